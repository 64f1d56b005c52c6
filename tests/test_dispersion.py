"""minidisp.dispersion against the float64 oracle, hand-computed values, and the properties of each variant."""

import copy
import functools
import math
import random

import numpy as np
import oracle
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minidisp import dispersion
from minidisp.dispersion import VARIANTS, select_layers
from minidisp.ops.dispersion import select

# The reference is compared with the oracle here; test_ops.py compares the other implementations with both.
dispersion_loss = functools.partial(dispersion.dispersion_loss, impl="reference")
DispersionLoss = functools.partial(dispersion.DispersionLoss, impl="reference")

ANGULAR = ("angular_spread", "orthogonalization", "mean_cosine")  # functions of u = z / (||z|| + eps) alone
CLAMPED = ("angular_spread", "orthogonalization")
TEMPERED = ("angular_spread", "l2_repel", "perplexity_entropy")

all_variants = pytest.mark.parametrize("variant", VARIANTS)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


BASE = randn(2, 7, 5)
CASES = {
    "random": BASE,
    "two tokens": BASE[:, :2],
    "three tokens": BASE[:, :3],
    "two features": randn(3, 6, 2),
    "nearly parallel": BASE[:, :1] + 0.01 * BASE,
    "long and parallel": 1000 + BASE,
    "duplicated": torch.cat([BASE, BASE[:, :3]], dim=1),
    "nearly duplicated": torch.cat([30 * BASE, 30 * BASE + 1e-3 * BASE.flip(2)], dim=1),
    "antipodal": torch.cat([BASE, -BASE], dim=1),
    "some zero": torch.cat([BASE, torch.zeros(2, 2, 5, dtype=torch.float64)], dim=1),
    "all zero": torch.zeros(2, 5, 4, dtype=torch.float64),
    "all equal": BASE[:, :1].expand(2, 6, 5),
    "tiny": 1e-3 * BASE,
    "wide": 0.5 + randn(1, 33, 64),
}


def value_and_gradient(z, *args, **kwargs):
    z = z.detach().clone().requires_grad_()
    loss = dispersion_loss(z, *args, **kwargs)
    loss.backward()
    return loss.item(), z.grad


def assert_matches_oracle(z, variant, value_tolerance, gradient_tolerance, atol=1e-14, **options):
    """Tolerances are relative to 1 + |value| and to the largest gradient; atol is for gradients that vanish."""
    value, gradient = value_and_gradient(z, variant, **options)
    truth = z.double().numpy()
    expected = oracle.gradient(truth, variant, **options)
    expected_value = oracle.loss(truth, variant, **options)
    assert abs(value - expected_value) <= value_tolerance * (1 + abs(expected_value))
    assert np.abs(gradient.double().numpy() - expected).max() <= gradient_tolerance * np.abs(expected).max() + atol


# The oracle itself


@pytest.mark.parametrize("variant", oracle.VARIANTS)
def test_oracle_gradient_is_the_slope_of_its_value(variant):
    z = 0.5 * randn(2, 4, 6, seed=3).numpy()
    options = {"tau": 0.7, "clamp": 0.01, "eps": 0.05}  # every pair inside the band, where straight-through is exact
    slope, h = np.zeros_like(z), 1e-5
    for index in np.ndindex(z.shape):
        up, down = z.copy(), z.copy()
        up[index] += h
        down[index] -= h
        slope[index] = (oracle.loss(up, variant, **options) - oracle.loss(down, variant, **options)) / (2 * h)
    np.testing.assert_allclose(oracle.gradient(z, variant, **options), slope, rtol=1e-6, atol=1e-9)


# Values and gradients


@all_variants
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tau", [1.0, 0.1])
def test_float64(variant, case, tau):
    assert_matches_oracle(CASES[case], variant, 1e-12, 1e-8, tau=tau, clamp=0.1)


@all_variants
@pytest.mark.parametrize("case", CASES)
def test_float32(variant, case):
    # If a gradient almost cancels, rounding errors of its terms remain, of the order of 1 / ||z||.
    length = CASES[case].norm(dim=-1).max().item()
    assert_matches_oracle(CASES[case].float(), variant, 1e-6, 2e-5, atol=1e-6 / (0.01 + length))


