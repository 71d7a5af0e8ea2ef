"""The GPU targets of the report, with the limits of one multiprocessor, and the occupancy that follows."""

from dataclasses import dataclass

from triton.backends.compiler import GPUTarget


@dataclass(frozen=True)
class Target:
    """One architecture; sizes in bytes. A "block" is one Triton program.

    NVIDIA: CUDA C++ Programming Guide, "Compute Capabilities", technical specifications per compute capability.
    AMD: CDNA 3 instruction set reference and LLVM's AMDGPU guide; a multiprocessor is a compute unit of four SIMDs.
    """

    name: str
    gpu: GPUTarget
    max_block_shared: int
    shared: int
    reserved_shared: int  # per block
    max_warps: int
    max_blocks: int
    registers: int  # 32-bit, per lane, over all resident warps
    register_granule: int

    def blocks_per_multiprocessor(self, registers: int, shared: int, num_warps: int) -> int:
        """Programs that fit on one multiprocessor at once."""
        granule = self.register_granule
        allocated = max(granule, -(-registers // granule) * granule)
        warps_by_registers = self.registers // allocated // 4 * 4  # four schedulers (SIMDs) share them evenly
        warps_by_registers = min(warps_by_registers, self.max_warps)
        by_shared = self.shared // max(shared + self.reserved_shared, 1)
        return min(warps_by_registers // num_warps, by_shared, self.max_blocks)


def _cuda(arch: int, max_block_shared: int, shared: int) -> Target:
    return Target(
        name=f"sm_{arch}",
        gpu=GPUTarget("cuda", arch, 32),
        max_block_shared=max_block_shared << 10,
        shared=shared << 10,
        reserved_shared=1 << 10,
        max_warps=64,
        max_blocks=32,
        registers=65536 // 32,
        register_granule=8,
    )


_GFX942 = Target(
    name="gfx942",
    gpu=GPUTarget("hip", "gfx942", 64),
    max_block_shared=64 << 10,
    shared=64 << 10,
    reserved_shared=0,
    max_warps=32,
    max_blocks=32,
    registers=4 * 512,
    register_granule=8,
)
TARGETS = {target.name: target for target in (_cuda(80, 163, 164), _cuda(90, 227, 228), _cuda(100, 227, 228), _GFX942)}
