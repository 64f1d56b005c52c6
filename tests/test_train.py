"""The trainer: what a run leaves, what it repeats exactly, and what it refuses."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from minidisp import InputError, checkpoint, load, report
from minidisp.config import parse, to_dict
from minidisp.data import Batches, Dataset
from minidisp.model import GPT
from minidisp.optim import build_optimizers, learning_rate
from tests.conftest import SMALL, small_config

ROOT = Path(train.__file__).parent
TIMES = {"tokens_per_second", "seconds"}  # all that may differ between two equal runs


def weights(run: Path) -> dict:
    return checkpoint.read(run / checkpoint.LAST)["model"]


def lines(run: Path) -> list[dict]:
    metrics = report.read_metrics(run / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in TIMES} for line in metrics]


def assert_same_weights(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_a_run_leaves_what_it_promises(run):
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
        "dispersion",
        "mean_cosine",
        "lr",
        "grad_norm",
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


def test_dispersion_changes_neither_start_nor_data(corpus, tmp_path):
    for name, options in {"off": {}, "on": {"dispersion": 0.5, "dispersion_tokens": 8}}.items():
        train.main(small_config(corpus, tmp_path / name, dropout=0.1, **options))
    off, on = lines(tmp_path / "off"), lines(tmp_path / "on")
    assert off[0] == on[0]  # the evaluation before the first step
    assert off[1]["ce"] == on[1]["ce"]  # the first training batch, dropout included
    assert off[2]["ce"] != on[2]["ce"]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_two_micro_batches_of_four_equal_one_of_eight(corpus, tmp_path, optimizer):
    options = {"dispersion": 1.0, "dispersion_tokens": 8, "max_steps": 6, "optimizer": optimizer}
    train.main(small_config(corpus, tmp_path / "one", batch_size=8, **options))
    train.main(small_config(corpus, tmp_path / "two", batch_size=4, grad_accum=2, **options))
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    tolerance = (
        2e-5 if optimizer == "adamw" else 2e-3
    )  # Muon orthogonalises in bfloat16, where rounding is a visible step
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=tolerance)
    for a, b in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        if "loss" in a:
            assert a["dispersion"] == pytest.approx(b["dispersion"], abs=tolerance)
            assert a["loss"] == pytest.approx(b["loss"], abs=tolerance)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resuming_equals_never_having_stopped(corpus, tmp_path, optimizer):
    options = {"dispersion": 0.1, "dispersion_tokens": 8, "dropout": 0.1, "optimizer": optimizer, "keep": 1}
    train.main(small_config(corpus, tmp_path / "whole", **options))
    half = tmp_path / "halves"
    stop_after(8, small_config(corpus, half, **options))
    # As if it had been killed later than that: what stands behind the checkpoint is run again, and logged once.
    with open(half / "metrics.jsonl", "a") as file:
        file.write(json.dumps({**lines(half)[-1], "step": 9}) + "\n")
    train.main(small_config(corpus, half, **options, resume=True))
    assert_same_weights(weights(tmp_path / "whole"), weights(half))
    assert lines(half) == lines(tmp_path / "whole")


def stop_after(steps: int, config) -> None:
    """Train, and interrupt the process itself during step `steps`."""
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
    summary = train.main(
        small_config(out, tmp_path / "run", max_steps=150, eval_every=150, log_every=50, lr=5e-3, **options)
    )
    assert summary["first"]["val_loss"] == pytest.approx(np.log(257), abs=0.2)
    assert summary["last"]["val_loss"] < 0.3


def test_dispersion_lowers_the_mean_cosine(corpus, tmp_path):
    cosines = []
    for weight in (0.0, 1.0):
        summary = train.main(
            small_config(corpus, tmp_path / str(weight), dispersion=weight, max_steps=60, eval_every=60)
        )
        cosines.append(summary["last"]["last_half_mean"])
    assert cosines[1] < cosines[0] - 0.1


def test_init_from_continues_with_the_weights(corpus, run, tmp_path):
    train.main(small_config(corpus, tmp_path / "next", init_from=str(run), max_steps=1))
    first = lines(tmp_path / "next")[0]
    best = checkpoint.read(run / checkpoint.BEST)
    assert first["val_loss"] == pytest.approx(best["val_loss"], abs=1e-6)


def test_load_gives_the_model_of_the_best_checkpoint(run):
    model, vocabulary = load(run)
    assert not model.training
    assert_same_weights(model.state_dict(), checkpoint.read(run / checkpoint.BEST)["model"])
    prompt = torch.tensor([vocabulary.encode("abc ")])
    assert vocabulary.decode(model.generate(prompt, 5, seed=0)[0].tolist()).startswith("abc ")


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


def small_flags(**changes) -> list[str]:
    return [
        part for name, value in {**SMALL, **changes}.items() for part in (f"--{name.replace('_', '-')}", str(value))
    ]


def test_the_command_trains(corpus, tmp_path):
    done = command(*small_flags(), "--data", corpus, "--out", tmp_path / "run", "--dispersion", "0.1")
    assert done.returncode == 0, done.stderr
    assert "validation loss" in done.stdout
    assert "val loss" in done.stdout
    assert "angular_spread" in done.stdout
    assert not done.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_go_on(corpus, tmp_path, number, code):
    out = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *small_flags(max_steps=100_000), "--data", str(corpus), "--out", str(out)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
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
    "too large a model": (["--n-embd", "600000000"], "memory"),
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


def test_an_occupied_folder_is_not_overwritten(corpus, run, tmp_path, capsys):
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    assert train.cli([*small_flags(), "--data", str(corpus), "--out", str(run)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    (tmp_path / "file").write_text("mine")
    assert train.cli([*small_flags(), "--data", str(corpus), "--out", str(tmp_path / "file")]) == 2
    assert "not a folder" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in run.iterdir() if path.is_file()}


def test_an_unwritable_folder_is_named(corpus, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert train.cli([*small_flags(), "--data", str(corpus), "--out", str(tmp_path / "file" / "run")]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "file") in error
    assert error.count("\n") == 1


def test_resume_refuses_another_model_or_other_data(corpus, bpe_corpus, run, capsys):
    assert train.cli(["--resume", "--out", str(run), "--n-layer", "3"]) == 2
    assert "n_layer" in capsys.readouterr().err
    assert train.cli(["--resume", "--out", str(run), "--data", str(bpe_corpus)]) == 2
    assert re.search("vocab_size|data", capsys.readouterr().err)


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
