"""The safety of runs: good checkpoints, threads, launchers, compilers, and terminal output."""

import dataclasses
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import unicodedata
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

import eval as evaluation
import minidisp
import train
from minidisp import InputError, loss, report
from minidisp.config import parse
from minidisp.data import Dataset, training_batches
from minidisp.runtime import checkpoint, command, device, processes
from minidisp.runtime.guard import Guard
from minidisp.runtime.processes import World
from tests.conftest import small_config, small_flags

ROOT = Path(train.__file__).parent


# --- checkpoints that are called good ---------------------------------------------------------------------------------


def outputs_are_finite(run: Path) -> bool:
    model, _ = checkpoint.load(run / checkpoint.LAST)
    weights = all(torch.isfinite(p).all() for p in model.parameters())
    return bool(weights and torch.isfinite(model(torch.arange(20)[None]).logits).all())


@pytest.mark.parametrize("lr", ["1e8", "1e30", "1e38"])
def test_what_is_called_good_has_been_seen_to_work(corpus, tmp_path, capsys, lr):
    """After a huge step, the weights are still finite but give NaN: such a checkpoint must not replace a good one."""
    run = tmp_path / "run"
    flags = small_flags(max_steps=40, lr=lr, warmup_steps=0, grad_clip=0, save_every=1, eval_every=100)
    code = train.cli([*flags, "--data", str(corpus), "--out", str(run)])
    error = capsys.readouterr().err
    if code == 0:
        assert outputs_are_finite(run)
        return
    assert code == 3
    assert ("nothing was saved" in error) != ("is good" in error)
    if "is good" in error:
        assert outputs_are_finite(run)
    else:
        assert not (run / checkpoint.LAST).exists()


def test_a_diverged_run_resumes_from_its_good_checkpoint(corpus, tmp_path, capsys):
    run = tmp_path / "run"
    base = ["--data", str(corpus), "--out", str(run)]
    assert train.cli([*small_flags(max_steps=4, save_every=2), *base]) == 0
    assert train.cli(["--resume", "--out", str(run), "--max-steps", "40", "--lr", "1e38", "--grad-clip", "0"]) == 3
    assert f"{run / checkpoint.LAST} is good, step " in capsys.readouterr().err
    assert outputs_are_finite(run)
    assert train.cli(["--resume", "--out", str(run), "--max-steps", "12", "--lr", "1e-3", "--grad-clip", "1"]) == 0


def test_weights_that_are_not_finite_are_not_saved(corpus, tmp_path):
    with ExitStack() as at_exit:
        trainer = train.Trainer(small_config(corpus, tmp_path / "run"), train.ALONE, at_exit)
        trainer.progress = report.Progress(12, 0, 0.0, hidden=True)
        assert trainer.is_good()
        with torch.no_grad():
            trainer.model.wpe.weight[31, 0] = math.nan
        assert not trainer.is_good()


# --- the objective ----------------------------------------------------------------------------------------------------


def test_a_custom_training_loss_is_used_and_evaluation_keeps_the_cross_entropy(corpus, tmp_path, monkeypatch, capsys):
    """Also with the fast cross-entropy for large vocabularies."""
    plain, found = loss.plain, []
    for factor, fast in ((1.0, 1), (3.0, 1), (3.0, None)):
        monkeypatch.setattr(loss, "plain", lambda logits, targets, by=factor: by * plain(logits, targets))
        monkeypatch.setattr(loss, "CHUNKED_MIN_VOCAB", fast)
        out = tmp_path / f"{factor}-{fast}"
        assert train.cli([*small_flags(), "--data", str(corpus), "--out", str(out), "--grad-clip", "0"]) == 0
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        found.append([next(line[key] for line in lines if key in line) for key in ("val_loss", "ce", "grad_norm")])
        assert ("not the cross-entropy" in capsys.readouterr().out) == (factor != 1)
    for other in found[1:]:
        assert other == pytest.approx([found[0][0], *(3 * value for value in found[0][1:])], rel=1e-5)


# --- threads, launchers, compilers ------------------------------------------------------------------------------------


def test_training_in_a_thread(corpus, tmp_path):
    """As in web demos; signals belong to the main thread."""
    summaries = []
    thread = threading.Thread(target=lambda: summaries.append(train.main(small_config(corpus, tmp_path / "run"))))
    thread.start()
    thread.join()
    assert summaries[0]["last"]["step"] == 12


VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "MASTER_ADDR",
    "LOCAL_RANK",
    "TORCHELASTIC_RUN_ID",
    *(name for names in processes.OTHER_LAUNCHERS.values() for name in names),
)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, False),
        ({"WORLD_SIZE": "1"}, False),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}, False),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, True),
        ({"TORCHELASTIC_RUN_ID": "x"}, True),
        ({"SLURM_NTASKS": "4"}, False),  # an allocation in which no job step was started
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, False),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, "RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "MASTER_ADDR"),
        ({"WORLD_SIZE": "two", "RANK": "1"}, "WORLD_SIZE is two"),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "localhost"}, "below WORLD_SIZE"),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "a", "LOCAL_RANK": ""}, "LOCAL_RANK is empty"),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "abc"}, "MASTER_PORT is abc"),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, "SLURM_LOCALID"),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "1", "RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "a"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, "OMPI_COMM_WORLD_LOCAL_RANK"),
        ({"PMI_SIZE": "2", "PMI_RANK": "1"}, "torchrun"),
    ],
)
def test_the_launcher_is_read_off_the_environment(monkeypatch, variables, expected):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if isinstance(expected, bool):
        assert processes.is_launched() == expected
        return
    with pytest.raises(InputError, match=expected) as error:
        processes.is_launched()
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_processes_without_torchrun_train_one_run(corpus, tmp_path):
    """As started by srun and mpirun: RANK, WORLD_SIZE and MASTER_ADDR, but no variables of torchrun."""
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    environment |= {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29617", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "train.py",
        *small_flags(max_steps=2),
        "--data",
        str(corpus),
        "--out",
        str(tmp_path / "run"),
    ]
    started = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    printed = [process.communicate(timeout=200)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], printed
    assert "2 processes" in printed[0]
    assert not printed[1]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["environment"]["processes"] == 2


