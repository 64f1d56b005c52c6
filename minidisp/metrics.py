"""Metrics of condensation and of prediction quality (arXiv 2602.00217).

    condensation = Condensation()
    for batch in batches:
        condensation.update(model(batch, return_hidden_states=True).hidden_states)
    condensation.result()["mean_cosine_by_layer"]

Condensation means that with depth the hidden states of all tokens of a sequence collapse towards a common direction, so
their pairwise cosine similarity approaches 1. The class Condensation follows the paper's protocol; FullCondensation
adds metrics that address its weaknesses, at a higher cost in time and memory. The paper's L tokens and D features are T
and C here. Layer 0 is the embeddings, layer n_layer is after the final norm. Undefined values (the rank correlation of
a constant, the perplexity of zero tokens) are NaN.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from minidisp.dispersion import full_precision, select_layers

BINS = 128  # bins of every histogram, equally wide on [-1, 1]
SAMPLED_SEQUENCES, SAMPLED_TOKENS = 128, 32  # sequences, and tokens of each, that FullCondensation centres on


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
    """Ranks from 1 for the smallest; tied values share their mean rank. All NaN if any value is NaN."""
    x = np.asarray(values, dtype=np.float64)
    _, which, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks = last - (counts - 1) / 2
    return np.full(len(x), math.nan) if np.isnan(x).any() else ranks[which]


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's rho: the linear correlation of the ranks, in [-1, 1]. NaN if x or y is constant or contains a NaN."""
    a, b = (ranks - ranks.mean() for ranks in (_ranks(x), _ranks(y)))
    return _ratio(a @ b, math.sqrt((a @ a) * (b @ b)))


def kendall_tau_b(x: Sequence[float], y: Sequence[float]) -> float:
    """Kendall's tau-b, in [-1, 1]: concordant minus discordant pairs, divided by the geometric mean of the number of
    pairs without a tie in x and of those without a tie in y. NaN if x or y is constant or contains a NaN.
    """
    a, b = (np.sign(ranks[:, None] - ranks).ravel() for ranks in (_ranks(x), _ranks(y)))
    return _ratio(a @ b, math.sqrt((a @ a) * (b @ b)))


def perplexity(nats: float, tokens: int) -> float:
    """exp of the mean loss per token. nats: the loss summed over the tokens. Infinity if it overflows float64."""
    try:
        return math.exp(_ratio(nats, tokens))
    except OverflowError:
        return math.inf


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """Loss per byte of text in bits, comparable across tokenizers. nats: the loss summed over the text."""
    return _ratio(nats, n_bytes * math.log(2))


def word_perplexity(nats: float, words: int) -> float:
    """exp of the loss per whitespace-separated word, comparable across tokenizers. nats: summed loss."""
    return perplexity(nats, words)


def _count_pairs(cosines: Tensor) -> Tensor:
    """The number of cosines (B, T, T) of pairs i != j in each bin, (BINS,) int64, without NaN. torch.histc would count
    in float32.
    """
    bins = ((cosines + 1) * (BINS / 2)).clamp(max=BINS - 1).nan_to_num(BINS).to(torch.uint8)
    bins.diagonal(dim1=1, dim2=2).fill_(BINS)
    count = _count_at_once if bins.device.type in ("cpu", "mps") else _count_by_rows
    return count(bins)[:BINS]


def _count_at_once(bins: Tensor) -> Tensor:
    """The number of occurrences of each of 0..BINS, (BINS + 1,) int64."""
    return torch.bincount(bins.flatten(), minlength=BINS + 1)


def _count_by_rows(bins: Tensor) -> Tensor:
    """The same without synchronising with the device, which bincount does to find the maximum. Slower on a CPU.

    Each row has its own counts, so that few threads add to the same address.
    """
    counts = torch.zeros(*bins.shape[:-1], BINS + 1, dtype=torch.int64, device=bins.device)
    ones = torch.ones((), dtype=torch.int64, device=bins.device).expand(bins.shape)
    return counts.scatter_add_(-1, bins.long(), ones).flatten(0, -2).sum(dim=0)


def _density(counts: np.ndarray, total: int) -> list[float]:
    return (counts / (total * 2 / BINS)).tolist()


