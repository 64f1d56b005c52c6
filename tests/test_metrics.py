"""minidisp.metrics against scipy, numpy and hand values."""

import json
import math

import numpy as np
import pytest
import torch

from minidisp.metrics import (
    BINS,
    Condensation,
    bits_per_byte,
    cosine_matrix,
    kendall_tau_b,
    paired_bootstrap,
    perplexity,
    spearman,
    word_perplexity,
)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Rank correlations


@pytest.mark.parametrize("n", [2, 3, 5, 13, 49])
@pytest.mark.parametrize("levels", [2, 4, 1000])  # few levels: many ties
@pytest.mark.filterwarnings("ignore:An input array is constant")
def test_rank_correlations_agree_with_scipy(n, levels):
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(n * levels)
    for _ in range(20):
        x, y = rng.integers(0, levels, (2, n)) / 7
        assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12, nan_ok=True)
        assert kendall_tau_b(x, y) == pytest.approx(stats.kendalltau(x, y).statistic, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("score", [spearman, kendall_tau_b])
def test_rank_correlations_by_hand(score):
    assert score([0.1, 0.2, 0.7], range(3)) == 1
    assert score([0.7, 0.2, 0.1], range(3)) == -1
    assert score([-math.inf, 0.0, math.inf], range(3)) == 1
    assert math.isnan(score([0.5, 0.5, 0.5], range(3)))
    assert math.isnan(score([0.5, math.nan, 0.7], range(3)))
    assert math.isnan(score([0.5], [1]))


def test_ties_by_hand():
    x, y = [1, 1, 2], [1, 2, 3]  # ranks 1.5, 1.5, 3; two of three pairs ordered alike, one tied in x
    assert spearman(x, y) == pytest.approx(math.sqrt(3) / 2)
    assert kendall_tau_b(x, y) == pytest.approx(2 / math.sqrt(2 * 3))


# Perplexity


def test_perplexity():
    assert perplexity(5 * math.log(50), 5) == pytest.approx(50)
    assert word_perplexity(12 * math.log(3), 6) == pytest.approx(9)
    assert bits_per_byte(8 * math.log(2), 4) == pytest.approx(2)
    assert perplexity(0, 10) == 1


def test_perplexity_at_its_limits():
    assert perplexity(1e6, 1) == math.inf
    assert word_perplexity(1e300, 2) == math.inf
    assert perplexity(math.inf, 7) == math.inf
    for undefined in (perplexity(0, 0), word_perplexity(3.0, 0), bits_per_byte(1, 0), perplexity(math.nan, 2)):
        assert math.isnan(undefined)


# Cosines


def test_cosine_matrix_by_hand():
    z = torch.tensor([[3.0, 4.0], [-6.0, -8.0], [4.0, -3.0], [0.0, 0.0], [0.0, 5e-4]], dtype=torch.float64)
    expected = [  # the last row is shorter than 1e-3 and counts half
        [1, -1, 0, 0, 0.4],
        [-1, 1, 0, 0, -0.4],
        [0, 0, 1, 0, -0.3],
        [0, 0, 0, 0, 0],
        [0.4, -0.4, -0.3, 0, 0.25],
    ]
    torch.testing.assert_close(cosine_matrix(z), torch.tensor(expected, dtype=torch.float64))


def test_cosine_matrix_is_clipped_and_keeps_nan():
    z = randn(1, 9, 300).float() * 1e-3 + 1
    assert cosine_matrix(z).abs().max() <= 1
    z[0, 4, 7] = math.nan
    assert cosine_matrix(z)[0, 4].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cosine_matrix_is_computed_in_float32(dtype):
    z = (1 + 0.1 * randn(2, 5, 16)).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cosines = cosine_matrix(z)
    assert cosines.dtype == torch.float32
    torch.testing.assert_close(cosines.double(), cosine_matrix(z.double()), rtol=0, atol=1e-6)


# Condensation


def condensing(B=6, T=11, C=32, n_layer=4):
    """Hidden states whose common direction grows with the layer."""
    return tuple(randn(B, T, C, seed=layer) + 0.5 * layer for layer in range(n_layer + 1))


def measure(*batches):
    condensation = Condensation()
    for hidden_states in batches:
        condensation.update(hidden_states)
    return condensation.result()


def cosines_by_numpy(hidden_states):
    """(n_layer + 1, B, T, T)."""
    unit = [(z / z.norm(dim=-1, keepdim=True)).numpy() for z in hidden_states]
    return np.stack([np.einsum("bic,bjc->bij", u, u) for u in unit]).clip(-1, 1)


def test_condensation_agrees_with_numpy():
    hidden_states = condensing()
    result, cosines = measure(hidden_states), cosines_by_numpy(hidden_states)
    averaged = cosines.mean(axis=1)
    off_diagonal = ~np.eye(11, dtype=bool)
    mu = averaged.mean(axis=(1, 2))
    assert (result["sequences"], result["tokens_per_sequence"]) == (6, 11)
    np.testing.assert_allclose(result["mean_cosine_by_layer"], mu)
    np.testing.assert_allclose(result["off_diagonal_mean_by_layer"], averaged[:, off_diagonal].mean(axis=1))
    for layer in range(5):
        expected = np.histogram(averaged[layer], BINS, range=(-1, 1), density=True)[0]
        np.testing.assert_allclose(result["histogram_by_layer"][layer], expected)
        expected = np.histogram(cosines[layer][:, off_diagonal], BINS, range=(-1, 1), density=True)[0]
        np.testing.assert_allclose(result["pair_histogram_by_layer"][layer], expected)
    assert result["spearman"] == result["kendall"] == 1
    assert result["last_half_mean"] == pytest.approx(mu[[3, 4]].mean())
    np.testing.assert_allclose(result["last_1_to_5_means"], [mu[-1], mu[-2:].mean(), mu[-3:].mean(), mu[-4:].mean()])


def test_last_half_and_last_layers_of_an_odd_depth():
    result = measure(condensing(n_layer=7))
    mu = np.array(result["mean_cosine_by_layer"])
    assert result["last_half_mean"] == pytest.approx(mu[4:].mean())  # layers 4 to 7 of 7, as for the loss
    assert len(result["last_1_to_5_means"]) == 5
    assert result["last_1_to_5_means"][4] == pytest.approx(mu[3:].mean())


def test_batches_add_up():
    hidden_states = condensing()
    whole = measure(hidden_states)
    parts = measure(tuple(z[:1] for z in hidden_states), tuple(z[1:] for z in hidden_states))
    assert whole.keys() == parts.keys()
    for key, value in whole.items():
        np.testing.assert_allclose(parts[key], value, rtol=1e-12, atol=1e-15, err_msg=key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_dtype(dtype):
    rounded = tuple(z.to(dtype) for z in condensing())
    result, truth = measure(rounded), measure(tuple(z.double() for z in rounded))
    np.testing.assert_allclose(result["mean_cosine_by_layer"], truth["mean_cosine_by_layer"], atol=1e-6)


def test_equal_tokens_fill_the_last_bin():
    result = measure((torch.ones(3, 4, 5), torch.ones(3, 4, 5)))
    assert result["mean_cosine_by_layer"] == pytest.approx([1, 1])
    assert result["off_diagonal_mean_by_layer"] == pytest.approx([1, 1])
    for histograms in (result["histogram_by_layer"], result["pair_histogram_by_layer"]):
        assert histograms[1][-1] == pytest.approx(BINS / 2)
        assert sum(histograms[1][:-1]) == pytest.approx(0)
    assert math.isnan(result["spearman"])
    assert math.isnan(result["kendall"])


def test_opposite_tokens_fill_the_first_bin():
    z = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]])
    result = measure((z, z))
    assert result["mean_cosine_by_layer"] == [0, 0]
    assert result["off_diagonal_mean_by_layer"] == [-1, -1]
    assert result["pair_histogram_by_layer"][0][0] == BINS / 2


