"""The objective: scheduled weights, and targets that are not counted, against loops in float64."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train
from minidisp.data import Batches, Dataset, eval_windows
from minidisp.model import GPT
from minidisp.objective import Forward, Objective, Term
from minidisp.runtime import checkpoint
from minidisp.runtime.guard import first_bad_tensor
from minidisp.runtime.processes import ALONE
from minidisp.validation import Validation
from tests.conftest import small_config


def a_forward(step: int) -> Forward:
    x = torch.arange(6.0).view(1, 2, 3).requires_grad_()
    return Forward(torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.int64), x.sum(), (x, x), step)


def test_the_sum_has_the_weights_of_the_step():
    terms = [
        Term("ce", 1.0, lambda forward: forward.ce, "cross-entropy", ""),
        Term("a", 0.5, lambda forward: forward.ce**2, "a", "", lambda step: 2.0 * step),
        Term("b", -3.0, lambda forward: forward.hidden_states[0].amax(), "b", ""),
    ]
    objective = Objective(terms)
    for step in (1, 7):
        values = objective(a_forward(step))
        assert values["loss"].item() == 15 + 0.5 * 2 * step * 15**2 - 3 * 5
        assert objective.scheduled_weights(step) == {"a_weight": float(step)}
    values = objective(a_forward(0))  # its weight is 0, so that it is not even computed
    assert values.keys() == {"ce", "b", "loss"}
    assert values["loss"].item() == 0


def test_the_diagnosis_sums_as_training_does(corpus):
    """A term that is NaN counts only in the steps in which it has a weight."""
    config = dataclasses.replace(small_config(corpus, "unused"), vocab_size=257)
    model = GPT(config)
    terms = [
        Term("ce", 1.0, lambda forward: forward.ce, "cross-entropy", ""),
        Term("late", 1.0, lambda forward: forward.ce * math.nan, "late term", "", lambda step: float(step >= 5)),
    ]
    x, y = (torch.from_numpy(a) for a in Batches(Dataset(corpus).split("train"), 32, 0).batch(0, 2))
    for step, culprit in ((4, "no tensor is bad"), (5, "the late term went")):
        forwards = [(1.0, Forward(x, y, *model(x, y, return_hidden_states=True)[1:], step))]
        assert first_bad_tensor(model, Objective(terms), iter(forwards)).startswith(culprit)


# --- masked targets -----------------------------------------------------------------------------------------------------


def mask(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Targets of which sequences have very different shares, and some none at all: decided by the tokens alone."""
    masked = y.copy()
    for row, tokens in zip(masked, x, strict=True):
        row[: (int(tokens.sum()) * 7) % (len(row) + 9)] = -1
    return masked


@pytest.fixture
def masked(monkeypatch):
    batch = Batches.batch

    def masked_batch(self, first, count):
        x, y = batch(self, first, count)
        return x, mask(x, y)

    def masked_windows(*args):
        x, y = eval_windows(*args)
        return x, mask(x, y)

    monkeypatch.setattr(Batches, "batch", masked_batch)
    monkeypatch.setattr("minidisp.validation.eval_windows", masked_windows)


