"""lrlora doctor and lrlora env: exit codes, what they print, and what they keep to themselves."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("typer")
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from lrlora_ops import FixedRank, LearnedRank, apply_lora
from lrlora_ops.cli import app
from lrlora_ops.finetune import bandwidth, environment
from lrlora_ops.finetune.tokens import train_tokenizer
from tests._cli import TEXT, assert_one_line, llama, qwen3_moe


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Two models, the adapters of a run, adapters without ranks, and a model with a NaN."""
    directory = tmp_path_factory.mktemp("inputs")
    tokenizer = train_tokenizer([TEXT], 300)
    ill = llama()
    ill.model.layers[1].mlp.up_proj.weight.data[3, 4] = torch.nan
    for name, model in (("llama", llama()), ("qwen3_moe", qwen3_moe()), ("ill", ill)):
        model.save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)
    apply_lora(llama(), LearnedRank(2, 4), ["q_proj", "mlp.*"]).save(directory / "run")
    apply_lora(llama(), FixedRank(0), "q_proj").save(directory / "empty-run")
    return directory


def doctor(directory, *options):
    return CliRunner().invoke(app, ["doctor", *map(str, [directory, *options]), "--device", "cpu"])


@pytest.mark.parametrize(
    "name, options, adapters",
    [
        ("llama", [], 14),
        ("llama", ["--method", "learned", "--targets", "q_proj", "--targets", "mlp.*"], 8),
        ("llama", ["--method", "sinc", "--targets", "q_proj"], 2),
        ("qwen3_moe", ["--method", "dynamic"], 2),
        ("run", ["--model", "llama"], 8),
    ],
)
def test_healthy(inputs, name, options, adapters):
    words = [inputs / word if word == "llama" else word for word in options]
    result = doctor(inputs / name, *words)
    assert result.exit_code == 0, (result.output, result.exception)
    assert "FAIL" not in result.output and result.output.count("PASS  ") == 7
    assert f"PASS  a merged layer computes what its adapter does: {adapters} adapters\n" in result.output
    assert "backend: eager" in result.output and "model.embed_tokens" in result.output


def test_ill(inputs):
    """Exit code 1, the layer and the fix."""
    result = doctor(inputs / "ill")
    assert (
        "FAIL  all values are finite: model.layers.1.mlp.up_proj.weight: NaN or infinity in the weights\n"
        in result.output
    )
    assert "      fix: load the weights again" in result.output
    assert_one_line(result, r"\d of 7 checks failed, see FAIL and fix above", code=1)


def test_a_run_whose_ranks_are_0(inputs):
    result = doctor(inputs / "empty-run", "--model", inputs / "llama")
    assert "FAIL  there are ranks: all 2 adapters have rank 0, so nothing trains\n" in result.output
    assert result.exit_code == 1


def test_a_model_whose_output_is_detached(inputs, monkeypatch):
    forward = LlamaForCausalLM.forward

    def detached(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output["logits"] = output["logits"].detach()
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", detached)
    result = doctor(inputs / "llama")
    assert result.exit_code == 1
    assert "and 11 more: called, but no gradient comes back\n" in result.output


def test_env(monkeypatch, tmp_path):
    """Versions and settings; no path, no token, no name of a user."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,2")
    result = CliRunner().invoke(app, ["env"])
    assert result.exit_code == 0
    facts = dict(line.split(maxsplit=1) for line in result.output.splitlines())
    assert facts["torch"] == torch.__version__
    assert facts["CUDA_VISIBLE_DEVICES"] == "1,2"
    assert facts["TRITON_CACHE_DIR"] == "(a path)"
    assert "eager" in facts["backend"]
    for secret in ("hf_secret", "HF_TOKEN", str(tmp_path), "/"):
        assert secret not in result.output


@pytest.mark.parametrize("value, text", [("1", "1"), ("/home/me/x", "(a path)"), ("C:\\me", "(a path)")])
def test_a_path_is_not_shown(value, text):
    assert environment.shown(value) == text


@pytest.mark.parametrize(
    "name, rate, passed, words",
    [
        ("NVIDIA H200", 4.3e12, True, "NVIDIA H200 copies 4.30 TB/s, 90% of the datasheet's 4.80"),
        ("NVIDIA H200", 2.4e12, False, "50% of the datasheet's 4.80"),
        ("Abacus 3000", 1e9, True, "the datasheet of this GPU is not in the table"),
    ],
)
def test_bandwidth_beside_the_datasheet(name, rate, passed, words):
    found, text = bandwidth.judged(name, rate)
    assert found == passed and words in text


@pytest.mark.gpu
def test_copy_bandwidth_is_a_gpu_s():
    assert 1e11 < bandwidth.copy_bandwidth(torch.device("cuda")) < 1e14
