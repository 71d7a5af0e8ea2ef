"""apply_lora puts adapters into a model; Adapters trains, shows, saves and merges them."""

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
from lrlora_ops._targets import call_every_layer, choose_methods, find_targets, replace_module
from lrlora_ops.methods import Method, Policy
from lrlora_ops.modules import VariableRankLoRALinear


def apply_lora(
    model: nn.Module,
    method: Method | Mapping[str, Method],
    targets: str | Sequence[str] | None = None,
    *,
    lora_alpha: float | None = None,
    dropout: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Adapters:
    """Give layers of a model an adapter each, in place, and a method that rules their ranks.

    Args:
        model: Any ``nn.Module``. With ``targets`` all its parameters are frozen but the adapters'.
        method: ``FixedRank``, ``LearnedRank``, ...; or patterns and the method of each, first match wins.
        targets: "all-linear" (every ``nn.Linear`` but the output embeddings), a name or glob such as ``q_proj``
            or ``model.layers.*.mlp.*`` (matched against the whole name or its end from a dot on), or several.
            None adopts the ``VariableRankLoRALinear`` modules that the model already has, sets their rank to the
            method's, and freezes nothing; if it has none and ``method`` is a mapping, its patterns are the targets.
        lora_alpha: Of new adapters; default ``2 * max_rank``.
        dropout: Of new adapters.
        dtype: Of the new adapters' parameters; default fp32.

    Returns:
        The handle for training, saving and merging.

    Raises:
        ValueError: A target matches nothing, or a setting does not fit; the model is unchanged then.
    """
    if targets is None and isinstance(method, Mapping) and not _has_adapters(model):
        targets = list(method)
    found = find_targets(model, targets)
    served = choose_methods(list(found), method)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        modules = {
            name: _adapter(name, found[name], chosen, lora_alpha=lora_alpha, dropout=dropout, dtype=dtype)
            for chosen, names in served
            for name in names
        }
        for chosen, names in served:  # on copies: it may raise, and it may set ranks
            chosen.policy({name: copy.deepcopy(modules[name].table) for name in names})
    except Exception:
        for parameter in trainable:
            parameter.requires_grad_()
        raise
    if targets is not None:
        model.requires_grad_(False)
        for name, module in modules.items():
            replace_module(model, found[name], module)
    for chosen, names in served:
        for name in names:
            modules[name].set_rank(chosen.initial_rank)
    call_every_layer(model)
    return Adapters(model, modules, served)


def _adapter(name: str, layer: nn.Module, method: Method, **options: Any) -> VariableRankLoRALinear:
    """The layer itself if it is an adapter, or a new one around it."""
    if not isinstance(layer, VariableRankLoRALinear):
        try:
            options |= {"max_rank": method.max_rank, "rank": method.initial_rank}
            return VariableRankLoRALinear.from_linear(layer, **options)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    if layer.max_rank < method.initial_rank:
        raise ValueError(
            f"{name} has max_rank {layer.max_rank}, but the method needs {method.initial_rank}; make the layer larger "
            "with resize, or lower the method's rank"
        )
    return layer


def _has_adapters(model: nn.Module) -> bool:
    return any(isinstance(module, VariableRankLoRALinear) for module in model.modules())


class Adapters:
    """The adapters of one model and the policies over their ranks; made by ``apply_lora``.

    Attributes:
        model: The adapted model.
        modules: The adapters by name.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, VariableRankLoRALinear],
        methods: Sequence[tuple[Method, Sequence[str]]],
    ) -> None:
        self.model, self.modules = model, dict(modules)
        self.methods = [(method, list(names)) for method, names in methods]
        self.policies: list[Policy] = [
            method.policy({name: self.modules[name].table for name in names}) for method, names in self.methods
        ]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters of the adapters alone."""
        for name, module in self.modules.items():
            yield f"{name}.lora_A", module.lora_A
            yield f"{name}.lora_B", module.lora_B

    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer trains. Give it no weight decay while ranks are learned."""
        return [parameter for _, parameter in self.named_parameters()]

    def step(self, loss: Tensor | None = None) -> None:
        """Let the methods set the ranks; once per optimizer step, after backward and clipping, before the optimizer.

        Averages the sensitivities and the loss over the default process group, and clears the sensitivities.

        Args:
            loss: The loss of the step, a scalar; only ``LearnedRank(penalty=...)`` reads it.
        """
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self._reduce_statistics()
            loss = None if loss is None else _process_mean(loss.detach())
        for policy in self.policies:
            policy.step(loss)
        for module in self.modules.values():
            module.table.clear_statistics()

    def _reduce_statistics(self) -> None:
        tables = [module.table for module in self.modules.values()]
        reduced = _process_mean(torch.cat([table.sensitivity.detach() for table in tables]))
        for table, sensitivity in zip(tables, reduced.split([t.pool_size for t in tables]), strict=True):
            if table.gate.grad is None:
                table.gate.grad = torch.empty_like(table.gate)
            table.gate.grad.copy_(sensitivity)

    def ranks(self) -> dict[str, Tensor]:
        """int32 ``[]`` per adapter: its rank. While ranks are learned, what rounding them now would give."""
        return {name: module.rank.detach().clone() for name, module in self.modules.items()}

    def summary(self) -> str:
        """Print, and return, a line per adapter and the totals: rank, live parameters, memory held."""
        lines = [f"{'adapter':<48} {'in':>7} {'out':>7} {'rank':>5} {'max':>4} {'parameters':>12} {'KiB held':>9}"]
        ranks = parameters = kib = 0.0
        for name, module in self.modules.items():
            rank, width = int(module.rank), module.in_features + module.out_features
            held = module.max_rank * width * module.lora_A.element_size() / 1024
            ranks, parameters, kib = ranks + rank, parameters + rank * width, kib + held
            lines.append(
                f"{name:<48} {module.in_features:>7} {module.out_features:>7} {rank:>5} {module.max_rank:>4} "
                f"{rank * width:>12,} {held:>9,.1f}"
            )
        total = f"total of {len(self.modules)}"
        lines.append(f"{total:<48} {'':>15} {ranks:>5.0f} {'':>4} {parameters:>12,.0f} {kib:>9,.1f}")
        text = "\n".join(lines)
        print(text)
        return text

    def save(self, directory: str | PathLike[str]) -> None:
        """Write the adapters and all state of the methods to a directory, so that ``load`` continues bit for bit.

        The directory holds ``lrlora_state.json``, replaced last and atomically, and the safetensors file it names.

        One process of a distributed run calls it.

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

    def compact(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Hold only the live components from now on, in memory and in the optimizer's state.

        For ranks that are final. Parameters keep their identity; their gradients are dropped.

        Args:
            optimizer: Its state of the adapters' parameters is cut to the same rows.

        Raises:
            RuntimeError: A method still changes ranks.
        """
        for policy, (method, _) in zip(self.policies, self.methods, strict=True):
            if not policy.frozen:
                raise RuntimeError(f"{type(method).__name__} still changes ranks; compact after its freeze")
        for module in self.modules.values():
            rank, held = int(module.rank), module.max_rank
            module.resize(rank)
            for parameter in (module.lora_A, module.lora_B):
                state = {} if optimizer is None else optimizer.state.get(parameter, {})
                for key, value in state.items():
                    if isinstance(value, Tensor) and value.dim() == 2 and value.shape[0] == held:
                        state[key] = value[:rank].clone()

    def merge(self) -> nn.Module:
        """Put the updates into the base weights, each checked against its adapter's forward.

        Holds a second copy of the adapted weights while it works; afterwards these adapters hold no module.

        Returns:
            The model, plain again, its parameters frozen as ``apply_lora`` left them.

        Raises:
            ValueError, RuntimeError: A layer cannot be merged; the model keeps all its adapters then.
        """
        merged: dict[str, nn.Module] = {}
        for name, module in self.modules.items():
            try:
                merged[name] = module.merge()
            except (ValueError, RuntimeError) as error:
                raise type(error)(f"{name}: {error}") from error
        uses = Counter(id(p) for owner in self.model.modules() for p in owner._parameters.values() if p is not None)
        for name, module in self.modules.items():
            if uses[id(module.weight)] > 1:
                warnings.warn(
                    f"{name} shared its weight with a layer that keeps the old one; tell the model's config before "
                    "saving it (tie_word_embeddings=False), or loading ties them again",
                    stacklevel=2,
                )
            replace_module(self.model, module, merged[name])
        self.modules = {}
        return self.model

    def callback(self) -> Any:
        """A ``transformers.TrainerCallback`` that calls ``step`` at the right moment and tells the run's length.

        Raises:
            ImportError: transformers is not installed.
        """
        from lrlora_ops.integrations.transformers import AdaptersCallback

        return AdaptersCallback(self)


def _process_mean(x: Tensor) -> Tensor:
    mean = x / dist.get_world_size()
    dist.all_reduce(mean)
    return mean