def test_compiling_without_a_compiler_is_one_line(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(device.shutil, "which", lambda name: None)
    assert train.cli([*small_flags(), "--data", str(corpus), "--out", str(tmp_path / "run"), "--compile", "on"]) == 2
    error = capsys.readouterr().err
    assert "compiler" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()
    assert not device.compiles("auto", torch.device("cuda"))  # training continues without it
    assert "not compiled" in capsys.readouterr().err
    assert not device.compiles("auto", torch.device("cpu"))
    assert not device.compiles("off", torch.device("cuda"))
    monkeypatch.undo()
    monkeypatch.setenv("CXX", 'g++ "')
    with pytest.raises(InputError, match="no C\\+\\+ compiler"):
        device.compiles("on", torch.device("cpu"))


@pytest.mark.slow
def test_a_compiler_that_fails_is_one_line(corpus, tmp_path, monkeypatch):
    """The first step compiles, and compiler errors have pages of traceback."""
    environment = {**os.environ, "CXX": shutil.which("false"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    flags = [*small_flags(max_steps=1), "--data", str(corpus), "--out", str(tmp_path / "run"), "--compile", "on"]
    done = subprocess.run(
        [sys.executable, "train.py", *flags], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("train.py: torch.compile failed")


# --- terminal output --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("--learning-rate", "--lr"),
        ("--max_iters", "--max-steps"),
        ("--gradient-accumulation-steps", "--grad-accum"),
        ("--n_layers", "--n-layer"),
        ("--d-model", "--n-embd"),
        ("--lambda", "--dispersion"),
        ("--output_dir", "--out"),
        ("--context-length=8", "--block-size"),
    ],
)
def test_the_usual_names_lead_to_the_flag(theirs, ours):
    with pytest.raises(InputError, match=f"did you mean {ours}\\?"):
        parse([theirs, "1"])


def test_every_name_from_elsewhere_leads_to_a_flag():
    from minidisp.config import ELSEWHERE, GROUPS, flags

    names = {field.name for field in flags()}
    assert set(ELSEWHERE.values()) <= names
    assert not set(ELSEWHERE) & names
    assert set(GROUPS.values()) <= names


def test_help_has_groups_and_no_false_default(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = capsys.readouterr().out
    for group in ("run:", "data:", "model:", "dispersion:", "optimisation:", "system:", "logging:"):
        assert f"\n{group}\n" in text
    assert "default False" not in text
    assert text.index("--n-layer") < text.index("--dispersion ")


def test_a_run_that_is_all_warm_up_is_reported(corpus, tmp_path, capsys):
    train.main(small_config(corpus, tmp_path / "run", max_steps=2, warmup_steps=40))
    out = capsys.readouterr().out
    assert "all of it warm-up" in out
    assert "--warmup-steps 40" in out
    train.main(small_config(corpus, tmp_path / "another", max_steps=3, warmup_steps=2))
    assert "warm-up" not in capsys.readouterr().out


def test_without_a_terminal_there_are_lines(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("minidisp.report.progress.SECONDS_BETWEEN_LINES", 0)
    train.main(small_config(corpus, tmp_path / "run", log_every=4))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split(":")[0] for line in lines] == ["step 1 of 12", "step 4 of 12", "step 8 of 12", "step 12 of 12"]
    assert all("tokens/s" in line and "left" in line for line in lines)


def test_resuming_a_missing_run_is_reported(tmp_path, capsys):
    assert train.cli(["--resume", "--out", str(tmp_path / "nowhere")]) == 2
    error = capsys.readouterr().err
    assert f"--resume: there is no run in {tmp_path / 'nowhere'}" in error
    assert error.count("\n") == 1


def test_a_tilde_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse(["--out", "~/x"]).run_dir == tmp_path / "x"


# --- --init-from ------------------------------------------------------------------------------------------------------


def test_init_from_sets_the_architecture_and_rejects_conflicting_flags(corpus, run, tmp_path, capsys):
    """Even if the given value is the flag's default."""
    base = ["--init-from", str(run), "--data", str(corpus), "--max-steps", "1", "--device", "cpu"]
    further = tmp_path / "further.json"
    saved = json.loads((run / "config.json").read_text())
    further.write_text(json.dumps({**saved, "init_from": str(run)}))
    for flags, expected in (
        (["--n-layer", "8"], "n_layer 2, not 8"),
        (["--n-embd", "192"], "n_embd 32, not 192"),
        (["--arch", "qwen3"], "arch gpt2, not qwen3"),
        (["--recipe", "fast"], "arch gpt2, not qwen3: leave out --recipe"),
        (["--preset", "tiny"], "n_layer 2, not 8: leave out --preset"),
        (["--block-size", "256"], "block_size 32, not 256"),
        (["--config", str(further), "--n-layer", "8"], "n_layer 2, not 8"),
    ):
        assert train.cli([*base, *flags, "--out", str(tmp_path / "refused")]) == 2
        error = capsys.readouterr().err
        assert expected in error
        assert error.count("\n") == 1
    assert not (tmp_path / "refused").exists()
    assert train.cli([*base, "--n-layer", "2", "--eval-tokens", "256", "--out", str(tmp_path / "next")]) == 0
    saved = json.loads((tmp_path / "next" / "config.json").read_text())
    assert (saved["n_layer"], saved["n_embd"], saved["block_size"]) == (2, 32, 32)


def test_a_batch_that_does_not_divide_evenly_is_rejected():
    assert World(rank=1, size=2).share_of(6) == 3
    with pytest.raises(InputError, match="2 processes cannot share evenly"):
        World(rank=0, size=2).share_of(7)


# --- less memory, and weight averages ---------------------------------------------------------------------------------


def weights(run: Path, name: str = checkpoint.LAST) -> dict[str, torch.Tensor]:
    return checkpoint.read(run / name)["model"]


@pytest.mark.parametrize("options", [{}, {"dropout": 0.2, "arch": "qwen3"}])
def test_recomputing_gives_the_same_weights_and_keeps_less(corpus, tmp_path, options):
    options = {"dispersion": 0.1, "max_steps": 3, **options}
    for name, recompute in (("kept", False), ("again", True)):
        train.main(small_config(corpus, tmp_path / name, recompute=recompute, **options))
    kept, again = weights(tmp_path / "kept"), weights(tmp_path / "again")
    assert all(torch.equal(kept[name], again[name]) for name in kept)
    sizes = {}
    for recompute in (False, True):
        config = small_config(corpus, tmp_path / "x", recompute=recompute, vocab_size=257, **options)
        model, saved = train.GPT(config), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t):
            model(torch.zeros(4, 32, dtype=torch.int64), torch.zeros(4, 32, dtype=torch.int64)).loss.backward()
        sizes[recompute] = max(len(saved), 1)
    assert sizes[True] < sizes[False]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch_size": 2, "grad_accum": 2}, "micro-batches of 2 instead of 4 (dropout draws other random numbers)"),
        ({"compile": "off"}, "compile off instead of auto (dropout draws other random numbers)"),
    ],
)
def test_changes_of_dropout_random_numbers_are_reported(corpus, tmp_path, capsys, changes, said):
    for dropout in (0.1, 0.0):
        config = small_config(
            corpus, tmp_path / f"{dropout}", max_steps=2, dropout=dropout, batch_size=4, grad_accum=1, compile="auto"
        )
        train.main(config)
        capsys.readouterr()
        train.main(dataclasses.replace(config, resume=True, max_steps=3, **changes))
        resumed = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("resumed at step 2"))
        assert (said in resumed) is bool(dropout), resumed