@all_variants
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_half_precision_rounds_only_the_gradient(variant, dtype, rounding):
    for case in ("random", "nearly parallel", "duplicated", "antipodal", "some zero"):
        z = CASES[case].to(dtype)
        assert dispersion_loss(z, variant).dtype == torch.float32
        assert_matches_oracle(z, variant, 1e-6, rounding + 1e-4, atol=1e-6)
        assert value_and_gradient(z, variant)[1].dtype == dtype


@pytest.mark.parametrize("variant", TEMPERED)
@pytest.mark.parametrize("tau", [1e-3, 1e-6, 1e6])
@pytest.mark.parametrize("case", ["random", "nearly parallel", "nearly duplicated", "two tokens"])
def test_extreme_temperatures(variant, tau, case):
    assert_matches_oracle(CASES[case], variant, 1e-10, 1e-6, tau=tau)
    if tau == 1e-3:  # the exponents reach 1e5, so float32 resolves the weights of the pairs to about 1e-2 only
        z = CASES[case].float()
        value, gradient = value_and_gradient(z, variant, tau=tau)
        assert value == pytest.approx(oracle.loss(z.double().numpy(), variant, tau=tau), rel=1e-5, abs=1e-6)
        assert gradient.isfinite().all()


@all_variants
@pytest.mark.parametrize("eps", [0.0, 0.5])
def test_eps(variant, eps):
    for case in ("random", "some zero", "all zero", "tiny"):
        assert_matches_oracle(CASES[case], variant, 1e-12, 1e-10, eps=eps)


def test_close_tokens_far_from_the_origin_keep_their_distances():
    z = (100 + 0.01 * randn(1, 9, 64)).float()
    for variant in ("l2_repel", "perplexity_entropy"):
        assert_matches_oracle(z, variant, 1e-6, 1e-4, tau=1e-3)


@all_variants
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_input_gives_nan(variant, dtype, bad):
    z = randn(2, 5, 4).to(dtype)
    z[1, 2, 3] = bad
    assert dispersion_loss(z, variant).isnan()
    z[:] = bad
    assert dispersion_loss(z, variant).isnan()


# Values by hand


@pytest.mark.parametrize("tau", [1.0, 0.5, 1e-3])
def test_orthogonal_tokens(tau):
    z = 3 * torch.eye(6, dtype=torch.float64)[None]
    off_squared = math.log(6 / 36 + 30 / 36 * math.exp(-18 / tau)) + 0.1 * 9 / 6
    assert dispersion_loss(z, "angular_spread", tau).item() == pytest.approx(-0.5 / tau)
    assert dispersion_loss(z, "orthogonalization").item() == pytest.approx(0, abs=1e-15)
    assert dispersion_loss(z, "mean_cosine").item() == pytest.approx(0, abs=1e-15)
    assert dispersion_loss(z, "l2_repel", tau).item() == pytest.approx(off_squared)
    assert dispersion_loss(z, "decorrelation").item() == pytest.approx((1 / 5) ** 2)  # centred: cosine -1 / (C - 1)
    assert dispersion_loss(z, "perplexity_entropy", tau).item() == pytest.approx(math.log2(1 / 5 + 0.01))


def test_equal_tokens():
    z = torch.tensor([1.0, 2.0, 2.0], dtype=torch.float64).expand(2, 5, 3)
    angle = math.acos(0.75) / math.pi
    assert dispersion_loss(z, "angular_spread", tau=0.5).item() == pytest.approx(-angle / 0.5)
    assert dispersion_loss(z, "angular_spread", clamp=0.1).item() == pytest.approx(-math.acos(0.9) / math.pi)
    assert dispersion_loss(z, "orthogonalization").item() == pytest.approx((0.5 - angle) ** 2)
    assert dispersion_loss(z, "mean_cosine", eps=0.1).item() == pytest.approx((3 / 3.1) ** 2)
    assert dispersion_loss(z, "l2_repel").item() == pytest.approx(0.1 * 3)
    assert dispersion_loss(z, "decorrelation").item() == pytest.approx(1)
    assert dispersion_loss(z, "perplexity_entropy").item() == pytest.approx(math.log2(1 / 4 + 0.01))


