"""bench/: the counts are right, and implementations with different results are not timed."""

import argparse
import importlib.util
import json
import operator
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import train
from minidisp import GPT, GPTConfig, InputError
from minidisp.data import Batches, Dataset
from tests.conftest import write_text

TINY = {"n_layer": 3, "n_head": 2, "n_embd": 32, "block_size": 16, "batch_size": 2, "vocab_size": 1000}

# A minimal stand-in for a nanoGPT checkout: its names, around our blocks.
PEER = """
from dataclasses import dataclass
import torch
import minidisp.decoding
import minidisp.model

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        model = minidisp.model.GPT(minidisp.model.GPTConfig(**vars(config)))
        self.lm_head = model.lm_head
        self.transformer = torch.nn.ModuleDict({"wte": model.wte, "wpe": model.wpe, "h": model.h, "ln_f": model.ln_f})

    def forward(self, idx, targets):
        x = self.transformer.wte(idx) + self.transformer.wpe.weight[: idx.shape[1]]
        for block in self.transformer.h:
            x = block(x, None, minidisp.decoding.Context())
        logits = self.lm_head(self.transformer.ln_f(x))
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()) SCALE
"""


def script(name: str):
    """bench/<name>.py as a module."""
    path = Path(train.__file__).parent / "bench" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"bench_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def bench(monkeypatch):
    module = script("train")
    monkeypatch.setitem(module.MODELS, "tiny", TINY)
    return module


def args(**more):
    return argparse.Namespace(**{"device": "cpu", "dtype": "float32", "clock": "wall", "against": None, **more})


def test_flops_are_those_that_torch_counts(bench):
    config = bench.make_config("tiny")
    idx = torch.zeros(config.batch_size, config.block_size, dtype=torch.int64)
    model = bench.GPT(config)
    with FlopCounterMode(display=False) as counter:
        model.lm_head(model._backbone(idx)[0]).sum().backward()
    counts = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    products = sum(count for op, count in counts.items() if op in ("aten.mm", "aten.addmm"))
    attention = 6 * config.n_layer * config.block_size * config.n_embd * idx.numel()  # the causal half
    assert bench.flops_per_step(config) == products + attention


@pytest.mark.slow
def test_parts_make_up_the_step_and_a_peer_of_equal_weights_agrees(bench, corpus, tmp_path):
    (tmp_path / "model.py").write_text(PEER.replace("SCALE", ""))
    config = bench.make_config("tiny")
    batches = Batches(Dataset(corpus).split("train"), config.block_size, seed=0)
    names = ["minidisp", "minidisp + dispersion", "nanoGPT"]
    forms = bench.forms(names, config, batches, args(against=str(tmp_path)))
    losses = bench.verify(forms)
    assert losses["nanoGPT"] == pytest.approx(losses["minidisp"], rel=1e-6)
    for name in ("minidisp", "nanoGPT"):
        for _ in range(3):
            forms[name].step()
    # Still the same after three steps: data, clipping and optimiser are the same, too.
    torch.testing.assert_close(forms["nanoGPT"].losses(), forms["minidisp"].losses(), rtol=1e-5, atol=0)
    forms["minidisp + dispersion"].step()
    assert all(ms > 0 for ms in forms["minidisp + dispersion"].clock.read().values())


def test_a_peer_that_computes_something_else_is_not_timed(bench, corpus, tmp_path):
    (tmp_path / "model.py").write_text(PEER.replace("SCALE", "* 1.001"))
    config = bench.make_config("tiny")
    batches = Batches(Dataset(corpus).split("train"), config.block_size, seed=0)
    with pytest.raises(SystemExit, match="nanoGPT is wrong: its loss"):
        bench.verify(bench.forms(["minidisp", "nanoGPT"], config, batches, args(against=str(tmp_path))))
    with pytest.raises(SystemExit, match="has no model"):
        bench.forms(["nanoGPT"], config, batches, args(against=str(tmp_path / "elsewhere")))


# A nanoGPT whose training leaves the weights at their initial values.
PEER_TRAIN = """
import pickle, sys
from pathlib import Path
import numpy as np
import torch
from minidisp import GPT, GPTConfig

flags = dict(word[2:].split("=") for word in sys.argv[2:])
vocab_size = pickle.loads(Path("data/text/meta.pkl").read_bytes())["vocab_size"]
assert np.fromfile("data/text/train.bin", np.uint16).max() < vocab_size
torch.manual_seed(1337)
names = ("n_layer", "n_head", "n_embd", "block_size")
model_args = {"vocab_size": vocab_size, "bias": False, "dropout": 0.0, **{name: int(flags[name]) for name in names}}
state = GPT(GPTConfig(**model_args)).state_dict()
state = {name if name.startswith("lm_head") else f"transformer.{name}": weight for name, weight in state.items()}
Path(flags["out_dir"]).mkdir()
torch.save({"model": state, "model_args": model_args}, f"{flags['out_dir']}/ckpt.pt")
"""


