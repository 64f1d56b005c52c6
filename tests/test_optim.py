"""Schedules, parameter groups, and one step of each optimiser against the written formula."""

import copy
import math
from pathlib import Path

import pytest
import torch

from minidisp import optim
from minidisp.config import Config
from minidisp.model import GPT
from minidisp.optim import Muon, build_optimizers, learning_rate, step_where_on_device
from tests import forked
from tests.conftest import small_flags

SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 8, "vocab_size": 32}


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_every_schedule_warms_up_and_stays_within_its_bounds(schedule):
    config = Config(schedule=schedule, max_steps=1000, warmup_steps=100, lr=1.0, min_lr=0.1)
    rates = [learning_rate(step, config) for step in range(1000)]
    assert rates[0] == pytest.approx(1 / 101)
    assert rates[99] == pytest.approx(100 / 101)
    assert rates[100] == 1.0
    assert max(rates) == 1.0
    assert rates[100:] == sorted(rates[100:], reverse=True)
    assert rates[-1] == 1.0 if schedule == "constant" else rates[-1] == pytest.approx(0.1, abs=5e-3)


def test_cosine_and_wsd_in_the_middle():
    cosine = Config(max_steps=1100, warmup_steps=100, lr=1.0, min_lr=0.0)
    assert learning_rate(600, cosine) == pytest.approx(0.5)
    assert learning_rate(350, cosine) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    wsd = Config(schedule="wsd", max_steps=1000, warmup_steps=100, lr=1.0, min_lr=0.2)
    assert learning_rate(799, wsd) == 1.0
    assert learning_rate(900, wsd) == pytest.approx(0.6)
    linear = Config(schedule="linear", max_steps=1100, warmup_steps=100, lr=1.0, min_lr=0.2)
    assert learning_rate(350, linear) == pytest.approx(0.8)


def test_more_warmup_than_steps_and_no_steps_at_all():
    assert learning_rate(4, Config(max_steps=5, warmup_steps=100, lr=1.0)) == pytest.approx(5 / 101)
    assert math.isfinite(learning_rate(0, Config(max_steps=0, warmup_steps=0)))


def test_final_rate_is_a_tenth_by_default():
    assert Config(lr=1.0).final_lr == pytest.approx(0.1)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_parameter_is_optimised_once_and_only_matrices_decay(optimizer):
    config = Config(**SMALL, optimizer=optimizer, weight_decay=0.3)
    model = GPT(config)
    groups = [group for o in build_optimizers(model, config) for group in o.param_groups]
    seen = [id(p) for group in groups for p in group["params"]]
    assert sorted(seen) == sorted(id(p) for p in model.parameters())
    for group in groups:
        assert all((p.ndim >= 2) == (group["weight_decay"] == 0.3) for p in group["params"])
    if optimizer == "muon":
        muon = build_optimizers(model, config)[1]
        assert {id(p) for g in muon.param_groups for p in g["params"]} == {
            id(p) for name, p in model.h.named_parameters() if p.ndim == 2
        }


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_have_a_learning_rate_of_their_own(optimizer, tied):
    config = Config(**SMALL, optimizer=optimizer, tied=tied, embedding_lr=5.0)
    model = GPT(config)
    groups = [group for o in build_optimizers(model, config) for group in o.param_groups]
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(id(p) for p in model.parameters())
    scaled = [(group["lr_scale"], group["params"]) for group in groups if "lr_scale" in group]
    assert scaled == [(5.0, [model.wte.weight])]
    assert [group for group in groups if group.get("lr_scale", 1.0) == 1.0]


def test_to_train_imports_no_compiler(corpus, tmp_path):
    code = (
        "import sys, torch; from minidisp import GPT; from minidisp.config import Config\n"
        "from minidisp.optim import *\n"
        "for name in OPTIMIZERS:\n"
        "    config = Config(n_layer=1, n_head=1, n_embd=8, vocab_size=8, optimizer=name); model = GPT(config)\n"
        "    idx = torch.zeros(1, 4, dtype=torch.long); model(idx, idx).loss.backward()\n"
        "    [(o.step(), o.load_state_dict(o.state_dict())) for o in build_optimizers(model, config)]\n"
        "assert 'torch._dynamo' not in sys.modules\n"
        "from minidisp import report; import train; report.draw_run = lambda *_: []\n"
        "for arch in 'gpt2', 'qwen3':\n"
        "    assert train.cli([*sys.argv[2:], '--arch', arch, '--out', sys.argv[1] + '/' + arch]) == 0\n"
        "assert not sys.modules.keys() & {'torch._dynamo', 'torch.fx.experimental.symbolic_shapes'}"
    )
    flags = small_flags(data=corpus, dispersion=0.1, dispersion_tokens=4, max_steps=2)
    forked.run("-c", code, tmp_path, *flags, cwd=Path(__file__).parents[1]).check_returncode()


