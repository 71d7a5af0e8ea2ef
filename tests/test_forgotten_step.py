"""A loop that never calls ``adapters.step()``, or passes adapters by, is told so once; no other hears anything."""

from __future__ import annotations

import gc
import warnings
import weakref

import pytest
import torch
from torch.optim import optimizer as torch_optimizer

from lrlora_ops import Adapters, FixedRank, LearnedRank, apply_lora
from tests._models import ALL, IDS, Model

LEARNED = LearnedRank(2, 4, total_steps=5)


def start(method=LEARNED) -> tuple[Model, Adapters]:
    model = Model()
    return model, apply_lora(model, method, ALL)


def loop(model: Model, optimizers: list[torch.optim.Optimizer], steps: int, micro: int = 1) -> None:
    for _ in range(steps):
        for _ in range(micro):
            model(IDS).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def test_warned_once_with_the_line_to_add():
    """At the second step of the optimizer, not at the second micro-batch, and at the loop's own line."""
    model, adapters = start()
    optimizer = torch.optim.SGD(adapters.parameters(), 1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loop(model, [optimizer], 1, micro=4)
    with pytest.warns(UserWarning, match=r"add the line 'adapters.step\(\)' before 'optimizer.step\(\)'") as caught:
        loop(model, [optimizer], 5)
    assert len(caught) == 1 and caught[0].filename == __file__


def test_ranks_that_never_change_need_no_step():
    model, adapters = start(FixedRank(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loop(model, [torch.optim.SGD(adapters.parameters(), 1e-3)], 4)


def test_a_step_after_the_optimizers_is_a_step():
    """Two of them: one for lora_A and one for lora_B."""
    model, adapters = start()
    optimizers = [torch.optim.SGD(adapters.parameters()[index::2], 1e-3) for index in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            loop(model, optimizers, 1)
            adapters.step()


def test_other_optimizers_do_not_count():
    """They move something else, or the adapters of another model."""
    _model, _ = start()
    other, others = start(FixedRank(2))
    router = torch.nn.Parameter(torch.zeros(2))
    optimizers = [torch.optim.SGD(others.parameters(), 1e-3), torch.optim.SGD([router], 1e-3)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loop(other, optimizers, 4)


def test_nothing_stays_behind():
    """The hook goes with the first step, or with the adapters."""
    hooks = torch_optimizer._global_optimizer_post_hooks
    gc.collect()
    before = len(hooks)
    model, adapters = start()
    assert len(hooks) == before + 1
    adapters.step()
    assert len(hooks) == before
    model, adapters = start()
    gone = weakref.ref(adapters)
    del model, adapters
    gc.collect()
    assert gone() is None and len(hooks) == before


def test_adapters_that_the_loop_passes_by():
    """As a trainer that multiplies by ``lm_head.weight`` itself; frozen ones are somebody's intention."""
    model = Model()
    adapters = apply_lora(model, LEARNED, [*ALL, "lm_head"])
    frozen = adapters.modules["layers.1.q_proj"]
    frozen.requires_grad_(False)
    x = model.embed(IDS)
    for layer in model.layers:
        x = layer(x)
    (x @ model.lm_head.weight.t()).square().mean().backward()
    with pytest.warns(UserWarning, match=r"^lm_head got no gradient in the first step") as caught:
        adapters.step()
        adapters.step()
    assert len(caught) == 1 and caught[0].filename == __file__


def test_a_loop_that_cleared_its_gradients_hears_nothing():
    """Nothing can be said of them then."""
    model, adapters = start()
    model(IDS).square().mean().backward()
    for parameter in adapters.parameters():
        parameter.grad = None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapters.step()