def test_two_tokens():
    z = torch.tensor([[[2.0, 0.0], [1.0, math.sqrt(3)]]], dtype=torch.float64)  # both of length 2, 60 degrees apart
    assert dispersion_loss(z, "angular_spread", eps=0).item() == pytest.approx(-1 / 3)
    assert dispersion_loss(z, "orthogonalization", eps=0).item() == pytest.approx((1 / 2 - 1 / 3) ** 2)
    assert dispersion_loss(z, "mean_cosine", eps=0).item() == pytest.approx(0.5)
    assert dispersion_loss(z, "l2_repel").item() == pytest.approx(math.log((1 + math.exp(-4)) / 2) + 0.1 * 2)
    assert dispersion_loss(z, "decorrelation").item() == pytest.approx(1)
    assert dispersion_loss(z, "perplexity_entropy").item() == pytest.approx(math.log2(1.01))


@all_variants
def test_the_batch_is_averaged(variant):
    z = CASES["random"]
    alone = [dispersion_loss(sequence[None], variant).item() for sequence in z]
    assert dispersion_loss(z, variant).item() == pytest.approx(sum(alone) / len(alone))


# The straight-through clamp


@all_variants
def test_gradcheck_inside_the_band(variant):
    z = (2 * torch.eye(4, 6, dtype=torch.float64) + 0.4 * randn(2, 4, 6)).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: dispersion_loss(z, variant, tau=0.5, clamp=0.05), z)


@pytest.mark.parametrize("variant", CLAMPED)
def test_gradient_is_not_zero_beyond_the_clamp(variant):
    z = CASES["nearly parallel"]
    value, gradient = value_and_gradient(z, variant)
    assert value == dispersion_loss(z[:, :1].expand_as(z), variant, eps=0).item()  # the value is flat ...
    assert gradient.norm() > 1e-4  # ... and the tokens still repel each other
    step = dispersion_loss(z - 1e-3 * gradient / gradient.norm(), "mean_cosine")
    assert step < dispersion_loss(z, "mean_cosine")


@pytest.mark.parametrize("tau", [1.0, 0.2])
def test_beyond_the_clamp_the_gradient_is_that_of_mean_cosine(tau):
    z, clamp = CASES["nearly parallel"], 0.25
    gradient = value_and_gradient(z, "angular_spread", tau, clamp)[1]
    expected = value_and_gradient(z, "mean_cosine")[1] / (math.pi * tau * math.sqrt(1 - (1 - clamp) ** 2))
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-15)


# Invariances


@all_variants
def test_permuting_tokens_changes_nothing(variant):
    z = CASES["nearly parallel"]
    order = torch.tensor([3, 0, 6, 2, 5, 1, 4])
    torch.testing.assert_close(dispersion_loss(z[:, order], variant), dispersion_loss(z, variant))


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "decorrelation"])
def test_rotating_features_changes_nothing(variant):
    z = CASES["random"]
    rotation = torch.linalg.qr(randn(5, 5)).Q
    torch.testing.assert_close(dispersion_loss(z @ rotation, variant), dispersion_loss(z, variant))


@pytest.mark.parametrize("variant", ANGULAR)
def test_lengths_do_not_matter_without_eps(variant):
    z = CASES["random"]
    longer = z * torch.arange(1, 8).view(1, 7, 1)
    torch.testing.assert_close(dispersion_loss(longer, variant, eps=0), dispersion_loss(z, variant, eps=0))


def test_decorrelation_ignores_scale_and_offset_of_a_token():
    z = CASES["random"]
    moved = z * torch.arange(1, 8).view(1, 7, 1) + torch.arange(7).view(1, 7, 1)
    torch.testing.assert_close(dispersion_loss(moved, "decorrelation"), dispersion_loss(z, "decorrelation"))


