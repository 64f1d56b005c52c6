"""The dispersion loss (arXiv 2602.00217) in plain PyTorch: it spreads out the hidden states of a sequence's tokens.

    loss = cross_entropy + weight * dispersion_loss(z)                                  # one layer
    loss = cross_entropy + weight * DispersionLoss()(hidden_states)                     # a whole model

The paper's L tokens and D features are T and C here: z holds the hidden states of one layer, (B, T, C). Every variant
is a loss per sequence over pairs of tokens i != j, averaged over the batch. Common to all:
- float64 stays float64, every other dtype is computed in float32, also under autocast (see dispersion_loss for the
  precision of the fused form): bfloat16 rounds the cosine 1 - 1e-3 to 1, which makes nearly parallel tokens
  indistinguishable. (Call backward outside of autocast, as PyTorch recommends.)
- Zero, equal and opposite tokens give finite values and gradients; NaN or Inf in z gives NaN.
- The published runs divide by ||z|| + 0.01, which is eps here, and some add a constant 0.01 to the loss (not here).

The variants do not check their arguments; dispersion_loss does.
"""

import functools
import inspect
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from minidisp import InputError
from minidisp.ops import dispersion as ops
from minidisp.ops import untraced


def full_precision(function: Callable) -> Callable:
    """Decorator: call function(z, ...) with z in float32 unless it is float64, and with autocast disabled."""

    @functools.wraps(function)
    def wrapped(z: Tensor, *args, **kwargs) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):
            return function(z if z.dtype == torch.float64 else z.float(), *args, **kwargs)

    return wrapped


def _unit(z: Tensor, eps: float) -> Tensor:
    """z / (||z|| + eps) along the last dimension; a zero vector stays zero."""
    length = torch.linalg.vector_norm(z, dim=-1, keepdim=True) + eps
    return z / length.masked_fill(length == 0, math.inf)  # with eps = 0 a zero vector has no direction, so no gradient


def _angles(z: Tensor, clamp: float, eps: float) -> Tensor:
    """The angle between tokens i and j in units of pi: arccos(c_ij) / pi, (B, T, T).

    The derivative of arccos is infinite at +-1, so the cosine is clamped first. The gradient is straight-through: that
    of arccos at the clamped cosine, but not zeroed outside the band, as parallel tokens would otherwise get no
    gradient.
    """
    u = _unit(z, eps)
    cosine = u @ u.mT
    clamped = cosine.detach().clamp(clamp - 1, 1 - clamp)
    return torch.arccos(clamped + (cosine - cosine.detach())) / math.pi


def _squared_distances(z: Tensor) -> Tensor:
    """||z_i - z_j||^2, (B, T, T).

    ||z_i||^2 + ||z_j||^2 - 2 z_i.z_j suffers from cancellation for tokens that are close together relative to their
    norms, which matter most. Hence float64, where the device supports it, and centring on the mean token, which
    preserves distances.
    """
    wide = z.to(torch.float32 if z.device.type == "mps" else torch.float64)
    wide = wide - wide.mean(dim=1, keepdim=True).detach()
    square = wide.square().sum(dim=-1)
    return (square.unsqueeze(2) + square.unsqueeze(1) - 2 * wide @ wide.mT).to(z.dtype)


def _fill_diagonal(pairs: Tensor, value: float) -> Tensor:
    """Replace the entries i = j of (B, T, T)."""
    return pairs.masked_fill(torch.eye(pairs.shape[-1], dtype=torch.bool, device=pairs.device), value)


def _pair_mean(pairs: Tensor) -> Tensor:
    """Mean over the pairs i != j of (B, T, T) and over the batch; every sequence has the same number of pairs."""
    B, T, _ = pairs.shape
    return _fill_diagonal(pairs, 0.0).sum() / (B * T * (T - 1))


@full_precision
def angular_spread(z: Tensor, tau: float = 1.0, clamp: float = 0.25, eps: float = 1e-2) -> Tensor:
    """log mean_{i!=j} exp(-D_ij / tau), D_ij = arccos(c_ij) / pi: the paper's main variant.

    tau is a temperature in units of pi. -0.5 / tau if all tokens are orthogonal; about -0.23 / tau, the maximum, if all
    are parallel (clamp = 0.25). The paper uses a log-sum, larger by the constant log(T (T - 1)).
    """
    T = z.shape[1]
    exponents = _fill_diagonal(-_angles(z, clamp, eps) / tau, -math.inf)
    return (exponents.logsumexp(dim=(1, 2)) - math.log(T * (T - 1))).mean()