class Condensation:
    """The paper's condensation protocol, accumulated over batches.

    Keeps the sum of the T x T cosine matrices of each layer, in float64, and a count of the individual cosines per bin,
    so memory does not grow with the number of sequences. Both are on the device of the hidden states (or on the CPU if
    that device has no float64); only `result` synchronises with it. The paper uses 100 held-out sequences of 512
    tokens.
    """

    def __init__(self):
        self.sequences = 0
        self.matrix_sums: Tensor | None = None  # (n_layer + 1, T, T), float64
        self.pair_counts: Tensor | None = None  # (n_layer + 1, BINS), int64, over the pairs i != j

    @torch.no_grad()
    def update(self, hidden_states: Sequence[Tensor]) -> None:
        """Add a batch: n_layer + 1 tensors (B, T, C), embeddings first, on any device and of any floating dtype.

        n_layer >= 1 and T >= 2 must be the same in every call. Raises ValueError, with the shapes, otherwise.
        """
        shapes = [tuple(z.shape) for z in hidden_states]
        if len(shapes) < 2 or {len(shape) for shape in shapes} != {3} or len({shape[:2] for shape in shapes}) > 1:
            raise ValueError(f"hidden_states must be n_layer + 1 tensors (B, T, C), not {shapes}")
        B, T, _ = shapes[0]
        if T < 2:
            raise ValueError(f"a cosine needs at least two tokens per sequence: hidden_states are {shapes}")
        if self.matrix_sums is None:
            device = hidden_states[0].device if hidden_states[0].device.type != "mps" else "cpu"
            self.matrix_sums = torch.zeros(len(shapes), T, T, dtype=torch.float64, device=device)
            self.pair_counts = torch.zeros(len(shapes), BINS, dtype=torch.int64, device=device)
        if (len(shapes), T) != self.matrix_sums.shape[:2]:
            raise ValueError(
                f"{len(shapes)} hidden states of {T} tokens cannot be averaged with the earlier "
                f"{len(self.matrix_sums)} of {self.matrix_sums.shape[1]} tokens"
            )
        self.sequences += B
        for z, matrix_sum, counts in zip(hidden_states, self.matrix_sums, self.pair_counts, strict=True):
            cosines = cosine_matrix(z)  # (B, T, T), smaller than the logits that came with it
            matrix_sum += cosines.sum(dim=0).to(matrix_sum.device)
            counts += _count_pairs(cosines).to(counts.device)

    def result(self) -> dict:
        """The metrics so far, as plain Python numbers and lists that JSON can represent.

        sequences, tokens_per_sequence: the amount of text measured.
        mean_cosine_by_layer: mean of the averaged cosine matrix, diagonal included (the paper's mu), l = 0..n_layer.
        off_diagonal_mean_by_layer: the same over the pairs i != j only, which does not depend on T.
        spearman, kendall: rank correlation of mean_cosine_by_layer with l; +1 = each layer condenses more.
        last_half_mean: mean of mean_cosine_by_layer over the late half of layers 1..n_layer (see select_layers).
        last_1_to_5_means: the same over the last 1, 2, .. 5 layers, as far as the model has them; never the embeddings.
        histogram_by_layer: density of the entries of the averaged matrix, the paper's heat map; BINS bins on [-1, 1].
        pair_histogram_by_layer: density of the individual cosines, i != j. Unlike histogram_by_layer, it is not
            narrowed by averaging over sequences and has no peak at 1 from the diagonal.
        Raises ValueError before the first update.
        """
        if not self.sequences:
            raise ValueError("no hidden states yet: call update first")
        matrices = (self.matrix_sums / self.sequences).cpu().numpy()
        pair_counts = self.pair_counts.cpu().numpy()
        T = matrices.shape[1]
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
            "pair_histogram_by_layer": [_density(counts, self.sequences * pairs) for counts in pair_counts],
        }


def singular_values(x: Tensor) -> Tensor:
    """Singular values of matrices (..., T, C), largest first, (..., min(T, C)) in float64; NaN if x is not finite.

    Computed as square roots of the eigenvalues of X X^T or X^T X, whichever is smaller: several times faster than an
    SVD of X. Squaring costs half of float64's digits: the absolute error is up to about 1e-7 of the largest singular
    value, comparable to the float32 precision of the hidden states.
    """
    x = x.double()
    finite = x.isfinite().all(dim=-1).all(dim=-1)[..., None]  # eigvalsh does not converge on NaN or Inf
    x = torch.where(finite[..., None], x, 0.0)
    gram = x @ x.mT if x.shape[-2] < x.shape[-1] else x.mT @ x
    s = torch.linalg.eigvalsh(gram).flip(-1).clamp_min(0.0).sqrt()
    return s.masked_fill(~finite, math.nan)


def singular_entropy(s: Tensor) -> Tensor:
    """-sum p_i log2 p_i in bits with p_i = s_i / sum s_j, (..., N) -> (...); 2 to this power is the effective rank.

    (Roy & Vetterli 2007, in nats there.) NaN where all singular values are 0.
    """
    p = s / s.sum(dim=-1, keepdim=True)
    return -torch.special.xlogy(p, p).sum(dim=-1) / math.log(2)


