"""The other mitigation methods: noisy embeddings, active forgetting, distillation."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import kstest, norm

import train
from minidisp import countermeasures
from minidisp.data import Dataset
from minidisp.model import GPT
from minidisp.optim import build_optimizers
from minidisp.runtime import checkpoint
from tests.conftest import SMALL, small_config
from tests.test_train import assert_same_weights, lines, stop_after, weights

ALL = {
    "noisy_embedding": 5.0,
    "active_forgetting": 4,
    "distill_weight": 0.5,
    "distill_temperature": 3.0,
    "dropout": 0.1,
}


def model_of(corpus, tmp_path, **changes):
    config = small_config(corpus, tmp_path / "unused", vocab_size=257, **changes)
    torch.manual_seed(0)
    return GPT(config), config


# --- together -------------------------------------------------------------------------------------------------------


def test_resuming_with_all_of_them_equals_never_having_stopped(corpus, run, tmp_path):
    options = {**ALL, "distill": str(run), "dispersion": 0.1, "grad_accum": 2, "save_every": 5}
    train.main(small_config(corpus, tmp_path / "whole", **options))
    for stop in (4, 6):  # right before a reset, and between two resets
        half = tmp_path / f"stopped-{stop}"
        stop_after(stop, small_config(corpus, half, **options))
        train.main(small_config(corpus, half, **options, resume=True))
        assert_same_weights(weights(tmp_path / "whole"), weights(half))
        assert lines(half) == lines(tmp_path / "whole")


@pytest.mark.parametrize("option", [{"noisy_embedding": 5.0}, {"active_forgetting": 4}, {"distill": "teacher"}])
def test_each_leaves_the_start_the_data_and_dropout_alone(corpus, run, tmp_path, option):
    option = {key: str(run) if value == "teacher" else value for key, value in option.items()}
    train.main(small_config(corpus, tmp_path / "off", dropout=0.1))
    train.main(small_config(corpus, tmp_path / "on", dropout=0.1, **option))
    off, on = lines(tmp_path / "off"), lines(tmp_path / "on")
    assert off[0] == on[0]  # the evaluation before the first step
    states = [checkpoint.read(tmp_path / name / checkpoint.LAST) for name in ("off", "on")]
    assert torch.equal(states[0]["rng"]["cpu"], states[1]["rng"]["cpu"])
    assert off[-1]["val_loss"] != on[-1]["val_loss"]
    if "noisy_embedding" not in option:
        assert off[1]["ce"] == on[1]["ce"]  # the first batch, dropout included


def test_two_micro_batches_of_four_equal_one_of_eight(corpus, run, tmp_path):
    options = {**ALL, "dropout": 0.0, "distill": str(run), "max_steps": 8}
    train.main(small_config(corpus, tmp_path / "one", batch_size=8, **options))
    train.main(small_config(corpus, tmp_path / "two", batch_size=4, grad_accum=2, **options))
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=2e-5)


def test_they_are_reported_at_the_start_and_in_the_config(corpus, run, tmp_path, capsys):
    train.main(small_config(corpus, tmp_path / "run", **ALL, distill=str(run), dispersion=0.1))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("loss ")]
    for part in (
        "cross-entropy + 0.1 x angular_spread",
        f"0.5 x distillation from {run}",
        "temperature 3",
        "5 / sqrt(T C)",
        "tied to the output layer, reset every 4 steps",
    ):
        assert part in line
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert {**ALL, "distill": str(run)}.items() <= saved.items()
    for line in lines(tmp_path / "run"):
        if "loss" in line:
            expected = line["ce"] + 0.1 * line["dispersion"] + 0.5 * line["distillation"]
            assert line["loss"] == pytest.approx(expected, abs=1e-5)


# --- noisy embeddings -----------------------------------------------------------------------------------------------


def test_the_noise_is_uniform_within_the_bound_and_in_training_only(corpus, tmp_path):
    model, config = model_of(corpus, tmp_path, noisy_embedding=3.0)
    noise = train.EmbeddingNoise(model.wte, config)
    noise.draw(first=0, count=40)
    bound = 3.0 / math.sqrt(32 * 32)
    assert noise.noise.shape == (40, 32, 32)
    assert noise.noise.abs().max() <= bound
    assert kstest(noise.noise.double().flatten().numpy(), "uniform", (-bound, 2 * bound)).pvalue > 1e-3
    sequences = noise.noise.flatten(1).double().numpy()
    correlation = np.corrcoef(sequences) - np.eye(40)
    assert np.abs(correlation).max() < 5 / math.sqrt(32 * 32)  # sequences are independent
    idx = torch.randint(257, (40, 32), generator=torch.Generator().manual_seed(1))
    assert torch.equal(model.train().wte(idx), model.wte.weight[idx] + noise.noise)
    assert torch.equal(model.eval().wte(idx), model.wte.weight[idx])


def test_the_noise_depends_on_seed_and_sequence_alone(corpus, tmp_path):
    def draw(first, count, seed=0):
        model, config = model_of(corpus, tmp_path, noisy_embedding=1.0, seed=seed)
        noise = train.EmbeddingNoise(model.wte, config)
        before = torch.get_rng_state()
        noise.draw(first, count)
        assert torch.equal(before, torch.get_rng_state())
        return noise.noise

    whole = draw(0, 8)
    assert torch.equal(whole, torch.cat((draw(0, 3), draw(3, 5))))
    assert not torch.equal(whole, draw(0, 8, seed=1))
    assert not torch.equal(whole, draw(8, 8))


def test_the_noise_changes_under_compile(corpus, tmp_path):
    """The hook is traced once, and still adds the latest noise."""
    model, config = model_of(corpus, tmp_path, noisy_embedding=50.0)
    noise = train.EmbeddingNoise(model.wte, config)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled, idx = torch.compile(model, backend=backend), torch.zeros(2, 32, dtype=torch.int64)
    seen = []
    for step in range(3):
        noise.draw(2 * step, 2)
        seen.append(compiled(idx, return_hidden_states=True).hidden_states[0])
        torch.testing.assert_close(seen[-1], model(idx, return_hidden_states=True).hidden_states[0])
    torch.compiler.reset()
    assert len(graphs) == 1
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


# --- active forgetting ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("every", "steps"), [(4, [4, 8]), (5, [5]), (6, [6]), (1, list(range(1, 12)))])
def test_resets_come_every_k_steps_and_leave_k_to_learn(corpus, tmp_path, monkeypatch, every, steps):
    seen, original = [], train.forget

    def spy(weight, optimizers, seed, step):
        original(weight, optimizers, seed, step)
        seen.append(step)

    monkeypatch.setattr(train, "forget", spy)
    train.main(small_config(corpus, tmp_path / "run", active_forgetting=every))
    assert seen == steps


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_forgetting_reinitialises_the_embeddings_and_clears_their_state(corpus, tmp_path, optimizer, tied):
    model, config = model_of(corpus, tmp_path, optimizer=optimizer, tied=tied)
    optimizers = build_optimizers(model, config)
    idx = torch.arange(32)[None]

    def step():
        model.zero_grad()
        model(idx, idx).loss.backward()
        for o in optimizers:
            o.step()

    for _ in range(3):
        step()
    weight = model.wte.weight
    others = {name: p.clone() for name, p in model.named_parameters() if p is not weight}
    assert int(optimizers[0].state[weight]["step"]) == 3
    before = torch.get_rng_state()
    train.forget(weight, optimizers, seed=7, step=3)
    assert torch.equal(before, torch.get_rng_state())
    assert kstest(weight.detach().double().flatten().numpy(), norm(0, 0.02).cdf).pvalue > 1e-3
    assert all(weight not in o.state for o in optimizers)
    assert all(p in o.state for o in optimizers for group in o.param_groups for p in group["params"] if p is not weight)
    for name, p in model.named_parameters():  # everything else is unchanged, including an untied output layer
        assert p is weight or torch.equal(p, others[name]), name
    assert (model.lm_head.weight is weight) == tied

    drawn = weight.detach().clone()
    step()  # AdamW's first update, with the moments of a single gradient: g / (|g| + eps)
    g = weight.grad.double()
    expected = drawn * (1 - config.lr * config.weight_decay) - config.lr * g / (g.abs() + 1e-8)
    torch.testing.assert_close(weight.detach(), expected.float(), rtol=0, atol=1e-6)

    train.forget(weight, optimizers, seed=7, step=3)
    assert torch.equal(weight, drawn)
    train.forget(weight, optimizers, seed=7, step=6)
    assert not torch.equal(weight, drawn)


# --- distillation ---------------------------------------------------------------------------------------------------


def log_softmax(z):
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("chunk", [1000, 7])
def test_the_divergence_and_its_gradient_agree_with_the_formula(corpus, run, tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(countermeasures, "tokens_at_once", lambda device, vocab_size: chunk)
    config = small_config(corpus, tmp_path / "x", distill=str(run), distill_temperature=2.5)
    teacher = train.Teacher(config, Dataset(corpus), torch.device("cpu"))
    teacher.model.double()
    rng = torch.Generator().manual_seed(0)
    idx = torch.randint(257, (3, 10), generator=rng)
    x = torch.randn(
        3, 10, 16, generator=rng, dtype=torch.float64, requires_grad=True
    )  # a width different from the teacher's
    weight = torch.randn(257, 16, generator=rng, dtype=torch.float64, requires_grad=True)
    loss = teacher.divergence(idx, x, lambda x: F.linear(x, weight))
    loss.backward()

    T, a, W = 2.5, x.detach().numpy().reshape(30, 16), weight.detach().numpy()
    logits = teacher.model(idx).logits.numpy().reshape(30, 257)
    log_p, log_q = log_softmax(logits / T), log_softmax(a @ W.T / T)
    p, q = np.exp(log_p), np.exp(log_q)
    assert loss.item() == pytest.approx(T**2 * (p * (log_p - log_q)).sum() / 30, rel=1e-12)
    targets = torch.where(idx % 3 == 0, -1, idx)  # masked in a text, as in examples
    kept = (targets != -1).flatten().numpy()
    masked = teacher.divergence(idx, x.detach(), lambda x: F.linear(x, weight), targets).item()
    assert masked == pytest.approx(T**2 * (p * (log_p - log_q))[kept].sum() / kept.sum(), rel=1e-12)
    d_logits = T * (q - p) / 30
    np.testing.assert_allclose(x.grad.numpy().reshape(30, 16), d_logits @ W, atol=1e-12)
    np.testing.assert_allclose(weight.grad.numpy(), d_logits.T @ a, atol=1e-12)
    assert all(not p.requires_grad and p.grad is None for p in teacher.model.parameters())
    assert not teacher.model.training


def test_a_student_equal_to_its_teacher_has_nothing_to_learn_from_it(corpus, run, tmp_path):
    train.main(small_config(corpus, tmp_path / "x", init_from=str(run), distill=str(run), max_steps=1))
    assert abs(lines(tmp_path / "x")[1]["distillation"]) < 1e-5


def test_the_student_comes_closer_to_a_teacher_of_another_shape(corpus, tmp_path):
    rarely = {"max_steps": 60, "eval_every": 60, "save_every": 60}
    shape = {"n_embd": 48, "n_layer": 3, "block_size": 64}
    train.main(small_config(corpus, tmp_path / "teacher", **rarely, **shape, lr=5e-3, dropout=0.1))
    options = {"distill": str(tmp_path / "teacher"), "distill_weight": 5.0}
    train.main(small_config(corpus, tmp_path / "student", **rarely, **options))
    divergences = [line["distillation"] for line in lines(tmp_path / "student") if "loss" in line]
    assert divergences[-1] < 0.3 * divergences[0]
    assert all(value >= 0 for value in divergences)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_divergence_never_holds_the_logits_of_all_tokens(corpus, run, tmp_path, monkeypatch, dtype):
    """No N x V tensor is kept for the backward pass."""
    config = small_config(corpus, tmp_path / "x", distill=str(run))
    teacher = train.Teacher(config, Dataset(corpus), torch.device("cpu"))
    monkeypatch.setattr(countermeasures, "tokens_at_once", lambda device, vocab_size: 32)
    x, weight = torch.randn(8, 32, 16, requires_grad=True), torch.randn(257, 16, requires_grad=True)
    sizes = []

    def pack(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = teacher.divergence(torch.zeros(8, 32, dtype=torch.int64), x, lambda x: F.linear(x, weight))
        loss.backward()
    assert loss.dtype == torch.float32
    assert sizes
    assert max(sizes) <= 32 * 257


# --- what is refused ------------------------------------------------------------------------------------------------

BAD = {
    "noise": (["--noisy-embedding", "-1"], "--noisy-embedding"),
    "noise without end": (["--noisy-embedding", "inf"], "--noisy-embedding"),
    "forgetting": (["--active-forgetting", "-5"], "--active-forgetting"),
    "forgetting too late": (["--active-forgetting", "7"], "at most 6"),
    "weight without teacher": (["--distill-weight", "0.5"], "--distill RUN"),
    "temperature without teacher": (["--distill-temperature", "3"], "--distill RUN"),
    "no teacher": (["--distill", "missing"], "missing"),
    "weight 0": (["--distill", "RUN", "--distill-weight", "0"], "--distill-weight"),
    "temperature 0": (["--distill", "RUN", "--distill-temperature", "0"], "--distill-temperature"),
    "itself": (["--distill", "run"], "itself"),
    "short teacher": (["--distill", "RUN", "--block-size", "64"], "--block-size 32"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_usage_is_one_line_and_exit_2(corpus, run, tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    flags, expected = BAD[name]
    small = [part for key, value in SMALL.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    flags = [str(run) if part == "RUN" else part for part in flags]
    assert train.cli([*small, "--data", str(corpus), "--out", "run", *flags]) == 2
    captured = capsys.readouterr()
    assert expected in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_teacher_with_another_tokenizer_is_refused(bpe_corpus, run, tmp_path, capsys):
    flags = ["--data", str(bpe_corpus), "--block-size", "32", "--out", str(tmp_path / "x"), "--distill", str(run)]
    assert train.cli(flags) == 2
    assert "tokenizer" in capsys.readouterr().err


def test_resume_refuses_another_teacher(corpus, run, tmp_path, capsys):
    train.main(small_config(corpus, tmp_path / "a", distill=str(run)))
    train.main(small_config(corpus, tmp_path / "b"))
    for changes in (["--distill", str(tmp_path / "b")], ["--distill", ""]):
        assert train.cli(["--resume", "--out", str(tmp_path / "a"), *changes]) == 2
        error = capsys.readouterr().err
        assert "--distill" in error
        assert error.count("\n") == 1