def test_perplexity_entropy_ignores_where_the_origin_is():
    z = CASES["random"]
    torch.testing.assert_close(dispersion_loss(z + 5, "perplexity_entropy"), dispersion_loss(z, "perplexity_entropy"))


# Constant tokens, layouts, autocast, compile


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_constant_token_is_no_direction(dtype):
    z = randn(1, 6, 257).to(dtype)
    z[0, 2] = 0.1  # values that the mean over features does not reproduce exactly
    gradient = value_and_gradient(z, "decorrelation")[1]
    assert gradient[0, 2].count_nonzero() == 0
    assert_matches_oracle(z, "decorrelation", 1e-6, 1e-5)


@all_variants
def test_non_contiguous_input(variant):
    base = randn(2, 5, 14)
    z = base.mT[:, ::2]
    assert not z.is_contiguous()
    value, gradient = value_and_gradient(z.contiguous(), variant)
    base.requires_grad_()
    loss = dispersion_loss(base.mT[:, ::2], variant)
    loss.backward()
    assert loss.item() == pytest.approx(value)
    torch.testing.assert_close(base.grad.mT[:, ::2], gradient)


@all_variants
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(variant, dtype):
    z = CASES["nearly parallel"].to(dtype)
    expected = value_and_gradient(z, variant)
    z.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (z.float() @ z.float().mT).dtype == torch.bfloat16
        loss = dispersion_loss(z, variant)
        direct = VARIANTS[variant](z)
    loss.backward()
    assert loss.dtype == direct.dtype == torch.float32
    assert loss.item() == direct.item() == expected[0]
    assert torch.equal(z.grad, expected[1])


@all_variants
def test_compile(variant):
    z = CASES["nearly parallel"].float().requires_grad_()
    compiled = torch.compile(dispersion_loss, backend="aot_eager", fullgraph=True)
    loss = compiled(z, variant)
    loss.backward()
    expected = value_and_gradient(z, variant)
    assert loss.item() == pytest.approx(expected[0], rel=1e-6)
    torch.testing.assert_close(z.grad, expected[1])


# Refusals


@pytest.mark.parametrize(
    ("z", "options", "message"),
    [
        (torch.ones(3, 4), {}, r"\(3, 4\)"),
        (torch.ones(1, 2, 3, 4), {}, r"\(1, 2, 3, 4\)"),
        (torch.ones(2, 3, 4, dtype=torch.int64), {}, "int64"),
        (torch.ones(2, 1, 4), {}, r"\(2, 1, 4\)"),
        (torch.ones(0, 3, 4), {}, r"\(0, 3, 4\)"),
        (torch.ones(2, 3, 0), {"variant": "l2_repel"}, r"\(2, 3, 0\)"),
        *((torch.ones(2, 3, 1), {"variant": name}, r"\(2, 3, 1\)") for name in (*ANGULAR, "decorrelation")),
        *((torch.ones(2, 3, 4), {"tau": tau}, f"tau.* {tau}") for tau in (0.0, -1.0, math.inf, math.nan)),
        *((torch.ones(2, 3, 4), {"clamp": clamp}, f"clamp.* {clamp}") for clamp in (0.0, 1.0, -0.1, 1e-9, math.nan)),
        *((torch.ones(2, 3, 4), {"eps": eps}, f"eps.* {eps}") for eps in (-1e-3, math.inf, math.nan)),
        (torch.ones(2, 3, 4), {"variant": "angular"}, "'angular'.*angular_spread.*l2_repel.*mean_cosine"),
    ],
)
def test_dispersion_loss_refuses(z, options, message):
    with pytest.raises(ValueError, match=message):
        dispersion_loss(z, **options)


def test_one_feature_is_enough_for_distances():
    for variant in ("l2_repel", "perplexity_entropy"):
        assert_matches_oracle(randn(2, 5, 1), variant, 1e-12, 1e-10)


# Layers


