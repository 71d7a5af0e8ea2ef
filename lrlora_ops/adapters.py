"""Adapters: what trains, shows, saves, exports and merges the adapters of a model."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lrlora_ops import _checkpoint
from lrlora_ops._export import export
from lrlora_ops._forgotten import FirstSteps
from lrlora_ops._metrics import metrics
from lrlora_ops._sharding import require_whole
from lrlora_ops._targets import unadapted_experts
from lrlora_ops.methods import Method, Policy
from lrlora_ops.modules._adapter import RankAdapter, replace_module, unique_tables
from lrlora_ops.modules._interface import CHILD
from lrlora_ops.rank_table import RankTable


class Adapters:
    """The adapters of one model and the policies over their ranks; made by ``apply_lora``.

    Attributes:
        model: The adapted model.
        modules: The adapters by name.
        tables: Their rank tables, each once, by the name of the first adapter that uses it.
        policies: What moves the ranks, one for each method.
    """

    model: nn.Module
    modules: dict[str, RankAdapter]
    tables: dict[str, RankTable]
    policies: list[Policy]

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, RankAdapter],
        methods: Sequence[tuple[Method, Sequence[str]]],
    ) -> None:
        self.model, self.modules = model, dict(modules)
        self.tables = unique_tables(self.modules)
        self.methods = [(method, list(names)) for method, names in methods]
        self.policies = [
            method.policy(unique_tables({name: self.modules[name] for name in names})) for method, names in self.methods
        ]
        self._shared = _shared_parameters(self.modules)
        for (_, parameter), names in self._shared.items():
            for name in names:  # transformers saves no model whose parameters are shared but for those named so
                vars(self.modules[name]).setdefault("_tied_weights_keys", {})[parameter] = parameter
        self._first_steps = FirstSteps(self)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters of the adapters alone.

        Raises:
            ValueError: Layers that shared a parameter have one each now.
        """
        self._require_shared()
        seen: set[int] = set()  # layers may share some
        for name, module in self.modules.items():
            for key, parameter in module.trained().items():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield f"{name}.{key}", parameter

    def _require_shared(self) -> None:
        """FSDP2 parts, without a word, what layers share that it divides one by one; each would learn its own."""
        for (_, parameter), names in self._shared.items() if self.modules else ():
            own = {id(self.modules[name].trained()[parameter]): name for name in names}
            if len(own) > 1:
                one, other = list(own.values())[:2]
                raise ValueError(
                    f"{one} and {other} had one and the same {parameter} and have two now, which fully_shard makes "
                    "of it if it divides layers one by one; divide all of them in one call, as fully_shard(model) "
                    "does, or give each its own from the start: SincUpdate(share='layer')"
                )

    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer trains. Give it no weight decay while ranks are learned."""
        return [parameter for _, parameter in self.named_parameters()]

    def step(self, loss: Tensor | None = None, *, loss_scale: float | Tensor = 1.0, skipped: bool = False) -> None:
        """Let the methods set the ranks; once per optimizer step, right before ``optimizer.step()`` or right after it.

        Averages the sensitivities and the loss over the default process group, adds up what was routed to experts, and
        clears these statistics.

        Args:
            loss: The loss of the step, a scalar; only ``LearnedRank(penalty=...)`` reads it.
            loss_scale: What the loss was multiplied by before backward, a number or a scalar tensor: a GradScaler's
                scale of this step. The statistics are divided by it.
            skipped: Whether a GradScaler skipped the optimizer's step, whose gradients overflowed. The statistics
                are dropped then, the ranks stay, and the step does not count.

        Raises:
            RuntimeError: A method does not know the length of the run.
            ValueError: A method lacks the loss, or the run is too short for it.
        """
        self._first_steps.on_step()
        if not skipped:
            self._let_methods_decide(loss, loss_scale)
        for table in self.tables.values():
            table.clear_statistics()

    def _let_methods_decide(self, loss: Tensor | None, loss_scale: float | Tensor) -> None:
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self._reduce_statistics()
            # A process may know a loss that no method asks for, and the others not: they would wait for each other.
            needed = any(policy.needs_loss for policy in self.policies)
            loss = _process_mean(loss.detach()) if needed and loss is not None else None
        for table in self.tables.values() if isinstance(loss_scale, Tensor) or loss_scale != 1.0 else ():
            table.sensitivity.div_(loss_scale)
        for policy in self.policies:
            policy.step(loss)

    def _reduce_statistics(self) -> None:
        """Over the processes, the mean of the sensitivities, as of any gradient, and the sum of what was routed."""
        tables, statistics = self.tables.values(), []
        for leaf in (leaf for table in tables for leaf in (table.gate, table.demand)):
            leaf.grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            statistics.append(leaf.grad)
        reduced = _process_mean(torch.cat([values.flatten() for values in statistics]))
        for values, mean in zip(statistics, reduced.split([values.numel() for values in statistics]), strict=True):
            values.copy_(mean.view_as(values))
        for table in tables:
            table.routed.mul_(dist.get_world_size())

    def ranks(self) -> dict[str, Tensor]:
        """int32 per adapter: its rank, ``[]``, or those of its experts, ``[E]``.

        While ranks are learned, what rounding them now would give. Of a ``SincUpdate``, which has no rank to speak of,
        the stable rank, fp32: of experts the mean of an expert's projections.
        """
        return {name: module.shown_rank().detach().clone() for name, module in self.modules.items()}

    def metrics(self) -> dict[str, float]:
        """What to log: mean, min, max and sum of the ranks, the budget if there is one, the mean of each kind of layer.

        Reads the ranks on the host, so call it when something is logged. The callback does it for a Trainer.

        Returns:
            ``lrlora/rank_mean``, ``rank_min``, ``rank_max`` and ``rank_sum`` over layers and experts,
            ``lrlora/budget``, ``lrlora/stable_rank_mean`` of what a ``SincUpdate`` learned, and
            ``lrlora/rank_mean/q_proj`` and so on if there are several kinds.
        """
        return metrics(self)

    def summary(self) -> str:
        """Print, and return, a line per projection and the totals: ranks, live parameters, memory held.

        The rank of experts is the sum of their ranks. Of a ``SincUpdate`` it is the stable rank, beside the rows of A
        and B as "max", and its coefficients are no rank's parameters: they are left out.
        """
        columns = "{:<48} {:>7} {:>7} {:>7} {:>5} {:>4} {:>12} {:>9}"
        lines = [columns.format("adapter", "experts", "in", "out", "rank", "max", "parameters", "KiB held")]
        totals: list[float] = [0, 0, 0.0]
        for name, module in self.modules.items():
            rank, experts = int(module.table.ranks.sum()), module.table.num_experts
            shown = module.shown_rank()
            for projection, pool in module.pools().items():
                width = pool.in_features + pool.out_features
                held = module.table.pool_size * width * pool.lora_A.element_size() / 1024
                totals = [total + new for total, new in zip(totals, (rank, rank * width, held), strict=True)]
                sizes = (experts, pool.in_features, pool.out_features)
                ranks = (f"{shown.sum():.1f}" if shown.is_floating_point() else rank, module.max_rank)
                full_name = f"{name}.{projection}" if projection else name
                lines.append(columns.format(full_name, *sizes, *ranks, f"{rank * width:,}", f"{held:,.1f}"))
        components, parameters, held = totals
        lines.append(
            columns.format(f"total of {len(lines) - 1}", "", "", "", components, "", f"{parameters:,}", f"{held:,.1f}")
        )
        lines += [f"not adapted: {name}, name it or 'experts' in targets" for name in unadapted_experts(self.model)]
        text = "\n".join(lines)
        print(text)
        return text

    def save(self, directory: str | PathLike[str]) -> None:
        """Write the adapters and all state of the methods to a directory, so that ``load`` continues bit for bit.

        The directory holds ``lrlora_state.json``, replaced last and atomically, and the safetensors file it names.

        Of several processes the first one writes, and the others may call it; they must where parameters are divided
        among them (FSDP2), to gather them. It can be loaded by any number of processes.

        Raises:
            OSError: The directory cannot be written; what it held before is still whole.
            ValueError: The adapters are merged.
        """
        _checkpoint.save(self, directory)

    def load(self, directory: str | PathLike[str]) -> None:
        """Restore what ``save`` wrote, into adapters made by the same ``apply_lora`` call.

        Raises:
            FileNotFoundError: There is no checkpoint.
            ValueError: It is damaged, of a newer version, or of other adapters or methods; nothing is changed then.
        """
        _checkpoint.load(self, directory)

    def state_dict(self) -> dict[str, Any]:
        """What ``save`` writes, tensors under "tensors": of the adapters by name, and of the methods.

        With it the adapters are a ``Stateful`` of ``torch.distributed.checkpoint``, which divides parameters anew if a
        run resumes on another number of processes. The adapters' tensors are theirs, not copies.

        Raises:
            ValueError: The adapters are merged.
        """
        return _checkpoint.state_of(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from ``state_dict()``.

        Raises:
            ValueError: It is of other adapters or methods, or contradicts itself; nothing is changed then.
        """
        _checkpoint.restore(self, state_dict)

    def compact(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Hold only the live components from now on, in memory and in the optimizer's state.

        For ranks that are final. Parameters keep their identity; their gradients are dropped.

        Args:
            optimizer: Its state of the adapters' parameters is cut to the same rows.

        Raises:
            RuntimeError: A method still changes ranks.
            ValueError: Parameters are divided among processes.
        """
        for policy, (method, _) in zip(self.policies, self.methods, strict=True):
            if not policy.frozen:
                raise RuntimeError(f"{type(method).__name__} still changes ranks; compact after its freeze")
        require_whole(self.parameters(), "compaction")
        for table in self.tables.values():
            held, rows = table.pool_size, table.compact()
            for module in self.modules.values():
                for pool in module.pools().values() if module.table is table else ():
                    pool.hold(rows, len(rows))
                    if optimizer is not None:
                        _keep_rows(optimizer, [pool.lora_A, pool.lora_B], rows, held)

    def merge(self) -> nn.Module:
        """Put the updates into the base weights, each checked against its adapter's forward.

        Holds a second copy of the adapted weights while it works; afterwards these adapters hold no module.

        Returns:
            The model, plain again, its parameters frozen as ``apply_lora`` left them.

        Raises:
            ValueError, RuntimeError: A layer cannot be merged; the model keeps all its adapters then.
        """
        require_whole(self.model.parameters(), "merging")
        merged: dict[str, nn.Module] = {}
        for name, module in self.modules.items():
            try:
                merged[name] = module.merge_into(self.model.get_submodule(name))
            except (ValueError, RuntimeError) as error:
                raise type(error)(f"{name}: {error}") from error
        uses = Counter(id(p) for owner in self.model.modules() for p in owner._parameters.values() if p is not None)
        for name, module in self.modules.items():
            weight = getattr(module, "weight", None)
            if weight is not None and uses[id(weight)] > 1:
                warnings.warn(
                    f"{name} shared its weight with a layer that keeps the old one; tell the model's config before "
                    "saving it (tie_word_embeddings=False), or loading ties them again",
                    stacklevel=2,
                )
            replace_module(self.model, self.model.get_submodule(name), merged[name])
        self.modules, self.tables = {}, {}
        return self.model

    def unadapted(self) -> nn.Module:
        """A copy of the model without the adapters, whose parameters and buffers are the model's own.

        Raises:
            ValueError: An adapter is no other layer's.
        """
        shared = {id(tensor): tensor for tensor in (*self.model.parameters(), *self.model.buffers())}
        model = copy.deepcopy(self.model, shared)
        for name in self.modules:
            host = model.get_submodule(name)
            adapter: Any = host if isinstance(host, RankAdapter) else getattr(host, CHILD)
            replace_module(model, host, adapter.plain(host))
        return model

    def export(self, directory: str | PathLike[str], format: str = "peft") -> float:
        """Write the adapters for another library, at their ranks of now; read it back, compare, print the difference.

        Args:
            directory: New or empty; it appears whole, or not at all.
            format: "peft": a LoRA checkpoint for ``PeftModel.from_pretrained``, experts padded to the largest of their
                ranks, adapters of rank 0 left out; needs PEFT. "vllm", "sglang": a LoRA checkpoint with the names and
                ranks that the server wants, for the model families that it is known to adapt. "merged": a plain
                checkpoint of the whole model for ``from_pretrained``, the updates in its weights, written and read
                without a second copy of the model; needs transformers and accelerate.

        Returns:
            The largest difference between the outputs of a layer, as exported and as adapted here, on random inputs,
            relative to their norm.

        Raises:
            FileExistsError: The directory holds something.
            ImportError: The format's library is not installed.
            RuntimeError: What was written computes something else; it is deleted.
            ValueError: The format is unknown, an adapter has no counterpart in it, or the adapters are merged.
        """
        require_whole(self.model.parameters(), "an export")
        return export(self, directory, format)

    def callback(self, history: bool = True) -> Any:
        """All that a Hugging Face Trainer, or TRL's, needs: it steps the methods, tells them the run's length, logs
        the ranks, and saves into and resumes from the trainer's checkpoints.

        Args:
            history: Whether to write ``history.jsonl``, which ``lrlora report`` draws, into the trainer's output
                directory.

        Raises:
            ImportError: transformers is not installed.
        """
        from lrlora_ops.integrations.transformers import AdaptersCallback

        return AdaptersCallback(self, history)


def _shared_parameters(modules: Mapping[str, RankAdapter]) -> dict[tuple[int, str], list[str]]:
    """The adapters that have a parameter in common, by its identity and name."""
    owners: dict[tuple[int, str], list[str]] = {}
    for name, module in modules.items():
        for key, parameter in module.trained().items():
            owners.setdefault((id(parameter), key), []).append(name)
    return {key: names for key, names in owners.items() if len(names) > 1}


def _keep_rows(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], rows: Tensor, held: int) -> None:
    """Of the optimizer's state of these parameters, the rows that they keep of the ``held`` ones."""
    for parameter in parameters:
        state = optimizer.state.get(parameter, {})
        for key, value in state.items():
            if isinstance(value, Tensor) and value.dim() == 2 and value.shape[0] == held:
                state[key] = value[rows]


def _process_mean(x: Tensor) -> Tensor:
    mean = x / dist.get_world_size()
    dist.all_reduce(mean)
    return mean
