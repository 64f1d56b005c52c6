"""The Transformer: an independent float64 forward pass, parameter counts, causality, generation."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from minidisp import InputError, loss
from minidisp.config import PRESETS, from_dict
from minidisp.decoding import Context, KVCache, PrefixTree, Segments, sample
from minidisp.loss import chunked, cross_entropy
from minidisp.model import GPT, Attention, GPTConfig
from minidisp.ops import layers
from minidisp.ops.attention import causal_attention
from tests.conftest import NothingIsLookedAt

SMALL = {"n_layer": 3, "n_head": 4, "n_embd": 32, "block_size": 16, "vocab_size": 50}
KINDS = {
    "gpt2": GPTConfig(**SMALL),
    "gpt2-nobias-untied": GPTConfig(**SMALL, bias=False, tied=False, mlp_dim=20),
    "qwen3": GPTConfig(**SMALL, arch="qwen3"),
    "qwen3-grouped": GPTConfig(**SMALL, arch="qwen3", n_kv_head=2, head_dim=10, tied=False),
    "gpt2-relu2": GPTConfig(**SMALL, mlp="relu2"),
    "qwen3-relu2": GPTConfig(**SMALL, arch="qwen3", mlp="relu2"),
}


@pytest.fixture(params=KINDS)
def model(request) -> GPT:
    torch.manual_seed(1)
    model = GPT(KINDS[request.param]).double().eval()
    for p in model.parameters():  # larger than at initialisation, so that every part matters; norms and biases too
        torch.nn.init.normal_(p, mean=float(p.ndim == 1), std=0.3)
    return model


def numpy_forward(model: GPT, idx: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Logits (T, V) and hidden states of one sequence, written from the papers with loops over heads and positions."""
    config = model.config
    w = {name: p.detach().numpy() for name, p in model.named_parameters()}
    T, D = len(idx), config.head_dim

    def affine(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

    def norm(x, name):
        if config.arch == "gpt2":
            x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        else:
            x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
        return x * w[f"{name}.weight"] + w.get(f"{name}.bias", 0.0)

    def rope(x):  # (T, D): channel i is rotated with channel i + D/2
        out = x.copy()
        for t in range(T):
            for i in range(D // 2):
                angle = t * config.rope_theta ** (-2 * i / D)
                a, b = x[t, i], x[t, i + D // 2]
                out[t, i] = a * math.cos(angle) - b * math.sin(angle)
                out[t, i + D // 2] = b * math.cos(angle) + a * math.sin(angle)
        return out

    x = w["wte.weight"][idx]
    if config.arch == "gpt2":
        x = x + w["wpe.weight"][:T]
    states = [x]
    for layer in range(config.n_layer):
        name = f"h.{layer}"
        qkv = affine(norm(x, f"{name}.ln_1"), f"{name}.attn.c_attn")
        heads = []
        for head in range(config.n_head):
            group = head // (config.n_head // config.n_kv_head)
            q = qkv[:, head * D : (head + 1) * D]
            k = qkv[:, (config.n_head + group) * D : (config.n_head + group + 1) * D]
            v = qkv[
                :, (config.n_head + config.n_kv_head + group) * D : (config.n_head + config.n_kv_head + group + 1) * D
            ]
            if config.arch == "qwen3":
                q, k = rope(norm(q, f"{name}.attn.q_norm")), rope(norm(k, f"{name}.attn.k_norm"))
            out = np.zeros((T, D))
            for t in range(T):
                scores = np.exp(k[: t + 1] @ q[t] / math.sqrt(D))
                out[t] = scores / scores.sum() @ v[: t + 1]
            heads.append(out)
        x = x + affine(np.concatenate(heads, axis=1), f"{name}.attn.c_proj")
        h = affine(norm(x, f"{name}.ln_2"), f"{name}.mlp.c_fc")
        if config.mlp == "relu2":
            h = np.where(h > 0, h, 0) ** 2
        elif config.arch == "gpt2":
            h = h * 0.5 * (1 + np.vectorize(math.erf)(h / math.sqrt(2)))
        else:
            gate, up = np.split(h, 2, axis=1)
            h = gate / (1 + np.exp(-gate)) * up
        x = x + affine(h, f"{name}.mlp.c_proj")
        states.append(x)
    states[-1] = norm(x, "ln_f")
    head = w["wte.weight"] if config.tied else w["lm_head.weight"]
    return states[-1] @ head.T, states


def test_forward_agrees_with_numpy(model):
    idx = torch.randint(0, 50, (2, 11), generator=torch.Generator().manual_seed(0))
    logits, loss, hidden_states = model(idx, return_hidden_states=True)
    assert loss is None
    assert len(hidden_states) == model.config.n_layer + 1
    for b in range(2):
        want, states = numpy_forward(model, idx[b].numpy())
        # The rotary tables and their product are float32 by design.
        tolerance = 1e-10 if model.config.arch == "gpt2" else 2e-4
        np.testing.assert_allclose(logits[b].detach().numpy(), want, rtol=tolerance, atol=tolerance)
        for got, state in zip(hidden_states, states, strict=True):
            np.testing.assert_allclose(got[b].detach().numpy(), state, rtol=tolerance, atol=tolerance)


@pytest.fixture
def small_chunks(monkeypatch):
    """The chunked loss takes 7 tokens at a time, so that a few dozen make several chunks and a shorter last one."""
    monkeypatch.setattr("minidisp.loss.chunk_tokens", lambda x: 7)


@pytest.mark.parametrize("vocab_size", [50, 2000])  # the plain loss, and the one that works in chunks
def test_loss_is_the_cross_entropy_of_the_logits(vocab_size, small_chunks):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SMALL, "vocab_size": vocab_size}))
    torch.nn.init.normal_(model.wte.weight)
    idx, targets = torch.randint(0, vocab_size, (2, 3, 16))
    targets[1, :5] = -1
    nats = -model(idx).logits.double().log_softmax(-1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    nats = nats.where(targets >= 0, 0.0)
    logits, loss, hidden_states = model(idx, targets)
    assert logits is None
    assert hidden_states is None
    torch.testing.assert_close(loss.double(), nats.sum() / (targets >= 0).sum(), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        per_token = model(idx, targets, loss_reduction="none").loss
    torch.testing.assert_close(per_token.double(), nats, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        of_the_last = model(idx, targets[:, -5:], loss_reduction="none").loss
    torch.testing.assert_close(of_the_last.double(), nats[:, -5:], rtol=1e-4, atol=1e-5)
    with pytest.raises((RuntimeError, ValueError)):  # not the training loss of shifted targets
        model(idx, targets[:, -5:])
    (want,) = torch.autograd.grad(nats.sum() / (targets >= 0).sum(), model.wte.weight)
    (got,) = torch.autograd.grad(loss, model.wte.weight)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def exact_cross_entropy(x, weight, targets):
    """Loss and gradients of x and weight, token by token in float64."""
    x, weight = (a.detach().double().numpy() for a in (x, weight))
    loss, x_grad, weight_grad, number = 0.0, np.zeros_like(x), np.zeros_like(weight), int((targets >= 0).sum())
    for n, target in enumerate(targets.tolist()):
        if target < 0:
            continue
        logits = weight @ x[n]
        probs = np.exp(logits - logits.max())
        probs /= probs.sum()
        loss -= math.log(probs[target]) / number
        probs[target] -= 1
        x_grad[n] = probs @ weight / number
        weight_grad += np.outer(probs, x[n]) / number
    return loss, x_grad, weight_grad


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_chunked_loss_and_gradients_against_float64(dtype, autocast, small_chunks):
    torch.manual_seed(0)
    x = torch.randn(32, 24).to(dtype).requires_grad_()
    weight = torch.randn(60, 24).to(dtype).requires_grad_()
    targets = torch.randint(0, 60, (32,))
    targets[[0, 9, 31]] = -1
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        loss = chunked(x, weight, targets)
    (3 * loss).backward()
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert (x.grad.dtype, weight.grad.dtype) == (dtype, dtype)
    products = dtype if dtype == torch.float64 else autocast or dtype
    # Rounding errors of logits up to 10 are ten times as large in the probabilities.
    rounding = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9}
    rounding = max(rounding[products], rounding[dtype])
    want, *grads = exact_cross_entropy(x, weight, targets)
    assert loss.item() == pytest.approx(want, rel=rounding)
    for got, exact in zip((x.grad, weight.grad), grads, strict=True):
        assert np.linalg.norm(got.double().numpy() / 3 - exact) < rounding * np.linalg.norm(exact)


def test_chunked_loss_gradcheck(small_chunks):
    torch.manual_seed(0)
    x, weight = (torch.randn(n, 5, dtype=torch.float64, requires_grad=True) for n in (16, 11))
    targets = torch.randint(-1, 11, (16,))
    for wanted in ((True, True), (True, False), (False, True)):
        inputs = [a.detach().requires_grad_(on) for a, on in zip((x, weight), wanted, strict=True)]
        # Recomputed for each of gradcheck's backward passes, since its backward can run only once.
        assert torch.autograd.gradcheck(
            lambda x, weight: checkpoint(chunked, x, weight, targets, use_reentrant=False), inputs
        )


def test_chunked_loss_sums_thousands_of_tokens_in_float32():
    """Neither the loss nor the weight's gradient may be summed in bfloat16, whose steps at 8 are 1/32."""
    torch.manual_seed(0)
    x, weight = torch.randn(5000, 16), torch.randn(50, 16).requires_grad_()
    targets = torch.randint(0, 50, (5000,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = chunked(x, weight, targets)
    loss.backward()
    want, _, grad = exact_cross_entropy(x, weight, targets)
    assert loss.item() == pytest.approx(want, rel=2e-4)
    assert np.linalg.norm(weight.grad.double().numpy() - grad) < 2**-8 * np.linalg.norm(grad)


def test_chunked_loss_can_be_differentiated_once_only():
    x, weight = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    loss = chunked(x, weight, torch.arange(4))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunked_loss_as_an_operator(dtype, wanted, small_chunks):
    torch.manual_seed(0)
    x, weight = (torch.randn(n, 5, requires_grad=on) for n, on in zip((16, 11), wanted, strict=True))
    arguments = x, weight, torch.randint(-1, 11, (16,)), dtype, *wanted
    # Its backward pass scales its gradients in place; that this is safe under the compiler is tested below.
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.minidisp.linear_cross_entropy.default, arguments, test_utils=tests)


def test_compiled_the_chunked_loss_stays_one_operator_in_one_graph(small_chunks, monkeypatch):
    torch.compiler.reset()  # otherwise graphs compiled by other tests would count
    monkeypatch.setattr(
        layers, "fuses", lambda *_: False
    )  # torch's implementations in both, since compiled models use them
    torch.manual_seed(0)
    model, graphs = GPT(GPTConfig(**{**SMALL, "vocab_size": 2000})), []
    idx, targets = torch.randint(0, 2000, (2, 3, 16))

    def look(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    for autocast in (False, True):
        found = []
        for each in (model, torch.compile(model, backend=look, fullgraph=True)):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                loss = each(idx, targets, return_hidden_states=True).loss
            found.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
        assert all(a.equal(b) for a, b in zip(*found, strict=True))
    assert len(graphs) == 2
    for graph in graphs:
        made = [node.meta.get("example_value") for node in graph.graph.nodes if node.op != "placeholder"]
        assert torch.ops.minidisp.linear_cross_entropy in [node.target for node in graph.graph.nodes]
        assert max(value.numel() for value in made if isinstance(value, torch.Tensor)) < 3 * 16 * 2000  # all logits


def test_chunked_loss_without_a_counted_token_is_nan_like_the_plain_one():
    x, weight, targets = (
        torch.randn(4, 3, requires_grad=True),
        torch.randn(5, 3, requires_grad=True),
        torch.full((4,), -1),
    )
    for tokens in (4, 0):
        found = []
        for form in (chunked, lambda x, weight, targets: cross_entropy(x, targets, lambda x: x @ weight.T, 5)):
            loss = form(x[:tokens], weight, targets[:tokens])
            assert loss.isnan()
            found.append(torch.autograd.grad(loss, (x, weight)))
        assert all(ours.equal(theirs) for ours, theirs in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("preset", "vocab_size", "published"),
    [
        ("gpt2", 50257, 124_439_808),
        ("gpt2-medium", 50257, 354_823_168),
        ("gpt2-large", 50257, 774_030_080),
        ("gpt2-xl", 50257, 1_557_611_200),
        ("qwen3-0.6b", 151936, 596_049_920),
    ],
)
def test_published_parameter_counts(preset, vocab_size, published):
    config = from_dict({**PRESETS[preset], "preset": preset, "vocab_size": vocab_size})
    with torch.device("meta"):
        assert GPT(config).num_params() == published


@pytest.mark.parametrize("arch", ["gpt2", "qwen3"])
def test_parameters_are_counted_before_they_are_there(arch):
    options = [
        {},
        {"tied": False},
        {"mlp": "relu2"},
        {"mlp_dim": 24},
        {"n_kv_head": 2},
        {"head_dim": 6},
        {"zero_init": True},
    ]
    options += [{"bias": False}] if arch == "gpt2" else [{"attention_bias": True}]
    for fields in options:
        config = GPTConfig(**SMALL, arch=arch, **fields)
        assert config.parameter_count == GPT(config).num_params(), fields


def test_own_presets_are_small():
    for preset, low, high in (("tiny", 4e6, 5e6), ("mini", 1e7, 1.5e7)):
        assert low < GPT(from_dict({**PRESETS[preset], "preset": preset})).num_params() < high


def test_a_later_token_changes_nothing_before_it(model):
    idx = torch.arange(12).unsqueeze(0)
    changed = idx.clone()
    changed[0, 7] = 40
    a, b = model(idx).logits, model(changed).logits
    assert torch.equal(a[:, :7], b[:, :7])
    assert not torch.allclose(a[:, 7:], b[:, 7:])


def test_initialisation_is_gpt2s():
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=8, n_embd=128, n_head=4))
    assert model.wte.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.h[3].mlp.c_fc.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.h[3].mlp.c_proj.weight.std().item() == pytest.approx(0.02 / math.sqrt(16), rel=0.02)
    assert model.h[3].attn.c_proj.weight.std().item() == pytest.approx(0.02 / math.sqrt(16), rel=0.02)
    assert not model.h[0].attn.c_attn.bias.any()
    idx = torch.randint(0, 4096, (4, 64))
    assert model(idx, idx.roll(-1, 1)).loss.item() == pytest.approx(math.log(4096), abs=0.1)


@pytest.mark.parametrize("arch", ["gpt2", "qwen3"])
def test_zero_init_lets_the_embeddings_through_and_learns(arch):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SMALL, arch=arch, zero_init=True))
    idx = torch.randint(0, 50, (2, 9))
    _, loss, hidden_states = model(idx, idx, return_hidden_states=True)
    assert all(torch.equal(z, hidden_states[0]) for z in hidden_states[:-1])
    loss.backward()
    assert all(p.grad.any() for name, p in model.named_parameters() if name.endswith("c_proj.weight"))


def test_tied_weights_are_one_matrix():
    model = GPT(GPTConfig(**SMALL))
    assert model.lm_head.weight is model.wte.weight
    assert GPT(dataclasses.replace(model.config, tied=False)).num_params() == model.num_params() + 50 * 32


def test_dropout_acts_in_training_only():
    model = GPT(GPTConfig(**SMALL, dropout=0.5))
    idx = torch.arange(8).unsqueeze(0)
    assert not torch.equal(model(idx).logits, model(idx).logits)
    model.eval()
    assert torch.equal(model(idx).logits, model(idx).logits)


def test_the_cache_changes_no_token(model):
    """Greedy generation with the cache equals running the whole text through the model for every token."""
    idx = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    slow = idx
    for _ in range(11):  # up to the whole context of 16
        slow = torch.cat((slow, model(slow).logits[:, -1].argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(model.generate(idx, 11, temperature=0), slow)


def test_generation_continues_when_the_context_is_full(model):
    idx = torch.arange(20).unsqueeze(0)  # longer than the context already
    out = model.generate(idx, 30, seed=3)
    assert out.shape == (1, 50)
    assert torch.equal(out[:, :20], idx)
    assert torch.equal(out, model.generate(idx, 30, seed=3))
    assert not torch.equal(out, model.generate(idx, 30, seed=4))


def test_generation_leaves_mode_and_random_numbers_alone():
    model = GPT(GPTConfig(**SMALL, dropout=0.1)).train()
    state = torch.get_rng_state()
    model.generate(torch.tensor([[1]]), 5, seed=0)
    assert model.training
    assert torch.equal(state, torch.get_rng_state())


def test_a_stream_that_is_left_gives_the_same_tokens_and_the_mode_back():
    model = GPT(GPTConfig(**SMALL, dropout=0.1)).train()
    idx = torch.tensor([[1, 2, 3], [4, 5, 6]])
    whole = model.generate(idx, 8, seed=1)
    stream = model.stream(idx, 8, seed=1)
    first = [next(stream) for _ in range(3)]
    assert torch.equal(torch.cat(first, dim=1), whole[:, 3:6])
    assert not first[0].requires_grad
    stream.close()
    assert model.training
    assert torch.equal(model.generate(idx, 0), idx)


def test_generation_stops_at_the_stop_token():
    model = GPT(GPTConfig(**SMALL))
    idx = torch.tensor([[1, 2, 3]])
    token = model.generate(idx, 1, temperature=0)[0, -1].item()
    assert model.generate(idx, 10, temperature=0, stop_token=token).shape[1] == 4


def test_tokens_are_drawn_without_waiting_for_the_device(model, monkeypatch):
    monkeypatch.setattr("minidisp.decoding.look_every", lambda device: 16)
    idx = torch.tensor([[1, 2, 3], [4, 5, 6]])
    with NothingIsLookedAt():
        for options in ({"temperature": 0}, {"top_k": 3, "top_p": 0.9}):
            assert len(list(model.stream(idx, 15, stop_token=0, **options))) == 15


def test_each_row_of_a_batch_equals_its_seed_alone():
    model = GPT(GPTConfig(**SMALL)).double()
    idx = torch.tensor([[1, 2, 3], [4, 5, 6], [1, 2, 3]])
    options = {"temperature": 1.3, "top_k": 7, "top_p": 0.9}
    together = model.generate(idx, 20, seed=[5, 6, 7], **options)
    for row, seed in enumerate((5, 6, 7)):
        assert torch.equal(together[row : row + 1], model.generate(idx[row : row + 1], 20, seed=seed, **options))


def test_generation_stops_at_any_of_several_stop_tokens():
    model = GPT(GPTConfig(**SMALL))
    idx = torch.tensor([[1, 2, 3], [4, 5, 6]])
    whole = model.generate(idx, 40, seed=0)[:, 3:]
    for stops in ({2}, (2, 9), [2, 9, 4, 7]):
        found = model.generate(idx, 40, seed=0, stop_token=stops)[:, 3:].tolist()
        wanted = []
        for row in whole.tolist():
            end = next((i for i, token in enumerate(row) if token in stops), 39)
            wanted.append(row[: end + 1] + [row[end]] * (39 - end))
        first = max(len(row) for row in found)
        assert found == [row[:first] for row in wanted]
        assert all(set(row) & set(stops) for row in found) or first == 40


def test_looking_rarely_for_the_stop_token_changes_nothing(model, monkeypatch):
    """As on devices that are rarely synchronised: samples that end before, at and after a check, or never."""
    idx = torch.tensor([[1, 2, 3], [4, 5, 6]])
    options = [{"seed": seed, "top_k": 3, "stop_token": stop} for seed in range(3) for stop in (0, 7)]
    options += [{"temperature": 0, "stop_token": model.generate(idx, n, temperature=0)[0, -1].item()} for n in (1, 2)]
    at_once = [model.generate(idx, 25, **each) for each in options]
    for every in (2, 5, 16):
        monkeypatch.setattr("minidisp.decoding.look_every", lambda device, every=every: every)
        for each, out in zip(options, at_once, strict=True):
            assert torch.equal(model.generate(idx, 25, **each), out), every
    assert model.generate(idx, 0, stop_token=0).equal(idx)


@pytest.mark.parametrize(
    "bad",
    [{"temperature": t} for t in (-1.0, math.nan, math.inf, 1e-45, 1e-30)]
    + [{"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_p": math.nan}],
)
def test_generation_refuses_bad_values(bad):
    with pytest.raises(ValueError, match=str(next(iter(bad.values())))):
        GPT(GPTConfig(**SMALL)).generate(torch.tensor([[1]]), 2, **bad)


def test_sampling_keeps_to_top_k_and_top_p():
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = probs.log().repeat(20_000, 1)
    generator = torch.Generator().manual_seed(0)

    def share(**options):
        drawn = sample(logits, **{"temperature": 1.0, "top_k": None, "top_p": None, "generator": generator, **options})
        return torch.bincount(drawn.flatten(), minlength=4) / len(drawn)

    torch.testing.assert_close(share(), probs, atol=0.015, rtol=0)
    torch.testing.assert_close(share(top_k=2), torch.tensor([0.625, 0.375, 0, 0]), atol=0.015, rtol=0)
    torch.testing.assert_close(share(top_p=0.79), torch.tensor([0.625, 0.375, 0, 0]), atol=0.015, rtol=0)
    torch.testing.assert_close(share(top_p=0.4), torch.tensor([1.0, 0, 0, 0]), atol=0, rtol=0)
    for tiny in (1e-30, 1e-320):  # the second one is 0 in float32
        torch.testing.assert_close(share(top_p=tiny), torch.tensor([1.0, 0, 0, 0]), atol=0, rtol=0)
    torch.testing.assert_close(share(temperature=0.5), probs**2 / (probs**2).sum(), atol=0.015, rtol=0)


def test_bfloat16_autocast_stays_close():
    torch.manual_seed(0)
    for vocab_size in (50, 2000):
        model = GPT(GPTConfig(**{**SMALL, "vocab_size": vocab_size}))
        idx, targets = torch.randint(0, vocab_size, (2, 2, 16))
        want = model(idx, targets).loss
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = model(idx, targets).loss
            assert model.generate(idx, 3, seed=0).shape == (2, 19)
        assert got.item() == pytest.approx(want.item(), rel=1e-2)
        got.backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"n_head": 5}, "--n-embd"),
        ({"n_head": 0}, "--n-head"),
        ({"n_kv_head": 3}, "--n-kv-head"),
        ({"mlp_dim": -1}, "--mlp-dim"),
        ({"dropout": 1.0}, "--dropout"),
        ({"dropout": math.nan}, "--dropout"),
        ({"arch": "qwen3", "head_dim": 7}, "--head-dim"),
        ({"block_size": 0}, "--block-size"),
    ],
)
def test_impossible_configs_name_the_flag(change, word):
    with pytest.raises(InputError, match=word):
        GPTConfig(**{**SMALL, **change})


