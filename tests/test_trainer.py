"""The Hugging Face Trainer drives the ranks through ``adapters.callback()`` and nothing else."""

import pytest
import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from lrlora_ops import LearnedRank, apply_lora


class Tokens(Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        ids = torch.randint(0, 50, (12,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def tiny_llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, num_key_value_heads=2, initializer_range=0.3, **sizes))


@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_callback_steps_once_per_optimizer_step(accumulation, tmp_path):
    model = tiny_llama()
    adapters = apply_lora(model, LearnedRank(mean_rank=3, max_rank=8), targets="all-linear")
    steps = []
    step = adapters.policies[0].step
    adapters.policies[0].step = lambda loss=None: (steps.append(adapters.policies[0].total_steps), step(loss))
    arguments = TrainingArguments(
        tmp_path,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation,
        max_steps=10,
        learning_rate=5e-3,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    before = {name: parameter.clone() for name, parameter in adapters.named_parameters()}
    Trainer(model, arguments, train_dataset=Tokens(), callbacks=[adapters.callback()]).train()

    assert steps == [10] * 10  # the trainer told the length of the run
    assert adapters.policies[0].frozen
    assert sum(map(int, adapters.ranks().values())) == 3 * len(adapters.modules)
    assert any(not torch.equal(parameter, before[name]) for name, parameter in adapters.named_parameters())
    assert all(not parameter.requires_grad for name, parameter in model.named_parameters() if "lora_" not in name)