@pytest.mark.parametrize(
    ("layers", "n_layer", "chosen"),
    [
        ("all", 3, [1, 2, 3]),
        ("last", 3, [3]),
        ("early_half", 5, [1, 2]),
        ("late_half", 5, [3, 4, 5]),
        ("late_half", 1, [1]),
        ("5,1, 3", 5, [1, 3, 5]),
        ("2", 2, [2]),
    ],
)
def test_select_layers(layers, n_layer, chosen):
    assert select_layers(layers, n_layer) == chosen


@pytest.mark.parametrize("layers", ["", "some", "1,,2", "0", "1,6", "-1", "2,2", "1.5", "early_half 1"])
def test_select_layers_refuses(layers):
    with pytest.raises(ValueError, match="layers"):
        select_layers(layers, 5)


def test_early_half_of_one_layer_is_refused():
    with pytest.raises(ValueError, match="early_half"):
        select_layers("early_half", 1)


# DispersionLoss


def states(B=4, T=20, C=6, n_layer=4):
    """Hidden states that require gradients, like those of a model with n_layer layers."""
    return tuple(randn(B, T, C, seed=layer).requires_grad_() for layer in range(n_layer + 1))


def positions(module, step=None, T=20):
    """The selected tokens of each layer, which are those that receive a gradient."""
    hidden_states = states(T=T)
    module(hidden_states, step).backward()
    taken = []
    for z in hidden_states:
        per_sequence = [
            row.nonzero().flatten().tolist() for row in (z.grad.abs().sum(-1) if z.grad is not None else [])
        ]
        assert all(row == per_sequence[0] for row in per_sequence)  # shared by the batch
        taken.append(per_sequence[0] if per_sequence else [])
    return taken


def test_module_is_the_mean_over_its_layers():
    hidden_states = states()
    for layers, chosen in (("all", [1, 2, 3, 4]), ("last", [4]), ("early_half", [1, 2]), ("1,4", [1, 4])):
        losses = [dispersion_loss(hidden_states[layer], "l2_repel", tau=2.0) for layer in chosen]
        loss = DispersionLoss("l2_repel", layers, tau=2.0)(hidden_states)
        assert loss.shape == ()
        assert loss.item() == pytest.approx(sum(losses).item() / len(losses))


def test_module_passes_its_options_on():
    hidden_states = states(n_layer=1)
    loss = DispersionLoss("angular_spread", tau=0.3, clamp=0.4, eps=0.2)(hidden_states)
    assert loss == dispersion_loss(hidden_states[1], "angular_spread", tau=0.3, clamp=0.4, eps=0.2)


def test_tokens_are_distinct_positions_of_each_layer():
    taken = positions(DispersionLoss(tokens=7), step=0)
    assert taken[0] == []  # the embeddings are not included
    assert [len(layer) for layer in taken[1:]] == [7] * 4
    assert len({tuple(layer) for layer in taken[1:]}) == 4  # each layer draws its own tokens


def test_tokens_are_a_pure_function_of_seed_step_and_layer():
    module = DispersionLoss(tokens=7, seed=3)
    drawn = [positions(module, step) for step in (0, 1, 2)]
    assert drawn[0] != drawn[1] != drawn[2]
    assert positions(module, 1) == drawn[1]  # independent of other random draws in between
    assert positions(DispersionLoss(tokens=7, seed=3), 2) == drawn[2]  # as after resuming
    assert positions(DispersionLoss(tokens=7, seed=4), 2) != drawn[2]
    assert (
        positions(DispersionLoss(tokens=7, seed=3, layers="2"), 2)[2] == drawn[2][2]
    )  # independent of the other layers


def test_every_position_is_drawn_equally_often():
    module, counts, draws = DispersionLoss(tokens=5, layers="1"), np.zeros(20), 2000
    for step in range(draws):
        counts[module._draw_positions(20, [1], step)[0]] += 1
    deviation = math.sqrt(draws * 0.25 * 0.75)
    assert np.abs(counts - draws * 0.25).max() < 4 * deviation