def test_too_long_a_sequence_is_refused():
    with pytest.raises(ValueError, match=r"17 tokens .* 16"):
        GPT(GPTConfig(**SMALL))(torch.zeros(1, 17, dtype=torch.int64))


@pytest.mark.parametrize("arch", ["gpt2", "qwen3"])
def test_a_tree_of_texts_is_the_texts(arch):
    """Texts with common prefixes, in one row after another tree: the same logits as one by one."""
    model = GPT(GPTConfig(**SMALL, arch=arch)).eval().double()
    #      3 -> 1 -> 4 and 3 -> 1 -> 5 -> 9, 3 -> 2; then a separate tree, 7 -> 1
    idx = torch.tensor([[3, 1, 4, 5, 9, 2, 7, 1]])
    parents = torch.tensor([[0, 0, 1, 1, 3, 0, 6, 6]])
    depth = torch.tensor([[0, 1, 2, 2, 3, 1, 0, 1]])
    got = model(idx, context=PrefixTree(parents, depth)).logits[0]
    for path in ([0, 1, 2], [0, 1, 3, 4], [0, 5], [6, 7]):
        torch.testing.assert_close(got[path], model(idx[:, path]).logits[0], atol=1e-12, rtol=1e-12)
    loss = model(idx, idx, loss_reduction="none", context=PrefixTree(parents, depth)).loss[0]
    torch.testing.assert_close(loss, -got.log_softmax(-1).gather(1, idx[0, :, None])[:, 0])