def test_averaging_sequences_narrows_only_the_paper_histogram():
    z = torch.stack([torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.0]])])  # cosine 0 in one sequence, 1 in the other
    result = measure((z, z))
    assert np.flatnonzero(result["pair_histogram_by_layer"][0]).tolist() == [64, 127]
    assert np.flatnonzero(result["histogram_by_layer"][0]).tolist() == [96, 127]  # 0.5, and the diagonal


def test_nan_is_not_hidden():
    hidden_states = condensing()
    hidden_states[2][0, 0, 0] = math.nan
    result = measure(hidden_states)
    assert [math.isnan(mu) for mu in result["mean_cosine_by_layer"]] == [False, False, True, False, False]
    assert math.isnan(result["spearman"])
    share = sum(result["pair_histogram_by_layer"][2]) * 2 / BINS
    assert share == pytest.approx(1 - 2 * 10 / (6 * 11 * 10))  # the pairs of one token in one of six sequences are gone


def test_result_is_plain_json():
    result = measure(condensing())
    assert json.loads(json.dumps(result)) == result


def test_update_needs_no_gradient_and_changes_no_input():
    hidden_states = tuple(z.requires_grad_() for z in condensing())
    before = [z.detach().clone() for z in hidden_states]
    measure(hidden_states)
    assert all(torch.equal(z, old) for z, old in zip(hidden_states, before, strict=True))


@pytest.mark.parametrize(
    "hidden_states",
    [
        condensing(T=12),
        condensing(n_layer=3),
        condensing()[:1],
        [*condensing()[:4], randn(6, 9, 32)],
        [z[0] for z in condensing()],
    ],
)
def test_update_refuses_other_shapes(hidden_states):
    condensation = Condensation()
    condensation.update(condensing())
    with pytest.raises(ValueError, match="hidden"):
        condensation.update(hidden_states)
    assert condensation.result() == measure(condensing())


def test_one_token_is_refused():
    with pytest.raises(ValueError, match="one token"):
        measure(condensing(T=1))


def test_no_result_without_sequences():
    with pytest.raises(ValueError, match="update"):
        Condensation().result()


def test_paired_bootstrap_covers_a_known_difference():
    rng = np.random.default_rng(0)
    hard = rng.gamma(4, 100, size=400)  # blocks differ far more from each other than the two models do
    first, second = hard, hard + rng.normal(2.0, 5.0, size=400)
    n_bytes = np.full(400, 1024)
    difference, low, high = paired_bootstrap(first, second, n_bytes)
    assert difference == pytest.approx((second - first).sum() / n_bytes.sum() / math.log(2))
    # The normal approximation, from the spread of the paired differences.
    spread = 1.96 * (second - first).std() / math.sqrt(400) / 1024 / math.log(2)
    assert low == pytest.approx(difference - spread, abs=0.15 * spread)
    assert high == pytest.approx(difference + spread, abs=0.15 * spread)
    assert paired_bootstrap(second, first, n_bytes)[0] == -difference


def test_paired_bootstrap_of_one_block_knows_no_spread():
    difference, low, high = paired_bootstrap(np.array([1.0]), np.array([2.0]), np.array([8]))
    assert difference == pytest.approx(1 / 8 / math.log(2))
    assert math.isnan(low)
    assert math.isnan(high)
