"""The trainer: its output files, exact reproducibility, and rejected input."""

import dataclasses
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal, get_args, get_origin

import numpy as np
import pytest
import torch

import train
from minidisp import InputError, load, optim, report
from minidisp.config import Config, from_dict, parse, to_dict
from minidisp.data import Batches, Dataset
from minidisp.dispersion import DispersionLoss
from minidisp.flags import flag
from minidisp.model import GPT, GPTConfig
from minidisp.objective import Forward, build_objective
from minidisp.optim import build_optimizers, learning_rate
from minidisp.runtime import checkpoint, device
from minidisp.runtime.guard import first_bad_tensor
from minidisp.runtime.run_folder import changed_settings
from tests.conftest import small_config, small_flags

ROOT = Path(train.__file__).parent
TIMES = {"tokens_per_second", "seconds"}  # the only values that may differ between two equal runs


def weights(run: Path) -> dict:
    return checkpoint.read(run / checkpoint.LAST)["model"]


def lines(run: Path) -> list[dict]:
    metrics = report.read_metrics(run / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in TIMES} for line in metrics]


def assert_same_state(a: Path, b: Path) -> None:
    """Weights, optimisers, random numbers: the whole state of a run."""
    states = [checkpoint.read(run / checkpoint.LAST) for run in (a, b)]
    for state in states:
        del state["seconds"], state["config"]["out"], state["config"]["resume"]
    assert_equal(*states)


