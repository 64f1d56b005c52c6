"""A small corpus and a small trained run, shared by several test files."""

import os
import random
import signal
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

os.environ.setdefault("MINIDISP_CPU", "amx")  # compile all instruction sets, since the tests use each of them

from data import prepare
from minidisp import report
from minidisp.config import from_dict
from train import main

# Shells make background processes ignore Ctrl-C, and all children of these tests would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

SMALL = {
    "recipe": "gpt2",
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 32,
    "block_size": 32,
    "batch_size": 4,
    "max_steps": 12,
    "warmup_steps": 2,
    "eval_every": 6,
    "eval_tokens": 512,
    "log_every": 1,
    "save_every": 6,
    "lr": 3e-3,
    "device": "cpu",
    "threads": 1,
}


@pytest.fixture(autouse=True)
def no_figures():
    """Training draws no figures, which take longer than a small run; test_report.py and the fixture `run` draw some."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "draw_run", lambda *_: [])
        yield


class NothingIsLookedAt(TorchDispatchMode):
    """Inside, operators that read tensor values in Python raise an error: on a GPU, they would synchronise."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}.intersection(func.tags)
        assert not waits, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """With pytest-xdist installed, `python -m pytest` uses up to four cores, one test file each; -n 0 disables this.

    Set here and not in addopts, so that pytest also runs without xdist.
    """
    if not config.pluginmanager.hasplugin("xdist") or hasattr(config, "workerinput"):
        return
    option = config.option
    if option.numprocesses is None and not option.tx:
        option.numprocesses = "auto"
        option.maxprocesses = option.maxprocesses or 4
    if option.numprocesses and option.dist == "no":
        option.dist = "loadfile"
        option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    # One of the longest files, which one of two processes would otherwise run alone at the end.
    items.sort(key=lambda item: item.path.name != "test_train.py")


def pytest_addoption(parser):
    parser.addoption(
        "--fuzz", type=float, default=1, metavar="N", help="N times as many damaged files, and other ones each time"
    )


def write_text(path: Path, words: int = 6000, seed: int = 0) -> Path:
    """A text with a little structure, always the same."""
    rng = random.Random(seed)
    vocabulary = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(1, 7))) for _ in range(60)]
    path.write_text(" ".join(rng.choices(vocabulary, range(60, 0, -1), k=words)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """One document in bytes."""
    folder = tmp_path_factory.mktemp("corpus")
    text = write_text(folder / "text.txt")
    out = folder / "prepared"
    assert prepare.main(["--input", str(text), "--name", "letters", "--tokenizer", "byte", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="session")
def bpe_corpus(tmp_path_factory) -> Path:
    """The same text in SentencePiece tokens."""
    folder = tmp_path_factory.mktemp("bpe")
    text = write_text(folder / "text.txt")
    out = folder / "prepared"
    assert prepare.main(["--input", str(text), "--name", "words", "--vocab-size", "300", "--out", str(out)]) == 0
    return out


def small_config(corpus: Path, out: Path, **changes):
    return from_dict({**SMALL, "data": str(corpus), "out": str(out), **changes})


def small_flags(**changes) -> list[str]:
    """SMALL as a command line."""
    return [
        part for name, value in {**SMALL, **changes}.items() for part in (f"--{name.replace('_', '-')}", str(value))
    ]


@pytest.fixture(scope="session")
def run(corpus, tmp_path_factory) -> Path:
    """A finished run on `corpus`."""
    out = tmp_path_factory.mktemp("runs") / "small"
    main(small_config(corpus, out, dispersion=0.1))
    return out


@pytest.fixture(scope="session")
def bpe_run(bpe_corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "bpe"
    main(small_config(bpe_corpus, out))
    return out