def test_one_step_of_adamw_is_the_formula():
    """After one step Adam's update is lr * sign-like g / (|g| + eps), and the decay lr * weight_decay * w."""
    config = Config(**SMALL, lr=0.1, weight_decay=0.5)
    torch.manual_seed(0)
    model = GPT(config)
    before = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    idx = torch.randint(0, 32, (2, 8))
    model(idx, idx).loss.backward()
    for optimizer in build_optimizers(model, config):
        optimizer.step()
    for name, p in model.named_parameters():
        g = p.grad.double()
        decay = 0.5 if p.ndim >= 2 else 0.0
        want = before[name] * (1 - 0.1 * decay) - 0.1 * g / (g.abs() + 1e-8)
        torch.testing.assert_close(p.detach().double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("at_once", [1, 500, 1 << 24])  # one matrix, a few, all of one shape
def test_muon_together_is_torch_s_one_by_one(monkeypatch, at_once):
    monkeypatch.setattr(Muon, "AT_ONCE", at_once)
    monkeypatch.setattr(optim, "newton_schulz_dtype", lambda device_type: torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    shapes = [(12, 8), (8, 12), (8, 8), (12, 8), (12, 8), (8, 8), (1, 5)]
    ours, theirs = ([torch.nn.Parameter(torch.ones(s)) for s in shapes] for _ in range(2))
    settings = {"lr": 0.1, "weight_decay": 0.2, "adjust_lr_fn": "match_rms_adamw"}
    optimizers = Muon(ours, **settings), torch.optim.Muon(theirs, **settings)
    for step in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator) * 10.0 ** -(3 * step)
            b.grad = a.grad.clone()
        if step == 1:
            ours[3].grad = theirs[3].grad = None
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-3)  # products are in bfloat16
        momenta = (o.state[p]["momentum_buffer"] for o, p in zip(optimizers, (a, b), strict=True))
        torch.testing.assert_close(*momenta)
    assert str(optimizers[0].state_dict()["param_groups"]) == str(optimizers[1].state_dict()["param_groups"])


@pytest.mark.parametrize("rows", [16, 8, 1])  # all of the queries, a head, a single row
def test_parts_of_a_matrix_are_orthogonalised_like_parameters_of_their_own(rows):
    torch.manual_seed(0)
    model = GPT(Config(**SMALL))
    whole = [block.attn.c_attn.weight for block in model.h]
    others = [block.mlp.c_fc.weight for block in model.h]
    separate = [[torch.nn.Parameter(part.clone()) for part in weight.detach().split(rows)] for weight in whole]
    expected = [torch.nn.Parameter(weight.detach().clone()) for weight in others]
    settings = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9, "adjust_lr_fn": "match_rms_adamw"}
    ours = Muon([*whole, *others], rows=dict.fromkeys(whole, rows), **settings)
    torch_s = torch.optim.Muon([p for parts in separate for p in parts] + expected, **settings)
    for step in range(3):
        for weight, parts in zip([*whole, *others], [*separate, *([p] for p in expected)], strict=True):
            weight.grad = torch.randn(weight.shape)
            for p, grad in zip(parts, weight.grad.split(len(parts[0])), strict=True):
                p.grad = grad.clone()
        if step == 1:
            ours = copy.copy(ours)
        ours.step()
        torch_s.step()
    for weight, parts in zip([*whole, *others], [*separate, *([p] for p in expected)], strict=True):
        # torch's Muon orthogonalises in bfloat16
        torch.testing.assert_close(weight.detach(), torch.cat(list(parts)).detach(), rtol=0, atol=2e-3)


