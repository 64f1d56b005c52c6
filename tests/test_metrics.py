"""minidisp.metrics against scipy, numpy and hand-computed values."""

import json
import math

import numpy as np
import pytest
import torch

from minidisp.metrics import (
    BINS,
    Condensation,
    FullCondensation,
    _count_at_once,
    _count_by_rows,
    bits_per_byte,
    cosine_matrix,
    distinct_ngrams,
    isoscore_star,
    kendall_tau_b,
    minimal_pair_values,
    perplexity,
    repeated_ngrams,
    singular_entropy,
    singular_values,
    spearman,
    word_perplexity,
)
from tests.conftest import NothingIsLookedAt


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


def test_the_two_ways_to_count_agree():
    """_count_by_rows is used on GPUs."""
    bins = torch.randint(0, BINS + 1, (3, 7, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    bins[0], bins[1, 2] = BINS - 1, 0
    counts = np.bincount(bins.flatten().numpy(), minlength=BINS + 1).tolist()
    assert _count_at_once(bins).tolist() == _count_by_rows(bins).tolist() == counts


def test_a_batch_is_added_without_waiting_for_the_device(monkeypatch):
    hidden_states, condensation = condensing(), Condensation()
    with pytest.raises(AssertionError, match="bincount"), NothingIsLookedAt():
        Condensation().update(hidden_states)
    monkeypatch.setattr("minidisp.metrics._count_at_once", _count_by_rows)
    with NothingIsLookedAt():
        condensation.update(hidden_states)
    assert condensation.result() == measure(hidden_states)


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
    assert share == pytest.approx(1 - 2 * 10 / (6 * 11 * 10))  # without the pairs of one token in one of six sequences


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
    with pytest.raises(ValueError, match="at least two tokens"):
        measure(condensing(T=1))


def test_no_result_without_sequences():
    with pytest.raises(ValueError, match="update"):
        Condensation().result()


# The further metrics


def published_isoscore(points):
    """Algorithm 1 of arXiv 2305.19358, step by step, without shrinkage."""
    eigenvalues = np.linalg.svd(np.cov(points.T), compute_uv=False)
    d = len(eigenvalues)
    normed = np.sqrt(d) * eigenvalues / np.linalg.norm(eigenvalues)
    defect = np.linalg.norm(normed - np.ones(d)) / np.sqrt(2 * (d - np.sqrt(d)))
    phi = (d - defect**2 * (d - np.sqrt(d))) ** 2 / d**2
    return (d * phi - 1) / (d - 1)


def test_isoscore_star_agrees_with_the_published_algorithm():
    rng = np.random.default_rng(0)
    for d in (2, 5, 40):
        points = rng.normal(size=(300, d)) @ rng.normal(size=(d, d)) + 7
        assert isoscore_star(np.cov(points.T)) == pytest.approx(published_isoscore(points), rel=1e-9)


@pytest.mark.parametrize("k", [1, 2, 5, 9])
def test_isoscore_star_counts_directions(k):
    """The authors' interpretation: with equal variance in k of d directions, in any basis, the score is (k - 1) / (d -
    1)."""
    basis, _ = np.linalg.qr(np.random.default_rng(k).normal(size=(9, 9)))
    assert isoscore_star(basis[:, :k] @ basis[:, :k].T * 3.0) == pytest.approx((k - 1) / 8)


def test_isoscore_star_of_nothing():
    assert math.isnan(isoscore_star(np.zeros((3, 3))))
    assert math.isnan(isoscore_star(np.ones((1, 1))))


@pytest.mark.parametrize("shape", [(3, 5, 9), (3, 9, 5), (2, 6, 6)])
def test_singular_values_agree_with_numpy(shape):
    x = randn(*shape)
    x[:, :, 0] *= 1e-4
    x[0, :, 1] = x[0, :, 2]  # one is zero where T >= C
    truth = np.linalg.svd(x.numpy(), compute_uv=False)
    s = singular_values(x)
    assert s.shape == truth.shape
    assert np.abs(s.numpy() - truth).max() < 1e-7 * truth.max()
    p = truth / truth.sum(axis=1, keepdims=True)
    entropy = [-sum(q * math.log2(q) for q in row if q > 0) for row in p]
    np.testing.assert_allclose(singular_entropy(s), entropy, atol=1e-5)


def test_singular_entropy_by_hand():
    s = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0], [2.0, 1.0, 1.0, 0.0], [0.0] * 4])
    torch.testing.assert_close(singular_entropy(s), torch.tensor([2.0, 0.0, 1.5, math.nan]), equal_nan=True)


