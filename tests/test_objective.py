"""The objective: scheduled weights, and targets that are not counted, against loops in float64."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train
from minidisp import InputError
from minidisp.config import parse
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
    values = objective(a_forward(0))  # its weight is 0, so it is not computed
    assert values.keys() == {"ce", "b", "loss"}
    assert values["loss"].item() == 0


def test_the_diagnosis_sums_as_training_does(corpus):
    """A NaN term matters only in steps in which it has a weight."""
    config = dataclasses.replace(small_config(corpus, "unused"), vocab_size=257)
    model = GPT(config)
    terms = [
        Term("ce", 1.0, lambda forward: forward.ce, "cross-entropy", ""),
        Term("late", 1.0, lambda forward: forward.ce * math.nan, "late term", "", lambda step: float(step >= 5)),
    ]
    x, y = (torch.from_numpy(a) for a in Batches(Dataset(corpus).split("train"), 32, 0).batch(0, 2))
    for step, culprit in ((4, "no tensor is NaN or Inf"), (5, "the late term became")):
        forwards = [(1.0, Forward(x, y, *model(x, y, return_hidden_states=True)[1:], step))]
        assert first_bad_tensor(model, Objective(terms), iter(forwards)).startswith(culprit)


# --- masked targets ---------------------------------------------------------------------------------------------------


def mask(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Masks with very different shares per sequence, some with no targets at all; they depend on the tokens only."""
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
    """The loss is the mean over the counted targets of a step for every split, even into single sequences."""
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


# --- the schedule of the dispersion loss's weight, and what is logged of an interval ----------------------------------


def test_a_scheduled_weight_is_logged_and_in_force(corpus, tmp_path):
    expected = {
        "linear:0.5": [0.2 * max(0, 1 - step / 6) for step in range(12)],
        "delayed:0.5": 6 * [0.0] + 6 * [0.2],
        "linear:1": [0.2 * (1 - step / 12) for step in range(12)],
    }
    for schedule, weights in expected.items():
        run = tmp_path / schedule.replace(":", "-")
        train.main(small_config(corpus, run, dispersion=0.2, dispersion_schedule=schedule))
        steps = [line for line in lines(run) if "ce" in line]
        assert [line["dispersion_weight"] for line in steps] == pytest.approx(weights)
        for line, weight in zip(steps, weights, strict=True):
            assert ("dispersion" in line) == (weight > 0)  # not computed, not logged
            assert line["loss"] == pytest.approx(line["ce"] + weight * line.get("dispersion", 0.0), abs=1e-6)
    train.main(small_config(corpus, tmp_path / "plain"))
    plain, delayed = (lines(tmp_path / name) for name in ("plain", "delayed-0.5"))
    for a, b in zip(plain[:7], delayed[:7], strict=True):  # until then, it equals plain training, bit for bit
        if "ce" in a:
            assert (a["ce"], a["grad_norm"]) == (b["ce"], b["grad_norm"])
    assert "dispersion" not in plain[1]
    assert "dispersion_weight" not in plain[1]


@pytest.mark.parametrize("schedule", ["linear:0.7", "delayed:0.4"])
def test_a_scheduled_weight_resumes_exactly(corpus, tmp_path, schedule):
    options = {
        "dispersion": 0.2,
        "dispersion_tokens": 8,
        "dispersion_schedule": schedule,
        "log_every": 5,
        "save_every": 3,
    }
    train.main(small_config(corpus, tmp_path / "whole", **options))
    half = tmp_path / "half"
    with pytest.MonkeyPatch.context() as patch:
        take_step = train.Trainer.take_step

        def stop(self, logging):
            if self.step == 8:
                raise KeyboardInterrupt
            return take_step(self, logging)

        patch.setattr(train.Trainer, "take_step", stop)
        with pytest.raises(KeyboardInterrupt):
            train.main(small_config(corpus, half, **options))
    train.main(small_config(corpus, half, **options, resume=True))
    for name in ("whole", "half"):
        assert checkpoint.read(tmp_path / name / checkpoint.LAST)["step"] == 12
    a, b = (checkpoint.read(tmp_path / name / checkpoint.LAST) for name in ("whole", "half"))
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    times = {"seconds", "tokens_per_second"}
    whole, half = (
        [{k: v for k, v in line.items() if k not in times} for line in lines(tmp_path / n)] for n in ("whole", "half")
    )
    assert whole == half


@pytest.mark.parametrize(
    "schedule", ["linear", "linear:0", "linear:1.5", "delayed:nan", "cosine:0.5", "constant:1", "", "linear:0.5:2"]
)
def test_an_unknown_weight_schedule_is_refused(schedule):
    with pytest.raises(
        InputError, match=r"--dispersion-schedule: .* is not a schedule: pass constant, linear:F, delayed:F"
    ):
        parse([f"--dispersion-schedule={schedule}"])


def test_a_line_has_the_mean_loss_and_the_largest_norm_of_its_interval(corpus, tmp_path):
    train.main(small_config(corpus, tmp_path / "each", lr=0.03))
    train.main(small_config(corpus, tmp_path / "some", lr=0.03, log_every=5))
    each = [line for line in lines(tmp_path / "each") if "ce" in line]
    some = [line for line in lines(tmp_path / "some") if "ce" in line]
    assert all((line["ce_mean"], line["grad_norm_max"]) == (line["ce"], line["grad_norm"]) for line in each)
    assert [line["step"] for line in some] == [1, 5, 10]
    for line, first in zip(some, (0, 1, 5), strict=True):
        interval = each[first : line["step"]]
        assert line["ce_mean"] == pytest.approx(np.mean([step["ce"] for step in interval]), rel=1e-6)
        assert line["grad_norm_max"] == max(step["grad_norm"] for step in interval)


def test_a_skipped_step_does_not_spoil_the_interval(corpus, tmp_path, monkeypatch):
    forward_backward = train.Trainer.forward_backward

    def spoiled(self, logging):
        values = forward_backward(self, logging)
        return (
            {**values, "loss": values["loss"] * math.nan, "ce": values["ce"] * math.nan} if self.step == 2 else values
        )

    monkeypatch.setattr(train.Trainer, "forward_backward", spoiled)
    train.main(small_config(corpus, tmp_path / "run", log_every=4, max_steps=4))
    last = [line for line in lines(tmp_path / "run") if "ce" in line][-1]
    assert (last["step"], last["skipped"]) == (4, 1)
    assert 0 < last["ce_mean"] < 10


def test_an_older_checkpoint_has_no_interval_and_resumes(corpus, tmp_path):
    train.main(small_config(corpus, tmp_path / "run", max_steps=6, schedule="constant"))
    state = checkpoint.read(tmp_path / "run" / checkpoint.LAST)
    del state["interval"]
    del state["config"]["dispersion_schedule"], state["config"]["recipe"]
    torch.save(state, tmp_path / "run" / checkpoint.LAST)
    train.main(small_config(corpus, tmp_path / "run", max_steps=8, schedule="constant", resume=True))
    assert lines(tmp_path / "run")[-1]["step"] == 8
