"""The formats of vLLM and SGLang: their loaders' rules, in code, accept what is written and get the trained update."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from safetensors.torch import load_file

from lrlora_ops import Adapters, FixedRank, VariableRankLoRAExperts, apply_lora
from lrlora_ops.integrations import sglang_export, vllm_export
from lrlora_ops.modules._adapter import RankAdapter
from tests import _sglang, _vllm
from tests._models import Model
from tests._moe import MODELS, adapted, tiny

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
DENSE = ("llama", "qwen3", "gemma2", "phi3")
# Where a server takes no adapter; all other linear layers of the model get one.
REFUSED = {
    "vllm": {"deepseek_v2": ["kv_b_proj"], "deepseek_v3": ["kv_b_proj"]},
    "sglang": {
        "qwen2_moe": ["shared_expert_gate"],
        "nemotron_h": ["mixer.in_proj", "shared_experts.up_proj"],
    },
}
UNSERVED = {
    "vllm": {"hunyuan_v1_moe", "aria_text", "muse_spark_text", "openai_privacy_filter", "dots1", "flex_olmo"},
}
UNSERVED["sglang"] = UNSERVED["vllm"] | {"qwen3_next", "lfm2_moe", "ernie4_5_moe"}
SERVED = [(server, name) for server in UNSERVED for name in (*DENSE, *MODELS) if name not in UNSERVED[server]]


def test_every_family_is_served_or_named():
    for server, module in (("vllm", vllm_export), ("sglang", sglang_export)):
        assert {name for s, name in SERVED if s == server} <= set(module.FAMILIES)
        assert not UNSERVED[server] & set(module.FAMILIES)
    assert {name for server, name in SERVED if server == "vllm"} == set(_vllm.MODELS)
    assert {name for server, name in SERVED if server == "sglang"} == _sglang.SERVED


def of_many_ranks(name: str, server: str, **options: object) -> tuple[nn.Module, Adapters]:
    """The plain model, and adapters on all that the server takes: linear layers of rank 2, 1 and 0, experts of four
    ranks, and the experts of the last layer of rank 0 if another has some."""
    plain = tiny(name, **options)
    refused = tuple(REFUSED[server].get(name, ()))
    model = copy.deepcopy(plain)
    linear = apply_lora(copy.deepcopy(plain), FixedRank(1), "all-linear").modules
    experts = ["experts"] if name in MODELS else []
    adapters = adapted(model, [*experts, *(layer for layer in linear if not layer.endswith(refused or ("?",)))])
    of_experts = [module for module in adapters.modules.values() if isinstance(module, VariableRankLoRAExperts)]
    for module in of_experts[1:][-1:]:
        module.set_ranks([0] * 4)
    linear_modules = [module for module in adapters.modules.values() if module not in of_experts]
    for index, module in enumerate(linear_modules):
        module.set_rank((index + 1) % 3)
    return plain, adapters


def load(server: str, directory, plain: nn.Module) -> dict[str, torch.Tensor]:
    if server == "sglang":
        return _sglang.load(directory, plain)
    return _vllm.load(directory, plain, json.loads((directory / CONFIG).read_text())["r"])


def deltas(module: RankAdapter) -> dict[str, torch.Tensor]:
    """By projection the trained update ``[N, K]``, of experts ``[E, N, K]``; gate and up apart."""
    if not isinstance(module, VariableRankLoRAExperts):
        return {"": module.delta_weight()}
    first, second = module.projections
    stacked = {
        key: torch.stack([module.delta_weight(key, expert) for expert in range(module.table.num_experts)])
        for key in (first, second)
    }
    return {"up" if first == "up_proj" else "gate_up": stacked[first], "down": stacked[second]}


def expected_of_vllm(name: str, adapters: Adapters) -> dict[str, torch.Tensor]:
    family = _vllm.MODELS[name]
    expected = {}
    for layer, module in adapters.modules.items():
        for projection, delta in deltas(module).items():
            if not projection:
                for old, new in family.renames.items():
                    layer = layer.replace(old, new)
                expected[layer] = delta
                continue
            block = f"model.layers.{layer.split('.')[2]}.{family.block}"
            if projection == "gate_up" and not family.three_d:
                expected[f"{block}.gate"], expected[f"{block}.up"] = delta.chunk(2, 1)
            else:
                expected[f"{block}.{projection}"] = delta
    return expected


def expected_of_sglang(adapters: Adapters) -> dict[str, torch.Tensor]:
    expected: dict[str, torch.Tensor] = {}
    for layer, module in adapters.modules.items():
        index = layer.split(".")[2] if "layers" in layer else None
        for projection, delta in deltas(module).items():
            if projection:
                expected[f"{index}.{'down' if projection == 'down' else 'gate_up'}_proj_moe"] = delta
                continue
            leaf = layer.rpartition(".")[2]
            whole = _sglang.NORMALIZED.get(leaf, leaf)
            own = expected.setdefault(f"{index}.{whole}", [])
            own.append((_sglang.STACKED.get(whole, (leaf,)).index(leaf) if whole != leaf else 0, delta))
    for key, parts in expected.items():
        if isinstance(parts, list):
            expected[key] = torch.cat([delta for _, delta in sorted(parts, key=lambda part: part[0])])
    return expected


def assert_served(server: str, name: str, directory, plain: nn.Module, adapters: Adapters) -> None:
    served = load(server, directory, plain)
    expected = expected_of_vllm(name, adapters) if server == "vllm" else expected_of_sglang(adapters)
    assert set(served) <= set(expected)
    assert any(delta.norm() > 1 for delta in expected.values())
    for key, delta in expected.items():
        got = served.get(key, torch.zeros_like(delta))
        assert (got - delta).norm() <= 1e-5 * max(delta.norm(), 1), key


@pytest.mark.parametrize(("server", "name"), SERVED)
def test_the_server_gets_the_trained_update(server, name, tmp_path, capsys):
    plain, adapters = of_many_ranks(name, server)
    assert adapters.export(tmp_path / "adapter", format=server) < 1e-4
    assert f"{server}, read back" in capsys.readouterr().out
    assert_served(server, name, tmp_path / "adapter", plain, adapters)
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert config["r"] == config["lora_alpha"] and config["rank_pattern"] == config["alpha_pattern"]
    assert config["r"] == (6 if server == "sglang" else 8) or name in DENSE
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [CONFIG, TENSORS]


@pytest.mark.parametrize("server", ["vllm", "sglang"])
@pytest.mark.parametrize("name", ["qwen3", "mixtral"])
def test_tied_and_output_embeddings(server, name, tmp_path):
    plain = tiny(name, tie_word_embeddings=True)
    adapters = adapted(copy.deepcopy(plain), ["lm_head", "o_proj"])
    adapters.export(tmp_path / "adapter", format=server)
    assert_served(server, name, tmp_path / "adapter", plain, adapters)


@pytest.mark.parametrize("server", ["vllm", "sglang"])
@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("llama", ["k_proj", "up_proj"]),  # SGLang stacks them with q, v and gate
        ("llama", ["q_proj"]),
        ("deepseek_v3", ["kv_a_proj_with_mqa", "shared_experts.gate_proj"]),
        ("nemotron_h", ["experts", "v_proj"]),
    ],
)
def test_single_layers_of_those_that_a_server_stacks(server, name, targets, tmp_path):
    plain = tiny(name)
    adapters = adapted(copy.deepcopy(plain), targets)
    adapters.export(tmp_path / "adapter", format=server)
    tensors = load_file(tmp_path / "adapter" / TENSORS)
    with_zeros = [key for key, tensor in tensors.items() if not tensor.any() and ".experts." not in key]
    assert bool(with_zeros) == (server == "sglang")
    served = load(server, tmp_path / "adapter", plain)
    total = sum(d.norm() ** 2 for module in adapters.modules.values() for d in deltas(module).values())
    torch.testing.assert_close(sum(d.norm() ** 2 for d in served.values()), total)


def test_a_rank_for_each_layer(tmp_path):
    """Of vLLM each layer has the next rank that it accepts; SGLang's have the largest of all."""
    plain = tiny("llama")
    adapters = apply_lora(copy.deepcopy(plain), FixedRank(20), "all-linear")
    ranks = [1, 2, 8, 9, 16, 17, 20]
    for index, module in enumerate(adapters.modules.values()):
        nn.init.normal_(module.lora_B)
        module.set_rank(ranks[index % 7])
    for server in ("vllm", "sglang"):
        adapters.export(tmp_path / server, format=server)
        assert_served(server, "llama", tmp_path / server, plain, adapters)
        tensors = load_file(tmp_path / server / TENSORS)
        written = [len(tensors[f"base_model.model.{name}.lora_A.weight"]) for name in adapters.modules]
        assert written[:7] == ([1, 8, 8, 16, 16, 32, 32] if server == "vllm" else [20] * 7)
    config = json.loads((tmp_path / "vllm" / CONFIG).read_text())
    assert sorted(config["rank_pattern"].values()) == [1, 8, 16] and config["r"] == 32


