"""Several processes: the same run, files and checkpoints as one process, and an exit if one is lost."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import minidisp
import train
from minidisp import InputError, report
from minidisp.runtime import checkpoint
from minidisp.runtime.guard import half_of
from minidisp.runtime.processes import World
from tests.conftest import small_flags

ROOT = Path(train.__file__).parent
TIMES = {"tokens_per_second", "seconds"}

# Imports take seconds, so one process imports everything and forks for the processes of each launch, with the variables
# that torchrun sets. Launches are [number of processes, [[name of a run, changes], ...]] in JSON, one after another.
LAUNCHES = """
import json, multiprocessing, os, socket, sys
from contextlib import ExitStack
import torch._inductor.compile_fx, torch.distributed.fsdp
import minidisp.loss
import train
from minidisp import InputError, report
from tests.conftest import small_config

report.draw_run = lambda *_: []
corpus, folder, launches = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])

def work(rank, processes, port, runs):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port),
                   "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    if processes > 1:
        minidisp.loss.CHUNKED_MIN_VOCAB = 0  # as if the vocabulary were large; one process computes the plain loss
    with ExitStack() as at_exit:
        world = train.World.join(at_exit)
        for name, changes in runs:
            try:
                train.main(small_config(corpus, f"{folder}/{name}", **changes), world)
            except (InputError, train.Diverged) as error:
                print(f"{type(error).__name__}: {error}", flush=True)
            world.barrier()