def lines(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_masked_targets_do_not_depend_on_the_micro_batches(corpus, tmp_path, masked):
    """The loss is the mean over the counted targets of a step, however the step is split, one sequence at a time included."""
    splits = {"whole": (12, 1), "thirds": (4, 3), "single": (1, 12)}
    losses, weights = {}, {}
    for name, (batch_size, grad_accum) in splits.items():
        run = tmp_path / name
        train.main(small_config(corpus, run, batch_size=batch_size, grad_accum=grad_accum, max_steps=5, dispersion=0.1))
        losses[name] = [line["ce"] for line in lines(run) if "ce" in line]
        weights[name] = checkpoint.read(run / checkpoint.LAST)["model"]
    for name in ("thirds", "single"):
        assert losses[name] == pytest.approx(losses["whole"], abs=2e-6)
        for key, weight in weights["whole"].items():
            torch.testing.assert_close(weights[name][key], weight, atol=2e-5, rtol=1e-4)

    # The first step against one sequence at a time, in float64.
    config = dataclasses.replace(small_config(corpus, tmp_path / "x", batch_size=12), vocab_size=257)
    torch.manual_seed(config.seed)
    model = GPT(config).double()
    x, y = (torch.from_numpy(a) for a in Batches(Dataset(corpus).split("train"), 32, config.seed).batch(0, 12))
    assert 0 in (y != -1).sum(1)
    nats, counted = 0.0, 0
    for tokens, targets in zip(x, y, strict=True):
        logits = model(tokens[None])[0][0]
        for logit, target in zip(logits, targets.tolist(), strict=True):
            if target >= 0:
                nats += (torch.logsumexp(logit, 0) - logit[target]).item()
                counted += 1
    assert losses["whole"][0] == pytest.approx(nats / counted, abs=2e-6)


def test_masked_gradients_are_those_of_one_sequence_at_a_time(corpus, tmp_path, masked):
    from contextlib import ExitStack

    config = small_config(corpus, tmp_path / "run", batch_size=3, grad_accum=4)
    with ExitStack() as at_exit:
        trainer = train.Trainer(config, ALONE, at_exit)
        trainer.forward_backward(logging=False)
        oracle = GPT(trainer.config).double()
        oracle.load_state_dict(trainer.model.state_dict())
        x, y = (torch.from_numpy(a) for a in trainer.batches.batch(0, 12))
        total = (y != -1).sum()
        for tokens, targets in zip(x, y, strict=True):
            logits = oracle(tokens[None])[0][0]
            (F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum") / total).backward()
        for (name, p), wanted in zip(trainer.model.named_parameters(), oracle.parameters(), strict=True):
            torch.testing.assert_close(p.grad.double(), wanted.grad, atol=1e-6, rtol=1e-4, msg=name)


def test_a_step_without_any_counted_target_leaves_the_run_whole(corpus, tmp_path, monkeypatch):
    batch = Batches.batch
    monkeypatch.setattr(
        Batches, "batch", lambda self, first, count: (batch(self, first, count)[0], np.full((count, 32), -1))
    )
    train.main(small_config(corpus, tmp_path / "run", max_steps=3, weight_decay=0.0))
    logged = [line for line in lines(tmp_path / "run") if "ce" in line]
    assert [(line["ce"], line["grad_norm"], line["skipped"]) for line in logged] == 3 * [(0, 0, 0)]


def test_validation_counts_the_counted_targets_alone(corpus, tmp_path, masked):
    dataset = Dataset(corpus)
    config = dataclasses.replace(small_config(corpus, tmp_path, eval_tokens=0, batch_size=3), vocab_size=257)
    torch.manual_seed(1)
    model = GPT(config)
    scores = Validation(dataset, config, torch.device("cpu"), ALONE).scores(model, step=0)
    x, y = eval_windows(dataset.split("val"), config.block_size, 0)
    y = mask(x, y)
    nats, targets, size = 0.0, 0, 0
    oracle = GPT(config).double()
    oracle.load_state_dict(model.state_dict())
    for tokens, wanted in zip(x, y, strict=True):
        log_probs = torch.log_softmax(oracle(torch.from_numpy(tokens)[None])[0][0], -1)
        for position, target in enumerate(wanted.tolist()):
            if target >= 0:
                nats -= log_probs[position, target].item()
                targets += 1
                size += len(dataset.tokenizer.token_bytes[target])
    assert 0 < targets < y.size
    assert scores["val_loss"] == pytest.approx(nats / targets, rel=1e-6)
    assert scores["perplexity"] == pytest.approx(math.exp(nats / targets), rel=1e-6)
    assert scores["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-6)
