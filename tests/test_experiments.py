"""The studies: each one runs at its smallest scale, continues after an interruption, and reports significance."""

import copy
import dataclasses
import importlib
import itertools
import json
import math
import os
import shutil
import signal
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import eval as evaluation
import train
from data import prepare
from minidisp import InputError, optim, report
from minidisp.config import Config, from_dict
from minidisp.model import GPT
from minidisp.objective import Forward
from minidisp.runtime import checkpoint, files

STUDIES = (
    "size", "mlp_width", "through_training", "distillation", "ablation", "learning_rate", "recipe", "warmup", "forms",
    "tasks", "muon",
)  # fmt: skip
FOLDER = Path(train.__file__).parent / "experiments"


@pytest.fixture
def load(monkeypatch):
    """Imports a study."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_runs_at_the_smoke_scale(load, corpus, tmp_path, capsys, name):
    script = load(name)
    assert script.main(["--scale", "smoke", "--data", str(corpus), "--threads", "1", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert (tmp_path / "table.txt").read_text() in shown.replace("\nfigure", "\n\nfigure", 1) + "\n"
    scale = script.SCALES["smoke"]
    for arm in script.arms(scale):
        assert arm in shown
    for view in results["compared"].values():
        for rows in view.values():
            assert all(len(row["values"]) == scale["seeds"] for row in rows.values())
    assert (tmp_path / "differences.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "condensation.png").exists() == (len(script.arms(scale)) <= len(report.CYCLE))


@pytest.mark.parametrize("name", STUDIES)
def test_the_settings_of_every_scale_make_sense(load, tmp_path, name):
    script, study = load(name), load("study")  # study removes this folder from sys.path
    assert {"smoke", "laptop", "gpu"} <= script.SCALES.keys()
    for scale, settings in script.SCALES.items():
        args = study.parse_arguments(name, "", script.SCALES, ["--scale", scale])
        arms = script.arms(settings)
        plan = study.make_plan(settings, arms, tmp_path, args)
        assert len(plan) == len(arms) * settings["seeds"]
        assert len({config.run_dir for config, _ in plan.values()}) == len(plan)
        assert settings["seeds"] >= 2


def test_chosen_conditions_alone_are_trained_and_compared(load, corpus, tmp_path, capsys):
    script = load("warmup")
    flags = ["--scale", "smoke", "--data", str(corpus), "--threads", "1", "--out", str(tmp_path), "--seeds", "1"]
    chosen = ["cross-entropy, warm-up 2", "with dispersion, warm-up 2"]
    assert script.main([*flags, "--arms", *chosen]) == 0
    results = json.loads((tmp_path / "results.json").read_text())["compared"]
    assert {view: list(rows["bits_per_byte"]) for view, rows in results.items()} == {
        "at_the_end": chosen,
        "warm_up_2": chosen,
    }
    assert script.main([*flags, "--arms", "warm-up 2"]) == 2
    assert "--arms 'warm-up 2' is not a condition: choose from 'cross-entropy, warm-up 1'" in capsys.readouterr().err


def test_a_condition_may_replace_functions_of_the_trainer(load, corpus, tmp_path):
    study = load("study")
    original = train.build_optimizers

    def slower(model, config):
        optimizers = original(model, config)
        optimizers[0].step = lambda: None
        return optimizers

    scales = {"smoke": {"seeds": 2, "train": study.SMOKE}}
    argv = ["--scale", "smoke", "--data", str(corpus), "--threads", "1", "--out", str(tmp_path)]
    arms = {"trained": {}, "untrained": {"build_optimizers": slower}}
    assert study.cli("some.py", "Which?", scales, lambda scale: arms, argv=argv) == 0
    assert train.build_optimizers is original
    results = json.loads((tmp_path / "results.json").read_text())["compared"]["at_the_end"]["bits_per_byte"]
    first = [report.read_metrics(tmp_path / f"untrained-s{seed}" / "metrics.jsonl")[0] for seed in (0, 1)]
    assert results["untrained"]["values"] == [line["bits_per_byte"] for line in first]
    assert all(np.less(results["trained"]["values"], results["untrained"]["values"]))


def test_the_forms_agree_with_loops_over_pairs(load):
    forms, generator = load("forms"), torch.Generator().manual_seed(0)
    states = torch.randn(3, 2, 6, 5, dtype=torch.float64, generator=generator)  # embeddings and two layers
    targets = torch.tensor([[1, 2, 1, 3, 2, 1], [0, 4, 5, 6, 7, 3]])
    forward = Forward(None, targets, None, tuple(states), 0)
    units = (states / (states.norm(dim=-1, keepdim=True) + 1e-2)).numpy()

    def log_mean(u, pairs):
        cosines = [np.clip(u[i] @ u[j], -0.75, 0.75) for i, j in pairs]
        return math.log(np.mean(np.exp(-np.arccos(cosines) / math.pi)))

    pairs = [[(i, j) for i in range(6) for j in range(6) if y[i] != y[j]] for y in targets]
    expected = np.mean([log_mean(units[layer][b], pairs[b]) for layer in (1, 2) for b in (0, 1)])
    np.testing.assert_allclose(forms.target_aware(forward, None), expected, rtol=1e-12)

    together = [(i, j) for i in range(12) for j in range(12) if i != j]
    expected = np.mean([log_mean(units[layer].reshape(12, 5), together) for layer in (1, 2)])
    np.testing.assert_allclose(forms.whole_batch(forward, None), expected, rtol=1e-12)

    u, y = states[2].reshape(12, 5).numpy(), targets.flatten().tolist()
    u = u / np.linalg.norm(u, axis=1, keepdims=True)
    losses = []
    for i in range(12):
        mass = {j: math.exp(u[i] @ u[j] / 0.1) for j in range(12) if j != i}
        if same := [j for j in mass if y[j] == y[i]]:
            losses.append(-math.log(sum(mass[j] for j in same) / sum(mass.values())))
    assert len(losses) == 7
    np.testing.assert_allclose(forms.contrastive(forward, None), np.mean(losses), rtol=1e-12)


def test_a_study_at_equal_time_and_on_another_corpus(load, corpus, tmp_path, capsys):
    script = load("mlp_width")
    flags = [
        "--scale",
        "smoke",
        "--data",
        str(corpus),
        "--other",
        str(corpus),
        "--threads",
        "1",
        "--out",
        str(tmp_path),
    ]
    assert script.main([*flags, "--time-ratio", "1.5"]) == 0
    assert "bits per byte of the other corpus" in capsys.readouterr().out
    first, *_, longer = json.loads((tmp_path / "results.json").read_text())["compared"]["at_the_end"]["other"].items()
    assert longer[0] == f"{first[0]}, 1.5 x the steps"
    assert longer[1]["values"] != first[1]["values"]
    summaries = [
        json.loads((tmp_path / f"{name}-s0" / "summary.json").read_text())
        for name in ("mlp-4", "mlp-4-1.5-x-the-steps")
    ]
    assert summaries[1]["tokens"] == 1.5 * summaries[0]["tokens"]
    for ratio in ("0", "nan", "-1"):
        assert script.main([*flags, "--time-ratio", ratio]) == 2
        assert "--time-ratio" in capsys.readouterr().err


def test_an_interrupted_study_continues_to_the_same_result(load, corpus, tmp_path, monkeypatch, capsys):
    script, lr = load("mlp_width"), train.learning_rate

    def command(out):
        return script.main(["--scale", "smoke", "--data", str(corpus), "--threads", "1", "--out", str(tmp_path / out)])

    assert command("whole") == 0
    calls, stop_at = [], [6]  # in the second of four runs of four steps

    def interrupting(step, config):
        calls.append(step)
        if len(calls) in stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        return lr(step, config)

    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(train, "learning_rate", interrupting)
    with pytest.raises(SystemExit) as stopped:
        command("parts")
    assert stopped.value.code == 130
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert len(list((tmp_path / "parts").iterdir())) == 2
    calls.clear()
    stop_at.clear()
    capsys.readouterr()
    assert command("parts") == 0
    assert len(calls) == 16 - 6
    shown = capsys.readouterr().out
    assert shown.count("already finished") == 1
    assert shown.count("resumed") == 1
    results = [json.loads((tmp_path / out / "results.json").read_text()) for out in ("whole", "parts")]
    assert results[0] == results[1]
    calls.clear()
    assert command("parts") == 0
    assert not calls  # nothing is left to do


def test_a_run_with_other_settings_is_not_used_by_the_study(load, corpus, tmp_path, capsys):
    script = load("mlp_width")
    flags = ["--scale", "smoke", "--data", str(corpus), "--threads", "1", "--out", str(tmp_path), "--seeds", "1"]
    assert script.main(flags) == 0
    assert "one seed: no interval" in capsys.readouterr().out
    config = tmp_path / "mlp-4-s0" / "config.json"
    files.write_json(config, {**json.loads(config.read_text()), "lr": 0.5})
    assert script.main(flags) == 2
    error = capsys.readouterr().err
    assert "lr 0.5" in error
    assert error.count("\n") == 1


def test_a_run_that_fails_ends_the_study_with_its_code(load, corpus, tmp_path, capsys):
    study = load("study")
    scales = {
        "smoke": {
            "seeds": 1,
            "train": {
                "n_layer": 1,
                "n_head": 1,
                "n_embd": 8,
                "block_size": 16,
                "max_steps": 9,
                "lr": 1e30,
                "grad_clip": 0.0,
                "warmup_steps": 0,
                "log_every": 1,
            },
        }
    }
    argv = ["--scale", "smoke", "--data", str(corpus), "--threads", "1", "--out", str(tmp_path / "study")]
    with pytest.raises(SystemExit) as failed:
        study.cli("bad.py", "Why?", scales, lambda scale: {"only": {}}, argv=argv)
    assert failed.value.code == 3
    assert str(tmp_path / "study" / "only-s0") in capsys.readouterr().err
    assert study.cli("bad.py", "Why?", scales, lambda scale: {"only": {"n_head": 3}}, argv=argv) == 2
    assert "--n-head" in capsys.readouterr().err
    assert study.cli("bad.py", "Why?", scales, lambda scale: {"only": {}}, argv=[*argv, "--seeds", "0"]) == 2
    assert "--seeds" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    argv = ["--scale", "smoke", "--data", str(corpus), "--out", str(tmp_path / "file" / "study")]
    assert study.cli("bad.py", "Why?", scales, lambda scale: {"only": {}}, argv=argv) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_comparisons_and_their_verdicts_agree_with_scipy(load):
    study, rng = load("study"), np.random.default_rng(0)
    base = rng.normal(2, 0.1, 6)
    rows = {
        "base": base,
        "less": base - 0.05 + rng.normal(0, 0.01, 6),
        "more": base + 0.05 + rng.normal(0, 0.01, 6),
        "same": base + rng.normal(0, 0.05, 6),
        "unknown": [None] + [1.0] * 5,
    }
    compared = study.compare(
        {label: [{"x": v} for v in values] for label, values in rows.items()}, "x", ("less", "more")
    )
    for label in ("less", "more", "same"):
        expected = stats.ttest_rel(rows[label], base).confidence_interval(0.95)
        assert (compared[label]["low"], compared[label]["high"]) == pytest.approx(tuple(expected), rel=1e-6)
        assert compared[label]["mean"] == pytest.approx(np.mean(rows[label]))
        assert compared[label]["sd"] == pytest.approx(np.std(rows[label], ddof=1))
    words = {label: c["verdict"] for label, c in compared.items()}
    assert words == {
        "base": words["base"],
        "less": "less",
        "more": "more",
        "unknown": "undefined",
        "same": "not significant",
    }
    table = study.comparison_table("x", 3, compared)
    assert "baseline" in table.splitlines()[2]
    assert math.isnan(compared["unknown"]["mean"])


def test_through_training_compares_later_moments_with_step_0(load):
    evaluations = {
        arm: [[{"step": 50 * k, "seed": seed, "arm": arm} for k in range(15)] for seed in range(2)]
        for arm in ("cross-entropy", "with dispersion")
    }
    rows = load("through_training").moments(evaluations)
    steps = [0, 50, 100, 200, 400, 700]
    assert [row[0]["step"] for row in rows.values()] == [*steps, *steps[1:]]
    for label, row in rows.items():
        assert [e["seed"] for e in row] == [0, 1]
        assert label == "step 0" or label == f"{row[0]['arm']}, step {row[0]['step']}"


def test_learning_rates_are_chosen_on_other_seeds(load):
    """Only seed 2 is best at the second learning rate, and its own result must not decide the selection."""
    bits = {
        "cross-entropy, 0.001": [1.0, 2.0, 3.0],
        "cross-entropy, 0.002": [1.5, 2.5, 0.0],
        "with dispersion, 0.001": [1.0, 1.0, 1.0],
        "with dispersion, 0.002": [0.5, 0.5, 0.5],
    }
    best = load("learning_rate").at_its_best(
        {
            label: [[{"bits_per_byte": 9.0}, {"bits_per_byte": value}] for value in values]
            for label, values in bits.items()
        }
    )
    assert {label: [e["bits_per_byte"] for e in row] for label, row in best.items()} == {
        "cross-entropy, 0.001 (1 of 3), 0.002 (2 of 3)": [1.5, 2.5, 3.0],
        "with dispersion, 0.002 (3 of 3)": [0.5, 0.5, 0.5],
    }


def test_figures_can_be_drawn_where_something_is_undefined(load, tmp_path):
    study = load("study")
    rows = {label: [{"x": v} for v in values] for label, values in {"a": [1.0, 2.0], "b": [None, 1.0]}.items()}
    (path,) = report.draw_differences(
        {"x": study.compare(rows, "x", ("less", "more"))}, {"x": ("x", ("less", "more"))}, "?", tmp_path / "x.png"
    )
    assert path.stat().st_size > 1000


@pytest.mark.slow
def test_verdict_chooses_confirms_and_reports(load, corpus, tmp_path, monkeypatch, capsys):
    verdict, out = load("verdict"), tmp_path / "verdict"
    monkeypatch.setattr(verdict, "GRID", {"gpt2": {"lr": (1e-3, 2e-3), "weight_decay": (0.1, 0.5)}})
    monkeypatch.setattr(verdict, "ARMS", dict(list(verdict.ARMS.items())[:3]))
    monkeypatch.setattr(verdict, "TEXTS", 1)
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"sentence_good": "It is good.", "sentence_bad": "It are good."}\n' * 2)

    def command(*more):
        flags = ["--scale", "smoke", "--data", str(corpus), "--other", str(corpus), "--out", str(out), "--seeds", "2"]
        return verdict.main([*flags, *more])

    assert command("--stage", "small") == 2
    assert "run --stage choice --recipe gpt2 first" in capsys.readouterr().err
    assert command("--stage", "report") == 2
    assert "no finished stage" in capsys.readouterr().err
    assert command("--stage", "choice") == 0
    choice = json.loads((out / "gpt2-choice" / "choice.json").read_text())["arms"]
    for arm, chosen in choice.items():
        assert chosen["bits_per_byte"] == min(chosen["tried"].values())
        assert len(chosen["tried"]) == 3  # two learning rates, then the other weight decay
        assert set(chosen["settings"]) == {"lr", "weight_decay"}, arm
    monkeypatch.setitem(verdict.ARMS, "l2_repel", verdict.ARMS["baseline"])
    assert command("--stage", "choice", "--arms", "l2_repel", "--seeds", "1") == 0  # next to those selected before
    assert set(json.loads((out / "gpt2-choice" / "choice.json").read_text())["arms"]) == {*choice, "l2_repel"}
    assert command("--stage", "small", "--pairs", str(pairs), "--time-ratio", "1.5") == 0
    results = json.loads((out / "gpt2-small" / "results.json").read_text())
    (compared,) = results["compared"]
    assert set(compared) == {key for key, *_ in verdict.MEASURES}
    assert list(compared["test"]) == ["baseline", "lambda 0.1", "tau 0.1", "baseline, 1.5 x the steps"]
    assert (
        json.loads((out / "gpt2-small" / "baseline-1.5-x-the-steps-s0" / "summary.json").read_text())["tokens"]
        == 6 * 128
    )
    for arm in ("baseline", "lambda 0.1", "tau 0.1"):
        assert results["settings"][arm] == {**verdict.ARMS[arm], **choice[arm]["settings"]}
    run = out / "gpt2-small" / "tau-0.1-s1"
    assert compared["train_loss"]["tau 0.1"]["values"][1] == pytest.approx(
        [line["ce"] for line in report.read_metrics(run / "metrics.jsonl") if "ce" in line][-1]
    )
    capsys.readouterr()
    assert command("--stage", "report") == 0
    shown = capsys.readouterr().out
    assert shown.count("gpt2, small: ") == 3
    for name in ("verdict.png", "recipes.png"):
        assert (out / "figures" / name).read_bytes().startswith(b"\x89PNG")
    assert command("--stage", "small", "--arms", "baseline", "tau 0.1") == 0  # the runs exist, and are evaluated
    (compared,) = json.loads((out / "gpt2-small" / "results.json").read_text())["compared"]
    assert list(compared["test"]) == ["baseline", "tau 0.1"]
    monkeypatch.setitem(verdict.STAGES["rates"], "times", (0.5, 1.0))
    assert command("--stage", "rates", "--arms", "baseline", "--seeds", "1") == 0
    (rates,) = json.loads((out / "gpt2-rates" / "choice.json").read_text())["arms"].values()
    assert len(rates["tried"]) == 2
    assert rates["settings"]["lr"] / choice["baseline"]["settings"]["lr"] in (0.5, 1.0)
    assert rates["settings"]["weight_decay"] == choice["baseline"]["settings"]["weight_decay"]
    assert command("--stage", "half", "--arms", "baseline", "--seeds", "1") == 0
    half = json.loads((out / "gpt2-half" / "baseline-s0" / "config.json").read_text())
    assert half["lr"] == choice["baseline"]["settings"]["lr"] / 2
    assert command("--stage", "124m", "--arms", "baseline", "--seeds", "1") == 0  # needs no selection
    assert json.loads((out / "gpt2-124m" / "baseline-s0" / "config.json").read_text())["beta2"] == 0.95
    monkeypatch.setitem(verdict.STAGES["limited-choice"]["grid"], "weight_decay", (0.5,))
    assert command("--stage", "limited-choice", "--arms", "baseline", "--seeds", "1") == 0
    (limited,) = json.loads((out / "gpt2-limited-choice" / "choice.json").read_text())["arms"].values()
    assert len(limited["tried"]) == 2  # with and without dropout, at the selected learning rate
    assert set(limited["settings"]) == {"lr", "weight_decay", "dropout"}
    assert limited["settings"]["lr"] == choice["baseline"]["settings"]["lr"]
    del choice["tau 0.1"]
    (out / "gpt2-choice" / "choice.json").write_text(json.dumps({"arms": choice}))
    assert command("--stage", "small") == 2
    assert "has no settings for tau 0.1" in capsys.readouterr().err


def test_verdict_takes_a_run_that_diverges_for_the_worst(load, corpus, tmp_path, monkeypatch, capsys):
    verdict = load("verdict")
    monkeypatch.setattr(verdict, "GRID", {"gpt2": {"lr": (1e-3, 1e30), "weight_decay": (0.1,)}})
    monkeypatch.setattr(verdict, "ARMS", {"baseline": {"grad_clip": 0.0, "warmup_steps": 0, "log_every": 1}})
    flags = ["--scale", "smoke", "--data", str(corpus), "--out", str(tmp_path), "--seeds", "1", "--stage", "choice"]
    assert verdict.main(flags) == 0
    tried = json.loads((tmp_path / "gpt2-choice" / "choice.json").read_text())["arms"]["baseline"]["tried"]
    assert [label for label, bits in tried.items() if bits is None] == ["baseline, lr 1e+30, weight decay 0.1"]
    assert len(tried) == 2


def test_the_committed_verdict_is_consistent_and_draws_its_figures(load, tmp_path, monkeypatch, capsys):
    """Differences and intervals follow from the values per seed, and the printed table agrees with them."""
    verdict = load("verdict")
    monkeypatch.syspath_prepend(str(FOLDER))
    results = FOLDER.parent / "results"
    table = (results / "verdict_tables.md").read_text()
    for c in json.loads((results / "verdict.json").read_text())["comparisons"]:
        assert c["low"] <= c["difference"] <= c["high"]
        if "by_seed" in c:
            pairs = np.subtract(c["by_seed"], c["baseline_by_seed"])
            half = stats.t.ppf(0.975, len(pairs) - 1) * pairs.std(ddof=1) / len(pairs) ** 0.5
            assert len(pairs) == c["seeds"]
            rounding = 1e-4 * (
                1 + stats.t.ppf(0.975, len(pairs) - 1) / len(pairs) ** 0.5
            )  # the values have four digits
            found = [pairs.mean(), pairs.mean() - half, pairs.mean() + half]
            assert found == pytest.approx([c["difference"], c["low"], c["high"]], abs=rounding)
        if c["books"] == "test":
            assert f"{c['difference']:+.4f}  {c['low']:+.4f} to {c['high']:+.4f}" in table
    (tmp_path / "verdict.json").write_bytes((results / "verdict.json").read_bytes())
    assert verdict.main(["--stage", "figures", "--out", str(tmp_path)]) == 0
    for name in ("verdict.png", "recipes.png"):
        assert (tmp_path / "figures" / name).read_bytes().startswith(b"\x89PNG")
    assert verdict.main(["--stage", "figures", "--out", str(tmp_path / "empty")]) == 2
    assert "run --stage report first" in capsys.readouterr().err


def muon_settings():
    return {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9, "adjust_lr_fn": "match_rms_adamw"}


@pytest.mark.parametrize("rows", [12, 4])
def test_normuon_and_cautious_decay_by_their_formulas(load, rows):
    load("study")
    muon, grads = load("muon"), torch.randn(3, 12, 8, generator=torch.Generator().manual_seed(0))
    start = torch.randn(12, 8, generator=torch.Generator().manual_seed(1))
    lr, scale = 0.02, 0.02 * 0.2 * math.sqrt(max(rows, 8))

    def run(variant, decay):
        p = nn.Parameter(start.clone())
        optimizer = variant([p], rows={p: rows}, **{**muon_settings(), "weight_decay": decay})
        for grad in grads:
            p.grad = grad.clone()
            optimizer.step()
            yield p.detach().double().numpy().copy()

    plain = [start.double().numpy(), *run(optim.Muon, 0.0)]
    directions = [(before - after) / scale for before, after in itertools.pairwise(plain)]
    w, squares, cautious = plain[0].copy(), np.zeros((12, 1)), plain[0].copy()
    for direction, normuon, decayed in zip(
        directions, run(muon.NorMuon, 0.0), run(muon.CautiousDecay, 0.1), strict=True
    ):
        squares = 0.95 * squares + 0.05 * (direction**2).mean(axis=1, keepdims=True)
        step = direction / np.sqrt(squares)
        w -= lr * 0.2 * step / np.sqrt((step**2).mean())  # root mean square 0.2 lr
        np.testing.assert_allclose(normuon, w, atol=1e-5)
        for i, j in np.ndindex(12, 8):
            if cautious[i, j] * direction[i, j] >= 0:
                cautious[i, j] *= 1 - lr * 0.1
        cautious -= scale * direction
        np.testing.assert_allclose(decayed, cautious, atol=1e-5)


def test_the_heads_of_the_output_are_orthogonalised_like_parameters_of_their_own(load):
    load("study")
    weight = nn.Parameter(torch.randn(8, 12))
    heads = [nn.Parameter(columns.clone()) for columns in weight.detach().chunk(3, dim=1)]
    ours = load("muon").OutputHeads([weight], **muon_settings())
    ours.heads = {weight: 3}
    theirs = optim.Muon(heads, **muon_settings())
    for _ in range(3):
        weight.grad = torch.randn(8, 12)
        for head, grad in zip(heads, weight.grad.chunk(3, dim=1), strict=True):
            head.grad = grad.clone()
        ours.step(), theirs.step()
    torch.testing.assert_close(weight.detach(), torch.cat(heads, dim=1).detach(), rtol=0, atol=1e-3)


def test_norm_bound_and_long_momentum_by_their_formulas(load):
    load("study")
    muon, generator = load("muon"), torch.Generator().manual_seed(0)
    grads = torch.randn(4, 12, 8, generator=generator)
    p = nn.Parameter(torch.zeros(12, 8))
    bounded = muon.NormBound([p], **{**muon_settings(), "weight_decay": 5.0})
    for start in (torch.full((12, 8), 0.03), torch.full((12, 8), 0.06)):
        p.data, p.grad = start.clone(), torch.zeros(12, 8)
        bounded.step()
        torch.testing.assert_close(p.detach(), start.clamp(max=0.04))  # neither decay nor update

    optimizer = muon.LongMomentum([p], **muon_settings())
    short, long = torch.zeros(2, 12, 8, dtype=torch.float64)
    for grad, lr in zip(grads, (0.02, 0.015, 0.01, 0.0), strict=True):
        optimizer.param_groups[0]["lr"], p.grad = lr, grad.clone()
        short, long = 0.9 * short + 0.1 * grad.double(), 0.99 * long + 0.01 * grad.double()
        nesterov, share = 0.9 * short + 0.1 * grad.double(), 0.5 * lr / 0.02
        (mixed,) = optimizer.averaged([p], optimizer.param_groups[0])
        torch.testing.assert_close(mixed.double(), (1 - share) * nesterov + share * long, rtol=1e-5, atol=1e-6)


def test_the_tail_average_is_the_mean_of_the_last_fifth(load):
    load("study")
    config = Config(n_layer=1, n_head=1, n_embd=8, block_size=4, vocab_size=16, max_steps=10, optimizer="muon")
    seen = []
    for build in (optim.build_optimizers, load("muon").averaging_optimizers):
        torch.manual_seed(0)
        model = GPT(config)
        optimizers = build(model, config)
        for _ in range(10):
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            for optimizer in optimizers:
                optimizer.step()
            seen.append([p.detach().clone() for p in model.parameters()])
    plain, averaged = seen[:10], seen[10:]
    for step in range(9):
        torch.testing.assert_close(averaged[step], plain[step], rtol=0, atol=0)
    for p, one, other in zip(averaged[9], plain[8], plain[9], strict=True):
        torch.testing.assert_close(p, (one + other) / 2)


def test_polar_express_orthogonalises(load):
    """Singular values from a thousandth of the norm on come to 1, in the directions of the singular vectors."""
    load("study")
    muon = load("muon")
    u, _ = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))
    v, _ = torch.linalg.qr(torch.randn(12, 8, generator=torch.Generator().manual_seed(1)))
    x = (v * torch.logspace(0, -2.5, 8)) @ u.mT
    optimizer = muon.PolarExpress([nn.Parameter(x)], **muon_settings())
    out = optimizer.directions(x[None], [], {"eps": 1e-7})[0]
    singular = (v.mT @ out @ u).diagonal()
    assert (singular - 1).abs().max() < 0.3
    torch.testing.assert_close(out, (v * singular) @ u.mT, rtol=0, atol=1e-3)


def test_mid_training_selects_learning_rates_then_compares_old_and_new(load, corpus, tmp_path, capsys):
    base, new, out = tmp_path / "base", tmp_path / "new", tmp_path / "study"
    midtraining = load("midtraining")
    size = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 32, "batch_size": 4, "max_steps": 20}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in size.items()]
    argv = ["--data", str(corpus), "--recipe", "gpt2", "--device", "cpu", "--threads", "1", "--lr", "1e-3", *flags]
    assert train.cli([*argv, "--eval-tokens", "512", "--out", str(base)]) == 0
    text = tmp_path / "new.txt"
    text.write_text("".join(f"line {i}: {i * i % 97} apples and {i % 7} pears\n" for i in range(2000)))
    assert prepare.main(["--input", str(text), "--out", str(new), "--tokenizer-from", str(base)]) == 0
    pairs, choices, cloze = (tmp_path / name for name in ("pairs.jsonl", "quiz.jsonl", "cloze.jsonl"))
    pairs.write_text('{"sentence_good": "3 apples and 2 pears", "sentence_bad": "3 pears apples and and"}\n')
    choices.write_text('{"context": "3 apples and 2", "choices": [" pears", " lines"], "answer": 0}\n')
    cloze.write_text('{"context": "3 apples and 2", "completion": " pears"}\n')
    command = ["--base", str(base), "--data", str(new), "--share", "0.5", "--seeds", "2", "--out", str(out)]
    command += ["--old-tokens", "500", "--threads", "1", "--arms", *(arms := ["baseline", "active forgetting"])]
    tasks = ["--pairs", str(pairs), "--choices", str(choices), "--completions", str(cloze)]
    assert midtraining.main([*command, *tasks]) == 0
    shown = capsys.readouterr().out

    tried = json.loads((out / "choice.json").read_text())
    assert list(tried["tried"]) == list(tried["chosen"]) == arms
    for arm, bits in tried["tried"].items():
        assert [float(lr) for lr in bits] == pytest.approx([1e-4, 3e-4, 1e-3])
        assert bits[min(bits, key=bits.get)] == bits[f"{tried['chosen'][arm]:g}"]
    results = json.loads((out / "results.json").read_text())
    assert list(results["compared"]) == list(results["base"])
    assert {"new", "old", "minimal pairs", "quiz", "cloze", "cloze loss"} < results["compared"].keys()
    for arm in arms:
        config = json.loads((out / f"{arm.replace(' ', '-')}-s1" / "config.json").read_text())
        assert (config["max_steps"], config["warmup_steps"], config["lr"]) == (10, 2, tried["chosen"][arm])
        assert config["active_forgetting"] == (5 if arm == "active forgetting" else 0)
        assert config["init_from"] == str(base)
        assert len(results["compared"]["new"][arm]["values"]) == 2
    every = midtraining.plan(
        midtraining.CONDITIONS, midtraining.base_config(base), midtraining.parse_arguments(command)
    )
    for arm, changes in midtraining.CONDITIONS.items():
        config, _ = every[arm, 0]
        assert {field: getattr(config, field) for field in changes if field != "active_forgetting"} == {
            field: value for field, value in changes.items() if field != "active_forgetting"
        }
    # The base is measured as eval.py measures it, and training on the new corpus lowers its bits per byte.
    (scores,) = evaluation.main([str(base), "--data", str(new), "--split", "test", "--stride", "32"])
    assert results["base"]["new"] == scores["bits_per_byte"]
    assert max(results["compared"]["new"]["baseline"]["values"]) < results["base"]["new"]
    assert (out / "table.txt").read_text() in shown
    assert (out / "choice.txt").read_text() in shown
    assert (out / "differences.png").read_bytes().startswith(b"\x89PNG")

    pears = tmp_path / "pears.jsonl"
    pears.write_text('{"prompt": "3 apples and 2", "completion": " pears"}\n')
    assert midtraining.main([*command, "--completions", str(pears)]) == 2
    assert "pears has prompts to answer" in capsys.readouterr().err
    assert midtraining.main([*command, "--seeds", "0"]) == 2
    assert midtraining.main([*command, "--share", "2"]) == 2
    assert midtraining.main(["--base", str(tmp_path), "--data", str(new)]) == 2
    shown = capsys.readouterr().err
    assert "--seeds is 0" in shown
    assert "--share is 2" in shown
    assert "is not the folder of a finished run" in shown


def test_conditions_chosen_across_views_are_compared_with_the_first(load, corpus, tmp_path):
    study = load("study")
    scales = {"smoke": {"seeds": 2, "train": study.SMOKE}}
    argv = ["--scale", "smoke", "--data", str(corpus), "--threads", "1", "--out", str(tmp_path)]
    views = tuple(study.at_the_end_of(letter, lambda label, letter=letter: letter in label) for letter in "ab")
    assert study.cli("some.py", "Which?", scales, lambda scale: {"a": {}, "b": {}}, views, argv) == 0
    assert list(json.loads((tmp_path / "results.json").read_text())["compared"]["at_the_end"]["spearman"]) == ["a", "b"]


def test_measurements_are_kept_until_their_files_change(load, run, tmp_path):
    study, pairs = load("study"), tmp_path / "pairs.jsonl"
    shutil.copytree(run, tmp_path / "run")
    settings = json.loads((run / "config.json").read_text()) | {"out": str(tmp_path / "run")}
    settings.pop("environment")
    flags = ["--split", "none", "--minimal-pairs", str(pairs)]
    row = '{"sentence_good": "aa bb", "sentence_bad": "bb aa"}\n'
    for rows in (1, 3, 3):
        pairs.write_text(rows * row)
        assert study.evaluated(from_dict(settings), "pairs", flags)["minimal_pairs"]["pairs"] == rows
    before = (tmp_path / "run" / "measured.json").stat().st_mtime_ns
    study.evaluated(from_dict(settings), "pairs", flags)
    assert (tmp_path / "run" / "measured.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("name", ["whole", "output heads", "normuon", "long momentum", "norm bound"])
def test_an_interrupted_variant_of_muon_goes_on(load, name):
    load("study")
    variant = load("muon").VARIANTS[name]["build_optimizers"]
    config = Config(n_layer=1, n_head=2, n_embd=8, block_size=4, vocab_size=16, max_steps=10, optimizer="muon")

    def steps(optimizers, model, first, last):
        for step in range(first, last):
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            for optimizer in optimizers:
                optimizer.step()

    models = [GPT(config) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    one, other = (variant(model, config) for model in models)
    steps(one, models[0], 0, 2)
    models[1].load_state_dict(models[0].state_dict())
    checkpoint.load_optimizers(other, [copy.deepcopy(optimizer.state_dict()) for optimizer in one], Path("x.pt"))
    steps(one, models[0], 2, 4), steps(other, models[1], 2, 4)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)


def test_a_tail_average_is_not_resumed_in_silence(load, corpus, tmp_path):
    study = load("study")
    arms = {"tail average": load("muon").VARIANTS["tail average"]}
    argv = ["--scale", "smoke", "--data", str(corpus), "--threads", "1", "--out", str(tmp_path), "--seeds", "1"]
    scales = {"smoke": {"seeds": 1, "train": {**study.SMOKE, "recipe": "fast", "warmup_steps": 1, "save_every": 2}}}
    plan = study.make_plan(scales["smoke"], arms, tmp_path, study.parse_arguments("muon", "", scales, argv))
    ((config, _),) = plan.values()
    with mock.patch.object(train, "build_optimizers", arms["tail average"]["build_optimizers"]):
        train.main(dataclasses.replace(config, max_steps=2))
        with pytest.raises(InputError, match="remove the folder of this run"):
            train.main(dataclasses.replace(config, resume=True))
