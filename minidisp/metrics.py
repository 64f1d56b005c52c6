"""How far the tokens of a model have condensed, and how well it predicts (arXiv 2602.00217).

    condensation = Condensation()
    for batch in batches:
        condensation.update(model(batch, return_hidden_states=True).hidden_states)
    condensation.result()["mean_cosine_by_layer"]

Condensation: with depth, the hidden states of all tokens of a sequence turn towards one direction, so their cosines
approach 1. The paper's L tokens and D features are T and C here. Layer 0 is the embeddings, layer n_layer is after the
final norm. What is undefined (the rank correlation of a constant, the perplexity of no token) is NaN.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from minidisp.dispersion import full_precision, select_layers

BINS = 128  # of every histogram, equally wide on [-1, 1]


@full_precision
def cosine_matrix(z: Tensor) -> Tensor:
    """Cosines between all tokens of a sequence, (..., T, C) -> (..., T, T), clipped to [-1, 1].

    Rows are divided by max(norm, 1e-3), as in the paper: a zero row has cosine 0 with everything, itself included.
    float64 stays float64, every other dtype is computed in float32, also under autocast.
    """
    u = z / torch.linalg.vector_norm(z, dim=-1, keepdim=True).clamp_min(1e-3)
    return (u @ u.mT).clamp(-1.0, 1.0)


def _ratio(a: float, b: float) -> float:
    return float(a / b) if b else math.nan


def _ranks(values: Sequence[float]) -> np.ndarray:
    """1 for the smallest; equal values share the mean of their ranks. All NaN if one value is."""
    x = np.asarray(values, dtype=np.float64)
    _, which, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks = last - (counts - 1) / 2
    return np.full(len(x), math.nan) if np.isnan(x).any() else ranks[which]


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's rho: the linear correlation of the ranks, in [-1, 1]. NaN if x or y is constant or holds a NaN."""
    a, b = (ranks - ranks.mean() for ranks in (_ranks(x), _ranks(y)))
    return _ratio(a @ b, math.sqrt((a @ a) * (b @ b)))


def kendall_tau_b(x: Sequence[float], y: Sequence[float]) -> float:
    """Kendall's tau-b, in [-1, 1]: pairs ordered alike minus pairs ordered contrarily, over the geometric mean of the
    numbers of pairs untied in x and untied in y. NaN if x or y is constant or holds a NaN."""
    a, b = (np.sign(ranks[:, None] - ranks).ravel() for ranks in (_ranks(x), _ranks(y)))
    return _ratio(a @ b, math.sqrt((a @ a) * (b @ b)))


def perplexity(nats: float, tokens: int) -> float:
    """exp of the mean loss per token. nats: the loss summed over the tokens. Infinity where float64 cannot hold it."""
    try:
        return math.exp(_ratio(nats, tokens))
    except OverflowError:
        return math.inf


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """Loss per byte of text in bits, which can be compared across tokenizers. nats: the loss summed over the text."""
    return _ratio(nats, n_bytes * math.log(2))


def word_perplexity(nats: float, words: int) -> float:
    """exp of the loss per whitespace-separated word, which can be compared across tokenizers. nats: summed loss."""
    return perplexity(nats, words)


def _count(cosines: Tensor) -> np.ndarray:
    """How many cosines fall into each bin, exactly (torch.histc counts in float32); NaN falls into none."""
    bins = ((cosines + 1) * (BINS / 2)).clamp(max=BINS - 1).nan_to_num(BINS).to(torch.uint8)
    return torch.bincount(bins.flatten(), minlength=BINS + 1)[:BINS].cpu().numpy()


def _density(counts: np.ndarray, total: int) -> list[float]:
    return (counts / (total * 2 / BINS)).tolist()