@full_precision
def orthogonalization(z: Tensor, clamp: float = 0.25, eps: float = 1e-2) -> Tensor:
    """mean_{i!=j} max(0, 1/2 - D_ij)^2, D_ij as in angular_spread: only angles below 90 degrees count. 0 to 1/4."""
    return _pair_mean((0.5 - _angles(z, clamp, eps)).relu().square())


@full_precision
def l2_repel(z: Tensor, tau: float = 1.0) -> Tensor:
    """log mean_{i,j} exp(-||z_i - z_j||^2 / tau) + 0.1 mean(z^2), i = j included; at least -log T.

    tau has the unit of z^2. The second term keeps the norms bounded.
    """
    T = z.shape[1]
    exponents = _fill_diagonal(-_squared_distances(z) / tau, 0.0)  # exact instead of rounding errors
    return (exponents.logsumexp(dim=(1, 2)) - 2 * math.log(T)).mean() + 0.1 * z.square().mean()


@full_precision
def decorrelation(z: Tensor) -> Tensor:
    """mean_{i!=j} R_ij^2, R_ij the correlation of tokens i and j over their features. From 0 to 1.

    The paper standardises each token (unbiased std) and divides Z Z^T by C - 1: the cosine of the centred tokens.
    A token whose features are all equal has correlation 0 with every other and gets no gradient.
    """
    centred = z - z.mean(dim=-1, keepdim=True)
    rounding = 4 * torch.finfo(z.dtype).eps * z.abs().amax(dim=-1, keepdim=True)
    constant = centred.abs().amax(dim=-1, keepdim=True) <= rounding  # only rounding errors remain of such a token
    u = _unit(centred.masked_fill(constant, 0.0), eps=0.0)
    return _pair_mean((u @ u.mT).square())


@full_precision
def perplexity_entropy(z: Tensor, tau: float = 1.0) -> Tensor:
    """mean_i sum_j p_ij log2(p_ij + 0.01), p_i = softmax over j != i of -||z_i - z_j||^2 / tau.

    Minus the entropy, in bits, of a random step from token i to a neighbour; tau has the unit of z^2.
    """
    p = _fill_diagonal(-_squared_distances(z) / tau, -math.inf).softmax(dim=-1)
    return (p * (p + 0.01).log2()).sum(dim=-1).mean()


@full_precision
def mean_cosine(z: Tensor, eps: float = 1e-2) -> Tensor:
    """mean_{i!=j} c_ij = (||sum_i u_i||^2 - sum_i ||u_i||^2) / (T (T - 1)), in O(T C), without pairs. Not in the paper.

    As u_i = z_i / (||z_i|| + eps) is not exactly a unit vector, the pairs i = j sum to the second term instead of T. So
    this is exactly the mean of the cosines in angular_spread. Where all of them exceed its clamp, the gradient
    of angular_spread is this one's times 1 / (pi tau sqrt(1 - (1 - clamp)^2)).
    """
    B, T, _ = z.shape
    u = _unit(z, eps)
    return (u.sum(dim=1).square().sum() - u.square().sum()) / (B * T * (T - 1))


VARIANTS: dict[str, Callable[..., Tensor]] = {
    variant.__name__: variant
    for variant in (angular_spread, orthogonalization, l2_repel, decorrelation, perplexity_entropy, mean_cosine)
}
CLOSED_FORM = ("mean_cosine",)  # without pairs, identical for every implementation
# Which of tau, clamp and eps a variant uses, from its signature: ("z", ...).
_OPTIONS = {name: tuple(inspect.signature(variant).parameters)[1:] for name, variant in VARIANTS.items()}


def _check_options(variant: str, tau: float, clamp: float, eps: float) -> None:
    if variant not in VARIANTS:
        raise InputError(f"unknown dispersion variant {variant!r}: choose one of {', '.join(VARIANTS)}")
    if not 0 < tau < math.inf:
        raise InputError(f"the dispersion tau must be a positive number, not {tau}")
    least = torch.finfo(torch.float32).eps  # below, 1 - clamp rounds to 1 in float32
    if not least <= clamp < 1:
        raise InputError(f"the dispersion clamp must be between 0 and 1 (at least {least:.1e}), not {clamp}")
    if not 0 <= eps < math.inf:
        raise InputError(f"the dispersion eps must be 0 or a positive number, not {eps}")


