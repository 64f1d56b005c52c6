"""No data is lost: killed at random times, on a full disk, in a read-only folder, by signals, with two runs at once."""

import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

import train
from minidisp import report
from minidisp.runtime import checkpoint, files
from tests import forked
from tests.conftest import small_config, small_flags
from tests.test_train import assert_equal, assert_same_state, lines

ROOT = Path(train.__file__).parent
KILLS = 50


# --- SIGKILL --------------------------------------------------------------------------------------------------------


def tiny_config(corpus: Path, out: Path, **changes):
    size = {
        "n_layer": 1,
        "n_embd": 16,
        "block_size": 16,
        "batch_size": 2,
        "dropout": 0.1,
        "dispersion": 0.1,
        "dispersion_tokens": 8,
    }
    often = {"max_steps": 4 * KILLS, "save_every": 1, "eval_every": 20, "keep": 1, "dispersion_impl": "reference"}
    return small_config(corpus, out, **{**size, **often, **changes})


def kill_again_and_again(corpus: Path, folder: Path) -> dict:
    """Train once without interruption, then again with KILLS SIGKILLs at random times, four out of five during a save.

    The processes are forked from this one, which has torch loaded, so each kill is cheap. Returns statistics.
    """
    torch.set_num_threads(1)
    report.draw_run = lambda *_: []
    save, durations = checkpoint.save, []

    def timed(*arguments):
        begin = time.perf_counter()
        save(*arguments)
        durations.append(time.perf_counter() - begin)

    checkpoint.save = timed
    train.main(tiny_config(corpus, folder / "whole"))
    save_seconds = sorted(durations)[len(durations) // 2]
    rng, out, seen = random.Random(0), folder / "killed", {"kills": 0, "in_a_save": 0, "lives": 0}

    def live(report_to: int) -> None:
        def marked(run, state, step, keep):
            os.write(report_to, b"<%d\n" % step)
            save(run, state, step, keep)
            os.write(report_to, b">%d\n" % step)

        checkpoint.save = marked
        train.main(tiny_config(corpus, out, resume=(out / "config.json").exists()))

    while seen["kills"] < KILLS:
        seen["lives"] += 1
        read_end, write_end = os.pipe()
        child = os.fork()
        if not child:
            status = 1
            try:
                os.close(read_end)
                live(write_end)
                status = 0
            finally:
                os._exit(status)
        os.close(write_end)
        heard = b""
        if seen["lives"] % 5:  # wait for a save to start, then for part of its duration
            saves = rng.randint(1, 3)
            while heard.count(b"<") < saves and (part := os.read(read_end, 1000)):
                heard += part
            time.sleep(rng.uniform(0, 1.1 * save_seconds))
        else:  # at any time, including start-up
            select.select([read_end], [], [], rng.uniform(0, 0.4))
        os.kill(child, signal.SIGKILL)
        killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        while part := os.read(read_end, 1000):
            heard += part
        os.close(read_end)
        assert killed, "it ended before it was killed: give it more steps"
        seen["kills"] += 1
        begun = [int(line[1:]) for line in heard.split() if line.startswith(b"<")]
        done = [int(line[1:]) for line in heard.split() if line.startswith(b">")]
        seen["in_a_save"] += len(begun) > len(done)
        if begun[:1] == [1] and not done and not (out / checkpoint.LAST).exists():
            continue  # killed during the first save: nothing has been saved
        if (out / checkpoint.LAST).exists():
            step = checkpoint.read(out / checkpoint.LAST)["step"]
            assert not done or step >= done[-1], (step, heard)
            assert not begun or step <= begun[-1], (step, heard)
        assert len(list(out.glob("*.tmp"))) <= 1
    train.main(tiny_config(corpus, out, resume=(out / "config.json").exists()))
    return seen


def in_child(*arguments) -> dict:
    """Run this file as a program, which forks; returns what it has seen."""
    done = forked.run("-m", "tests.test_crash", *arguments, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_fifty_kills_lose_nothing(corpus, tmp_path):
    seen = in_child(corpus, tmp_path)
    assert seen["kills"] == KILLS
    assert seen["in_a_save"] > KILLS // 2, seen
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert_same_state(whole, killed)
    assert lines(killed) == lines(whole)  # no step incomplete, repeated or missing
    assert sorted(path.name for path in killed.iterdir()) == sorted(path.name for path in whole.iterdir())


# --- killed twice, before any change of a file ------------------------------------------------------------------------

CHANGES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}


def killed_at(point: int, folder: Path, work) -> bool:
    """Call work() in a fork that kills itself before its point-th file change in the folder; returns whether it did.

    point: counted from 1; with 0, it finishes.
    """
    child = os.fork()
    if not child:
        left, code = point, 1

        def count(event: str, arguments: tuple) -> None:
            nonlocal left
            if event not in CHANGES or not str(arguments[0]).startswith(str(folder)):
                return
            if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
                return
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        try:
            work()
            code = 0
        except SystemExit as end:
            code = end.code
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
    return os.WIFSIGNALED(status)


def kill_overwriting_twice(corpus: Path, folder: Path, every: int) -> dict:
    """Replace a run with --overwrite, killed twice, at every pair of points. every: use one out of this many points.

    In between, --resume never continues the run being replaced; in the end, the new run is complete and exact.
    """
    torch.set_num_threads(1)
    report.draw_run = lambda *_: []
    few = {"max_steps": 2, "eval_every": 2, "save_every": 1, "dropout": 0.0}
    train.main(tiny_config(corpus, folder / "old", **few, keep=1))
    train.main(tiny_config(corpus, folder / "new", **few, keep=1, seed=5, overwrite=True))
    out, seen, rng = folder / "run", {"pairs": 0, "refused": 0, "resumed": 0}, random.Random(1)

    def overwrite() -> None:
        train.main(tiny_config(corpus, out, **few, keep=1, seed=5, overwrite=True))

    def try_to_resume() -> None:
        copy = folder / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(out, copy)
        code = train.cli(["--resume", "--out", str(copy)])
        assert code in (0, 2), code
        seen["resumed" if code == 0 else "refused"] += 1
        if code == 0:
            assert json.loads((copy / "config.json").read_text())["seed"] == 5, "the run that was replaced was resumed"
            assert_equal(*(checkpoint.read(where / checkpoint.LAST)["model"] for where in (copy, folder / "new")))

    point, there = 1, True
    while there:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(folder / "old", out)
        before_anything = sorted(path.name for path in out.iterdir())
        there = killed_at(point, out, overwrite)
        if there and (
            sorted(path.name for path in out.iterdir()) != before_anything
            or (out / "metrics.jsonl").stat().st_size == 0
        ):
            try_to_resume()
            killed_at(rng.randint(1, point + 5), out, overwrite)
            try_to_resume()
        overwrite()
        assert_same_state(out, folder / "new")
        assert lines(out) == lines(folder / "new")
        assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in (folder / "new").iterdir())
        seen["pairs"] += 1
        point += every
    return seen


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("every", [12, pytest.param(1, marks=pytest.mark.slow)])
def test_an_overwrite_killed_twice_is_never_the_old_run(corpus, tmp_path, every):
    seen = in_child(corpus, tmp_path, str(every))
    assert seen["refused"]
    assert seen["resumed"]
    assert seen["pairs"] >= 30 // every