@pytest.mark.parametrize("arch", ["gpt2", "qwen3"])
def test_packed_examples_do_not_see_each_other(arch):
    model = GPT(GPTConfig(**SMALL, arch=arch)).eval().double()
    idx = torch.randint(SMALL["vocab_size"], (2, 16), generator=torch.Generator().manual_seed(0))
    segments = torch.tensor([[0] * 5 + [1] * 1 + [2] * 10, [7] * 16])
    got = model(idx, context=Segments(segments)).logits
    for row, begin, end in ((0, 0, 5), (0, 5, 6), (0, 6, 16), (1, 0, 16)):
        alone = model(idx[row : row + 1, begin:end]).logits[0]
        torch.testing.assert_close(got[row, begin:end], alone, atol=1e-6, rtol=1e-5)  # rotations are in float32


class SlidingWindow(Attention):
    """A custom attention as a user would write it: tokens attend to the last three, including themselves."""

    def forward(self, x, positions, context):
        qkv = self.c_attn(x)
        if self.rotary:
            weights = self.q_norm.weight, self.k_norm.weight
            qkv = layers.rotate_heads(qkv, *weights, *positions, self.n_head, self.n_kv_head, self.q_norm.eps)
        distance = context.distances(x.shape[1], x.device)
        mask = (distance >= 0) & (distance < 3)
        return self.c_proj(causal_attention(qkv, self.n_head, self.n_kv_head, 0.0, context.kept(self.layer, mask)))


