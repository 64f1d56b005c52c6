"""The examples of docs/hacking.md: each is applied to a copy of the code, trained, killed and resumed."""

import json
import re
import shutil
from pathlib import Path

import pytest

from tests import forked
from tests.conftest import small_flags

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "hacking.md").read_text(encoding="utf-8")

# Imports once, and forks for each process: one trains to the end, one is killed in step 6, two steps after a
# checkpoint, and a fresh one resumes the killed run.
TRAIN_KILL_RESUME = """
import os, signal, sys
import torch, train
from minidisp import report
from minidisp.runtime import checkpoint

flags, folder = sys.argv[2:], sys.argv[1]
report.draw_run = lambda *_: []
learning_rate = train.learning_rate

def killing(step, config):
    if step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return learning_rate(step, config)

def fork(*flags):
    sys.stdout.flush()
    if (child := os.fork()) == 0:
        os._exit(train.cli(list(flags)))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

assert fork(*flags, "--out", folder + "/whole") == 0
train.learning_rate = killing
assert fork(*flags, "--out", folder + "/killed") == -signal.SIGKILL
train.learning_rate = learning_rate
assert fork("--resume", "--out", folder + "/killed") == 0
whole, killed = (checkpoint.read(f"{folder}/{name}/ckpt_last.pt") for name in ("whole", "killed"))
assert whole["model"].keys() == killed["model"].keys()
for name, weight in whole["model"].items():
    assert torch.equal(weight, killed["model"][name]), name
for a, b in zip(whole.get("mean", []), killed.get("mean", []), strict=True):
    assert torch.equal(a, b)
print("mean" in whole)
"""
# title: flags, and what the first lines or the log then have
HACKS = {
    "1. A term of the objective": (["--norm-penalty", "0.01"], "0.01 x mean squared hidden state"),
    "2. Another block": (["--parallel"], None),
    "3. A schedule": (["--schedule", "inverse_sqrt"], "inverse_sqrt schedule"),
    "4. An optimiser": (["--optimizer", "nadam"], "nadam"),
    "5. Weight averaging": ([], None),
    "6. A number that is logged": ([], None),
    "7. A scheduled weight": (["--norm-penalty", "0.01"], "0.01 x mean squared hidden state"),
    "8. Another attention": (["--window", "5"], None),
    "9. Masked targets": ([], None),
}


def sections() -> dict[str, str]:
    return {part.partition("\n")[0]: part for part in PAGE.split("\n## ")[1:]}


def edits(section: str) -> list[tuple[str, str, str]]:
    """The changes of a section as (file, old text, new text)."""
    found, file = [], ""
    (block,) = re.findall(r"```diff\n(.*?)```", section, re.DOTALL)
    for hunk in re.split(r"^(?=--- )|^@@\n", block, flags=re.MULTILINE):
        lines = hunk.splitlines()
        if lines and lines[0].startswith("--- "):
            file = lines.pop(0).removeprefix("--- ")
        if lines:
            before = "".join(line[1:] + "\n" for line in lines if line[:1] != "+")
            after = "".join(line[1:] + "\n" for line in lines if line[:1] != "-")
            found.append((file, before, after))
    return found


def copy_of_the_code(folder: Path) -> Path:
    """A checkout with the files that training needs, including the prebuilt extension."""
    code = folder / "code"
    shutil.copytree(ROOT / "minidisp", code / "minidisp", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "csrc", code / "csrc")
    (code / "data").mkdir()
    for path in (ROOT / "data").glob("*.py"):
        shutil.copy(path, code / "data")
    shutil.copy(ROOT / "train.py", code)
    return code


def apply(section: str, code: Path) -> int:
    """Apply the changes, each of which must match exactly one place; returns their number."""
    changes = edits(section)
    for file, before, after in changes:
        text = (code / file).read_text(encoding="utf-8")
        assert text.count(before) == 1, f"{file} has {text.count(before)} places for\n{before}"
        (code / file).write_text(text.replace(before, after), encoding="utf-8")
    return len(changes)


def test_every_example_is_here():
    assert [title for title in sections() if title[0].isdigit()] == list(HACKS)


@pytest.mark.parametrize(
    "title", [title if title[0] in "1789" else pytest.param(title, marks=pytest.mark.slow) for title in HACKS]
)
def test_an_example_trains_and_resumes_exactly(corpus, tmp_path, title):
    flags, expected = HACKS[title]
    code = copy_of_the_code(tmp_path)
    assert apply(sections()[title], code) <= 4
    flags = [*small_flags(max_steps=8, save_every=4, eval_every=8), "--data", str(corpus), *flags]
    done = forked.run("-c", TRAIN_KILL_RESUME, tmp_path, *flags, cwd=code)
    assert done.returncode == 0, done.stderr
    assert expected is None or expected in done.stdout
    assert "resumed at step 4" in done.stdout
    assert done.stdout.splitlines()[-1] == str(title.startswith("5"))
    logs = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "killed")
    ]
    times = {"tokens_per_second", "seconds"}
    assert [line.keys() for line in logs[0]] == [line.keys() for line in logs[1]]
    for a, b in zip(*logs, strict=True):
        assert {key: a[key] for key in a.keys() - times} == {key: b[key] for key in b.keys() - times}
    for numbers, name in (("17", "norm_penalty"), ("6", "largest_state"), ("7", "norm_penalty_weight")):
        assert (name in logs[0][2]) == (title[0] in numbers)
    if title.startswith("7"):
        assert [line["norm_penalty_weight"] for line in logs[0] if "ce" in line] == [
            0.01 * step / 100 for step in range(8)
        ]


def test_another_block_is_not_exported(corpus, tmp_path):
    """A block that the format cannot represent is rejected, not written as a standard one."""
    code = copy_of_the_code(tmp_path)
    apply(sections()["2. Another block"], code)
    script = """
import sys
from minidisp import hf, report
import train
report.draw_run = lambda *_: []
assert train.cli([*sys.argv[2:], "--parallel", "--out", sys.argv[1] + "/run"]) == 0
sys.exit(hf.main(["export", sys.argv[1] + "/run", sys.argv[1] + "/out"]))
"""
    done = forked.run("-c", script, tmp_path, *small_flags(max_steps=2), "--data", corpus, cwd=code)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert "parallel" in done.stderr
    assert not (tmp_path / "out").exists()