@pytest.mark.parametrize(("tokens", "step"), [(7, 3), (19, 0), (2, 10**6)])
def test_positions_are_what_numpy_draws_for_the_layer(tokens, step):
    module = DispersionLoss(tokens=tokens, seed=5)
    for layer, taken in list(enumerate(positions(module, step)))[1:]:
        drawn = np.random.default_rng((5, step, layer)).choice(20, tokens, replace=False)
        assert taken == sorted(drawn.tolist())


def test_positions_are_copied_to_a_device_once_per_step_for_all_layers():
    class Copies(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function is torch.ops.aten._to_copy.default and args[0].dtype == torch.int64
            return function(*args, **(kwargs or {}))

    module = DispersionLoss(tokens=7)
    elsewhere = [z.detach().to("meta") for z in states()]
    for step, micro_batches in ((0, 3), (1, 2)):
        with Copies() as copies:
            for _ in range(micro_batches):
                taken = module._positions(20, [1, 2, 3, 4], step, elsewhere[1:])
                assert {where.device.type for where in taken} == {"meta"}
        assert copies.count == 1
    with Copies() as copies:
        for _ in range(2):
            module._positions(20, [1, 2, 3, 4], None, elsewhere[1:])
    assert copies.count == 2
    two_devices = [*elsewhere[:3], *states()[3:]]
    taken = module._positions(20, [1, 2, 3, 4], 1, two_devices[1:])
    assert [where.device.type for where in taken] == ["meta", "meta", "cpu", "cpu"]


def test_without_a_step_every_call_resamples():
    module = DispersionLoss(tokens=7)
    first, second = positions(module), positions(module)
    assert first != second
    fresh = DispersionLoss(tokens=7)
    assert [positions(fresh), positions(fresh)] == [first, second]
    assert positions(module, step=0) == positions(module, step=0)


@pytest.mark.parametrize("tokens", [0, 20, 21])
def test_all_tokens_when_there_are_no_more(tokens):
    assert positions(DispersionLoss(tokens=tokens), step=0)[1:] == [list(range(20))] * 4


def test_two_micro_batches_are_one_batch():
    whole = states(B=16)
    loss = DispersionLoss(tokens=9)(whole, step=5)
    loss.backward()
    module, total = DispersionLoss(tokens=9), 0.0
    halves = [tuple(z.detach()[part].requires_grad_() for z in whole) for part in (slice(0, 8), slice(8, 16))]
    for half in halves:
        part = module(half, step=5) / 2
        part.backward()
        total += part.item()
    assert total == pytest.approx(loss.item(), rel=1e-12)
    for layer in range(1, 5):
        together = torch.cat([half[layer].grad for half in halves])
        torch.testing.assert_close(together, whole[layer].grad, rtol=1e-12, atol=1e-15)


def test_global_random_numbers_are_left_alone():
    before = torch.get_rng_state(), copy.deepcopy(np.random.get_state()), random.getstate()
    module = DispersionLoss(tokens=7)
    module(states())
    module(states(), step=3)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), before[1], strict=True))
    assert random.getstate() == before[2]


def test_module_has_no_state_to_save_and_says_what_it_is():
    module = DispersionLoss("l2_repel", layers="last", tokens=256, tau=0.5)
    assert not module.state_dict()
    assert not list(module.parameters())
    shown = repr(module)
    assert all(part in shown for part in ("variant='l2_repel'", "layers='last'", "tokens=256", "tau=0.5", "seed=0"))


def test_compiled_module_does_not_recompile_each_step():
    torch.compiler.reset()
    module, hidden_states = DispersionLoss(tokens=7), states()
    compiled = torch.compile(DispersionLoss(tokens=7), backend="eager")

    def check(step):
        assert compiled(hidden_states, step).item() == pytest.approx(module(hidden_states, step).item())

    for step in (0, 1, None, None):
        check(step)
    with torch.compiler.set_stance("fail_on_recompile"):
        for step in (2, 3, None, None):
            check(step)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 1}, "tokens.* 1"),
        ({"tokens": -4}, "tokens.* -4"),
        ({"seed": -1}, "seed.* -1"),
        ({"tau": 0.0}, "tau"),
        ({"clamp": 2.0}, "clamp"),
        ({"eps": -1.0}, "eps"),
        ({"variant": "none"}, "angular_spread"),
    ],
)
def test_module_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        DispersionLoss(**options)