@pytest.mark.parametrize("arch", ["gpt2", "qwen3"])
def test_another_attention_is_the_same_in_training_generation_trees_and_packed_rows(arch, monkeypatch):
    monkeypatch.setattr("minidisp.model.Attention", SlidingWindow)
    model = GPT(GPTConfig(**{**SMALL, "block_size": 24}, arch=arch)).eval().double()
    for p in model.parameters():
        p.data += torch.randn(p.shape, generator=torch.Generator().manual_seed(1)).double() / 4
    idx = torch.randint(SMALL["vocab_size"], (2, 9), generator=torch.Generator().manual_seed(0))
    want, context = model(idx).logits, 2 * model.config.n_layer + 1
    # A token farther away than the windows of all layers combined has no effect; a nearer one has.
    long = torch.cat((idx, idx), dim=1)
    changed = long.clone()
    changed[:, 0] = (changed[:, 0] + 1) % SMALL["vocab_size"]
    same = (model(changed).logits - model(long).logits).abs().amax(dim=(0, 2)) < 1e-12
    assert same[context:].all()
    assert not same[:context].any()

    cache = KVCache(model.config, 2, 24, torch.device("cpu"), torch.float64)
    pieces = [model.logits(model._backbone(idx[:, a:b], context=cache)[0]) for a, b in ((0, 4), (4, 5), (5, 8), (8, 9))]
    torch.testing.assert_close(torch.cat(pieces, dim=1), want, atol=1e-12, rtol=1e-12)
    greedy = model.generate(idx, 8, temperature=0)
    for end in range(9, 17):
        assert torch.equal(model(greedy[:, :end]).logits[:, -1].argmax(-1), greedy[:, end])

    at = torch.arange(9).expand(2, 9)
    tree = PrefixTree((at - 1).clamp(min=0), at)
    torch.testing.assert_close(model(idx, context=tree).logits, want, atol=1e-12, rtol=1e-12)
    packed = model(torch.cat((idx[:1], idx[1:]), dim=1), context=Segments(torch.tensor([[0] * 9 + [1] * 9]))).logits
    torch.testing.assert_close(packed.view_as(want), want, atol=1e-6, rtol=1e-5)  # rotations are in float32


