"""bench/train.py: what it counts, and that it times nothing that computes something else."""

import argparse
import importlib.util
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import train
from minidisp.data import Batches, Dataset

TINY = {"n_layer": 3, "n_head": 2, "n_embd": 32, "block_size": 16, "batch_size": 2, "vocab_size": 1000}

# The least that passes for a nanoGPT checkout: its names, around our blocks.
PEER = """
from dataclasses import dataclass
import torch
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
            x = block(x, None, None)
        logits = self.lm_head(self.transformer.ln_f(x))
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()) SCALE
"""


@pytest.fixture
def bench(monkeypatch):
    path = Path(train.__file__).parent / "bench" / "train.py"
    spec = importlib.util.spec_from_file_location("bench_train", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(module.MODELS, "tiny", TINY)
    return module


def args(**more):
    return argparse.Namespace(**{"device": "cpu", "clock": "wall", "against": None, **more})


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
    with pytest.raises(SystemExit, match="there is no model"):
        bench.forms(["nanoGPT"], config, batches, args(against=str(tmp_path / "elsewhere")))