def test_in_bf16(tmp_path):
    plain = tiny("qwen3_moe", torch.bfloat16)
    adapters = adapted(copy.deepcopy(plain), ["experts", "all-linear"])
    for server in ("vllm", "sglang"):
        assert adapters.export(tmp_path / server, format=server) < 0.02
        assert load(server, tmp_path / server, plain)


@pytest.mark.parametrize(
    ("server", "name"), [(server, name) for server in UNSERVED for name in sorted(UNSERVED[server])]
)
def test_unserved_families(server, name, tmp_path):
    adapters = adapted(tiny(name))
    with pytest.raises(ValueError, match=rf"not known to serve .* '{name}', only of llama.*format='merged'"):
        adapters.export(tmp_path / "adapter", format=server)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("server", "name"), [(server, name) for server in REFUSED for name in REFUSED[server]])
def test_layers_that_a_server_does_not_adapt(server, name, tmp_path):
    for layer in REFUSED[server][name]:
        adapters = adapted(tiny(name), [layer, "o_proj"])
        with pytest.raises(ValueError, match=rf"takes no adapter on .*{layer}.*format='merged'"):
            adapters.export(tmp_path / "adapter", format=server)
        for key, module in adapters.modules.items():
            if key.endswith(layer):
                module.set_rank(0)  # then nothing of it is written
        adapters.export(tmp_path / layer, format=server)