@pytest.mark.parametrize("arch", ["gpt2", "qwen3"])
def test_several_tokens_behind_a_cache(arch):
    model = GPT(GPTConfig(**SMALL, arch=arch)).eval().double()
    idx = torch.randint(SMALL["vocab_size"], (3, 16), generator=torch.Generator().manual_seed(0))
    cache = KVCache(model.config, 3, 16, torch.device("cpu"), torch.float64)
    pieces = [model.logits(model._backbone(piece, context=cache)[0]) for piece in idx.split((1, 6, 2, 7), dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(idx).logits, atol=1e-12, rtol=1e-12)


def test_rotary_tables_cover_only_the_tokens_read():
    config = GPTConfig(**{**SMALL, "block_size": 1 << 20, "head_dim": 256}, arch="qwen3")
    model = GPT(config).eval()
    assert sum(buffer.nbytes for buffer in model.buffers()) <= 1 << 25
    kept = model._rotations(Context(), 1 << 14)[0].clone()
    assert len(model.cos) == 1 << 14
    assert torch.equal(model._rotations(Context(), (1 << 14) + 1)[0][: 1 << 14], kept)
    assert len(model.cos) == 1 << 15
    assert "cos" not in model.state_dict()


# --- the output layer and the training loss ---------------------------------------------------------------------------


class Capped(GPT):
    def logits(self, x):
        return 5 * (super().logits(x) / 5).tanh()


class Biased(GPT):
    """Its bias starts at 0, so its first logits equal those of a model without it."""

    def __init__(self, config):
        super().__init__(config)
        self.out_bias = torch.nn.Parameter(torch.zeros(config.vocab_size))

    def logits(self, x):
        return super().logits(x) + self.out_bias


@pytest.mark.parametrize("kind", [GPT, Capped, Biased])
@pytest.mark.parametrize("V", [50, 2000])
def test_one_output_layer_for_loss_logits_and_samples(kind, V, small_chunks):
    torch.manual_seed(0)
    model = kind(GPTConfig(**{**SMALL, "vocab_size": V}))
    torch.nn.init.normal_(model.wte.weight)
    model.double()
    idx, targets = torch.randint(0, V, (2, 3, 16))
    targets[1, :5] = -1
    logits = model(idx).logits
    wanted = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
    got = model(idx, targets).loss
    torch.testing.assert_close(got, wanted)
    assert model.fast_loss == (kind is GPT)
    parameters = list(model.parameters())
    for a, b in zip(*(torch.autograd.grad(value, parameters) for value in (got, wanted)), strict=True):
        torch.testing.assert_close(a, b)
    per_token = model(idx, targets, loss_reduction="none").loss
    torch.testing.assert_close(per_token.sum() / (targets >= 0).sum(), wanted)
    greedy = model.generate(idx[:, :3], 4, temperature=0)
    assert torch.equal(greedy[:, 3], logits[:, 2].argmax(-1))


def z_loss(logits, targets):
    return ORIGINAL(logits, targets) + 0.1 * logits.logsumexp(-1).square()


def smoothed(logits, targets):
    return F.cross_entropy(logits, targets, reduction="none", ignore_index=-1, label_smoothing=0.1)


def capped(logits, targets):
    return ORIGINAL(30 * (logits / 30).tanh(), targets)


ORIGINAL = loss.plain


@pytest.mark.parametrize("changed", [z_loss, smoothed, capped])
@pytest.mark.parametrize("V", [50, 2000])
def test_a_changed_plain_trains_whole_and_in_pieces_and_evaluation_is_the_cross_entropy(
    changed, V, small_chunks, monkeypatch
):
    monkeypatch.setattr(loss, "plain", changed)
    assert loss.is_other_distribution() == (changed is capped)
    assert loss.describe() != "cross-entropy"
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SMALL, "vocab_size": V})).double()
    idx, targets = torch.randint(0, V, (2, 3, 16))
    targets[1, :5] = -1
    logits = model(idx).logits.flatten(0, 1)
    counted = targets.flatten() >= 0
    wanted = changed(logits, targets.flatten())[counted].mean()
    got = model(idx, targets).loss
    torch.testing.assert_close(got, wanted)
    parameters = list(model.parameters())
    for a, b in zip(*(torch.autograd.grad(value, parameters) for value in (got, wanted)), strict=True):
        torch.testing.assert_close(a, b)
    nats = model(idx, targets, loss_reduction="none").loss.flatten()
    torch.testing.assert_close(nats, ORIGINAL(logits, targets.flatten()))