@pytest.mark.slow
def test_recipe_against_a_peer_scores_both_by_the_same_function(corpus, tmp_path):
    script = Path(train.__file__).parent / "bench" / "recipe.py"
    command = [
        sys.executable,
        str(script),
        "--data",
        str(corpus),
        "--seeds",
        "1",
        "--records",
        "1",
        "--steps",
        "2",
        "--against",
        str(tmp_path),
    ]
    options = {"capture_output": True, "text": True, "env": {**os.environ, "PYTHONPATH": str(script.parent.parent)}}
    refused = subprocess.run(command, **options)
    assert refused.returncode == 1
    assert "pass a nanoGPT checkout" in refused.stderr
    assert "Traceback" not in refused.stderr

    (tmp_path / "config").mkdir()
    (tmp_path / "train.py").write_text(PEER_TRAIN)
    for name in ("model.py", "configurator.py"):
        (tmp_path / name).touch()
    done = subprocess.run(command, **options)
    assert done.returncode == 0, done.stderr
    row = re.search(r"^\| 0 \| (\S+) \| \d+ \| (\S+) \| \d+ \| \d\.\d\d \|$", done.stdout, re.MULTILINE)

    torch.manual_seed(0)  # the seed of the table, not the peer's own
    model = GPT(GPTConfig(n_layer=4, n_head=4, n_embd=128, block_size=64, vocab_size=257, bias=False))
    val = Dataset(corpus).split("val")
    n = (val.tokens - 1) // 64
    starts = [i * (val.tokens - 1) // n for i in range(n)]
    windows = torch.stack([torch.from_numpy(val.slice(start, start + 65)) for start in starts])
    with torch.no_grad():
        log_p = model(windows[:, :-1]).logits.double().log_softmax(-1)
    loss = -log_p.gather(-1, windows[:, 1:, None]).mean().item()
    assert float(row[1]) == pytest.approx(loss, abs=1e-4)
    assert float(row[2]) < loss  # our model has learnt something in two steps
    assert "820,736 parameters" in done.stdout
    assert "1 of 1 seeds reach nanoGPT's loss" in done.stdout


SMALLEST = {"n-layer": 1, "n-head": 2, "n-embd": 16, "block-size": 32, "vocab-size": 300}
SMALLEST |= {"tokens": 40, "pairs": 2, "new-tokens": 8, "batch": 3, "seconds": 0}


@pytest.mark.parametrize("others", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_inference_is_measured_in_every_part(tmp_path, capsys, others):
    """On the smallest scale; with the alternatives that are installed, whose results must agree."""
    files = [write_text(tmp_path / f"{i}.txt", words=120, seed=i) for i in range(60)]
    files[0].write_text("one two three four five six seven\n" * 3 + "a b c d e f\n")
    flags = [f"--{name}={value}" for name, value in SMALLEST.items()]
    script("inference").main([*flags, "--others" if others else "--no-others", "--input", *map(str, files)])
    *table, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)["results"]
    assert [*found] == [line.split(" | ")[0][2:] for line in table if " | minidisp | " in line]
    assert [name.split(",")[0] for name in found] == [
        *["perplexity"] * 2, "pairs", *["generate"] * 4, "export", "import", *["preparation"] * 3
    ]  # fmt: skip
    for rows in found.values():
        assert all(row["per_cpu_second"] > 0 and row["per_second"] > 0 for row in rows.values())
        assert rows["minidisp"]["speed"] == 1
    by = {name for rows in found.values() for name in rows}
    assert by >= ({"minidisp", "numpy", "sentencepiece"} if others else {"minidisp"})
    assert others or by == {"minidisp"}


def test_inference_with_another_result_is_not_timed():
    bench, calls = script("inference"), []
    forms = {"minidisp": lambda: calls.append(0) or 5, "other": lambda: calls.append(1) or 6}
    with pytest.raises(InputError, match="other is wrong: task gives something else"):
        bench.measure(bench.Task("task", 1, "tokens", forms, operator.eq), 0)
    assert calls == [0, 1]
    with pytest.raises(InputError, match="x is wrong: its greedy continuation"):
        bench.refuse_other_text("x", [1, 2], [1, 3])
    same = np.array([1.0, 2.0])
    assert bench.same_nats(same, same + 1e-4)
    assert not bench.same_nats(same, same + 1e-2)
    assert bench.same_mean(same, same + np.array([0.1, -0.1]))
    assert not bench.same_mean(same, same + 0.02)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--new-tokens 20 --block-size 32", "exceed the context: pass --block-size 36 or more"),
        ("--pairs 0", "--pairs is 0, but must be at least 1"),
        ("--onyl pairs", "did you mean --only"),
    ],
)
def test_bad_flags_of_inference_are_one_line(flags, expected):
    with pytest.raises(InputError, match=expected):
        script("inference").main(flags.split())