def test_other_models(tmp_path):
    adapters = apply_lora(Model(), FixedRank(2), "all-linear")
    with pytest.raises(ValueError, match="not known to serve adapters of model_type ''"):
        adapters.export(tmp_path / "adapter", format="vllm")
    headless = adapted(tiny("llama").model, ["o_proj"])  # names without "model."
    with pytest.raises(ValueError, match=r"takes no adapter on layers\.0\.self_attn\.o_proj"):
        headless.export(tmp_path / "adapter", format="vllm")
    latent = adapted(tiny("deepseek_v2", q_lora_rank=None), ["kv_a_proj_with_mqa"])
    with pytest.raises(ValueError, match="kv_a_proj_with_mqa beside which there is no q_a_proj"):
        latent.export(tmp_path / "adapter", format="sglang")


def test_mlps_beside_experts_have_no_buffers_in_sglang(tmp_path):
    plain = tiny("qwen3_moe", mlp_only_layers=[0])
    adapters = adapted(copy.deepcopy(plain), ["experts", "o_proj"])
    with pytest.raises(
        ValueError, match=r"cannot adapt model\.layers\.1\.mlp\.experts .* such as model\.layers\.0\.mlp"
    ):
        adapters.export(tmp_path / "adapter", format="sglang")
    adapters.modules["model.layers.1.mlp.experts"].set_ranks([0] * 4)
    adapters.export(tmp_path / "adapter", format="sglang")
    assert_served("sglang", "qwen3_moe", tmp_path / "adapter", plain, adapters)


@pytest.mark.parametrize("server", ["vllm", "sglang"])
def test_nothing_to_write(server, tmp_path):
    adapters = adapted(tiny("llama"), ["o_proj"])
    for module in adapters.modules.values():
        module.set_rank(0)
    with pytest.raises(ValueError, match="every adapter has rank 0"):
        adapters.export(tmp_path / "adapter", format=server)


def test_ranks_above_the_largest(tmp_path):
    adapters = apply_lora(tiny("llama"), FixedRank(513), ["layers.1.self_attn.o_proj"])
    nn.init.normal_(adapters.parameters()[1])
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.o_proj has rank 513, and vLLM .* up to 512; lower"):
        adapters.export(tmp_path / "adapter", format="vllm")
    adapters.export(tmp_path / "adapter", format="sglang")