def test_a_changed_loss_never_holds_the_logits_of_all_tokens(monkeypatch):
    monkeypatch.setattr(loss, "plain", z_loss)
    monkeypatch.setattr(loss, "chunk_tokens", lambda x: 8)
    model, sizes = GPT(GPTConfig(**{**SMALL, "vocab_size": 2000})), []
    idx = torch.randint(0, 2000, (4, 16))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        model(idx, idx).loss.backward()
    assert max(sizes) <= max(8 * 2000, model.lm_head.weight.numel())


def test_sampling_keeps_no_more_than_it_will_see(monkeypatch):
    sizes, model = [], GPT(GPTConfig(n_layer=1, n_head=2, n_embd=8, block_size=64, vocab_size=11))
    init = KVCache.__init__
    monkeypatch.setattr(
        KVCache,
        "__init__",
        lambda self, config, B, size, *more: sizes.append(size) or init(self, config, B, size, *more),
    )
    for prompt, new in ((3, 2), (60, 10), (100, 5)):
        model.generate(torch.zeros(1, prompt, dtype=torch.int64), new, seed=0)
    assert sizes == [5, 64, 64]


def test_every_sequence_draws_with_its_own_seed(model):
    """As when sampled alone; and a top-p that float32 cannot represent keeps the most likely token."""
    model.float()
    idx = torch.randint(50, (3, 4), generator=torch.Generator().manual_seed(0))
    together = model.generate(idx, 20, top_p=0.9, seed=[5, 6, 7])
    for i, row in enumerate(together):
        assert torch.equal(row, model.generate(idx[i : i + 1], 20, top_p=0.9, seed=5 + i)[0])
    assert torch.equal(model.generate(idx, 20, top_p=1e-320, seed=0), model.generate(idx, 20, temperature=0))
    with pytest.raises(ValueError, match="2 seeds for 3 sequences"):
        model.generate(idx, 2, seed=[1, 2])