def isoscore_star(covariance: np.ndarray) -> float:
    """IsoScore* of a covariance matrix (C, C): 1 if the variance is equal in all directions, 0 if it is in one.

    (k - 1) / (C - 1) if the variance is equal in k directions and 0 in the others. Algorithm 1 of Rudman & Eickhoff
    (arXiv 2305.19358) takes eigenvalues e of the covariance, e' = sqrt(C) e / ||e||, delta = ||e' - 1|| / sqrt(2 (C -
    sqrt C)), phi = (C - delta^2 (C - sqrt C))^2 / C^2 and returns (C phi - 1) / (C - 1). Combined, C phi = (sum e)^2 /
    sum e^2, which needs no eigenvalues: sum e is the trace and sum e^2 the squared Frobenius norm. With fewer points
    than a few times C, shrink first, as the authors do: (1 - zeta) covariance + zeta covariance_of_more_points. NaN if
    the covariance is 0 or C is 1.
    """
    C = len(covariance)
    directions = _ratio(float(np.trace(covariance)) ** 2, float(np.square(covariance).sum()))
    return _ratio(directions - 1, C - 1)


class FullCondensation(Condensation):
    """Condensation and further metrics per layer that reveal what the mean cosine alone can hide.

    Meant for evaluation rather than for training: everything is computed in float64 on the CPU, which takes about as
    long as a forward pass of the model there. Keeps an additional C x C matrix per layer, and 32 tokens of each of the
    first 128 sequences.
    """

    PER_SEQUENCE = ("mev", "singular_entropy", "effective_rank", "hfc_lfc_ratio", "log_hfc_growth")

    def __init__(self):
        super().__init__()
        self.sums: list[np.ndarray] = []  # per layer, over the sequences, in the order of PER_SEQUENCE
        self.token_sums: list[np.ndarray] = []  # per layer (C,), float64
        self.product_sums: list[np.ndarray] = []  # per layer (C, C), float64: Z^T Z over all tokens
        self.samples: list[list[Tensor]] = []  # per layer: (B, SAMPLED_TOKENS, C), a part per batch

    @torch.no_grad()
    def update(self, hidden_states: Sequence[Tensor]) -> None:
        """See Condensation.update; C must be the same in every layer."""
        super().update(hidden_states)
        B, T, C = hidden_states[0].shape
        if not self.sums:
            self.sums = [np.zeros(len(self.PER_SEQUENCE)) for _ in hidden_states]
            self.token_sums = [np.zeros(C) for _ in hidden_states]
            self.product_sums = [np.zeros((C, C)) for _ in hidden_states]
            self.samples = [[] for _ in hidden_states]
        before = self.sequences - B
        sampled = range(before, min(self.sequences, SAMPLED_SEQUENCES))
        positions = torch.tensor(np.array([_sample_positions(T, sequence) for sequence in sampled], dtype=np.int64))
        if hidden_states[0].device.type != "cpu":
            hidden_states = torch.stack(tuple(hidden_states)).cpu()  # in one copy, as each synchronises with the device
        hfc_of_embeddings = None
        for layer, z in enumerate(hidden_states):
            x = z.double()
            if len(sampled):
                self.samples[layer].append(x[torch.arange(len(sampled))[:, None], positions].float())
            tokens = x.flatten(0, 1)
            self.token_sums[layer] += tokens.sum(dim=0).numpy()
            self.product_sums[layer] += (tokens.mT @ tokens).numpy()
            s = singular_values(x)  # (B, min(T, C))
            entropy = singular_entropy(s)
            mean = x.mean(dim=1, keepdim=True)
            hfc = x - mean  # LFC is the mean token repeated T times; its only singular value is sqrt(T) ||mean||
            ratio = singular_values(hfc)[:, 0] / (math.sqrt(T) * torch.linalg.vector_norm(mean, dim=(1, 2)))
            hfc = torch.linalg.vector_norm(hfc, dim=(1, 2))
            hfc_of_embeddings = hfc if layer == 0 else hfc_of_embeddings
            mev = s[:, 0].square() / s.square().sum(dim=1)
            scores = (mev, entropy, entropy.exp2(), ratio, (hfc / hfc_of_embeddings).log())
            self.sums[layer] += torch.stack(scores).sum(dim=1).numpy()

    def result(self) -> dict:
        """Condensation.result and, for the layers 0..n_layer:

        centred_mean_by_layer: mean cosine of the pairs i != j of a sequence after subtracting the mean token, which
            removes any direction shared by all tokens of all texts. The mean token is taken over SAMPLED_TOKENS tokens
            of each of many sequences, and the pairs are taken from these: a sequence centred on its own mean would
            always score near 0. With 100 sequences the sampling error is below about 0.01.
        standardised_mean_by_layer: the same after also dividing each dimension by its standard deviation, so a few
            dimensions with much larger values do not dominate (Timkey & van Schijndel 2021, arXiv 2109.04404).
        isoscore_star_by_layer: isoscore_star of the covariance of all tokens of all sequences, without shrinkage; it is
            biased low unless there are several times C tokens.
        Of each sequence's (T, C) matrix X with singular values s_i, averaged over the sequences:
        mev_by_layer: s_1^2 / sum s_i^2, the share of variance explained by the leading direction, from 1 / min(T, C) to
            1.
        singular_entropy_by_layer, effective_rank_by_layer: see singular_entropy; the rank itself is averaged.
        hfc_lfc_ratio_by_layer: ||HFC||_2 / ||LFC||_2, spectral norms. LFC is X with each token replaced by the
            sequence's mean token, HFC = X - LFC; 0 = all tokens are equal.
        log_hfc_growth_by_layer: ln(||HFC_l||_F / ||HFC_0||_F), 0 for the embeddings.
        """
        scores = super().result()
        N = self.sequences * scores["tokens_per_sequence"]
        for i, name in enumerate(self.PER_SEQUENCE):
            scores[f"{name}_by_layer"] = [float(sums[i]) / self.sequences for sums in self.sums]
        isotropy, centred, standardised = [], [], []
        for token_sum, product_sum, sample in zip(self.token_sums, self.product_sums, self.samples, strict=True):
            isotropy.append(isoscore_star((product_sum - np.outer(token_sum, token_sum) / N) / (N - 1)))
            x = torch.cat(sample).double()  # (sequences, tokens, C)
            x = x - x.mean(dim=(0, 1))
            std = x.square().mean(dim=(0, 1)).sqrt()
            centred.append(_off_diagonal_mean(cosine_matrix(x)))
            standardised.append(_off_diagonal_mean(cosine_matrix(x / std.masked_fill(std == 0, 1.0))))
        return {
            **scores,
            "centred_mean_by_layer": centred,
            "standardised_mean_by_layer": standardised,
            "isoscore_star_by_layer": isotropy,
        }


