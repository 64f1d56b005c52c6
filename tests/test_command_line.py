"""Any input: a command exits with 0, 2, 3 or 130, and reports errors in one line. No traceback, no half-written
file."""

import dataclasses
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import eval as evaluation
import train
from minidisp import report
from minidisp.config import Config, kebab
from minidisp.runtime.cli import Parser
from tests.conftest import small_flags

# None of these needs a compiler, a network or much time.
TINY = {
    "n_layer": 1,
    "n_head": 1,
    "n_embd": 8,
    "block_size": 8,
    "batch_size": 1,
    "max_steps": 1,
    "eval_tokens": 32,
    "dispersion": 0.1,
}
LONG = {"--compile", "--wandb", "--tensorboard", "--threads", "--help", "--version"}

NUMBERS = [
    "0",
    "1",
    "2",
    "3",
    "-1",
    "-0.0",
    "0.5",
    "1e-3",
    "1e-45",
    "1e-320",
    "1e20",
    "3.4e38",
    "1.7e308",
    "1e309",
    "nan",
    "-inf",
    "1e5000",
    "9" * 25,
    "-" + "9" * 25,
    "0x10",
    "1_0",
    " 1",
    "\u0663",
    "1,5",
    "",
]
WORDS = [
    "",
    " ",
    "x",
    "-",
    "--",
    "all",
    "none",
    "1,2",
    "adamw",
    "\x1b[2J",
    "\u202e",
    "\u200f\u200b\u061c\U000e0041",
    "\udcff",
    "a\nb",
    "%s %d",
    "$HOME",
    "~nobody",
    "*",
    "x" * 5000,
]


@pytest.fixture
def paths(run, tmp_path) -> list[str]:
    """Paths of every kind that are neither a run, nor a corpus, nor a writable file."""
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing" / "x")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty").write_text("")
    (tmp_path / "bytes").write_bytes(bytes(range(256)))
    names = [
        "loop",
        "loop/x",
        "a",
        "nowhere",
        "pipe",
        "folder",
        "empty",
        "empty/x",
        "bytes",
        "missing",
        "missing/x",
        "x" * 300,
        "/".join(["y" * 200] * 20),
        "\udcff",
    ]
    devices = ["/dev/null", "/dev/full", "/dev/zero", "/proc/self/mem"]
    return [*(str(tmp_path / name) for name in names), *devices]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Files with default or relative paths must not end up in the project."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def ends_well(capsys, prog: str, command: Callable[[], int], argv: list[str]) -> int:
    capsys.readouterr()
    code = command()
    said = capsys.readouterr().err
    assert code in (0, 2, 3, 130), (argv, code, said)
    assert "Traceback" not in said, argv
    if code:
        *before, last = said.splitlines()
        assert last.startswith(f"{prog}: "), (argv, said)
        assert all(line.startswith(("warning: ", f"{prog}: ", "not compiled")) for line in before), (argv, said)
        assert last.isprintable(), (argv, ascii(last))
        assert len(last) < 2000, argv
    return code