def test_singular_values_of_nan_and_inf():
    x = randn(3, 4, 5)
    x[1, 2, 3] = math.inf
    s = singular_values(x)
    assert s[1].isnan().all()
    torch.testing.assert_close(s[[0, 2]], singular_values(x[[0, 2]]))


def measure_all(*batches):
    condensation = FullCondensation()
    for hidden_states in batches:
        condensation.update(hidden_states)
    return condensation.result()


@pytest.mark.parametrize(("T", "C"), [(11, 32), (40, 12)])
def test_the_further_metrics_agree_with_numpy(T, C):
    """All metrics from their definitions, with an SVD per sequence and loops."""
    hidden_states = condensing(B=5, T=T, C=C)
    hidden_states[3][..., 2] *= 50  # a rogue dimension
    hidden_states[2][..., 1] = 4.0  # a constant one
    batches = [[z[i : i + 2] for z in hidden_states] for i in (0, 2, 4)]
    result = measure_all(*batches)
    want = {name: [] for name in result if name not in measure(hidden_states)}
    positions = [
        range(T) if T <= 32 else np.random.default_rng(i).choice(range(1, T), 32, replace=False) for i in range(5)
    ]
    norms_of_embeddings = None
    for layer in hidden_states:
        layer = layer.numpy()
        rows = []
        for x in layer:
            s = np.linalg.svd(x, compute_uv=False)
            p = s / s.sum()
            entropy = -(p * np.log2(p)).sum()
            lfc = np.ones((T, T)) / T @ x
            ratio = np.linalg.norm(x - lfc, 2) / np.linalg.norm(lfc, 2)
            rows.append((s[0] ** 2 / np.linalg.norm(x) ** 2, entropy, 2**entropy, ratio, np.linalg.norm(x - lfc)))
        mev, entropy, rank, ratio, hfc = np.array(rows).T
        norms_of_embeddings = hfc if norms_of_embeddings is None else norms_of_embeddings
        want["mev_by_layer"].append(mev.mean())
        want["singular_entropy_by_layer"].append(entropy.mean())
        want["effective_rank_by_layer"].append(rank.mean())
        want["hfc_lfc_ratio_by_layer"].append(ratio.mean())
        want["log_hfc_growth_by_layer"].append(np.log(hfc / norms_of_embeddings).mean())
        want["isoscore_star_by_layer"].append(published_isoscore(layer.reshape(-1, C)))
        sample = np.stack([x[p] for x, p in zip(layer, positions, strict=True)])
        mean, std = sample.reshape(-1, C).mean(axis=0), sample.reshape(-1, C).std(axis=0)
        std[std == 0] = 1
        for name, points in (("centred", sample - mean), ("standardised", (sample - mean) / std)):
            cosines = [
                x[i] @ x[j] / np.linalg.norm(x[i]) / np.linalg.norm(x[j])
                for x in points
                for i in range(len(x))
                for j in range(i)
            ]
            want[f"{name}_mean_by_layer"].append(np.mean(cosines))
    assert len(want) == 8
    for name, values in want.items():
        np.testing.assert_allclose(result[name], values, rtol=2e-6, atol=2e-6, err_msg=name)
    assert {name: value for name, value in result.items() if name not in want} == measure(*batches)
    assert json.loads(json.dumps(result)) == result