def test_sequences_that_end_leave_the_batch(model, monkeypatch):
    """The other samples stay the same, and only they are computed."""
    model.float()
    idx = torch.randint(50, (8, 3), generator=torch.Generator().manual_seed(1))
    free = model.generate(idx, 12, seed=list(range(8)))[:, 3:]
    stops = {int(token) for token in free[:6, 2]}
    backbone, sizes = model._backbone, []
    monkeypatch.setattr(model, "_backbone", lambda x, **options: sizes.append(len(x)) or backbone(x, **options))
    drawn = model.generate(idx, 12, seed=list(range(8)), stop_token=stops)[:, 3:]
    for want, got in zip(free.tolist(), drawn.tolist(), strict=True):
        end = next((n for n, token in enumerate(want, start=1) if token in stops), 12)
        assert got[:end] == want[:end]
    assert sizes[0] == 8
    assert sizes[-1] <= 4


def test_logits_that_are_not_finite_are_refused(model):
    with torch.no_grad():
        model.ln_f.weight.fill_(math.inf)
    with pytest.raises(InputError, match="logits are NaN or Inf"):
        model.generate(torch.tensor([[1, 2]]), 3, temperature=0)


@pytest.mark.parametrize("vocab_size", [50, 2000])
def test_a_frozen_model_has_a_loss(vocab_size, small_chunks):
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=vocab_size))
    tokens = torch.randint(vocab_size, (2, 16))
    expected = model(tokens[:, :8], tokens[:, 8:])
    found = model.requires_grad_(False)(tokens[:, :8], tokens[:, 8:])
    torch.testing.assert_close(found.loss, expected.loss.detach())
    every_other = model(tokens[:, :8], targets=torch.cat([tokens, tokens], dim=1)[:, 1::4])  # not contiguous
    assert every_other.loss.isfinite()