def assert_equal(a, b, where: str = "") -> None:
    assert type(a) is type(b), where
    if isinstance(a, dict | list):
        keys = a.keys() if isinstance(a, dict) else range(len(a))
        assert keys == (b.keys() if isinstance(a, dict) else range(len(b))), where
        for key in keys:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def assert_same_weights(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_a_run_writes_its_documented_files(run):
    files = {path.name for path in run.iterdir()}
    assert files == {
        "config.json",
        "metrics.jsonl",
        "ckpt_last.pt",
        "ckpt_best.pt",
        "tokenizer.model",
        "summary.json",
        "figures",
    }
    for name in ("loss.png", "cosine.png", "heatmap.png"):
        assert (run / "figures" / name).read_bytes().startswith(b"\x89PNG")
    metrics = report.read_metrics(run / "metrics.jsonl")
    steps = [line for line in metrics if "loss" in line]
    evals = [line for line in metrics if "val_loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert [line["step"] for line in evals] == [0, 6, 12]
    assert {
        "step",
        "tokens",
        "loss",
        "ce",
        "ce_mean",
        "dispersion",
        "mean_cosine",
        "lr",
        "grad_norm",
        "grad_norm_max",
        "skipped",
        "tokens_per_second",
        "seconds",
    } == steps[0].keys()
    for key in ("val_loss", "perplexity", "bits_per_byte", "mean_cosine_by_layer", "spearman", "kendall"):
        assert all(key in line for line in evals)
    for line in steps:
        assert line["loss"] == pytest.approx(line["ce"] + 0.1 * line["dispersion"], abs=1e-6)
        assert line["tokens"] == line["step"] * 4 * 32
    assert evals[-1]["val_loss"] < evals[0]["val_loss"]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["last"]["val_loss"] == evals[-1]["val_loss"]
    assert json.loads((run / "config.json").read_text())["environment"]["torch"] == torch.__version__


def test_weight_zero_is_plain_training(corpus, tmp_path):
    """A dozen lines of ordinary training give the same weights, bit for bit."""
    config = small_config(corpus, tmp_path / "run")
    train.main(config)
    dataset = Dataset(corpus)
    config = dataclasses.replace(config, vocab_size=dataset.tokenizer.vocab_size)
    batches = Batches(dataset.split("train"), 32, config.seed)
    torch.manual_seed(config.seed)
    model = GPT(config)
    (optimizer,) = build_optimizers(model, config)
    for step in range(config.max_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        x, y = (torch.from_numpy(tokens) for tokens in batches.batch(step * 4, 4))
        model(x, y).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
    assert_same_weights(weights(tmp_path / "run"), model.state_dict())


def test_embedding_lr_is_a_multiple_of_lr(corpus, tmp_path):
    """After one step without decay, embeddings have moved five times as far, and the rest equally far, bit for bit."""
    options = {"max_steps": 1, "tied": False, "weight_decay": 0.0}
    for scale in (1.0, 5.0):
        train.main(small_config(corpus, tmp_path / f"{scale}", embedding_lr=scale, **options))
    train.main(small_config(corpus, tmp_path / "start", **{**options, "max_steps": 0}))
    start, once, five = (weights(tmp_path / name) for name in ("start", "1.0", "5.0"))
    moved, further = (after["wte.weight"] - start["wte.weight"] for after in (once, five))
    torch.testing.assert_close(further, 5 * moved, rtol=1e-3, atol=1e-7)
    assert moved.abs().max() > 0
    assert_same_weights({**five, "wte.weight": once["wte.weight"]}, once)


def test_dispersion_changes_neither_start_nor_data(corpus, tmp_path):
    for name, options in {"off": {}, "on": {"dispersion": 0.5, "dispersion_tokens": 8}}.items():
        train.main(small_config(corpus, tmp_path / name, dropout=0.1, **options))
    off, on = lines(tmp_path / "off"), lines(tmp_path / "on")
    assert off[0] == on[0]  # the evaluation before the first step
    assert off[1]["ce"] == on[1]["ce"]  # the first training batch, dropout included
    assert off[2]["ce"] != on[2]["ce"]
    off, on = (checkpoint.read(tmp_path / name / checkpoint.LAST) for name in ("off", "on"))
    assert torch.equal(off["rng"]["cpu"], on["rng"]["cpu"])  # as many random numbers were drawn


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_two_micro_batches_of_four_equal_one_of_eight(corpus, tmp_path, optimizer):
    options = {"dispersion": 1.0, "dispersion_tokens": 8, "max_steps": 6, "optimizer": optimizer}
    train.main(small_config(corpus, tmp_path / "one", batch_size=8, **options))
    train.main(small_config(corpus, tmp_path / "two", batch_size=4, grad_accum=2, **options))
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    tolerance = (
        2e-5 if optimizer == "adamw" else 2e-3
    )  # Muon orthogonalises in bfloat16, where rounding errors are visible
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=tolerance)
    for a, b in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        if "loss" in a:
            assert a["dispersion"] == pytest.approx(b["dispersion"], abs=tolerance)
            assert a["loss"] == pytest.approx(b["loss"], abs=tolerance)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"optimizer": "muon", "grad_accum": 3, "save_every": 5},
        {"grad_accum": 2, "arch": "qwen3", "schedule": "wsd", "log_every": 3},
        {
            "optimizer": "muon",
            "dispersion_variant": "l2_repel",
            "dispersion_layers": "last",
            "dispersion_schedule": "linear:0.5",
            "dtype": "bfloat16",
        },
        {"dispersion": 0.0, "dtype": "float16"},  # with a gradient scale, for which steps are skipped
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_resuming_equals_never_having_stopped(corpus, tmp_path, options):
    """In the middle of an epoch (of 112 steps), between two saves: weights, optimisers, random numbers, metrics."""
    options = {"dispersion": 0.1, "dispersion_tokens": 8, "dropout": 0.1, "keep": 1, "batch_size": 8, **options}
    train.main(small_config(corpus, tmp_path / "whole", **options))
    half = tmp_path / "halves"
    for steps in (4, 8):
        stop_after(steps, small_config(corpus, half, **options, resume=steps > 4))
    # As if it had been killed later: steps after the checkpoint are repeated, and logged once.
    with open(half / "metrics.jsonl", "a") as file:
        file.write(json.dumps({**lines(half)[-1], "step": 9}) + "\n")
    train.main(small_config(corpus, half, **options, resume=True))
    assert_same_state(half, tmp_path / "whole")
    assert lines(half) == lines(tmp_path / "whole")
    best = [checkpoint.read(run / checkpoint.BEST) for run in (half, tmp_path / "whole")]
    assert_same_weights(best[0]["model"], best[1]["model"])
    assert best[0]["val_loss"] == best[1]["val_loss"]


def test_more_steps_than_planned(corpus, tmp_path):
    """A constant schedule equals the longer run, except for the evaluation at the first end; a cosine stretches."""
    for schedule in ("constant", "cosine"):
        run, longer = tmp_path / schedule, tmp_path / f"{schedule}-longer"
        train.main(small_config(corpus, run, schedule=schedule, max_steps=6))
        train.main(small_config(corpus, run, schedule=schedule, max_steps=9, resume=True))
        train.main(small_config(corpus, longer, schedule=schedule, max_steps=9))
        equal = all(torch.equal(a, b) for a, b in zip(weights(run).values(), weights(longer).values(), strict=True))
        assert equal == (schedule == "constant")
        assert [line["step"] for line in lines(run) if "loss" in line] == list(range(1, 10))


def stop_after(steps: int, config) -> None:
    """Train, and interrupt this process during step `steps`."""
    original = train.learning_rate

    def interrupting(step, config):
        if step == steps - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return original(step, config)

    train.learning_rate = interrupting
    try:
        with pytest.raises(SystemExit) as stopped:
            train.main(config)
    finally:
        train.learning_rate = original
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert stopped.value.code == 130
    assert checkpoint.read(Path(config.out) / checkpoint.LAST)["step"] == steps


def test_same_seed_same_run_and_another_seed_another(corpus, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train.main(small_config(corpus, tmp_path / name, seed=seed, dispersion=0.1))
    assert_same_weights(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert lines(tmp_path / "a") == lines(tmp_path / "b")
    assert lines(tmp_path / "a") != lines(tmp_path / "c")


def test_the_evaluation_interval_changes_nothing_else(corpus, tmp_path):
    train.main(small_config(corpus, tmp_path / "often", eval_every=1, dropout=0.1))
    train.main(small_config(corpus, tmp_path / "rarely", eval_every=100, log_every=5, dropout=0.1))
    assert_same_weights(weights(tmp_path / "often"), weights(tmp_path / "rarely"))


@pytest.mark.parametrize(
    "options",
    [{"arch": "qwen3"}, {"optimizer": "muon"}, {"dispersion": 1.0}, {"schedule": "wsd"}, {"dtype": "bfloat16"}],
)
def test_it_learns_a_text_by_heart(tmp_path, options):
    from data import prepare

    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    out = tmp_path / "data"
    assert (
        prepare.main(["--input", str(tmp_path / "text.txt"), "--name", "fox", "--tokenizer", "byte", "--out", str(out)])
        == 0
    )
    rarely = {"max_steps": 90, "eval_every": 90, "save_every": 90, "log_every": 50}
    summary = train.main(small_config(out, tmp_path / "run", **rarely, lr=1e-2, **options))
    assert summary["first"]["val_loss"] == pytest.approx(np.log(257), abs=0.2)
    assert summary["last"]["val_loss"] < 0.3


def test_dispersion_lowers_the_mean_cosine(corpus, tmp_path):
    cosines = []
    for weight in (0.0, 1.0):
        rarely = {"max_steps": 60, "eval_every": 60, "save_every": 60}
        summary = train.main(small_config(corpus, tmp_path / str(weight), dispersion=weight, **rarely))
        cosines.append(summary["last"]["last_half_mean"])
    assert cosines[1] < cosines[0] - 0.1


def test_init_from_continues_with_the_weights(corpus, run, tmp_path):
    train.main(small_config(corpus, tmp_path / "next", init_from=str(run), max_steps=1))
    first = lines(tmp_path / "next")[0]
    best = checkpoint.read(run / checkpoint.BEST)
    assert first["val_loss"] == pytest.approx(best["val_loss"], abs=1e-6)


def test_load_gives_the_model_of_the_best_checkpoint(run):
    model, tokenizer = load(run)
    assert not model.training
    assert_same_weights(model.state_dict(), checkpoint.read(run / checkpoint.BEST)["model"])
    prompt = torch.tensor([tokenizer.encode("abc ")])
    assert tokenizer.decode(model.generate(prompt, 5, seed=0)[0].tolist()).startswith("abc ")


def test_keep_leaves_the_newest_numbered_checkpoints(corpus, tmp_path):
    train.main(small_config(corpus, tmp_path / "run", save_every=3, keep=2))
    assert sorted(path.name for path in (tmp_path / "run").glob("ckpt_0*")) == ["ckpt_00000009.pt", "ckpt_00000012.pt"]


def test_max_steps_zero_leaves_the_initial_model(corpus, tmp_path):
    summary = train.main(small_config(corpus, tmp_path / "run", max_steps=0))
    assert summary["last"]["step"] == 0
    load(tmp_path / "run")


def test_the_saved_config_replays_the_run(corpus, run, tmp_path):
    config = parse(["--config", str(run / "config.json"), "--out", str(tmp_path / "again"), "--seed", "0"])
    train.main(config)
    assert_same_weights(weights(tmp_path / "again"), weights(run))


def test_resume_needs_no_other_flag(run):
    config = parse(["--resume", "--out", str(run), "--max-steps", "20"])
    saved = json.loads((run / "config.json").read_text())
    del saved["environment"]
    assert {**to_dict(config), "resume": False, "max_steps": 12} == saved


# --- the command line -----------------------------------------------------------------------------------------------


def command(*arguments, cwd=ROOT, timeout=120) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def test_the_command_trains(corpus, tmp_path):
    done = command(*small_flags(), "--data", corpus, "--out", tmp_path / "run", "--dispersion", "0.1")
    assert done.returncode == 0, done.stderr
    assert "validation loss" in done.stdout
    assert "val loss" in done.stdout
    assert "angular_spread" in done.stdout
    assert not done.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_prints_how_to_resume(corpus, tmp_path, number, code):
    out = tmp_path / "run"
    process = subprocess.Popen(
        [
            sys.executable,
            str(ROOT / "train.py"),
            *small_flags(max_steps=100_000),
            "--data",
            str(corpus),
            "--out",
            str(out),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.time() + 60
    while not (out / "metrics.jsonl").exists() or (out / "metrics.jsonl").read_text().count("\n") < 5:
        assert time.time() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert f"--resume --out {out}" in stderr
    assert "Traceback" not in stdout + stderr
    step = checkpoint.read(out / checkpoint.LAST)["step"]
    assert step == lines(out)[-1]["step"]


BAD = {
    "unknown flag": (["--dispersoin", "0.1"], "did you mean --dispersion"),
    "an unset variable": ([""], "an argument is empty"),
    "not a number": (["--dispersion", "much"], "--dispersion"),
    "not finite": (["--lr", "nan"], "--lr"),
    "negative": (["--batch-size", "0"], "--batch-size"),
    "unknown choice": (["--preset", "huge"], "tiny"),
    "unknown variant": (["--dispersion-variant", "angular"], "angular_spread"),
    "layers": (["--dispersion", "0.1", "--dispersion-layers", "1,9"], "--dispersion-layers"),
    "clamp": (["--dispersion-clamp", "1.5"], "--dispersion-clamp"),
    "tau": (["--dispersion-tau", "0"], "--dispersion-tau"),
    "one token": (["--dispersion", "0.1", "--dispersion-tokens", "1"], "--dispersion-tokens"),
    "heads": (["--n-head", "5"], "--n-embd"),
    "min-lr": (["--min-lr", "1"], "--min-lr"),
    "contradiction": (["--resume", "--overwrite"], "--resume"),
    "no corpus": (["--data", "nonsense"], "data/prepare.py"),
    "no config": (["--config", "missing.json"], "missing.json"),
    "no run": (["--resume", "--out", "missing"], "missing"),
    "no weights": (["--init-from", "missing"], "missing"),
    "long context": (["--block-size", "30000"], "--block-size"),
    "one token of context": (["--block-size", "1"], "--block-size"),
    "large seed": (["--seed", "99999999999999999999"], "--seed"),
    "a file as corpus": (["--data", __file__], "data/prepare.py"),
    "too large a model": (["--n-embd", "600000000"], "at most 1048576"),
    "odd head": (["--arch", "qwen3", "--head-dim", "7"], "--head-dim"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_usage_is_one_line_and_exit_2(corpus, tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    flags, expected = BAD[name]
    base = [] if "--data" in flags else ["--data", str(corpus)]
    assert train.cli([*base, "--out", "run", *flags] if "--out" not in flags else [*base, *flags]) == 2
    captured = capsys.readouterr()
    assert expected in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_device_is_named(corpus, tmp_path, capsys):
    assert train.cli(["--data", str(corpus), "--out", str(tmp_path / "run"), "--device", "cuda"]) == 2
    assert "--device cuda" in capsys.readouterr().err


@pytest.mark.parametrize(("instructions", "narrow"), [("avx512_bf16", 128), ("amx_bf16", 32)])
def test_bfloat16_is_offered_where_the_processor_has_it(corpus, tmp_path, monkeypatch, capsys, instructions, narrow):
    there, offered = {"dtype": "auto", "n_embd": 192}, "--dtype bfloat16"
    cases = [(True, there, True), (True, {**there, "dtype": "float32"}, False), (False, there, False)]
    for has, changes, wanted in [*cases, (True, {**there, "n_embd": narrow}, False)]:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: {instructions: has}, raising=False)
        train.main(small_config(corpus, tmp_path / "run", overwrite=True, device="cpu", max_steps=1, **changes))
        (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("device"))
        assert "float32" in line
        assert (offered in line) == wanted


def test_an_occupied_folder_is_not_overwritten(corpus, run, tmp_path, capsys):
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    assert train.cli([*small_flags(), "--data", str(corpus), "--out", str(run)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    (tmp_path / "file").write_text("mine")
    assert train.cli([*small_flags(), "--data", str(corpus), "--out", str(tmp_path / "file")]) == 2
    assert "not a folder" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in run.iterdir() if path.is_file()}


@pytest.mark.parametrize(
    "name", ["meta.json", "figures/loss.png", "tokenizer.model", "metrics.jsonl", "model.safetensors"]
)
@pytest.mark.parametrize("flags", [[], ["--overwrite"]])
def test_files_in_other_folders_are_not_lost(corpus, tmp_path, capsys, name, flags):
    file = tmp_path / "mine" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    assert train.cli([*small_flags(), "--data", str(corpus), "--out", str(tmp_path / "mine"), *flags]) == 2
    assert f"{tmp_path / 'mine'} is" in (error := capsys.readouterr().err)
    assert error.count("\n") == 1
    assert [path for path in (tmp_path / "mine").rglob("*") if path.is_file()] == [file]
    assert file.read_text() == "mine"


def test_fewer_steps_than_completed_are_rejected(corpus, run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    before = (tmp_path / "run" / "config.json").read_text()
    flags = ["--resume", "--out", str(tmp_path / "run"), "--data", str(corpus), "--max-steps", "5"]
    assert train.cli(flags) == 2
    assert "at step 12, which is beyond --max-steps 5" in capsys.readouterr().err
    assert (tmp_path / "run" / "config.json").read_text() == before


def test_an_unwritable_folder_is_named(corpus, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert train.cli([*small_flags(), "--data", str(corpus), "--out", str(tmp_path / "file" / "run")]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "file") in error
    assert error.count("\n") == 1


FIXED = {
    "arch",
    "n_layer",
    "n_head",
    "n_kv_head",
    "n_embd",
    "head_dim",
    "mlp_dim",
    "block_size",
    "bias",
    "gelu",
    "tied",
    "rope_theta",
    "vocab_size",
    "norm_eps",
    "attention_bias",
    "mlp",
    "zero_init",
    "recipe",
    "seed",
    "optimizer",
    "ema",
    "batch_size",
    "grad_accum",
    "embedding_lr",
    "packing",
}

# Fields for which no other value can be derived: most strings, and those that depend on other settings.
CHANGES = {
    "out": "elsewhere",
    "data": "elsewhere",
    "init_from": "x",
    "distill": "x",
    "dispersion_layers": "last",
    "dispersion_schedule": "linear:0.5",
    "preset": "mini",
    "recipe": "fast",
    "n_kv_head": 1,
    "n_head": 4,
    "n_embd": 64,
    "head_dim": 8,
    "block_size": 16,
    "min_lr": 1e-5,
    "lr": 1e-4,
    "dropout": 0.2,
    "active_forgetting": 3,
    "dispersion_tokens": 4,
    "dispersion_clamp": 0.1,
    "momentum": 0.8,
    "beta1": 0.8,
    "beta2": 0.8,
    "norm_eps": 1e-3,
    "ema": 0.9,
}


def another(field: dataclasses.Field, value):
    """Another valid value."""
    if field.name in CHANGES:
        return CHANGES[field.name]
    if get_origin(field.type) is Literal:
        return next(choice for choice in get_args(field.type) if choice != value)
    assert type(value) in (bool, int, float), f"{field.name}: put a value that differs from {value!r} into CHANGES"
    return not value if type(value) is bool else value + 1


def test_a_new_flag_is_refused_on_resume_unless_it_says_otherwise():
    assert flag(0, "help").metadata["resume"] == "refused"


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Config)])
def test_settings_that_resume_rejects_allows_and_reports(corpus, run, name):
    fields = {field.name: field for field in dataclasses.fields(Config)}
    may_change = {name: field.metadata.get("resume", "refused") for name, field in fields.items()}
    assert {name for name, may in may_change.items() if may == "refused"} - FIXED == set(), (
        "is it right that it may not change?"
    )
    path, dataset = run / checkpoint.LAST, Dataset(corpus)
    state = checkpoint.read(path)
    if name.startswith("distill_"):  # invalid without a teacher
        state["config"]["distill"] = "x"
    if name == "attention_bias":  # not available for gpt2
        state["config"]["arch"] = "qwen3"
    config = dataclasses.replace(from_dict(state["config"]), **{name: another(fields[name], state["config"][name])})
    assert getattr(config, name) != state["config"][name]
    if name in FIXED:
        with pytest.raises(InputError, match=name):
            changed_settings(state, config, dataset, None, path)
    else:
        said = changed_settings(state, config, dataset, None, path)
        assert [words.split()[0] for words in said] == ([name] if may_change[name] == "reported" else [])
        assert may_change[name] in ("reported", "silent")


def test_resume_may_split_the_batch_otherwise(corpus, run):
    state = checkpoint.read(run / checkpoint.LAST)
    config = dataclasses.replace(from_dict(state["config"]), batch_size=1, grad_accum=4)
    assert changed_settings(state, config, Dataset(corpus), None, run) == []


def test_resume_refuses_other_data_and_another_tokenizer_by_name(corpus, bpe_corpus, run, tmp_path, capsys):
    from data import prepare

    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    other = tmp_path / "other"
    (tmp_path / "other.txt").write_text("other words " * 2000)
    assert (
        prepare.main(
            ["--input", str(tmp_path / "other.txt"), "--name", "o", "--tokenizer", "byte", "--out", str(other)]
        )
        == 0
    )
    for flags, expected in (
        (["--n-layer", "3"], "n_layer is 2"),
        (["--data", str(bpe_corpus)], "a different tokenizer"),
        (["--data", str(other)], "different data"),
        (["--seed", "5"], "seed is 0"),
        (["--init-from", str(run)], "--init-from"),
    ):
        capsys.readouterr()
        assert train.cli(["--resume", "--out", str(run), *flags]) == 2
        error = capsys.readouterr().err
        assert expected in error
        assert error.count("\n") == 1
    assert before == {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}


def test_resume_reads_a_corpus_that_was_written_to(corpus, tmp_path, capsys):
    """The sizes, meta.json and the tokenizer are the same, but not the tokens; or only the times have changed."""
    data, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(corpus, data)
    train.main(small_config(data, out, max_steps=3))
    train.main(small_config(data, out, max_steps=4, resume=True))
    assert "checking the shards" not in capsys.readouterr().err
    shard = data / "val_000.bin"
    os.utime(shard)
    train.main(small_config(data, out, max_steps=5, resume=True))
    assert "checking the shards" in capsys.readouterr().err
    content = shard.read_bytes()
    shard.write_bytes(content[:64] + np.frombuffer(content[64:], "<u2")[::-1].tobytes())
    with pytest.raises(InputError, match=r"val_000\.bin has changed"):
        train.main(small_config(data, out, max_steps=6, resume=True))


def test_settings_changed_on_resume_apply_and_are_reported(corpus, tmp_path, capsys):
    """load_state_dict would silently restore the old weight decay."""
    run = tmp_path / "run"
    train.main(small_config(corpus, run, max_steps=6))
    train.main(small_config(corpus, run, max_steps=9, weight_decay=0.7, beta2=0.5, resume=True))
    out = capsys.readouterr().out
    assert "resumed at step 6, from here on with" in out
    assert "weight_decay 0.7 instead of 0.1" in out
    assert "max_steps 9 instead of 6 (this also changes the cosine schedule)" in out
    groups = checkpoint.read(run / checkpoint.LAST)["optimizers"][0]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.7, 0.0]
    assert [group["betas"] for group in groups] == [(0.9, 0.5)] * 2


def test_a_run_begun_from_weights_can_be_resumed(corpus, run, tmp_path):
    train.main(small_config(corpus, tmp_path / "next", init_from=str(run), max_steps=4))
    assert train.cli(["--resume", "--out", str(tmp_path / "next"), "--max-steps", "6"]) == 0
    assert lines(tmp_path / "next")[-1]["step"] == 6


def test_config_json_records_the_environment(corpus, run):
    environment = json.loads((run / "config.json").read_text())["environment"]
    assert environment["torch"] == torch.__version__
    assert environment["numpy"] == np.__version__
    assert environment["data_hash"] == Dataset(corpus).hash
    assert environment["tokenizer_sha256"] == Dataset(corpus).tokenizer.hash
    assert environment["cores"] == os.cpu_count()
    assert environment["cpu"]
    assert environment["memory_gib"] > 0
    if environment["commit"] is None:
        assert environment["dirty"] is None
    else:
        assert re.fullmatch("[0-9a-f]{40,64}", environment["commit"])
        assert isinstance(environment["dirty"], bool)


def test_without_git_it_trains_all_the_same(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(device.shutil, "which", lambda name: None)
    train.main(small_config(corpus, tmp_path / "run", max_steps=1))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["environment"]["commit"] is None


# --- NaN and Inf ----------------------------------------------------------------------------------------------------


def poison(monkeypatch, steps, where=lambda model, loss: loss * math.nan) -> None:
    """Make the loss of these optimiser steps NaN (counted from 0, one forward pass each)."""
    calls = itertools.count()

    class Poisoned(GPT):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            if not self.training or next(calls) not in steps:
                return output
            return output._replace(loss=where(self, output.loss))

    monkeypatch.setattr(train, "GPT", Poisoned)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_nan_step_is_skipped_counted_and_reported(corpus, tmp_path, monkeypatch, capsys, optimizer, bad):
    """Weights, optimiser and schedule equal those of normal training without that update; the data moves on."""
    steps = (0, 3, 4)
    # The loss is finite but its derivative is not: 0 * sqrt'(0).
    worse = {"loss": lambda m, loss: loss * math.inf, "gradient": lambda m, loss: loss + (loss - loss).sqrt()}[bad]
    poison(monkeypatch, steps, worse)
    summary = train.main(small_config(corpus, tmp_path / "run", optimizer=optimizer))
    assert summary["skipped"] == 3
    assert [line["skipped"] for line in lines(tmp_path / "run") if "loss" in line] == [
        1,
        1,
        1,
        2,
        3,
        3,
        3,
        3,
        3,
        3,
        3,
        3,
    ]
    out = capsys.readouterr().out
    assert "up to step 4, loss or gradient was NaN or Inf and the update skipped: 2 in total" in out
    assert "3 updates skipped" in out
    monkeypatch.setattr(train, "GPT", GPT)
    skip = patched_steps(monkeypatch, steps)
    train.main(small_config(corpus, tmp_path / "skipping", optimizer=optimizer))
    assert skip == list(steps)
    a, b = (checkpoint.read(tmp_path / name / checkpoint.LAST) for name in ("run", "skipping"))
    for key in ("model", "optimizers", "rng"):
        assert_equal(a[key], b[key], key)


def patched_steps(monkeypatch, steps) -> list[int]:
    """Skip these updates regardless of their values; returns those that were skipped."""
    left_out, calls = [], itertools.count()

    def step_where(finite, optimizers):
        assert finite
        if (step := next(calls)) in steps:
            left_out.append(step)
        else:
            for optimizer in optimizers:
                optimizer.step()

    monkeypatch.setattr(train, "step_where", step_where)
    return left_out


@pytest.mark.parametrize("bad", [(), (0,), (2, 3)])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_decision_on_the_device_is_that_on_the_host(corpus, name, bad):
    config = dataclasses.replace(small_config(corpus, Path("unused")), vocab_size=257, optimizer=name)
    batches = Batches(Dataset(corpus).split("train"), 32, 0)
    results = []
    for step_where in (optim.step_where, optim.step_where_on_device):
        torch.manual_seed(0)
        model = GPT(config)
        optimizers = build_optimizers(model, config)
        for step in range(6):
            x, y = (torch.from_numpy(tokens) for tokens in batches.batch(step * 4, 4))
            (model(x, y).loss * (math.nan if step in bad else 1.0)).backward()
            step_where(torch.tensor(step not in bad), optimizers)
            model.zero_grad()
        results.append({"model": dict(model.state_dict()), "optimizers": [o.state_dict()["state"] for o in optimizers]})
    host, device = results
    if bad == (0,):  # if the first step is skipped, optimiser states are created in the second
        assert all(torch.isfinite(p).all() for p in device["model"].values())
    assert_equal(host, device)


def test_too_many_bad_steps_end_with_3_and_the_good_checkpoint(corpus, tmp_path, monkeypatch, capsys):
    class Broken(GPT):
        def _backbone(self, *args, **kwargs):
            x, hidden_states = super()._backbone(*args, **kwargs)
            if self.training and self.steps > 7:
                hidden_states = (hidden_states[0], hidden_states[1] * math.nan, hidden_states[2])
                x = x * math.nan
            return x, hidden_states

        steps = 0

        def forward(self, *args, **kwargs):
            self.steps += self.training
            return super().forward(*args, **kwargs)

    monkeypatch.setattr(train, "GPT", Broken)
    flags = small_flags(max_steps=40, save_every=3)
    assert train.cli([*flags, "--data", str(corpus), "--out", str(tmp_path / "run")]) == 3
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "10 of 17 steps" in captured.err
    assert "the hidden state of layer 1 became NaN or Inf first" in captured.err
    assert f"{tmp_path / 'run' / checkpoint.LAST} is good, step 6" in captured.err
    state = checkpoint.read(tmp_path / "run" / checkpoint.LAST)
    assert (state["step"], state["skipped"]["total"]) == (6, 0)
    assert lines(tmp_path / "run")[-1]["loss"] is None
    # Without the fault, it continues from there.
    monkeypatch.setattr(train, "GPT", GPT)
    assert train.cli(["--resume", "--out", str(tmp_path / "run"), "--max-steps", "12"]) == 0


def test_many_single_bad_steps_end_with_3(corpus, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, range(0, 100, 2))
    flags = small_flags(max_steps=100, eval_every=100)
    assert train.cli([*flags, "--data", str(corpus), "--out", str(tmp_path / "run")]) == 3
    assert "21 of 41 steps" in capsys.readouterr().err


def go_bad(what: str):
    """A model of two layers in which one tensor becomes NaN, and the loss."""
    config = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=257)
    torch.manual_seed(0)
    model, dispersion = GPT(config), DispersionLoss(impl="reference")
    worsen = lambda module, args, output: output * math.nan  # noqa: E731
    if what == "weights":
        model.h[1].mlp.c_fc.weight.data[3, 2] = math.inf
    elif what == "embeddings":
        model.wte.register_forward_hook(worsen)
    elif what == "layer 1":
        model.h[0].mlp.c_proj.register_forward_hook(worsen)
    elif what == "layer 2":
        model.ln_f.register_forward_hook(worsen)
    elif what == "logits":
        model.lm_head.register_forward_hook(worsen)
    elif what == "cross-entropy":
        model._cross_entropy = lambda x, targets, reduction: x.sum() * math.nan
    elif what == "dispersion":
        dispersion.register_forward_hook(worsen)
    elif what == "gradient":
        model.h[0].attn.c_attn.weight.register_hook(lambda gradient: gradient * math.nan)
    return model, dispersion


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("weights", "the weights h.1.mlp.c_fc.weight became"),
        ("embeddings", "the embeddings became"),
        ("layer 1", "the hidden state of layer 1 became"),
        ("layer 2", "the hidden state of layer 2 became"),
        ("logits", "the logits became"),
        ("cross-entropy", "the cross-entropy became"),
        ("dispersion", "the dispersion loss became"),
        ("gradient", "the gradient of h.0.attn.c_attn.weight became"),
        ("nothing", "no tensor is NaN or Inf"),
    ],
)
def test_the_first_bad_tensor_is_named(corpus, what, expected):
    model, dispersion = go_bad(what)
    config = small_config(corpus, Path("unused"), dispersion=0.1)
    batches = Batches(Dataset(corpus).split("train"), 8, 0)
    objective = build_objective(config, model, dispersion, None, "")

    def forward(first: int) -> Forward:
        x, y = (torch.from_numpy(tokens) for tokens in batches.batch(first, 2))
        return Forward(x, y, *model(x, y, return_hidden_states=True)[1:], step=3)

    passes = ((1 / 2, forward(first)) for first in (3 * 4, 3 * 4 + 2))
    assert first_bad_tensor(model, objective, passes).startswith(expected)


# --- out of memory --------------------------------------------------------------------------------------------------


def limit_memory(monkeypatch, sequences: int, training_only: bool = True, error=torch.OutOfMemoryError) -> list[int]:
    """Make the model run out of memory, after drawing some random numbers, with more sequences than that."""
    seen: list[int] = []

    class Limited(GPT):
        def forward(self, idx, *args, **kwargs):
            if self.training:
                seen.append(len(idx))
            output = super().forward(idx, *args, **kwargs)
            if len(idx) > sequences and (self.training or not training_only):
                raise error("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
            return output

    monkeypatch.setattr(train, "GPT", Limited)
    return seen


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError, MemoryError])
def test_out_of_memory_halves_the_micro_batch(corpus, tmp_path, monkeypatch, capsys, error):
    options = {"dropout": 0.1, "dispersion": 0.1, "dispersion_tokens": 8, "max_steps": 6}
    train.main(small_config(corpus, tmp_path / "small", batch_size=2, grad_accum=4, **options))
    seen = limit_memory(monkeypatch, 2, error=error)
    train.main(small_config(corpus, tmp_path / "run", batch_size=8, **options))
    assert seen == [8, 4] + 6 * [2, 2, 2, 2]
    out = capsys.readouterr().out
    assert out.count("out of memory") == 2
    assert (
        "step 1: out of memory; retrying with micro-batches of 4 sequences instead of 8, the same effective batch size"
        in out
    )
    small, run = (checkpoint.read(tmp_path / name / checkpoint.LAST) for name in ("small", "run"))
    for key in ("model", "optimizers", "rng"):
        assert_equal(small[key], run[key], key)
    assert run["micro_batch"] == 2
    metrics = [[line for line in lines(tmp_path / name) if "loss" in line] for name in ("small", "run")]
    assert metrics[0] == metrics[1]
    # The smaller micro-batch is kept: no second attempt with 8.
    seen.clear()
    train.main(small_config(corpus, tmp_path / "run", batch_size=8, resume=True, **{**options, "max_steps": 7}))
    assert seen == [2, 2, 2, 2]


def test_an_odd_batch_is_the_same_batch(corpus, tmp_path, monkeypatch):
    options = {"batch_size": 7, "grad_accum": 2, "dispersion": 0.1, "max_steps": 3}
    train.main(small_config(corpus, tmp_path / "whole", **options))
    seen = limit_memory(monkeypatch, 4)
    train.main(small_config(corpus, tmp_path / "run", **options))
    assert seen == [7] + 3 * [4, 4, 4, 2]
    for a, b in zip(lines(tmp_path / "whole"), lines(tmp_path / "run"), strict=True):
        if "loss" in a:
            assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
            assert a["dispersion"] == pytest.approx(b["dispersion"], abs=1e-5)
    whole, run = weights(tmp_path / "whole"), weights(tmp_path / "run")
    for name in whole:
        torch.testing.assert_close(whole[name], run[name], rtol=1e-4, atol=2e-5)


def test_evaluation_takes_half_at_a_time_too(corpus, run, tmp_path, monkeypatch):
    limit_memory(monkeypatch, 1, training_only=False)
    train.main(small_config(corpus, tmp_path / "run", max_steps=1))
    assert lines(tmp_path / "run")[0]["val_loss"] == pytest.approx(lines(run)[0]["val_loss"], abs=1e-5)


def test_a_model_that_does_not_fit_at_all_is_reported(corpus, tmp_path, monkeypatch, capsys):
    limit_memory(monkeypatch, 0)
    assert train.cli([*small_flags(), "--data", str(corpus), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "--block-size" in error
    assert "--n-layer" in error
    assert error.count("\n") == 1


def test_other_errors_are_no_lack_of_memory(corpus, tmp_path, monkeypatch):
    class Wrong(GPT):
        def forward(self, *args, **kwargs):
            raise RuntimeError("shapes do not match")

    monkeypatch.setattr(train, "GPT", Wrong)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        train.main(small_config(corpus, tmp_path / "run"))


# --- rejected input -------------------------------------------------------------------------------------------------


def test_init_from_refuses_another_model(corpus, run, tmp_path, capsys):
    flags = small_flags(n_embd=64)
    assert train.cli([*flags, "--data", str(corpus), "--out", str(tmp_path / "x"), "--init-from", str(run)]) == 2
    assert "n_embd" in capsys.readouterr().err


def test_divergence_ends_with_3(corpus, tmp_path, capsys):
    flags = small_flags(lr=1e30, grad_clip=0, max_steps=50, warmup_steps=0)
    assert train.cli([*flags, "--data", str(corpus), "--out", str(tmp_path / "run")]) == 3
    error = capsys.readouterr().err
    assert "--lr" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 truncated"])
def test_a_damaged_checkpoint_is_named(tmp_path, content):
    (tmp_path / checkpoint.LAST).write_bytes(content)
    with pytest.raises(InputError, match="ckpt_last"):
        load(tmp_path)


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "trapped"),))

    torch.save({"model": Trap(), "config": {}, "step": 0}, tmp_path / checkpoint.LAST)
    with pytest.raises(InputError, match="ckpt_last"):
        load(tmp_path)
    assert not (tmp_path / "trapped").exists()