def test_the_first_lines_warn_of_many_epochs_and_the_last_can_be_pasted(corpus, tmp_path, capsys):
    out = tmp_path / "it's $HOME; (1)"
    train.main(small_config(corpus, out, max_steps=2, batch_size=8))
    first = capsys.readouterr().out
    tokens = json.loads((corpus / "meta.json").read_text())["splits"]["train"]["tokens"]
    assert f"{tokens:,} training tokens" in first
    assert "warning" not in first
    words = shlex.split(first.splitlines()[-1])
    assert words[:5] == ["next", "python", "eval.py", str(out), "--split"]
    assert report.next_command(out, "cut\n---\n\n- a list\na line of\n").endswith("--sample 'a line of'")
    evaluation.main([*words[3:], "--device", "cpu"])
    assert f"\n{words[-1]}" in capsys.readouterr().out

    def first_lines(config):
        batches = training_batches(Dataset(corpus), config.block_size, 0, "separate")
        return report.introduction(Dataset(corpus), batches, config, 1, [], "here", 0, [])

    epochs = 20
    config = small_config(corpus, out, batch_size=8, overwrite=True)
    many = dataclasses.replace(config, max_steps=epochs * tokens // config.tokens_per_step)
    warned = first_lines(many)
    enough = int(re.search(r"warning: (\d+) epochs of the same text.* --max-steps (\d+)", warned)[2])
    assert "warning: 20 epochs" in warned
    assert enough * config.tokens_per_step / tokens == pytest.approx(10, rel=0.05)
    few = first_lines(dataclasses.replace(many, max_steps=enough))
    assert "warning" not in few


def test_recomputing_under_compile_gives_the_same_gradients(corpus, tmp_path):
    config = small_config(corpus, tmp_path / "x", recompute=True, vocab_size=257)
    torch.manual_seed(0)
    model, idx = train.GPT(config), torch.arange(128).view(4, 32)
    gradients = []
    torch.compiler.reset()
    for form in (model, torch.compile(model, backend="aot_eager")):
        model.zero_grad()
        _, ce, hidden_states = form(idx, idx, return_hidden_states=True)
        (ce + train.DispersionLoss(impl="streamed")(hidden_states, 0)).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.compiler.reset()
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_an_average_of_the_weights_is_that_of_the_formula(corpus, tmp_path):
    """Compared with an average computed by hand from the checkpoints of every step, in float64."""
    run, decay = tmp_path / "run", 0.7
    train.main(small_config(corpus, run, ema=decay, save_every=1, keep=20, eval_every=4))
    train.main(small_config(corpus, tmp_path / "start", max_steps=0))
    average = {name: value.double() for name, value in weights(tmp_path / "start").items()}
    for step in range(1, 13):
        share = 1 - min(decay, (1 + step) / (10 + step))
        for name, value in weights(run, f"ckpt_{step:08d}.pt").items():
            average[name] += share * (value.double() - average[name])
    for name, value in weights(run, checkpoint.AVERAGE).items():
        torch.testing.assert_close(value.double(), average[name], rtol=1e-5, atol=1e-7)
    lines = [line for line in report.read_metrics(run / "metrics.jsonl") if "val_loss" in line]
    model, _ = checkpoint.load(run / checkpoint.AVERAGE)
    validation = train.Validation(Dataset(corpus), small_config(corpus, run), torch.device("cpu"), train.ALONE)
    assert lines[-1]["ema_val_loss"] == pytest.approx(validation.scores(model, 12)["val_loss"], abs=1e-6)
    assert lines[-1]["ema_val_loss"] != lines[-1]["val_loss"]


def test_an_average_is_resumed_bit_for_bit_and_changes_nothing_else(corpus, tmp_path, monkeypatch):
    from tests.test_train import stop_after

    options = {"ema": 0.9, "dropout": 0.1, "optimizer": "muon"}
    train.main(small_config(corpus, tmp_path / "plain", **{**options, "ema": 0.0}))
    train.main(small_config(corpus, tmp_path / "whole", **options))
    stop_after(5, small_config(corpus, tmp_path / "halves", **options))
    train.main(small_config(corpus, tmp_path / "halves", **options, resume=True))
    for name in (checkpoint.LAST, checkpoint.AVERAGE):
        whole, halves = weights(tmp_path / "whole", name), weights(tmp_path / "halves", name)
        assert all(torch.equal(whole[key], halves[key]) for key in whole)
    plain, whole = weights(tmp_path / "plain"), weights(tmp_path / "whole")
    assert all(torch.equal(plain[key], whole[key]) for key in plain)
    lines = [report.read_metrics(tmp_path / name / "metrics.jsonl")[-1] for name in ("whole", "halves")]
    assert lines[0]["ema_val_loss"] == lines[1]["ema_val_loss"]


@pytest.mark.parametrize("decay", ["1", "-0.1", "nan"])
def test_an_invalid_decay_is_rejected(decay):
    with pytest.raises(InputError, match="--ema"):
        parse(["--ema", decay])


def test_the_average_is_never_older_than_the_checkpoint(corpus, tmp_path, monkeypatch, capsys):
    """Even if the run ends between the two: resuming a finished run writes nothing."""
    flags = small_flags(ema=0.5, max_steps=4, save_every=2, eval_every=4)
    assert train.cli([*flags, "--data", str(corpus), "--out", str(tmp_path / "whole")]) == 0
    save = checkpoint.save

    def fails_at_the_end(path, state, step, keep):
        if step == 4:
            raise OSError(28, "No space left on device", "x")
        save(path, state, step, keep)

    run = tmp_path / "run"
    monkeypatch.setattr(checkpoint, "save", fails_at_the_end)
    assert train.cli([*flags, "--data", str(corpus), "--out", str(run)]) == 2
    monkeypatch.setattr(checkpoint, "save", save)
    assert train.cli(["--resume", "--out", str(run)]) == 0
    for name in (checkpoint.LAST, checkpoint.AVERAGE):
        there, here = weights(tmp_path / "whole", name), weights(run, name)
        assert all(torch.equal(there[key], here[key]) for key in there)


def test_a_closed_stdout_and_a_port_in_use_are_reported(corpus, tmp_path, monkeypatch, capsys):
    def gone(*_):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(report, "introduction", gone)
    assert train.cli([*small_flags(), "--data", str(corpus), "--out", str(tmp_path / "run")]) == 2
    assert "stdout was closed, so the run stops" in capsys.readouterr().err
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, str(value))
        assert train.cli([*small_flags(), "--data", str(corpus), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert f"cannot meet at MASTER_ADDR:MASTER_PORT, 127.0.0.1:{port}" in error
    assert "Traceback" not in error


# --- edge cases of resuming -------------------------------------------------------------------------------------------


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_from_weights_stopped_before_its_first_checkpoint_starts_from_them_again(corpus, run, tmp_path):
    flags = [*small_flags(max_steps=2), "--init-from", str(run), "--data", str(corpus), "--out", str(tmp_path / "next")]
    assert train.cli(flags) == 0
    before = metrics(tmp_path / "next")[0]["val_loss"]
    for path in (tmp_path / "next").glob("ckpt_*.pt"):
        path.unlink()
    assert train.cli(["--resume", "--out", str(tmp_path / "next")]) == 0
    assert metrics(tmp_path / "next")[0]["val_loss"] == before


def test_a_float32_run_resumes_in_float16_and_back(corpus, tmp_path):
    config = small_config(corpus, tmp_path / "run", max_steps=2)
    train.main(config)
    for steps, dtype in ((4, "float16"), (6, "float32")):
        train.main(dataclasses.replace(config, max_steps=steps, dtype=dtype, resume=True))
    assert metrics(tmp_path / "run")[-1]["step"] == 6


def test_the_best_of_repeated_steps_is_discarded(corpus, tmp_path, monkeypatch):
    """A run that is killed after its last checkpoint, and continues differently."""
    config = small_config(corpus, tmp_path / "run", max_steps=8, save_every=4, eval_every=2, lr=0.01)
    forward_backward, steps = train.Trainer.forward_backward, []

    def killed(self, logging):
        steps.append(self.step)
        if len(steps) == 8:
            raise KeyboardInterrupt
        return forward_backward(self, logging)

    monkeypatch.setattr(train.Trainer, "forward_backward", killed)
    with pytest.raises(KeyboardInterrupt):
        train.main(config)
    assert checkpoint.read(tmp_path / "run" / checkpoint.BEST)["step"] == 6
    train.main(dataclasses.replace(config, resume=True, lr=1e-9, max_steps=6))
    best = checkpoint.read(tmp_path / "run" / checkpoint.BEST)
    assert best["val_loss"] in [line["val_loss"] for line in metrics(tmp_path / "run") if "val_loss" in line]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert best["val_loss"] in (summary["best"]["val_loss"], summary["last"]["val_loss"])


def test_a_longer_run_has_no_results_of_the_shorter_one(corpus, tmp_path, monkeypatch):
    run = tmp_path / "run"
    config = small_config(corpus, run, max_steps=6)
    train.main(config)
    (run / "measured.json").write_text("{}")
    train.main(dataclasses.replace(config, resume=True))  # nothing to do
    assert (run / "measured.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "forward_backward", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.main(dataclasses.replace(config, resume=True, max_steps=12))
    assert not (run / "measured.json").exists()
    assert not (run / "summary.json").exists()


def test_the_best_loss_is_that_of_todays_validation_windows(corpus, tmp_path):
    config = small_config(corpus, tmp_path / "run", eval_tokens=512)
    train.main(config)
    assert checkpoint.read(tmp_path / "run" / checkpoint.BEST)["step"] == 12
    train.main(dataclasses.replace(config, resume=True, max_steps=18, lr=1e-30))  # nothing changes
    assert checkpoint.read(tmp_path / "run" / checkpoint.BEST)["step"] == 12
    train.main(dataclasses.replace(config, resume=True, max_steps=24, lr=1e-30, eval_tokens=1024))
    assert checkpoint.read(tmp_path / "run" / checkpoint.BEST)["step"] == 24


def test_a_row_of_skipped_steps_is_judged_by_the_limit_of_its_dtype():
    guard = Guard(torch.device("cpu"), float16=True)
    for step in range(12):  # the scaler looks for its scale
        guard.count(torch.tensor(False), step)
    guard.count(torch.tensor(True), 12)
    guard.fetch(13)
    assert not guard.hopeless(13)
    resumed = Guard(torch.device("cpu"), float16=False)
    resumed.load_state(guard.state())
    assert not resumed.hopeless(13)
    for step in range(13, 23):
        resumed.count(torch.tensor(False), step)
    resumed.fetch(23)
    assert resumed.hopeless(23)


def test_a_system_that_hides_the_peak_of_memory(monkeypatch):
    monkeypatch.setattr(device.Path, "read_text", lambda self: "VmSize:\t  300 kB\n")
    assert device.peak_memory_mib(torch.device("cpu")) is None


def test_a_run_is_not_initialised_from_itself(corpus, tmp_path):
    config = small_config(corpus, tmp_path / "run", max_steps=2)
    train.main(config)
    for source in (tmp_path / "run", tmp_path / "run" / checkpoint.LAST):
        with pytest.raises(InputError, match=r"--init-from .* is this run itself"):
            train.main(dataclasses.replace(config, init_from=str(source), overwrite=True))
    assert (tmp_path / "run" / checkpoint.LAST).exists()


def test_an_empty_out_is_the_default_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path(parse([]).run_dir)
    with pytest.raises(InputError, match=re.escape(str(folder))):
        parse(["--resume", "--out", ""])


def test_a_run_that_is_to_end_where_it_is_is_evaluated_there(corpus, tmp_path, monkeypatch):
    config = small_config(corpus, tmp_path / "run", max_steps=12, eval_every=12, save_every=3)
    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "evaluate", lambda self: setattr(self, "last_eval", 0))
        patch.setattr(train.Trainer, "summarise", lambda self: {})
        train.main(dataclasses.replace(config, max_steps=3))
    train.main(dataclasses.replace(config, max_steps=3, resume=True))
    assert [line["step"] for line in metrics(tmp_path / "run") if "val_loss" in line][-1] == 3
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["last"]["step"] == 3


def test_only_training_is_on_the_clock(corpus, tmp_path, monkeypatch):
    evaluate, save_weights = train.Trainer.evaluate, train.RunFolder.save_weights

    def slow(function):
        return lambda *args, **options: (time.sleep(0.7), function(*args, **options))[1]

    monkeypatch.setattr(train.Trainer, "evaluate", slow(evaluate))
    monkeypatch.setattr(train.RunFolder, "save_weights", slow(save_weights))
    train.main(small_config(corpus, tmp_path / "run", max_steps=2, save_every=1, ema=0.5))
    assert metrics(tmp_path / "run")[-1]["seconds"] < 0.7


def test_damaged_metrics_of_a_run_that_is_replaced_do_not_matter(corpus, tmp_path):
    config = small_config(corpus, tmp_path / "run", max_steps=1)
    train.main(config)
    (tmp_path / "run" / "metrics.jsonl").write_text("no metrics\n" * 3)
    train.main(dataclasses.replace(config, overwrite=True))
    assert metrics(tmp_path / "run")[-1]["step"] == 1


# --- signals, streams and output --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("trap", "stops"), [("trap '' INT;", False), pytest.param("", True, marks=pytest.mark.slow)])
def test_a_signal_that_was_inherited_as_ignored_stays_ignored(corpus, tmp_path, trap, stops):
    """As in background jobs of shell scripts. SIGTERM stops such a run, with a checkpoint."""
    run = tmp_path / "run"
    metrics = run / "metrics.jsonl"
    flags = small_flags(
        data=corpus, out=run, max_steps=100_000, save_every=100_000, eval_every=100_000, schedule="constant"
    )
    process = subprocess.Popen(
        ["sh", "-c", f'{trap} exec "$0" "$@"', sys.executable, "train.py", *flags],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )

    def steps() -> int:
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    try:
        wait_for(lambda: steps() > 3, process)
        process.send_signal(signal.SIGINT)
        if not stops:
            before = steps()
            wait_for(lambda: steps() > before + 20, process)
            process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == (130 if stops else 143), error
    name = "SIGINT" if stops else "SIGTERM"
    assert f"by {name}; continue with: python train.py --resume" in error
    assert checkpoint.read(run / checkpoint.LAST)["step"] > 0


def wait_for(what, process: subprocess.Popen) -> None:
    end = time.monotonic() + 60
    while not what():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.02)


def test_an_ignored_signal_is_not_caught(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with ExitStack() as at_exit:
            caught = command.catch_signals(at_exit, World())
            os.kill(os.getpid(), signal.SIGTERM)
            assert caught == []
            os.kill(os.getpid(), signal.SIGINT)
            assert caught == [signal.SIGINT]
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("program", ["train.py", "eval.py", "data/prepare.py", "-m minidisp.hf"])
def test_an_interrupt_while_importing_is_one_line(program):
    """At any time: a sitecustomize sends it when a certain module is imported."""
    hook = (
        "import os, signal, sys\nclass F:\n  def find_spec(self, name, *_):\n"
        "    if name == {!r}: os.kill(os.getpid(), signal.SIGINT)\nsys.meta_path.insert(0, F())\n"
    )
    module = "numpy" if program == "data/prepare.py" else "torch"
    start = (
        "runpy._run_module_as_main(sys.argv.pop(1))"
        if program.startswith("-m")
        else "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"{hook.format(module)}import runpy; sys.argv = {[*program.split(), '--help']!r}; "
            f"sys.path.insert(0, '.'); {start}",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert (done.returncode, done.stderr) == (130, "interrupted\n"), done


@pytest.mark.parametrize(
    ("closed", "program"),
    [
        pytest.param("<&- >&- 2>&-", "train.py", marks=pytest.mark.slow),
        (">&-", "eval.py"),
        pytest.param("2>&-", "eval.py", marks=pytest.mark.slow),
    ],
)
def test_closed_streams_are_no_error(corpus, run, tmp_path, closed, program):
    """As started by pythonw and some services. Output must not end up in a file of the run."""
    out, scores = tmp_path / "run", tmp_path / "r.json"
    if program == "train.py":
        flags = small_flags(data=corpus, out=out, max_steps=2, eval_every=1, save_every=1)
    else:
        flags = [str(run), "--json", str(scores), "--tokens", "200"]
    for words, code in ((flags, 0), (["--nonsense"], 2)):
        done = subprocess.run(
            ["sh", "-c", f'exec "$0" "$@" {closed}', sys.executable, program, *words],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, (words, done)
        assert "Traceback" not in done.stderr
    if program == "train.py":
        assert [line["step"] for line in report.read_metrics(out / "metrics.jsonl")][-1] == 2
        assert checkpoint.read(out / checkpoint.LAST)["step"] == 2
    else:
        assert json.loads(scores.read_text())[0]["tokens"] == 200


@pytest.mark.parametrize(
    ("program", "reader"), [("train.py", "| true"), ("eval.py", "> /dev/full"), ("data/prepare.py", "| true")]
)
def test_a_stdout_that_takes_nothing_is_one_line(program, reader):
    shell = f'{{ "$0" "$@"; echo "code $?" >&2; }} {reader}'
    done = subprocess.run(
        ["bash", "-c", shell, sys.executable, program, "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    said = done.stderr.splitlines()
    assert said[-1] in ("code 2", "code 0"), said
    assert len(said) <= 2


HOSTILE = "\x1b]0;title\x07\x1b[2J\u202eevil\u2066\r\x9b31m\x00\u2028"


def test_what_could_command_a_terminal_is_escaped():
    invisible = [
        chr(code) for code in range(0x110000) if unicodedata.category(chr(code)) in ("Cc", "Cf", "Cs", "Zl", "Zp")
    ]
    assert minidisp.printable("".join(invisible)).isascii()
    bidi = ["\u200e", "\u200f", "\u061c", "\u2067", "\u202b"]
    for text in (
        HOSTILE,
        "\x7f",
        "\x85",
        "\ud800",
        "\U000e0041",
        "\U000e0100",
        "\u200b",
        "\ufeff",
        "\xad",
        "\u3164",
        *bidi,
    ):
        shown = minidisp.printable(text)
        assert shown.isprintable(), ascii(shown)
        assert not minidisp.is_plain(text)
        assert text not in minidisp.printable(f"a{text}b", keep="\n\t" + minidisp.TEXT)
    for text in ("naïve 中文 é ❤\ufe0f", "\u0645\u06cc\u200c\u062e", "a\xa0b\u3000c", "\U0001f468\u200d\U0001f469"):
        assert minidisp.is_plain(text)
        assert minidisp.printable(text, keep=minidisp.TEXT) == text
    assert minidisp.printable("runs/a\u200d") == "runs/a\\u200d"  # not taken for runs/a
    assert minidisp.printable("a\n\tb\x1b\r", keep="\n\t") == "a\n\tb\\x1b\\r"
    long = minidisp.printable("x" * 3_000_000 + "the end", 100)
    assert len(long) < 120
    assert long.endswith("the end")


@pytest.mark.parametrize(
    "words",
    [
        ["--out", f"runs/{HOSTILE[:-2]}"],
        ["--data", f"x{HOSTILE[5]}"],
        [f"--{HOSTILE[:5]}"],
        ["--config", "\n\x1b[2J" * 2000],
        ["--preset", "\x1b[1m"],
        ["--lr", "\x1b[2J\n"],
        ["--resume", "--out", "\x1b[2J/\u202e"],
        ["--init-from", "\x9b"],
        ["--" + "y" * 300_000],
        ["--seed", "9" * 5000],
    ],
)
def test_messages_are_one_printable_line(words, capsys):
    assert train.cli([word.replace("\0", "") for word in words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error[:-1].isprintable(), ascii(error)
    assert len(error) < 2000


def test_samples_and_prompts_are_shown_escaped_and_kept_as_they_are(run, tmp_path, capsys, monkeypatch):
    written = HOSTILE.encode()
    ids = iter([*written, ord("\n"), ord("\t"), ord("z")] * 3)
    monkeypatch.setattr(
        "minidisp.sampling._stream", lambda *_: (torch.tensor([[next(ids)]]) for _ in range(len(written) + 3))
    )
    assert (
        evaluation.cli(
            [
                str(run),
                "--split",
                "none",
                "--sample",
                f"prompt {HOSTILE}".replace("\0", ""),
                "--json",
                str(tmp_path / "r.json"),
            ]
        )
        == 0
    )
    shown = capsys.readouterr().out
    assert all(line.isprintable() for line in shown.replace("\t", "").split("\n")), ascii(shown)
    assert "\\x1b]0;title\\x07" in shown
    assert "\n\tz" in shown
    (sample,) = json.loads((tmp_path / "r.json").read_text())[0]["samples"]
    assert sample["continuation"] == HOSTILE + "\n\tz"


# --- the environment of a run -----------------------------------------------------------------------------------------


def test_the_limits_of_containers_count(tmp_path, monkeypatch):
    def put(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    assert list(device.cgroup_limits(tmp_path)) == []  # no Linux
    put("proc/self/cgroup", "0::/a/b/c\n")
    put("sys/fs/cgroup/a/memory.max", "5000000000\n")  # of a group above
    put("sys/fs/cgroup/a/b/memory.max", "max\n")
    put("sys/fs/cgroup/a/b/c/memory.max", "7000000000\n")
    assert sorted(device.cgroup_limits(tmp_path)) == [5_000_000_000, 7_000_000_000]
    put(
        "proc/self/cgroup", "0::/../../elsewhere/of/the/host\n"
    )  # as seen in a container: its group is mounted at the top
    put("sys/fs/cgroup/memory.max", "3000000000\n")
    assert list(device.cgroup_limits(tmp_path)) == [3_000_000_000]
    put(
        "proc/self/cgroup", "12:cpu,cpuacct:/x\n4:memory:/docker/abc\n0::/\n"
    )  # version 1, with an empty version 2 beside
    put("sys/fs/cgroup/memory.max", "max")
    put("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712")  # none
    put("sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes", "2000000000")
    assert list(device.cgroup_limits(tmp_path)) == [2_000_000_000]
    monkeypatch.setattr(device, "cgroup_limits", lambda root: iter([10**9]))
    assert device.memory_bytes(torch.device("cpu")) == 10**9


def test_a_model_too_large_for_its_container_is_refused(corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(device, "cgroup_limits", lambda root: iter([1 << 20]))
    flags = [*small_flags(n_embd=512, n_layer=4, n_head=4), "--data", str(corpus), "--out", str(tmp_path / "run")]
    assert train.cli(flags) == 2
    assert "out of memory" in capsys.readouterr().err
    assert not (tmp_path / "run" / "config.json").exists()


def test_the_commit_is_of_the_codes_own_repository(tmp_path, monkeypatch):
    def git(*words, where):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        done = subprocess.run(
            ["git", *identity, *words],
            cwd=where,
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "GIT_CONFIG_GLOBAL": os.devnull},
        )
        return done.stdout.strip()

    outer, inner = tmp_path / "outer", tmp_path / "outer" / "vendored"
    for folder in (inner, outer):
        (folder / "minidisp").mkdir(parents=True)
        (folder / "minidisp" / "__init__.py").touch()
        (folder / "train.py").touch()
    (outer / ".gitignore").write_text("/minidisp")  # outer has a train.py of its own, and minidisp is installed there
    git("init", "-q", where=outer)
    git("add", "-A", where=outer)
    git("commit", "-qm", "outer", where=outer)
    monkeypatch.setattr(device, "ROOT", inner)
    assert device.git("rev-parse", "HEAD") is None
    assert device.git("status", "--porcelain") is None
    git("init", "-q", where=inner)
    git("add", "-A", where=inner)
    git("commit", "-qm", "inner", where=inner)
    assert device.git("rev-parse", "HEAD") == git("rev-parse", "HEAD", where=inner)
    mine = git("rev-parse", "HEAD", where=inner)
    monkeypatch.setenv("GIT_DIR", str(outer / ".git"))  # as in a git hook
    assert device.git("rev-parse", "HEAD") == mine
    monkeypatch.setattr(device, "ROOT", outer)
    assert device.git("rev-parse", "HEAD") is None


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        torch.OutOfMemoryError("CUDA out of memory."),
    ],
)
def test_eval_out_of_memory_is_one_line(run, monkeypatch, capsys, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("minidisp.model.GPT.forward", fail)
    assert evaluation.cli([str(run)]) == 2
    said = capsys.readouterr().err
    assert "out of memory" in said
    assert said.count("\n") == 1
    monkeypatch.setattr("minidisp.model.GPT.forward", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluation.cli([str(run)])
