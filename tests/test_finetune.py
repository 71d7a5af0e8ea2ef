"""What fine-tuning from the command line is built of: measuring, batches, planning."""

import copy
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lrlora_ops import FixedRank, apply_lora
from lrlora_ops.finetune import speed
from lrlora_ops.finetune.errors import Diverged
from lrlora_ops.finetune.evaluate import bits_per_byte
from lrlora_ops.finetune.experiments import dense, growing_ranks, mixture_of_experts
from lrlora_ops.finetune.outcome import compare
from lrlora_ops.finetune.routing import routing_shares
from lrlora_ops.finetune.tokens import (
    EncodedExamples,
    EncodedText,
    batches,
    collate,
    encode,
    inputs_and_labels,
    sample,
    train_tokenizer,
)
from lrlora_ops.finetune.trainer import Recipe, batch_loss, train


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=300, initializer_range=0.3, **sizes)).eval()


@pytest.mark.parametrize(
    "length, seq_len, batch_size",
    [
        (16, 16, 4),  # one window
        (31, 16, 4),  # two windows without a rest
        (40, 16, 2),  # a shorter last window, padded in a batch
        (32, 16, 4),  # a last window of two tokens
        (10, 16, 4),  # less than a window
    ],
)
def test_bits_per_byte_predicts_every_token_but_the_first_once(model, length, seq_len, batch_size):
    tokens = torch.randint(300, (length,), generator=torch.Generator().manual_seed(0))
    nats = 0.0
    with torch.no_grad():
        for index in range(1, length):
            start = (index - 1) // (seq_len - 1) * (seq_len - 1)
            logits = model(input_ids=tokens[None, start:index]).logits[0, -1].double()
            nats -= torch.log_softmax(logits, 0)[tokens[index]].item()
    bits = bits_per_byte(model, EncodedText(tokens, 77), seq_len, batch_size)
    assert bits == pytest.approx(nats / math.log(2) / 77, rel=1e-5)
    assert not model.training


def test_encoding_is_lossless_and_puts_a_separator_before_each_document():
    tokenizer = train_tokenizer(["some text, some more text\n"] * 3, 300)
    documents = ["text älso ünseen ☃\n", "more"]
    text = encode(tokenizer, documents)
    assert tokenizer.decode(text.tokens) == "".join(tokenizer.eos_token + document for document in documents)
    assert text.num_bytes == len("".join(documents).encode())


def test_sample_is_a_fixed_part_of_the_documents():
    documents = [str(digit) * 10 for digit in range(10)]
    taken = sample(documents, 35)
    assert taken == sample(documents, 35)
    assert [len(part) for part in taken] == [10, 10, 10, 5]
    assert all(any(document.startswith(part) for document in documents) for part in taken)
    assert sorted(sample(documents, 1000)) == documents


def test_batches_repeat_with_their_seed_and_mix_the_texts():
    streams = [(torch.arange(100), 2), (torch.arange(1000, 1008), 1)]
    made = list(batches(streams, 8, 50, seed=1))
    assert all(torch.equal(a, b) for a, b in zip(made, batches(streams, 8, 50, seed=1), strict=True))
    assert not torch.equal(torch.stack(made), torch.stack(list(batches(streams, 8, 50, seed=2))))
    for batch in made:
        assert batch.shape == (3, 8)
        assert torch.equal(batch.diff(dim=1), torch.ones(3, 7, dtype=torch.int64))
        assert torch.equal(batch[2], streams[1][0])
    assert {int(batch[0, 0]) for batch in made} <= set(range(93))