def dispersion_loss(
    z: Tensor,
    variant: str = "angular_spread",
    tau: float = 1.0,
    clamp: float = 0.25,
    eps: float = 1e-2,
    impl: str = "auto",
) -> Tensor:
    """The dispersion loss of one layer.

    z: hidden states, (B, T, C), any floating dtype. T >= 2; C >= 2, or 1 for l2_repel and perplexity_entropy.
    variant: a name in VARIANTS; options that its function does not take are ignored.
    tau: temperature, > 0. clamp: cosines are clamped to [-1 + clamp, 1 - clamp], 0 < clamp < 1. eps: >= 0, added to
        norms.
    impl: "reference" is the plain PyTorch above, differentiable any number of times. "streamed" is PyTorch too, but
        keeps no T x T matrix. "fused" is the compiled extension, for the variants in ops.FUSED_VARIANTS and any dtype
        but float64; other cases use "streamed". "auto" is fused if the extension is available or can be built now, else
        streamed. mean_cosine has no pairs and is the same for every impl.
    Returns a scalar, float64 if z is, else float32. Raises ValueError with the invalid shape or value.

    Precision: exact float32 at float32 matmul precision "highest". At "high", on CUDA, fused uses tensor cores for all
    but l2_repel, with an error of up to 2e-3 of the gradient's norm and 5e-4 (1 + |value|) in the value; more if tokens
    form tight, well-separated clusters (docs/gpu.md). At "high" and under autocast, on a CPU with AMX, fused uses AMX
    tiles for angular_spread with tau >= 0.5 and clamp >= 0.2, T >= 32 and C >= 16, with no larger error. The reference
    uses TF32 on CUDA, with an error of up to 7e-2 of the gradient for nearly parallel tokens. streamed stays exact.
    """
    _check_options(variant, tau, clamp, eps)
    if z.ndim != 3 or not z.is_floating_point():
        raise ValueError(f"z must be (B, T, C) of a floating dtype, not {tuple(z.shape)} of {z.dtype}")
    min_features = 1 if variant in ("l2_repel", "perplexity_entropy") else 2  # an angle needs two features
    if z.shape[0] < 1 or z.shape[1] < 2 or z.shape[2] < min_features:
        raise ValueError(f"{variant} needs B >= 1, T >= 2 and C >= {min_features}, but z is {tuple(z.shape)}")

    chosen, _ = ops.select(impl, variant, z.dtype, z.device.type)
    if chosen != "reference":
        return ops.run(chosen, z, variant, float(tau), float(clamp), float(eps))
    options = {"tau": tau, "clamp": clamp, "eps": eps}
    return VARIANTS[variant](z, **{name: options[name] for name in _OPTIONS[variant]})


def select_layers(layers: str, n_layer: int) -> list[int]:
    """Parse "all", "last", "early_half", "late_half" or "1,3,5" into ascending layer numbers in 1..n_layer.

    Layer l is the output of block l; 0, the embeddings, is never chosen. early_half is the first floor(n_layer / 2)
    layers, late_half the others. Raises ValueError if the text is invalid or selects no layer.
    """
    half = n_layer // 2
    named = {
        "all": range(1, n_layer + 1),
        "last": range(n_layer, n_layer + 1),
        "early_half": range(1, half + 1),
        "late_half": range(half + 1, n_layer + 1),
    }
    try:
        chosen = sorted(named[layers] if layers in named else map(int, layers.split(",")))
    except ValueError:
        raise InputError(
            f"invalid layers {layers!r}: pass one of {', '.join(named)}, or numbers separated by commas: 1,3,5"
        ) from None
    if not chosen or not set(chosen) <= set(named["all"]) or len(set(chosen)) < len(chosen):
        raise InputError(f"invalid layers {layers!r}: pass at least one of 1 to {n_layer}, each once")
    return chosen


