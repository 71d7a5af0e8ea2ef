"""The matrix shapes that are benchmarked and reported on: the projections of real models, with the ranks."""

from dataclasses import dataclass

RANKS = (4, 8, 16, 32, 64, 128)


@dataclass(frozen=True)
class Shape:
    """A linear layer ``[K] -> [N]`` applied to M rows (tokens)."""

    model: str
    projection: str
    M: int
    K: int
    N: int

    def __str__(self) -> str:
        return f"{self.model} {self.projection} {self.M}x{self.K}x{self.N}"


def _projections(model: str, rows: int, hidden: int, key_value: int, intermediate: int) -> list[Shape]:
    """The distinct shapes of a decoder layer: q and o, k and v, gate and up, down."""
    return [
        Shape(model, "q_proj", rows, hidden, hidden),
        Shape(model, "k_proj", rows, hidden, key_value),
        Shape(model, "up_proj", rows, hidden, intermediate),
        Shape(model, "down_proj", rows, intermediate, hidden),
    ]


# Sizes of Llama 3.2 1B, Llama 3.1 8B and Llama 3.1 70B, from their config.json.
GPU_SHAPES = [
    *_projections("1B", 8192, 2048, 512, 8192),
    *_projections("8B", 8192, 4096, 1024, 14336),
    *_projections("70B", 8192, 8192, 1024, 28672),
]
# The dense table of KERNELS.md: long batches of the 8B model.
LONG_SHAPES = [
    Shape("8B", "q_proj", 8192, 4096, 4096),
    Shape("8B", "up_proj", 16384, 4096, 14336),
    Shape("8B", "down_proj", 16384, 14336, 4096),
    Shape("8B", "q_proj", 32768, 4096, 4096),
]
# What a CPU gets through in a benchmark's time.
CPU_SHAPES = [
    Shape("1B", "q_proj", 2048, 2048, 2048),
    Shape("8B", "q_proj", 1024, 4096, 4096),
    Shape("1B", "up_proj", 1024, 2048, 8192),
]


@dataclass(frozen=True)
class ExpertsShape:
    """The experts of a Mixture-of-Experts layer, gated MLPs ``H -> 2 I -> H``, for T tokens of ``top_k`` rows each."""

    model: str
    T: int
    num_experts: int
    top_k: int
    hidden: int
    intermediate: int

    def __str__(self) -> str:
        sizes = f"{self.num_experts}e top{self.top_k} {self.hidden}/{self.intermediate}"
        return f"{self.model} {self.T} tokens {sizes}"

    @property
    def rows(self) -> int:
        """Rows that experts work on, L."""
        return self.T * self.top_k


def olmoe(tokens: int) -> ExpertsShape:
    """OLMoE-1B-7B, from its config.json."""
    return ExpertsShape("OLMoE", tokens, 64, 8, 2048, 1024)


def qwen3(tokens: int) -> ExpertsShape:
    """Qwen3-30B-A3B, from its config.json."""
    return ExpertsShape("Qwen3", tokens, 128, 8, 2048, 768)


def mixtral(tokens: int) -> ExpertsShape:
    """Mixtral-8x7B, from its config.json."""
    return ExpertsShape("Mixtral", tokens, 8, 2, 4096, 14336)


@dataclass(frozen=True)
class ProjectionShape:
    """One projection ``[K] -> [N]`` of all experts, for L rows in all."""

    rows: int
    num_experts: int
    K: int
    N: int

    def __str__(self) -> str:
        return f"experts {self.rows} rows {self.num_experts}e {self.K}x{self.N}"
