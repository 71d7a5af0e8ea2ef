"""Linear layers whose weight another module reads: an adapter there is left out, warned of or refused."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrlora_ops import FixedRank, apply_lora


class Reader(nn.Module):
    """Calls three layers, reads two, one of them in both ways, and asks for a dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read, self.both, self.asked = (nn.Linear(4, 4) for _ in range(4))
        self.inner = nn.ModuleDict({"deep": nn.Linear(4, 4)})
        self.reset()

    def reset(self) -> None:
        """No part of forward."""
        nn.init.normal_(self.called.weight)

    def forward(self, x: Tensor, fused: bool = True) -> Tensor:
        x = self.called(x).to(self.asked.weight.dtype)
        if isinstance(self.asked.weight, Tensor) and self.asked.weight is not None:
            x = self.asked(x)
        return self.fast(x) if fused else self.both(x)

    def fast(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.read.weight, self.read.bias)
        return F.linear(x @ self.inner.deep.weight, self.both.weight)


class Inherits(Reader):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class Overrides(Reader):
    """Its forward calls them all."""

    def forward(self, x: Tensor) -> Tensor:
        return self.inner["deep"](self.asked(self.both(self.read(self.called(x)))))


BOTH = "Reader|Inherits reads their weight without calling the layer, which passes an adapter by"


@pytest.mark.parametrize("reader", [Reader, Inherits])
def test_all_linear_leaves_them_out(reader):
    """And says so of the one for which an adapter may work."""
    with pytest.warns(UserWarning, match=f"'all-linear' leaves out 1.both, name them .*: on some paths {BOTH}"):
        adapters = apply_lora(nn.Sequential(nn.Linear(4, 4), reader()), FixedRank(2), "all-linear")
    assert sorted(adapters.modules) == ["0", "1.asked", "1.called"]


def test_what_another_forward_reads_does_not_matter():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapters = apply_lora(nn.Sequential(Overrides()), FixedRank(2), "all-linear")
    assert len(adapters.modules) == 5


def test_one_that_is_called_on_some_paths_can_be_named():
    """The warning is right: one path heeds the adapter, the other does not."""
    model = nn.Sequential(Reader())
    x = torch.randn(3, 4)
    plain = [model[0](x, fused) for fused in (True, False)]
    with pytest.warns(
        UserWarning, match=f"target 'both' matches 0.both, leave them out unless .*: on some paths {BOTH}"
    ):
        adapters = apply_lora(model, FixedRank(2), "both")
    nn.init.normal_(model[0].both.lora_B)
    assert list(adapters.modules) == ["0.both"]
    changed = [not torch.equal(model[0](x, fused), before) for fused, before in zip((True, False), plain, strict=True)]
    assert changed == [False, True]


@pytest.mark.filterwarnings("ignore:target '0")
@pytest.mark.parametrize("target", ["read", "deep", "0.*"])
def test_one_that_is_only_read_is_refused(target):
    with pytest.raises(ValueError, match=r"whose weight Reader reads without calling the layer.* would do nothing"):
        apply_lora(nn.Sequential(Reader()), FixedRank(2), target)


MAMBA = {"vocab_size": 40, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "pad_token_id": 0}
HEADS = {"num_heads": 8, "head_dim": 4, "n_groups": 1, "chunk_size": 4}


def mamba(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    if name == "nemotron_h":
        from tests._moe import tiny

        return tiny(name)
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **MAMBA, **(HEADS if name == "mamba2" else {}))
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("name", "reader", "left_out", "only_read"),
    [
        ("nemotron_h", "NemotronHMamba2Mixer", {"out_proj"}, set()),
        ("mamba2", "Mamba2Mixer", {"out_proj"}, set()),
        ("mamba", "MambaMixer", {"out_proj", "x_proj", "dt_proj"}, {"dt_proj"}),
        ("falcon_mamba", "FalconMambaMixer", {"out_proj", "x_proj", "dt_proj"}, set()),
    ],
)
def test_mixers_of_mamba(name, reader, left_out, only_read):
    """Their kernels, where installed, take these weights; every adapter that all-linear gives them trains."""
    model = mamba(name)
    mixers = {n for n, m in model.named_modules() if type(m).__name__ == reader}
    own = {f"{mixer}.{child}" for mixer in mixers for child, m in model.get_submodule(mixer).named_children()}
    linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    for child in left_out:
        named = mamba(name)
        if child in only_read:
            with pytest.raises(ValueError, match=rf"mixer.{child}, whose weight {reader} reads without calling"):
                apply_lora(named, FixedRank(2), f"mixer.{child}")
        else:
            with pytest.warns(UserWarning, match=rf"mixer.{child}.* on some paths {reader} reads their weight"):
                assert len(apply_lora(named, FixedRank(2), f"mixer.{child}").modules) == len(mixers)
    with pytest.warns(UserWarning, match=rf"all-linear' leaves out .*{reader} reads their weight"):
        adapters = apply_lora(model, FixedRank(2), "all-linear")
    assert linear & own - set(adapters.modules) == {f"{mixer}.{child}" for mixer in mixers for child in left_out}
    ids = torch.randint(3, 40, (2, 6), generator=torch.Generator().manual_seed(0))
    for module in adapters.modules.values():
        nn.init.normal_(module.lora_B)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad.any() for parameter in adapters.parameters())