fork = multiprocessing.get_context("fork")
for processes, runs in launches:
    print("NEXT LAUNCH", flush=True)
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    ranks = [fork.Process(target=work, args=(rank, processes, port, runs)) for rank in range(processes)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert all(rank.exitcode == 0 for rank in ranks)
"""

# One process takes three micro-steps of four sequences; two take one of four and one of two each; three take one of
# four.
BATCH = {"batch_size": 4, "grad_accum": 3}
EVERYTHING = {
    **BATCH,
    "dispersion": 0.1,
    "dispersion_tokens": 12,
    "schedule": "constant",
    "eval_every": 3,
    "save_every": 3,
}


def python(*command: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def torchrun(processes: int, *arguments: str) -> subprocess.Popen:
    return python("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *arguments)


def finish(process: subprocess.Popen) -> str:
    """Wait for the process, which must succeed; returns its output."""
    printed, _ = process.communicate(timeout=240)
    assert process.returncode == 0, printed
    return printed


def curve(run: Path) -> list[dict]:
    return [
        {key: value for key, value in line.items() if key not in TIMES}
        for line in report.read_metrics(run / "metrics.jsonl")
    ]


def assert_same_curve(a: list[dict], b: list[dict], **tolerance) -> None:
    assert [line.keys() for line in a] == [line.keys() for line in b]
    for line, other in zip(a, b, strict=True):
        for key in line.keys() - {"histogram_by_layer", "perplexity"}:  # rounded; an exponential of val_loss
            assert line[key] == pytest.approx(other[key], **(tolerance or {"abs": 1e-5, "rel": 1e-5})), (
                line["step"],
                key,
            )


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory) -> Path:
    """Runs of one process, and of two and three that should be the same; two.txt is what two printed."""
    folder = tmp_path_factory.mktemp("distributed")
    rest = {"noisy_embedding": 1.0, "active_forgetting": 2, "distill": str(folder / "one"), "ema": 0.9, "max_steps": 6}
    muon = {**EVERYTHING, "max_steps": 4, "optimizer": "muon"}
    dropout = {**EVERYTHING, "dropout": 0.2}
    compiled = {"shard": True, "compile": "on"}
    launches = [
        [
            1,
            [
                ["one", {**EVERYTHING, "max_steps": 9}],
                ["one-rest", {**EVERYTHING, **rest}],
                ["one-muon", muon],
            ],
        ],
        [
            2,
            [
                ["moving", {**EVERYTHING, "max_steps": 3}],
                ["sharded", {**EVERYTHING, "max_steps": 6, "shard": True}],
                ["rest", {**EVERYTHING, **rest, "recompute": True}],
                ["sharded-rest", {**EVERYTHING, **rest, "recompute": True, "shard": True}],
                # Micro-batches of one size, since each size is compiled again.
                ["sharded-compiled", {**EVERYTHING, **rest, "batch_size": 2, "grad_accum": 6, **compiled}],
                ["muon", muon],
                ["sharded-muon", {**muon, "shard": True}],
                ["dropout", {**dropout, "max_steps": 6}],
                ["dropout-resumed", {**dropout, "max_steps": 3}],
                ["dropout-resumed", {**dropout, "max_steps": 6, "resume": True}],
                ["odd", {"batch_size": 3}],
                ["diverged", {**EVERYTHING, "lr": 1e30, "warmup_steps": 0}],
            ],
        ],
        [
            1,
            [
                ["moving", {**EVERYTHING, "max_steps": 6, "resume": True}],
                ["sharded", {**EVERYTHING, "max_steps": 7, "resume": True}],
            ],
        ],
        [
            3,
            [
                ["moving", {**EVERYTHING, "max_steps": 9, "resume": True}],
                ["sharded", {**EVERYTHING, "max_steps": 9, "resume": True, "shard": True}],
            ],
        ],
    ]
    printed = finish(python("-c", LAUNCHES, str(corpus), str(folder), json.dumps(launches)))
    (folder / "two.txt").write_text(printed.split("NEXT LAUNCH\n")[2])
    return folder


def test_the_number_of_processes_changes_nothing(runs):
    """Two processes for three steps, one for three, three for three: the run of one process."""
    assert_same_curve(curve(runs / "moving"), curve(runs / "one"))


def test_sharding_changes_nothing(runs):
    """Sharded over two processes, then on one device, then sharded over three, which divides no dimension."""
    lines = [line for line in curve(runs / "sharded") if "val_loss" not in line or line["step"] % 3 == 0]
    assert_same_curve(lines, curve(runs / "one"))


@pytest.mark.parametrize("name", ["rest", "sharded-rest", "sharded-compiled"])
def test_the_other_counter_measures_agree(runs, name):
    """Including the average of the weights; two of the runs recompute their blocks."""
    assert_same_curve(curve(runs / name), curve(runs / "one-rest"))
    assert "ema_val_loss" in curve(runs / name)[-1]
    averages = [checkpoint.read(runs / run / checkpoint.AVERAGE)["model"] for run in (name, "one-rest")]
    assert averages[0].keys() == averages[1].keys()
    for key, value in averages[0].items():
        torch.testing.assert_close(value, averages[1][key], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", ["muon", "sharded-muon"])
def test_muon_agrees(runs, name):
    """Muon orthogonalises in bfloat16 (eight bits of precision), which magnifies the gradients' rounding errors."""
    assert_same_curve(curve(runs / name), curve(runs / "one-muon"), abs=1e-3, rel=1e-3)


@pytest.mark.parametrize("name", ["moving", "sharded", "rest", "sharded-rest", "sharded-compiled"])
def test_a_checkpoint_is_that_of_one_process(runs, name):
    of_one, of_many = (checkpoint.read(runs / run / checkpoint.LAST) for run in ("one", name))
    assert of_one.keys() == of_many.keys()
    assert [(key, value.shape, value.dtype) for key, value in of_one["model"].items()] == [
        (key, value.shape, value.dtype) for key, value in of_many["model"].items()
    ]
    assert of_many["model"]["wte.weight"].data_ptr() == of_many["model"]["lm_head.weight"].data_ptr()  # tied, once
    (one,), (many,) = of_one["optimizers"], of_many["optimizers"]
    assert one["param_groups"][0].keys() == many["param_groups"][0].keys()
    for index, values in one["state"].items():
        assert {key: value.shape for key, value in values.items()} == {
            key: value.shape for key, value in many["state"][index].items()
        }
    model, _ = minidisp.load(runs / name)
    assert model.num_params() == sum(p.numel() for p in model.state_dict().values()) - model.lm_head.weight.numel()


def test_dropout_differs_from_process_to_process_and_resumes_exactly(runs):
    whole, resumed = (checkpoint.read(runs / name / checkpoint.LAST) for name in ("dropout", "dropout-resumed"))
    assert all(value.equal(resumed["model"][name]) for name, value in whole["model"].items())
    assert curve(runs / "dropout") == curve(runs / "dropout-resumed")
    (other,) = whole["rng_of_others"]
    assert not other["cpu"].equal(whole["rng"]["cpu"])
    assert other["cpu"].equal(resumed["rng_of_others"][0]["cpu"])


def test_only_the_main_process_writes_and_prints(runs):
    printed = (runs / "two.txt").read_text()
    assert printed.count("minidisp 0") == 11
    assert printed.count("resumed at step 3") == 1
    assert "2 processes, sharded" in printed
    assert printed.count("InputError: ") == 1
    assert "3 sequences per step, which 2 processes cannot share evenly" in printed
    assert not (runs / "odd").exists()
    one, many = ({path.name for path in (runs / name).iterdir()} for name in ("one", "moving"))
    assert one == many


def test_all_skip_the_same_steps_and_give_up_together(runs):
    (message,) = [line for line in (runs / "two.txt").read_text().splitlines() if line.startswith("Diverged: ")]
    assert "had a NaN or Inf loss or gradient" in message or "validation loss is nan" in message
    assert "became NaN or Inf first" in message


def test_out_of_memory_in_one_process_gives_advice():
    """It cannot retry its step with half the micro-batch: the others are waiting in the middle of theirs."""
    with pytest.raises(InputError, match=r"step 3: process 1 is out of memory: lower --batch-size.* --shard"):
        half_of(4, MemoryError(), "step 3", World(rank=1, size=2))
    with pytest.raises(InputError, match="with one sequence at a time"):
        half_of(1, MemoryError(), "step 3", World(rank=1, size=2))


# --- processes that were started differently --------------------------------------------------------------------------

# Each setting is given to the second process only. The folder `here` is a different corpus in each process.
DISAGREE = """
import json, os, sys
from contextlib import ExitStack
import train
from minidisp import InputError, report
from minidisp.runtime import device
from tests.conftest import small_config

data, folder, cases = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
report.draw_run = lambda *_: []
with ExitStack() as at_exit:
    world = train.World.join(at_exit)
    os.chdir(f"{folder}/{world.rank}")
    for number, (both, other) in enumerate(cases):
        changes = {**both, **(other if world.rank else {})}
        code_hash = device.code_hash
        if changes.pop("code", False):
            device.code_hash = lambda: "changed"
        corpus = changes.pop("data", data)
        try:
            train.main(small_config(corpus, f"{folder}/run{number}", **changes), world)
            said = "trained"
        except InputError as error:
            said = str(error)
        device.code_hash = code_hash
        said = world.gather(said)
        if world.main:
            print("SAID " + json.dumps(said), flush=True)
train.leave(0)
"""

DIFFERENT = {
    "lr": 1.0,
    "seed": 7,
    "optimizer": "muon",
    "batch_size": 2,
    "grad_accum": 3,
    "ema": 0.9,
    "dispersion": 0.1,
    "eval_every": 1,
    "n_embd": 16,
    "max_steps": 3,
    "dropout": 0.1,
    "arch": "qwen3",
    "device": "cuda",
    "compile": "on",
    "save_every": 1,
    "dtype": "bfloat16",
    "distill": "elsewhere",
    "init_from": "elsewhere",
    "resume": True,
    "shard": True,
    "keep": 2,
    "threads": 2,
}


def test_processes_with_other_flags_data_or_code_are_told_which(corpus, bpe_corpus, tmp_path):
    for rank, source in enumerate((corpus, bpe_corpus)):
        (tmp_path / str(rank)).mkdir()
        (tmp_path / str(rank) / "here").symlink_to(source)
    script = tmp_path / "disagree.py"
    script.write_text(DISAGREE)
    cases = [
        *([{}, {name: value}] for name, value in DIFFERENT.items()),
        [{}, {"data": str(bpe_corpus)}],
        [{"data": "here"}, {}],
        [{}, {"code": True}],
        [{"max_steps": 1}, {}],
    ]
    printed = finish(torchrun(2, str(script), str(corpus), str(tmp_path), json.dumps(cases)))
    said = [json.loads(line[5:]) for line in printed.splitlines() if line.startswith("SAID ")]
    assert len(said) == len(cases), printed
    names = [*(f"--{name.replace('_', '-')}: " for name in DIFFERENT), "--data: ", "--data: ", "the code of minidisp: "]
    for name, messages in zip(names, said, strict=False):
        assert messages[0] == messages[1]
        assert messages[0].startswith(f"the processes differ in {name}"), messages
        assert "in process 0" in messages[0]
        assert "in process 1" in messages[0]
    assert said[-1] == ["trained", "trained"]
    made = {path.name for path in tmp_path.iterdir()}
    assert made == {"0", "1", "disagree.py", f"run{len(cases) - 1}"}  # nothing was written before they agreed


def test_two_commands_that_differ_end_with_one_line(corpus, tmp_path):
    environment = {
        **os.environ,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "29631",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "train.py", *small_flags(max_steps=2, data=corpus, out=tmp_path / "run")]
    started = [
        subprocess.Popen(
            [*command, "--weight-decay", str(rank)],
            cwd=ROOT,
            env={**environment, "RANK": str(rank)},
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    printed = [process.communicate(timeout=200) for process in started]
    assert [process.returncode for process in started] == [2, 2], printed
    said = "".join(err for _, err in printed).splitlines()
    assert (
        len(
            [
                line
                for line in said
                if "the processes differ in --weight-decay: 0.0 in process 0, 1.0 in process 1" in line
            ]
        )
        == 1
    ), said
    assert "Traceback" not in "".join(said)
    assert not (tmp_path / "run").exists()


def wait_until(what, process: subprocess.Popen, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end
        time.sleep(0.01)


def worker(process: subprocess.Popen, rank: int) -> int:
    """The process id of a worker of the current attempt."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (pid,) = [int(pid) for pid in children if f"\0RANK={rank}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes()]
    return pid


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the workers in Linux's /proc")
def test_a_lost_process_and_a_signal_end_all(corpus, tmp_path):
    """One command: it starts, is killed before and after its first checkpoint, resumes, and is stopped by a signal."""
    run = tmp_path / "run"
    flags = small_flags(
        data=corpus, out=run, max_steps=100_000, save_every=100, eval_every=100_000, schedule="constant", dispersion=0.1
    )
    process = torchrun(2, "--max-restarts=2", "train.py", *flags, "--resume")
    metrics, last = run / "metrics.jsonl", run / checkpoint.LAST
    try:
        wait_until(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") > 20, process)
        assert not last.exists()
        os.kill(worker(process, 1), signal.SIGKILL)
        wait_until(last.exists, process)
        before = checkpoint.read(last)["step"]
        os.kill(worker(process, 0), signal.SIGKILL)
        config = (run / "config.json").stat().st_mtime_ns
        wait_until(lambda: (run / "config.json").stat().st_mtime_ns > config, process)  # the next attempt has started
        wait_until(lambda: checkpoint.read(last)["step"] > before, process)
        os.kill(worker(process, 1), signal.SIGTERM)  # to one process; the other must stop too
        printed, _ = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode != 0
    assert "it starts again at step 0" in printed
    assert "resumed at step" in printed
    assert printed.count("lost another process, so the run stops") == 2, printed
    assert "by SIGTERM; continue with" in printed
    assert 'train.py", line' not in printed, printed  # no traceback from our code
    state = checkpoint.read(last)
    assert state["step"] > before >= 100
    steps = [line["step"] for line in report.read_metrics(metrics) if "loss" in line]
    assert steps == list(range(1, state["step"] + 1))