class Condensation:
    """The paper's condensation protocol, one batch after another.

    Keeps the sum of the T x T cosine matrices of each layer, in float64, and a count of the individual cosines per bin:
    the memory does not grow with the number of sequences. The paper takes 100 held-out sequences of 512 tokens.
    """

    def __init__(self):
        self.sequences = 0
        self.matrix_sums: list[np.ndarray] = []  # per layer (T, T), float64
        self.pair_counts: list[np.ndarray] = []  # per layer (BINS,), int64, over the pairs i != j

    @torch.no_grad()
    def update(self, hidden_states: Sequence[Tensor]) -> None:
        """Add a batch: n_layer + 1 tensors (B, T, C), embeddings first, on any device and of any floating dtype.

        n_layer >= 1 and T >= 2 are the same in every call. Raises ValueError naming the shapes otherwise.
        """
        shapes = [tuple(z.shape) for z in hidden_states]
        if len(shapes) < 2 or {len(shape) for shape in shapes} != {3} or len({shape[:2] for shape in shapes}) > 1:
            raise ValueError(f"hidden_states must be n_layer + 1 tensors (B, T, C), not {shapes}")
        B, T, _ = shapes[0]
        if T < 2:
            raise ValueError(f"one token has no cosine with another: hidden_states are {shapes}")
        if not self.matrix_sums:
            self.matrix_sums = [np.zeros((T, T)) for _ in shapes]
            self.pair_counts = [np.zeros(BINS, np.int64) for _ in shapes]
        if (len(shapes), T) != (len(self.matrix_sums), len(self.matrix_sums[0])):
            raise ValueError(
                f"{len(shapes)} hidden states of {T} tokens cannot be averaged with the earlier "
                f"{len(self.matrix_sums)} of {len(self.matrix_sums[0])} tokens"
            )
        self.sequences += B
        for layer, z in enumerate(hidden_states):
            cosines = cosine_matrix(z)  # (B, T, T), smaller than the logits that came with it
            self.matrix_sums[layer] += cosines.sum(dim=0).cpu().numpy()
            self.pair_counts[layer] += _count(cosines) - _count(cosines.diagonal(dim1=1, dim2=2))

    def result(self) -> dict:
        """The scores so far, in plain Python numbers and lists that can go into a JSON file.

        sequences, tokens_per_sequence: what was measured.
        mean_cosine_by_layer: mean of the averaged cosine matrix, diagonal included (the paper's mu), l = 0..n_layer.
        off_diagonal_mean_by_layer: the same over the pairs i != j alone, so that T does not matter.
        spearman, kendall: rank correlation of mean_cosine_by_layer with l; +1 = each layer condenses more than the last.
        last_half_mean: mean of mean_cosine_by_layer over the late half of layers 1..n_layer (see select_layers).
        last_1_to_5_means: the same over the last 1, 2, .. 5 layers, as far as there are that many; never the embeddings.
        histogram_by_layer: density of the entries of the averaged matrix, the paper's heat map; BINS bins on [-1, 1].
        pair_histogram_by_layer: density of the individual cosines, i != j. Averaging sequences narrows a histogram, and
            the diagonal adds a peak at 1: this one has neither.
        Raises ValueError before the first update.
        """
        if not self.sequences:
            raise ValueError("no hidden states yet: call update first")
        matrices = [matrix_sum / self.sequences for matrix_sum in self.matrix_sums]
        T = len(matrices[0])
        pairs = T * (T - 1)
        mu = [float(matrix.mean()) for matrix in matrices]
        depth = range(len(mu))
        n_layer = len(mu) - 1
        return {
            "sequences": self.sequences,
            "tokens_per_sequence": T,
            "mean_cosine_by_layer": mu,
            "off_diagonal_mean_by_layer": [float((m.sum() - m.trace()) / pairs) for m in matrices],
            "spearman": spearman(mu, depth),
            "kendall": kendall_tau_b(mu, depth),
            "last_half_mean": float(np.mean([mu[layer] for layer in select_layers("late_half", n_layer)])),
            "last_1_to_5_means": [float(np.mean(mu[-k:])) for k in range(1, min(5, n_layer) + 1)],
            "histogram_by_layer": [_density(np.histogram(m, BINS, range=(-1, 1))[0], m.size) for m in matrices],
            "pair_histogram_by_layer": [_density(counts, self.sequences * pairs) for counts in self.pair_counts],
        }


def paired_bootstrap(
    first: np.ndarray, second: np.ndarray, n_bytes: np.ndarray, resamples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Difference in bits per byte between two models on the same text, second minus first, with a 95 % interval.

    first, second: nats of each model per block of text, (N,) float64; n_bytes: bytes of each block. Blocks are resampled
    together for both models (Efron's percentile bootstrap), so what makes a block hard for both cancels; blocks rather than
    tokens, since neighbouring tokens are not independent. Returns (difference, low, high); low and high are NaN if N < 2.
    """
    difference = np.asarray(second, np.float64) - np.asarray(first, np.float64)
    n_bytes, N = np.asarray(n_bytes, np.float64), len(difference)
    observed = bits_per_byte(float(difference.sum()), float(n_bytes.sum()))
    if N < 2:
        return observed, math.nan, math.nan
    rng = np.random.default_rng(seed)
    drawn = np.empty(resamples)
    for i in range(resamples):
        blocks = rng.integers(0, N, N)
        drawn[i] = difference[blocks].sum() / n_bytes[blocks].sum() / math.log(2)
    return observed, *(float(q) for q in np.quantile(drawn, (0.025, 0.975)))
