"""Stock LoRA checkpoints of the installed PEFT, with the logits that PEFT gives: ``python -m tests.peft_checkpoints``.

Those of its older versions lie in ``tests/data/peft`` and stay as they are; a new layout of PEFT deserves another run,
``pip install peft==...`` first.
"""

from __future__ import annotations

from pathlib import Path

import peft
import torch
from safetensors.torch import save_file
from torch import nn

from tests._moe import ids, output, tiny

FOLDER = Path(__file__).parent / "data" / "peft"
# Two layouts of an expert's weight; in the first one gate_up_proj is square, so that no shape tells what lora_A is of.
FAMILIES = ("qwen3_moe", "gpt_oss")


def base(name: str) -> nn.Module:
    """One layer, with weights that no version of transformers decides."""
    model, generator = tiny(name, num_hidden_layers=1), torch.Generator().manual_seed(7)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            parameter.normal_(0, 0.3, generator=generator)
    return model


def write(name: str) -> Path:
    """One checkpoint, on attention with another rank and alpha than on the experts, rank-stabilised."""
    folder = FOLDER / f"{peft.__version__}-{name}"
    config = peft.LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=["q_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        rank_pattern={"o_proj": 3},
        alpha_pattern={"q_proj": 7},
        use_rslora=True,
    )
    model = peft.get_peft_model(base(name), config)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for key, parameter in sorted(model.named_parameters()):
            if "lora_" in key:
                parameter.normal_(0, 0.3, generator=generator)
        logits = output(model.eval(), ids(1))
    model.save_pretrained(folder)
    save_file({"logits": logits}, folder / "logits.safetensors")
    (folder / "README.md").unlink(missing_ok=True)
    return folder


if __name__ == "__main__":
    for family in FAMILIES:
        print(write(family))