def exact_muon(weight, grads, lr, decay, momentum=0.95):
    """Muon's steps with these gradients in float64, by its formula; and the momentum."""
    a, b, c = 3.4445, -4.775, 2.0315
    buffer = torch.zeros_like(weight)
    for grad in grads:
        buffer = momentum * buffer + (1 - momentum) * grad
        x = (1 - momentum) * grad + momentum * buffer
        x = x / x.norm()
        for _ in range(5):
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
        weight = weight * (1 - lr * decay) - 0.2 * lr * max(weight.shape) ** 0.5 * x
    return weight, buffer


@pytest.mark.parametrize("block", [{}, {"arch": "qwen3", "n_head": 4, "n_kv_head": 2}])
@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 0.02), (torch.float32, 1e-5)])
def test_muon_together_is_muon_one_by_one_and_the_formula(monkeypatch, dtype, error, block):
    """The two round differently: in bfloat16, a step is accurate to 2 % of its size."""
    monkeypatch.setattr(optim, "newton_schulz_dtype", lambda device_type: dtype)
    config = Config(**{**SMALL, **block}, optimizer="muon", lr=0.1, weight_decay=0.5)
    found = []
    for together in (False, True):
        torch.manual_seed(0)
        model = GPT(config)
        muon = build_optimizers(model, config)[1]
        monkeypatch.setattr(Muon, "AT_ONCE", 1 << 24 if together else 1)
        before = {name: p.detach().clone() for name, p in model.h.named_parameters() if p.ndim == 2}
        grads = {name: [] for name in before}
        for step in range(3):
            for name, p in model.h.named_parameters():
                generator = torch.Generator().manual_seed(len(name) + step)
                p.grad = torch.randn(p.shape, generator=generator) if name != "1.mlp.c_fc.weight" else None
                if name in grads:
                    grads[name].append(p.grad)
            muon.step()
        found.append({name: p.detach() for name, p in model.h.named_parameters() if name in before})
        for name, p in model.h.named_parameters():
            if name == "1.mlp.c_fc.weight":  # has no gradient
                assert p.equal(before[name])
                assert p not in muon.state
            elif name in before:
                rows = model.h[0].attn.head_dim if "c_attn" in name else len(p)  # each head is a matrix of its own
                parts = zip(
                    before[name].double().split(rows), *(g.double().split(rows) for g in grads[name]), strict=True
                )
                stepped = [exact_muon(part, part_grads, 0.1, 0.5) for part, *part_grads in parts]
                weight, buffer = (torch.cat(pieces) for pieces in zip(*stepped, strict=True))
                step = (weight - before[name]).norm()
                assert (p.double() - weight).norm() < error * step
                torch.testing.assert_close(muon.state[p]["momentum_buffer"].double(), buffer, rtol=1e-5, atol=1e-6)
    for name, p in found[0].items():
        assert (p - found[1][name]).norm() <= error * (p - before[name]).norm()


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [
        ({"avx2": True}, torch.float32),
        ({"avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, torch.float32),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
        ({}, torch.float32),
    ],
)
def test_muon_orthogonalises_in_bfloat16_where_the_processor_has_it(monkeypatch, capabilities, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert optim.newton_schulz_dtype.__wrapped__("cpu") == dtype
    assert optim.newton_schulz_dtype.__wrapped__("cuda") == torch.bfloat16


def test_muon_leaves_all_as_it_was_where_something_is_not_finite():
    config = Config(**SMALL, optimizer="muon")
    model = GPT(config)
    muon = build_optimizers(model, config)[1]
    states = []
    for step, bad in enumerate((False, True, False)):
        for p in model.h.parameters():
            p.grad = torch.full_like(p, math.nan) if bad else torch.randn_like(p)
        step_where_on_device(torch.tensor(not bad), [muon])
        states.append([t.clone() for p in muon.state for t in (p.detach(), muon.state[p]["momentum_buffer"])])
        assert all(t.isfinite().all() for t in states[step])
    same = [[a.equal(b) for a, b in zip(states[step], states[step + 1], strict=True)] for step in (0, 1)]
    assert all(same[0])
    assert not any(same[1])


@pytest.mark.parametrize("changed", [{"nesterov": False}, {"adjust_lr_fn": "original"}])
def test_muon_refuses_what_it_does_not_implement(changed):
    with pytest.raises(ValueError, match="only nesterov=True"):
        Muon([torch.nn.Parameter(torch.randn(4, 4))], **{"adjust_lr_fn": "match_rms_adamw", **changed})