# --- disks that do not take it ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(corpus, tmp_path_factory) -> Path:
    """A folder with the runs of half_done, for all tests to copy."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "draw_run", lambda *_: [])
        train.main(small_config(corpus, folder / "whole"))
        interrupt_in(patch, 8)
        with pytest.raises(SystemExit):
            train.main(small_config(corpus, folder / "run"))
    return folder


@pytest.fixture
def half_done(stopped, tmp_path) -> Path:
    """A run of 12 steps that was stopped after 8, next to the same run without interruption."""
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    return tmp_path / "run"


def interrupt_in(patch, step: int, number=signal.SIGINT, times: int = 1) -> None:
    """Send this process a signal during a step (counted from 1)."""
    original = train.learning_rate

    def interrupting(index, config):
        if index == step - 1:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return original(index, config)

    patch.setattr(train, "learning_rate", interrupting)


def resume(run: Path, *flags) -> int:
    return train.cli(["--resume", "--out", str(run), *flags])


def assert_it_goes_on(run: Path) -> None:
    assert resume(run) == 0
    assert_same_state(run, run.parent / "whole")
    assert lines(run) == lines(run.parent / "whole")
    assert not list(run.glob("*.tmp"))


def test_a_limit_of_the_file_size_costs_nothing(half_done, capsys):
    before = (half_done / checkpoint.LAST).read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        code = resume(half_done)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capsys.readouterr().err
    assert (code, error.count("\n")) == (2, 1)
    assert f"{half_done / checkpoint.BEST}: File too large" in error or f"{checkpoint.LAST}: File too large" in error
    assert (half_done / checkpoint.LAST).read_bytes() == before
    assert_it_goes_on(half_done)


@pytest.mark.parametrize(
    ("target", "writes"), [*(("checkpoint", n) for n in (0, 1, 2, 5, 20, 60)), ("metrics", 0), ("metrics", 4)]
)
def test_a_full_disk_costs_nothing(half_done, capsys, monkeypatch, target, writes):
    """At every place where space can run out: in the pickle, in a tensor, in the zip directory, in a line."""

    class Full:
        left = writes

        def __init__(self, file):
            self.file, self.name = file, file.name

        def write(self, data):
            if Full.left == 0:
                self.file.write(data[: len(data) // 2])
                raise OSError(28, "No space left on device")
            Full.left -= 1
            return self.file.write(data)

    before = checkpoint.read(half_done / checkpoint.LAST)["step"]
    if target == "checkpoint":
        original = files._Writer.__init__
        monkeypatch.setattr(files._Writer, "__init__", lambda self, file: original(self, Full(file)))
    else:
        append = files.append_line
        monkeypatch.setattr(files, "append_line", lambda file, text: append(Full(file), text))
    code = resume(half_done)
    error = capsys.readouterr().err
    assert (code, error.count("\n")) == (2, 1)
    assert str(half_done) in error
    assert "No space left on device" in error
    assert checkpoint.read(half_done / checkpoint.LAST)["step"] >= before
    monkeypatch.undo()
    assert_it_goes_on(half_done)


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX permissions")
def test_a_read_only_folder_costs_nothing(half_done, corpus, capsys):
    root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to other users
        folder = Path(name)
        folder.chmod(0o755)
        for path in (half_done, half_done.parent / "whole"):
            shutil.copytree(path, folder / path.name)
        shutil.copytree(corpus, folder / "corpus")
        run = folder / "run"
        run.chmod(0o555)
        (run / "metrics.jsonl").chmod(0o444)
        if root:
            os.seteuid(65534)  # permissions do not apply to root
        try:
            assert train.cli(["--resume", "--out", str(run), "--data", str(folder / "corpus")]) == 2
        finally:
            if root:
                os.seteuid(0)
        error = capsys.readouterr().err
        assert f"{run / 'metrics.jsonl'}: Permission denied" in error
        assert error.count("\n") == 1
        run.chmod(0o755)
        (run / "metrics.jsonl").chmod(0o644)
        assert_it_goes_on(run)


# --- damage ----------------------------------------------------------------------------------------------------------


def test_a_torn_line_is_dropped(half_done):
    with open(half_done / "metrics.jsonl", "a") as file:
        file.write(json.dumps({**lines(half_done)[-1], "step": 9}) + '\n{"step": 10, "lo')
    assert_it_goes_on(half_done)


def test_a_damaged_line_is_named(half_done, capsys):
    path = half_done / "metrics.jsonl"
    path.write_text(path.read_text().replace('"loss"', '"lo', 1))
    before = path.read_bytes()
    assert resume(half_done) == 2
    error = capsys.readouterr().err
    assert f"{path}, line 2," in error
    assert error.count("\n") == 1
    assert path.read_bytes() == before


def test_without_an_older_one_a_damaged_checkpoint_ends_it(half_done, capsys):
    path = half_done / checkpoint.LAST
    path.write_bytes(path.read_bytes()[:-100])
    before = (half_done / "metrics.jsonl").read_bytes()
    assert resume(half_done) == 2
    error = capsys.readouterr().err
    assert str(path) in error
    assert "--init-from" in error  # ckpt_best.pt is intact
    assert error.count("\n") == 1
    assert (half_done / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_a_damaged_checkpoint_gives_way_to_an_older_one_aloud(corpus, tmp_path, capsys, damage):
    train.main(small_config(corpus, tmp_path / "whole", save_every=3, keep=2))
    with pytest.MonkeyPatch.context() as patch:
        interrupt_in(patch, 8)
        with pytest.raises(SystemExit):
            train.main(small_config(corpus, tmp_path / "run", save_every=3, keep=2))
    run = tmp_path / "run"
    (run / "ckpt_00000008.pt").unlink()
    path, content = run / checkpoint.LAST, bytearray((run / checkpoint.LAST).read_bytes())
    content[len(content) // 2] ^= 1  # one bit of one weight
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content if damage == "flipped" else content[: len(content) // 2])
    capsys.readouterr()
    assert_it_goes_on(run)
    error = capsys.readouterr().err
    if damage != "missing":
        assert f"{path} is not a minidisp checkpoint, or it is damaged" in error
        assert "resuming from ckpt_00000006.pt, step 6" in error


def test_stopped_before_the_first_checkpoint_it_starts_again_aloud(half_done, capsys):
    for path in half_done.glob("ckpt_*"):
        path.unlink()
    metrics = half_done / "metrics.jsonl"
    kept = metrics.read_text()
    assert resume(half_done) == 2  # step 8 is after the first save at step 6: the checkpoint was removed
    assert "has no usable checkpoint" in capsys.readouterr().err
    assert metrics.read_text() == kept
    metrics.write_text("".join(line for line in kept.splitlines(keepends=True) if json.loads(line)["step"] < 4))
    assert_it_goes_on(half_done)
    assert "starts again at step 0" in capsys.readouterr().err


# --- signals and neighbours ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_and_saves(corpus, tmp_path, capfd, monkeypatch, number, code):
    interrupt_in(monkeypatch, 5, number)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        train.main(small_config(corpus, tmp_path / "run"))
    assert stopped.value.code == code
    assert checkpoint.read(tmp_path / "run" / checkpoint.LAST)["step"] == 5
    error = capfd.readouterr().err
    assert f"{number.name}: finishing this step" in error
    assert f"stopped at step 5 by {number.name}; continue with: python train.py --resume --out" in error
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


def test_a_second_interrupt_exits_immediately(half_done, capfd, monkeypatch):
    before = (half_done / checkpoint.LAST).read_bytes()
    interrupt_in(monkeypatch, 10, times=2)
    assert resume(half_done) == 130
    assert "interrupted" in capfd.readouterr().err
    assert (half_done / checkpoint.LAST).read_bytes() == before
    assert [line["step"] for line in lines(half_done)][-1] == 9
    monkeypatch.undo()
    assert_it_goes_on(half_done)


@pytest.mark.parametrize("how", ["removed", "begun again", "moved", "its metrics replaced"])
@pytest.mark.parametrize("step", [3, 6, 11])
def test_a_folder_that_is_replaced_gets_no_more_writes(corpus, run, tmp_path, capsys, monkeypatch, how, step):
    """`rm -rf runs/x` and a new run while the old process is alive: the old one must not write into the new run."""
    folder, rate = tmp_path / "run", train.learning_rate

    def replaced(index, config):
        if index == step:
            folder.rename(tmp_path / "moved") if how == "moved" else None
            if how == "its metrics replaced":
                (folder / "metrics.jsonl").unlink()
                (folder / "metrics.jsonl").write_text("")
            elif how != "moved":
                shutil.rmtree(folder)
            if how == "begun again":
                shutil.copytree(run, folder)
        return rate(index, config)

    monkeypatch.setattr(train, "learning_rate", replaced)
    assert train.cli([*small_flags(save_every=2), "--data", str(corpus), "--out", str(folder)]) == 2
    error = capsys.readouterr().err
    assert f"{folder} was removed or replaced" in error
    assert error.count("\n") == 1
    if how == "begun again":
        there = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        assert there == {path.relative_to(run): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    elif how in ("removed", "moved"):
        assert not folder.exists()


def test_metrics_that_end_before_the_checkpoint_are_refused(half_done, capsys):
    path, before = half_done / "metrics.jsonl", (half_done / checkpoint.LAST).read_bytes()
    kept = path.read_text().splitlines(keepends=True)
    for content in ("", "".join(kept[:3]), "".join(kept[:-2])):
        path.write_text(content)
        assert resume(half_done) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert f"{half_done / checkpoint.LAST} was saved after step 8 was logged, but {path} ends at step" in error
        assert path.read_text() == content
        assert (half_done / checkpoint.LAST).read_bytes() == before
    path.write_text("".join(kept))
    assert_it_goes_on(half_done)


@pytest.mark.parametrize("flags", [["--resume"], ["--overwrite"]])
def test_a_second_run_in_the_folder_is_rejected(half_done, corpus, capsys, flags):
    before = {path.name: path.read_bytes() for path in half_done.iterdir()}
    with files.open_log(half_done / "metrics.jsonl", print):
        code = train.cli([*small_flags(), "--data", str(corpus), "--out", str(half_done), *flags])
    error = capsys.readouterr().err
    assert (code, error.count("\n")) == (2, 1)
    assert f"{half_done} is in use by another run" in error
    assert {path.name: path.read_bytes() for path in half_done.iterdir()} == before
    assert_it_goes_on(half_done)  # the lock ends with its holder


def test_missing_file_locks_are_reported(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", flock)
    said = []
    with files.open_log(tmp_path / "metrics.jsonl", said.append) as file:
        files.append_line(file, "{}")
    assert len(said) == 1
    assert "do not start a second run" in said[0]
    assert (tmp_path / "metrics.jsonl").read_text() == "{}\n"


if __name__ == "__main__":
    where = Path(sys.argv[1]), Path(sys.argv[2])
    found = kill_overwriting_twice(*where, int(sys.argv[3])) if sys.argv[3:] else kill_again_and_again(*where)
    print("\n" + json.dumps(found))