def test_batches_of_examples_are_epochs_in_random_order():
    """Each example once before any comes again; padding at the end is neither read nor predicted."""
    examples = [torch.tensor([~(10 * i + 1), *range(10 * i, 10 * i + i + 1)]) for i in range(5)]
    made = list(batches([(examples, 2)], 99, 5, seed=1))
    assert all(torch.equal(a, b) for a, b in zip(made, batches([(examples, 2)], 99, 5, seed=1), strict=True))
    order = [int(~row[0]) // 10 for batch in made for row in batch]
    assert sorted(order[:5]) == sorted(order[5:]) == list(range(5)) and order[:5] != order[5:]
    for batch, first, second in zip(made, order[::2], order[1::2], strict=True):
        assert batch.shape == (2, max(first, second) + 2)
        input_ids, labels = inputs_and_labels(batch)
        for row, index in zip(range(2), (first, second), strict=True):
            tokens = list(range(10 * index, 11 * index + 1))
            assert input_ids[row, : index + 2].tolist() == [10 * index + 1, *tokens]
            assert labels[row].tolist() == [-100, *tokens] + [-100] * (batch.shape[1] - index - 2)


def test_of_examples_the_completions_alone_count(model):
    """For the loss and for the bits per byte; each example is read by itself, whatever is beside it in a batch."""
    rows = [torch.tensor([~7, ~8, 9, 10]), torch.tensor([~3, 4, ~5, ~6, 200, ~7, 17])]
    nats, predicted = 0.0, 0
    for row in rows:
        tokens = inputs_and_labels(row)[0]
        with torch.no_grad():
            logits = model(input_ids=tokens[None]).logits[0].double().log_softmax(-1)
        nats -= sum(float(logits[i - 1, tokens[i]]) for i in range(1, len(row)) if row[i] >= 0)
        predicted += int((row[1:] >= 0).sum())
    with torch.no_grad():
        loss = batch_loss(model, collate(rows))
    assert loss.item() == pytest.approx(nats / predicted, rel=1e-5)
    for batch_size in (1, 2):
        bits = bits_per_byte(model, EncodedExamples(rows, 13), 99, batch_size)
        assert bits == pytest.approx(nats / math.log(2) / 13, rel=1e-5)


@pytest.mark.parametrize(
    "available, steps",
    [
        (1000, (600, 400)),  # time enough: what is wanted, never more
        (10 + 60 + 40, (300, 200)),  # half the time for training: half of both
        (0, (10, 10)),  # none at all: still a run
    ],
)
def test_steps_fit_the_time(available, steps):
    costs = speed.Costs(pretraining=0.2, fine_tuning=0.2, measuring=10)
    assert costs.fit(600, 400, available) == steps
    assert costs.total(300, 200) == 110


def test_costs_scale_with_a_machine_that_got_slower():
    assert speed.Costs(1, 2, 3).scaled(2) == speed.Costs(2, 4, 6)


@pytest.mark.parametrize(
    "step, slowness, steps", [(1.0, 1.0, 100), (0.5, 0.5, 100), (3.0, 3.0, 31), (1000.0, 1000.0, 10)]
)
def test_pretraining_ends_early_on_a_slower_machine(monkeypatch, step, slowness, steps):
    """Predicted: 100 steps of 1 s, 100 of 2 s, 10 s of measuring, of 310 s. Three times slower, 31 % fit."""
    now = [50.0]
    monkeypatch.setattr(speed.time, "perf_counter", lambda: now[0])
    pace = speed.Pace(speed.Costs(1, 2, 10), (100, 100), deadline=50.0 + 310.0)
    for _ in pace.while_it_fits(range(100)):
        now[0] += step
    assert (pace.steps, pace.slowness) == (steps, pytest.approx(slowness))


@pytest.mark.parametrize("seconds, chosen", [({1: 1.0, 2: 0.6, 4: 0.7, 8: 0.1}, 2), ({1: 1.0, 2: 9.0}, 1)])
def test_threads_are_chosen_by_the_clock(monkeypatch, seconds, chosen):
    threads = torch.get_num_threads()
    monkeypatch.setattr(speed, "usable_cores", lambda: 8)
    monkeypatch.setattr(speed, "seconds_per_step", lambda *_: seconds[torch.get_num_threads()])
    try:
        timed = speed.choose_threads(torch.nn.Identity(), torch.zeros(1))
        assert torch.get_num_threads() == chosen
        assert max(timed) == 2 * chosen  # the first that did not help is the last that was tried
    finally:
        torch.set_num_threads(threads)


def test_a_loss_that_is_not_finite_stops_the_training(model):
    stream = batches([(torch.randint(300, (100,)), 2)], 8, 5, seed=0)
    with pytest.raises(Diverged, match="lower the learning rate"):
        train(model, stream, Recipe(steps=5, lr=math.inf), lambda loss: None)


def test_the_demos_models_are_as_large_as_documented():
    sizes = [AutoModelForCausalLM.from_config(e.config).num_parameters() for e in (dense(0), mixture_of_experts(0))]
    assert [round(size / 1e6, 1) for size in sizes] == [1.0, 2.8]


@pytest.mark.parametrize(
    "steps, growths",
    [(200, range(10, 71, 8)), (1000, range(50, 351, 40)), (100, range(5, 36, 4)), (10, range(1, 4))],
)
def test_growth_is_at_the_same_fractions_of_any_run(steps, growths):
    """Of 200 steps, the recipe's: every 8 from step 10 to 70. The steps at which ranks change are counted here."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(mixture_of_experts(0).config)
    adapters = apply_lora(model, growing_ranks(steps), "experts")
    sums = [4 * 16 * 4]
    for _ in range(steps):
        adapters.step()
        sums.append(sum(int(ranks.sum()) for ranks in adapters.ranks().values()))
    assert [step for step in range(steps) if sums[step + 1] > sums[step]] == list(growths)
    assert sums[-1] == 4 * 16 * 8
    assert growing_ranks(steps).cap == 5


def test_routing_shares_count_every_row_of_every_expert():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(mixture_of_experts(0).config)
    adapters = apply_lora(model, FixedRank(2), "experts")
    tokens = torch.randint(1024, (37,))
    shares = routing_shares(model, adapters, {"text": EncodedText(tokens, 37)}, seq_len=16, batch_size=1)
    with torch.no_grad():
        logits = model(input_ids=tokens[:32].view(2, 16), output_router_logits=True).router_logits
    for share, layer in zip(shares["text"].values(), logits, strict=True):
        rows = torch.bincount(layer.topk(2).indices.flatten(), minlength=16)
        assert torch.equal(share, rows.double() / 64)
    assert not any(module._forward_pre_hooks for module in adapters.modules.values())


def test_a_model_without_adapted_experts_has_no_routing(model):
    adapters = apply_lora(copy.deepcopy(model), FixedRank(2), "q_proj")
    assert routing_shares(model, adapters, {"text": EncodedText(torch.arange(9), 9)}, 4, 1) == {}


@pytest.mark.parametrize(
    "baseline, bits, words",
    [(2.5, 2.4, "0.100 better"), (2.4, 2.5, "0.100 worse"), (2.5001, 2.4999, "equal"), (2.5, 2.499, "0.001 better")],
)
def test_comparisons_say_what_the_printed_digits_say(baseline, bits, words):
    assert compare(baseline, bits) == words


def test_the_balance_loss_is_that_of_each_layer_alone():
    """E * sum over experts of (share of the rows) * (mean probability), from the Switch Transformer, per layer."""
    torch.manual_seed(0)
    experiment = mixture_of_experts(0)
    model = AutoModelForCausalLM.from_config(experiment.config)
    with torch.no_grad():  # layers that are unbalanced, and each in its own way
        for layer in model.model.layers:
            layer.mlp.gate.weight.normal_(0, 1)
    batch = torch.randint(1024, (2, 16))
    with torch.no_grad():
        logits = model(input_ids=batch, output_router_logits=True).router_logits
    expected = 0.0
    for layer in logits:
        probabilities = layer.double().softmax(-1)
        rows = torch.bincount(layer.topk(2).indices.flatten(), minlength=16).double()
        expected += 16 * float((rows / len(layer) * probabilities.mean(0)).sum())
    plain, balanced = batch_loss(model, batch), batch_loss(model, batch, balance=0.01)
    assert (balanced - plain).item() == pytest.approx(0.01 * expected, rel=1e-4)
    balanced.backward()
    assert all(layer.mlp.gate.weight.grad.any() for layer in model.model.layers)


def test_training_follows_the_balance_of_its_recipe():
    """The first step, before any update, shows the loss of the same model on the same batch."""
    first = []
    for balance in (0.0, 1.0):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(mixture_of_experts(0).config)
        batch = torch.randint(1024, (2, 16), generator=torch.Generator().manual_seed(0))
        expected = batch_loss(model, batch, balance).item()
        losses: list[float] = []
        train(model, [batch], Recipe(1, 1e-3, balance=balance), losses.append)
        assert losses == [expected]
        first += losses
    assert first[1] > first[0] + 4 * 2  # each of 4 layers adds at least the number of experts that a token visits