class DispersionLoss(nn.Module):
    """Mean of dispersion_loss over the chosen layers of a model.

    layers: see select_layers. variant, tau, clamp, eps: see dispersion_loss.
    tokens: 0 uses every token. N > 0 samples N positions if T > N, a set per layer, shared by the batch, from a
        separate generator: the set depends only on (seed, step, layer). So the micro-batches of an optimiser step share
        it, a resumed run needs no state, and the global generator is not affected.
    impl: see dispersion_loss.
    Raises ValueError for invalid options.
    """

    def __init__(
        self,
        variant: str = "angular_spread",
        layers: str = "all",
        tokens: int = 0,
        tau: float = 1.0,
        clamp: float = 0.25,
        eps: float = 1e-2,
        seed: int = 0,
        impl: str = "auto",
    ):
        super().__init__()
        _check_options(variant, tau, clamp, eps)
        if tokens < 0 or tokens == 1:
            raise InputError(f"the dispersion tokens must be 0 (all) or at least 2, not {tokens}")
        if seed < 0:
            raise InputError(f"the dispersion seed must not be negative, but is {seed}")
        self.variant, self.layers, self.tokens = variant, layers, tokens
        self.tau, self.clamp, self.eps, self.seed = tau, clamp, eps, seed
        ops.check_name(impl)
        self.impl = impl
        self.calls = 0
        self._drawn: tuple = (None, {})  # the positions of the latest step: cache key, and a copy per device

    def prepare(self, device_type: str, dtype: torch.dtype = torch.float32) -> str:
        """Find or build the implementation for hidden states of this kind, and return its description.

        device_type: "cpu", "cuda", ... dtype: of the hidden states. Builds the extension only if it will be used.
        Without this call, the first forward does the same. Raises InputError if impl is fused and there is none.
        Returns "fused", "fused, compiled now in 14 s (PATH)", "streamed in PyTorch: no C++ compiler was found", ...
        """
        if self.variant in CLOSED_FORM:
            return "closed form"
        return ops.describe(self.impl, self.variant, dtype, device_type)

    def forward(
        self, hidden_states: Sequence[Tensor], step: int | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        """hidden_states: n_layer + 1 tensors (B, T, C), embeddings first, as Hugging Face models return them.

        step: the optimiser step, which determines the random positions; None counts the calls of this module instead.
        attention_mask: (B, T), 0 for padding, which is ignored, as in transformers; every sequence with two or more
            tokens has the same weight, whatever its length. Synchronises once with a GPU to read the lengths.
        Returns a scalar.
        """
        if attention_mask is not None:
            return untraced(self._masked)(hidden_states, step, attention_mask)
        layers = select_layers(self.layers, len(hidden_states) - 1)
        states = [hidden_states[layer] for layer in layers]
        if 0 < self.tokens < states[0].shape[1]:
            # numpy's generator cannot be traced, and a traced counter would cause a recompilation per call.
            positions = untraced(self._positions)(states[0].shape[1], layers, step, states)
            states = [z.index_select(1, where) for z, where in zip(states, positions, strict=True)]
        losses = [dispersion_loss(z, self.variant, self.tau, self.clamp, self.eps, self.impl) for z in states]
        return torch.stack([loss.to(losses[-1].device) for loss in losses]).mean()  # layers may be on several devices

    def _masked(self, hidden_states: Sequence[Tensor], step: int | None, attention_mask: Tensor) -> Tensor:
        """The mean of the sequences' losses without padding; sequences of equal length are batched."""
        if attention_mask.shape != hidden_states[-1].shape[:2]:
            raise ValueError(
                f"attention_mask must be (B, T) = {tuple(hidden_states[-1].shape[:2])}, not "
                f"{tuple(attention_mask.shape)}"
            )
        if step is None and self.tokens:  # count one call, regardless of the number of lengths
            step = self.calls
            self.calls += 1
        chosen, mask = select_layers(self.layers, len(hidden_states) - 1), attention_mask.bool()
        last = hidden_states[-1][:0]  # the loss of no sequence is 0, with a graph
        total, count = last.sum(dtype=torch.promote_types(last.dtype, torch.float32)), 0
        lengths = mask.sum(1).tolist()
        for length in sorted({length for length in lengths if length > 1}):
            rows = torch.tensor([i for i, n in enumerate(lengths) if n == length])
            states = list(hidden_states)
            for layer in chosen:
                z = states[layer]
                kept = rows.to(z.device)
                states[layer] = z[kept][mask.to(z.device)[kept]].view(len(rows), length, -1)
            total = total + len(rows) * self(states, step).to(total.device)
            count += len(rows)
        return total / max(1, count)

    def _positions(self, T: int, layers: list[int], step: int | None, states: list[Tensor]) -> list[Tensor]:
        """The random positions of each layer, (tokens,) int64, on the device of its states.

        Sampled once per step and copied once per device for all layers; the micro-batches of a step share them.
        """
        if step is None:
            step = self.calls
            self.calls += 1
        key = (T, tuple(layers), step, self.tokens, self.seed)
        with torch.inference_mode(False):  # cached tensors must not be inference tensors
            if self._drawn[0] != key:
                self._drawn = key, {torch.device("cpu"): torch.stack(self._draw_positions(T, layers, step))}
            copies = self._drawn[1]
            for device in {z.device for z in states} - copies.keys():
                drawn = copies[torch.device("cpu")]
                # From pinned memory the copy does not wait for pending work on the GPU.
                drawn = drawn.pin_memory() if device.type == "cuda" else drawn
                copies[device] = drawn.to(device, non_blocking=device.type == "cuda")
        return [copies[z.device][i] for i, z in enumerate(states)]

    def _draw_positions(self, T: int, layers: list[int], step: int) -> list[Tensor]:
        generators = [np.random.default_rng((self.seed, step, layer)) for layer in layers]
        return [torch.from_numpy(np.sort(rng.choice(T, self.tokens, replace=False))) for rng in generators]

    def extra_repr(self) -> str:
        names = ("variant", "layers", "tokens", "tau", "clamp", "eps", "seed", "impl")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