def _sample_positions(T: int, sequence: int) -> np.ndarray:
    """Up to SAMPLED_TOKENS positions in a sequence, the same ones each time.

    They differ between sequences, as centring would otherwise remove positional effects. The first token is excluded:
    in many models its norm is far larger than all others.
    """
    if T <= SAMPLED_TOKENS:
        return np.arange(T)
    return np.random.default_rng(sequence).choice(np.arange(1, T), SAMPLED_TOKENS, replace=False)


def _off_diagonal_mean(matrices: Tensor) -> float:
    """Mean of (B, T, T) over i != j."""
    B, T, _ = matrices.shape
    return float((matrices.sum() - matrices.diagonal(dim1=1, dim2=2).sum()) / (B * T * (T - 1)))


def minimal_pair_values(good: np.ndarray, bad: np.ndarray) -> np.ndarray:
    """1 where the good sentence of a pair is more likely, 1/2 for a tie, else 0 (arXiv 1912.00582).

    good, bad: total log-probability of each sentence, (N,). The mean of the result is the accuracy; chance level is
    1/2. A pair with a NaN counts as 0.
    """
    return (good > bad) + (good == bad) / 2


def repeated_ngrams(tokens: Sequence[int], n: int) -> float:
    """Share of a text's n-grams that have occurred earlier in it, 1 - distinct / all, in [0, 1); NaN if it has none.

    seq-rep-n of Welleck et al. (arXiv 1908.04319), rep-n of Su et al. (2202.06417), who take its mean over texts.
    """
    ngrams = _ngrams(tokens, n)
    return 1 - _ratio(len(set(ngrams)), len(ngrams))


def distinct_ngrams(texts: Sequence[Sequence[int]], n: int) -> float:
    """distinct-n: the number of distinct n-grams over the number of all n-grams in all texts, in (0, 1]; NaN if there
    are none.

    Li et al. (arXiv 1510.03055) divide by the number of tokens, which is the same for n = 1. It falls as texts are
    added, so compare equal numbers of equally long texts.
    """
    ngrams = [ngram for tokens in texts for ngram in _ngrams(tokens, n)]
    return _ratio(len(set(ngrams)), len(ngrams))


def _ngrams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    tokens = np.asarray(tokens).tolist()
    return list(zip(*(tokens[i:] for i in range(n)), strict=False))
