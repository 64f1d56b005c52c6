"""The reference for the tests: every dispersion variant and its gradient, in float64, pair by pair.

Written from the formulas of arXiv 2602.00217 with gradients derived by hand, for clarity and not for speed; it shares
no code with minidisp and needs no autograd. loss(z) and gradient(z) take an array (B, T, C).

In every variant the gradient of a sequence's loss L passes through a table of pairs g[i, j] = dL/dx_ij, where x_ij is
- the cosine c_ij = u_i.u_j:             dL/du_i = sum_j (g_ij + g_ji) u_j, and on from u_i to z_i, or
- the squared distance ||z_i - z_j||^2:  dL/dz_i = sum_j (g_ij + g_ji) 2 (z_i - z_j).
"""

import math

import numpy as np

VARIANTS = ("angular_spread", "orthogonalization", "l2_repel", "decorrelation", "perplexity_entropy", "mean_cosine")


def loss(z, variant="angular_spread", tau=1.0, clamp=0.25, eps=1e-2) -> float:
    """Mean over the sequences of z, (B, T, C)."""
    return float(np.mean([_SEQUENCE[variant](x, tau, clamp, eps)[0] for x in np.asarray(z, np.float64)]))


def gradient(z, variant="angular_spread", tau=1.0, clamp=0.25, eps=1e-2) -> np.ndarray:
    """d loss / dz, (B, T, C); straight-through where the variant clamps."""
    z = np.asarray(z, np.float64)
    return np.stack([_SEQUENCE[variant](x, tau, clamp, eps)[1] for x in z]) / len(z)


# One sequence, z (T, C): returns L and dL/dz.


def _angular_spread(z, tau, clamp, eps):
    u = _unit_vectors(z, eps)
    pairs = _pairs(len(z))
    exponent = {(i, j): -_angle(u[i] @ u[j], clamp) / tau for i, j in pairs}
    largest = max(exponent.values())
    total = math.fsum(math.exp(e - largest) for e in exponent.values())
    g = np.zeros((len(z), len(z)))
    for i, j in pairs:
        weight = math.exp(exponent[i, j] - largest) / total
        g[i, j] = -weight / tau * _angle_slope(u[i] @ u[j], clamp)
    return largest + math.log(total / len(pairs)), _through_unit_vectors(g, z, u, eps)


def _orthogonalization(z, tau, clamp, eps):
    u = _unit_vectors(z, eps)
    pairs = _pairs(len(z))
    value, g = 0.0, np.zeros((len(z), len(z)))
    for i, j in pairs:
        gap = max(0.0, 0.5 - _angle(u[i] @ u[j], clamp))
        value += gap**2 / len(pairs)
        g[i, j] = -2 * gap / len(pairs) * _angle_slope(u[i] @ u[j], clamp)
    return value, _through_unit_vectors(g, z, u, eps)


def _mean_cosine(z, tau, clamp, eps):
    u = _unit_vectors(z, eps)
    pairs = _pairs(len(z))
    value, g = 0.0, np.zeros((len(z), len(z)))
    for i, j in pairs:
        value += u[i] @ u[j] / len(pairs)
        g[i, j] = 1 / len(pairs)
    return value, _through_unit_vectors(g, z, u, eps)


def _decorrelation(z, tau, clamp, eps):
    T, C = z.shape
    std = z.std(axis=1, ddof=1)
    s = np.zeros_like(z)
    for i in range(T):
        if np.ptp(z[i]) > 0:  # a constant token has no direction: it is set to zero and gets no gradient
            s[i] = (z[i] - z[i].mean()) / std[i]
    value, grad_s, grad_z = 0.0, np.zeros_like(z), np.zeros_like(z)
    for i, j in _pairs(T):
        r = s[i] @ s[j] / (C - 1)
        value += r**2 / (T * (T - 1))
        grad_s[i] += 2 * r / (T * (T - 1)) * s[j] / (C - 1)
        grad_s[j] += 2 * r / (T * (T - 1)) * s[i] / (C - 1)
    for i in range(T):
        if np.ptp(z[i]) > 0:
            grad_z[i] = (grad_s[i] - grad_s[i].mean() - s[i] * (grad_s[i] @ s[i]) / (C - 1)) / std[i]
    return value, grad_z


def _l2_repel(z, tau, clamp, eps):
    T, C = z.shape
    exponent = -_squared_distances(z) / tau
    total = math.fsum(math.exp(e) for e in exponent.ravel())  # at least T, from the diagonal
    weight = np.exp(exponent) / total
    value = math.log(total / T**2) + 0.1 * np.mean(z**2)
    return value, _through_squared_distances(-weight / tau, z) + 0.2 * z / (T * C)


def _perplexity_entropy(z, tau, clamp, eps):
    T = len(z)
    exponent = -_squared_distances(z) / tau
    value, g = 0.0, np.zeros((T, T))
    for i in range(T):
        others = [j for j in range(T) if j != i]
        largest = max(exponent[i, others])
        p = np.exp(exponent[i, others] - largest)
        p /= p.sum()
        value += p @ np.log2(p + 0.01) / T
        slope = np.log2(p + 0.01) + p / ((p + 0.01) * math.log(2))  # d/dp of p log2(p + 0.01)
        g[i, others] = p * (slope - p @ slope) / T / -tau
    return value, _through_squared_distances(g, z)


_SEQUENCE = {name: globals()[f"_{name}"] for name in VARIANTS}


def _pairs(T):
    return [(i, j) for i in range(T) for j in range(T) if i != j]


def _unit_vectors(z, eps):
    return np.stack([x / (np.linalg.norm(x) + eps) if np.linalg.norm(x) + eps > 0 else x for x in z])


def _angle(cosine, clamp):
    return math.acos(min(max(cosine, clamp - 1), 1 - clamp)) / math.pi


def _angle_slope(cosine, clamp):
    """d angle / d cosine, straight-through: at the clamped cosine, on both sides of the clamp."""
    clamped = min(max(cosine, clamp - 1), 1 - clamp)
    return -1 / (math.pi * math.sqrt(1 - clamped**2))


def _through_unit_vectors(g, z, u, eps):
    """dL/dz from g = dL/dc. u = z / (n + eps), n = ||z||, so du = dz / (n + eps) - z (z.dz) / (n (n + eps)^2)."""
    grad_z = np.zeros_like(z)
    for i in range(len(z)):
        grad_u = sum((g[i, j] + g[j, i]) * u[j] for j in range(len(z)))
        n = np.linalg.norm(z[i])
        if n > 0:
            grad_z[i] = grad_u / (n + eps) - z[i] * (z[i] @ grad_u) / (n * (n + eps) ** 2)
        elif eps > 0:
            grad_z[i] = grad_u / eps
    return grad_z


def _squared_distances(z):
    return np.array([[(zi - zj) @ (zi - zj) for zj in z] for zi in z])


def _through_squared_distances(g, z):
    T = len(z)
    return np.stack([sum((g[i, j] + g[j, i]) * 2 * (z[i] - z[j]) for j in range(T)) for i in range(T)])