def test_what_the_mean_cosine_hides():
    """One shared direction, or one loud dimension, makes all cosines large; centred or standardised, nothing is
    left."""
    z = randn(60, 20, 64)
    offset, loud = z + 3 * randn(64, seed=1), z.clone()
    loud[..., 0] = 40 * (1 + 0.1 * loud[..., 0])
    result = measure_all((z, offset, loud))
    assert min(result["off_diagonal_mean_by_layer"][1:]) > 0.8
    for name in ("centred_mean_by_layer", "standardised_mean_by_layer"):
        assert np.abs(result[name]).max() < 0.03, name
    # A direction shared by the tokens of one text, but not by all texts, remains.
    result = measure_all((z, z + 3 * randn(60, 1, 64, seed=2)))
    assert result["centred_mean_by_layer"][1] == pytest.approx(0.9, abs=0.02)
    assert result["standardised_mean_by_layer"][1] == pytest.approx(0.9, abs=0.02)


def test_the_position_alone_condenses_nothing():
    z = randn(1, 64, 32).expand(100, 64, 32)  # position embeddings only
    result = measure_all((z, z))
    assert abs(result["centred_mean_by_layer"][0]) < 0.03
    assert abs(result["standardised_mean_by_layer"][0]) < 0.03


def test_the_sample_is_bounded():
    condensation = FullCondensation()
    for seed in range(3):
        condensation.update((randn(100, 20, 3, seed=seed), randn(100, 20, 3, seed=seed + 9)))
    assert [sum(len(part) for part in layer) for layer in condensation.samples] == [128, 128]
    assert len(condensation.result()["centred_mean_by_layer"]) == 2


def test_the_further_metrics_at_their_limits():
    equal = torch.ones(3, 4, 5)
    result = measure_all((randn(3, 4, 5).float(), equal, torch.zeros(3, 4, 5)))
    assert result["mev_by_layer"][1] == pytest.approx(1)
    assert result["effective_rank_by_layer"][1] == pytest.approx(1, abs=1e-5)
    assert result["hfc_lfc_ratio_by_layer"][1] == pytest.approx(0)
    assert result["log_hfc_growth_by_layer"][:2] == [0, -math.inf]
    for name in ("mev", "singular_entropy", "effective_rank", "hfc_lfc_ratio", "isoscore_star"):
        assert math.isnan(result[f"{name}_by_layer"][2]), name


def test_a_nan_stays_in_its_layer():
    hidden_states = condensing()
    hidden_states[2][0, 0, 0] = math.nan
    result = measure_all(hidden_states)
    for name, values in result.items():
        if name.endswith("_by_layer") and "histogram" not in name and name[:8] not in ("centred_", "standard"):
            assert [math.isnan(value) for value in values] == [False, False, True, False, False], name


# Minimal pairs and repetition


def test_minimal_pairs_count_one_a_half_or_nothing():
    values = minimal_pair_values(np.array([-1.0, -2.0, -3.0, math.nan]), np.array([-2.0, -2.0, -1.0, -1.0]))
    assert values.tolist() == [1.0, 0.5, 0.0, 0.0]


def test_repetition_by_hand():
    assert repeated_ngrams([1, 2, 1, 2, 1], 2) == pytest.approx(1 - 2 / 4)  # 12 21 12 21
    assert repeated_ngrams([1, 2, 1, 2, 1], 3) == pytest.approx(1 - 2 / 3)  # 121 212 121
    assert repeated_ngrams([7] * 128, 4) == pytest.approx(1 - 1 / 125)
    assert repeated_ngrams(range(128), 4) == 0
    assert repeated_ngrams(np.array([3, 3, 3]), 2) == pytest.approx(1 / 2)
    assert math.isnan(repeated_ngrams([1, 2], 3))
    assert distinct_ngrams([[1, 2, 3], [3, 2, 1]], 1) == pytest.approx(3 / 6)
    assert distinct_ngrams([[1, 2, 3], [3, 2, 1]], 2) == 1
    assert math.isnan(distinct_ngrams([[1]], 2))