def many(examples: int, strategy: st.SearchStrategy, check: Callable) -> None:
    @settings(
        max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(strategy)
    def run(case):
        check(case)

    run()


HOW_MANY = pytest.mark.parametrize("examples", [40, pytest.param(1500, marks=pytest.mark.slow)])


@HOW_MANY
def test_train(corpus, run, tmp_path, paths, capsys, monkeypatch, examples):
    values = {"--config": st.sampled_from([*paths, str(run / "config.json")])}
    for field in dataclasses.fields(Config):
        flag = f"--{kebab(field.name)}"
        if "help" not in field.metadata or flag in LONG:
            continue
        if get_origin(field.type) is Literal:
            values[flag] = st.sampled_from([*get_args(field.type), "x"])
        elif field.type is bool:
            values[flag] = st.none()
        elif field.name in ("data", "out", "init_from", "distill"):
            values[flag] = st.sampled_from(
                [*paths, str(run), str(corpus), *([] if field.name == "out" else [".", "/"])]
            )
        else:
            values[flag] = st.sampled_from(NUMBERS + WORDS)
    flags = st.sampled_from(sorted(values)).flatmap(lambda flag: st.tuples(st.just(flag), values[flag]))
    before = {path: path.read_bytes() for folder in (run, corpus) for path in folder.rglob("*") if path.is_file()}
    seen = set()

    def check(typed):
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        argv = [*small_flags(**TINY), "--data", str(corpus), "--out", str(out)]
        for flag, value in typed:
            argv += [flag] if value is None else [f"{flag}={value}"] if value.startswith("-") else [flag, value]
        if {"--overwrite", "--resume"} & {flag for flag, _ in typed} and str(run) in argv:
            return  # may modify that run
        rng = torch.get_rng_state()
        code = ends_well(capsys, "train.py", lambda: train.cli(argv), argv)
        torch.set_rng_state(rng)
        seen.add(code)
        assert not list(out.glob("*.tmp")), argv
        if code == 0 and out.exists() and "--max-steps" not in argv[len(small_flags(**TINY)) :]:
            assert (out / "summary.json").exists(), argv

    many(examples, st.lists(flags, min_size=1, max_size=3), check)
    assert seen >= {0, 2}
    for path, content in before.items():
        assert path.read_bytes() == content, path


@HOW_MANY
def test_eval(corpus, run, tmp_path, paths, capsys, monkeypatch, examples):
    monkeypatch.setattr(report, "draw_comparison", lambda *_, **__: [])
    typed_lines = itertools.cycle([*(word[:40] for word in WORDS), EOFError()])

    def typed(*_):
        if isinstance(line := next(typed_lines), EOFError):
            raise line
        return line

    monkeypatch.setattr("builtins.input", typed)
    files = {
        "--text-file": "some words of a text\n" * 9,
        "--prompts": "".join(f"{word!r}\n" for word in WORDS),
        "--minimal-pairs": json.dumps({"sentence_good": "a b", "sentence_bad": "b a", "field": "order"}),
        "--choices": json.dumps({"context": "a", "choices": [" b", " \x1b[2J\u202e"], "answer": 0}),
        "--completions": json.dumps({"prompt": "a \x1b[2J", "completion": " b"}),
    }
    for flag, content in files.items():
        (tmp_path / flag).write_text(content)
    parser = Parser(prog="eval.py", allow_abbrev=False)
    evaluation._add_flags(parser)
    values = {}
    for action in parser._actions:
        flag = action.option_strings[-1] if action.option_strings else None
        if flag is None or flag in LONG:
            continue
        if action.nargs == 0:
            values[flag] = st.none()
        elif action.choices:
            values[flag] = st.sampled_from([*action.choices, "x"])
        elif action.type in (int, float):
            values[flag] = st.sampled_from(NUMBERS)
        elif action.metavar in ("TEXT", "GLOB") and flag != "--data":
            values[flag] = st.sampled_from([*WORDS, *paths])
        else:
            values[flag] = st.sampled_from([*paths, str(run), str(corpus), "."])
        if flag in files:
            values[flag] |= st.just(str(tmp_path / flag))
    flags = st.sampled_from(sorted(values)).flatmap(lambda flag: st.tuples(st.just(flag), values[flag]))
    runs = st.just([str(run)]) | st.lists(st.sampled_from([*paths, str(run), str(run), str(run), str(run)]), max_size=2)
    modes = {flag: (flag, str(tmp_path / flag)) for flag in files} | {"--chat": ("--chat", None)}
    mode = st.lists(st.sampled_from(sorted(modes.values(), key=str)), max_size=1)
    before = {path: path.read_bytes() for folder in (run, corpus) for path in folder.rglob("*") if path.is_file()}
    seen = set()

    def check(case):
        names, chosen, others = case
        argv, typed = [*names], [*chosen, *others]
        outputs = {"--json", "--html", "--figures"}
        for flag, value in typed:
            if flag in outputs and value in (str(run), str(corpus)):
                continue
            argv += [flag] if value is None else [f"{flag}={value}"] if value.startswith("-") else [flag, value]
        given = {flag for flag, _ in typed}
        if "--max-new-tokens" not in given and {"--sample", "--prompts", "--chat", "--completions"} & given:
            argv += ["--max-new-tokens", "2"]
        code = ends_well(capsys, "eval.py", lambda: evaluation.cli(argv), argv)
        seen.update({(code, flag) for flag in given} | {code})

    many(examples, st.tuples(runs, mode, st.lists(flags, max_size=2)), check)
    assert seen >= {0, 2}
    if examples > 1000:
        assert seen >= {(0, flag) for flag in modes}
    for path, content in before.items():
        assert path.read_bytes() == content, path


@pytest.mark.parametrize("flag", ["--out", "--data", "--init-from", "--distill", "--config"])
def test_a_path_that_leads_nowhere_is_one_line(corpus, tmp_path, paths, capsys, monkeypatch, flag):
    for path in paths:
        argv = [*small_flags(**TINY), "--data", str(corpus), "--out", str(tmp_path / "out"), flag, path]
        code = ends_well(capsys, "train.py", lambda argv=argv: train.cli(argv), argv)
        assert code == 2 or (flag == "--out" and code == 0), (flag, path)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


@pytest.mark.parametrize("scale", [1e30, math.inf, math.nan])
def test_weights_of_any_size_end_in_numbers_or_one_line(run, tmp_path, capsys, scale):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    for path in folder.glob("ckpt_*.pt"):
        state = torch.load(path, weights_only=True)
        state["model"] = {name: tensor * scale for name, tensor in state["model"].items()}
        torch.save(state, path)
    for more in (["--tokens", "100"], ["--sample", "a", "--max-new-tokens", "3"], ["--texts", "2", "--tokens", "100"]):
        argv = [str(folder), *more]
        ends_well(capsys, "eval.py", lambda argv=argv: evaluation.cli(argv), argv)


def test_the_folder_of_paths_has_every_kind(paths):
    assert not Path(paths[0]).exists()
    assert len({*paths}) == len(paths)