@pytest.mark.parametrize("layers", ["5", "half"])
def test_module_refuses_layers_it_does_not_have(layers):
    with pytest.raises(ValueError, match=layers):
        DispersionLoss(layers=layers)(states())


def test_positions_first_drawn_in_inference_mode_serve_training():
    loss, z = DispersionLoss(tokens=4), torch.randn(2, 8, 16, requires_grad=True)
    with torch.inference_mode():
        first = loss([z, z], step=3)
    again = loss([z, z], step=3)
    again.backward()
    assert again.item() == first.item()
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("impl", ["fused", "streamed"])
def test_torchs_newer_precision_settings(impl):
    """Once one of them is set, torch no longer returns the older setting."""
    if impl == "fused" and select("auto", "angular_spread", torch.float32, "cpu")[0] != "fused":
        pytest.skip("there is no extension")
    z = torch.randn(2, 40, 16)
    exact, settings = (
        dispersion.dispersion_loss(z, impl=impl),
        (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul),
    )
    before = [setting.fp32_precision for setting in settings]
    try:
        settings[0].fp32_precision = "tf32"
        assert dispersion.dispersion_loss(z, impl=impl).equal(exact)
        assert settings[0].fp32_precision == "tf32"
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("impl", ["reference", "streamed", "auto"])
@pytest.mark.parametrize(
    "options", [{}, {"variant": "mean_cosine"}, {"layers": "last", "tokens": 3}, {"variant": "l2_repel"}]
)
def test_padding_does_not_count(impl, options):
    """With an attention mask, the loss and its gradient are those of the sequences without their padding."""
    generator = torch.Generator().manual_seed(0)
    lengths, T = [7, 3, 0, 7, 1, 10], 10
    states = [torch.randn(6, T, 5, generator=generator).requires_grad_() for _ in range(3)]
    mask = torch.zeros(6, T, dtype=torch.int64)
    for row, n in enumerate(lengths):
        mask[row, :n] = 1
    mask[3] = mask[3].flip(0)  # on the left
    with torch.no_grad():
        for z in states:
            z[mask == 0] = math.nan
    module = DispersionLoss(impl=impl, **options)
    found = module(states, step=4, attention_mask=mask)
    counted = [row for row, n in enumerate(lengths) if n > 1]
    wanted = sum(module([z[row : row + 1, mask[row].bool()] for z in states], step=4) for row in counted) / len(counted)
    torch.testing.assert_close(found, wanted)
    for a, b in zip(*(torch.autograd.grad(x, states, allow_unused=True) for x in (found, wanted)), strict=True):
        a, b = (torch.zeros_like(states[0]) if grad is None else grad for grad in (a, b))
        torch.testing.assert_close(a, b)
    whole = torch.ones(2, 5, dtype=torch.bool)
    z = [torch.randn(2, 5, 4, generator=generator) for _ in range(3)]
    torch.testing.assert_close(module(z, step=1, attention_mask=whole), module(z, step=1))
    nothing = module([x.requires_grad_() for x in z], attention_mask=~whole)
    assert nothing == 0
    nothing.backward()
    with pytest.raises(ValueError, match=r"\(2, 5\)"):
        module(z, attention_mask=whole[:, :3])


def test_a_mask_over_states_whose_sum_overflows():
    states = [torch.randn(2, 64, 256, generator=torch.Generator().manual_seed(i)) + 5 for i in range(3)]
    mask = torch.ones(2, 64, dtype=torch.bool)
    mask[1, 40:] = False
    exact = DispersionLoss()(states, attention_mask=mask)
    found = DispersionLoss()([z.half() for z in states], attention_mask=mask)  # the sum of a state is above 65,504
    torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-3)
    assert (
        DispersionLoss()([z.bfloat16() for z in states], attention_mask=~mask[:1].repeat(2, 1)).dtype == torch.float32
    )
