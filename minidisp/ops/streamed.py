"""The dispersion loss and its gradient in plain PyTorch, computed blockwise: no T x T matrix is kept, on any device.

Only half of the pairs are visited: a strip holds the rows start <= i < stop with all j >= start, and also represents
its mirror image. The formulas are in minidisp/dispersion.py. float64 z is computed in float64, all other dtypes in
float32, with full precision regardless of torch.set_float32_matmul_precision: with nearly parallel tokens, the error of
TF32 is up to 7 % of the gradient's norm, and that of bfloat16 more than 100 %.
"""

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

STRIP_ELEMENTS = {"cpu": 2**19}  # largest strip of float32 cosines that stays in the cache
STRIP_ELEMENTS_ELSEWHERE = 2**24  # 64 MB: fewer, larger kernels
LARGEST_EXPONENT = 80.0  # exp(-80) is still a normal float32


@contextlib.contextmanager
def float32_precision(precision: str) -> Iterator[None]:
    """Set torch.set_float32_matmul_precision(precision) temporarily, or torch's newer settings if those are in use."""
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # raised once a newer setting has been used
        newer = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
        kept = [setting.fp32_precision for setting in newer]
        for setting in newer:
            setting.fp32_precision = "ieee" if precision == "highest" else "tf32"
        try:
            yield
        finally:
            for setting, value in zip(newer, kept, strict=True):
                setting.fp32_precision = value
        return
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def dispersion(z: Tensor, variant: str, tau: float, clamp: float, eps: float, need_grad: bool) -> tuple[Tensor, Tensor]:
    """The loss, a scalar, and its gradient, (B, T, C), empty unless need_grad; both in the computing dtype."""
    with torch.no_grad(), torch.autocast(z.device.type, enabled=False), float32_precision("highest"):
        z = z if z.dtype == torch.float64 else z.float()
        by_distance = variant in ("l2_repel", "perplexity_entropy")
        pairs = _distance_pairs if by_distance else _cosine_pairs
        B, T, _ = z.shape
        budget = STRIP_ELEMENTS.get(z.device.type, STRIP_ELEMENTS_ELSEWHERE)
        group = min(B, max(1, budget // T**2))  # short sequences share a strip
        rows = min(T, max(1, budget // (T * group)), max(32, -(-T // 4)))  # a quarter: skips much of the lower triangle
        loss = z.new_zeros((), dtype=_wide(z))
        grad = torch.empty_like(z, memory_format=torch.contiguous_format) if need_grad else z.new_empty(0)
        for start in range(0, B, group):
            part = slice(start, start + group)
            loss += pairs(z[part], variant, tau, clamp, eps, rows, grad[part] if need_grad else None)
        if need_grad:
            grad /= B
        loss = (loss / B).to(z.dtype)
        if variant == "l2_repel":
            loss += 0.1 * z.square().mean()
            if need_grad:
                grad.add_(z, alpha=0.2 / z.numel())
        return loss, grad


def _strips(u: Tensor, rows: int, buffer: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """start, stop and the products u_i.u_j of the rows start <= i < stop with all j >= start, written over buffer."""
    G, T, _ = u.shape
    for start in range(0, T, rows):
        stop = min(start + rows, T)
        strip = buffer[: G * (stop - start) * (T - start)].view(G, stop - start, T - start)
        torch.bmm(u[:, start:stop], u[:, start:].mT, out=strip)
        yield start, stop, strip


def _sum_both(strip: Tensor) -> Tensor:
    """Sum per sequence of a strip and its mirror image; the square at its start counts once."""
    rows, wide = strip.shape[1], _wide(strip)
    # Rows are summed in the strip's dtype, since torch sums in blocks with small errors; the rest in float64.
    return strip.sum(dim=2).sum(dim=1, dtype=wide) * 2 - strip[:, :, :rows].sum(dim=2).sum(dim=1, dtype=wide)


def _wide(z: Tensor) -> torch.dtype:
    """float64 if the device supports it."""
    return torch.float32 if z.device.type == "mps" else torch.float64


def _apply_both(out: Tensor, start: int, stop: int, strip: Tensor, u: Tensor) -> None:
    """out += W u for a symmetric W; the strip holds its rows start to stop, from the diagonal on."""
    out[:, start:stop].baddbmm_(strip, u[:, start:])
    if stop < u.shape[1]:
        out[:, stop:].baddbmm_(strip[:, :, stop - start :].mT, u[:, start:stop])


def _cosine_pairs(
    z: Tensor, variant: str, tau: float, clamp: float, eps: float, rows: int, grad: Tensor | None
) -> Tensor:
    """Sum of the losses of the sequences z (G, T, C); grad, unless None, is overwritten with its gradient."""
    G, T, _ = z.shape
    if variant == "decorrelation":
        rounding = 4 * torch.finfo(z.dtype).eps * z.abs().amax(dim=-1, keepdim=True)
        z = z - z.mean(dim=-1, keepdim=True)
        z.masked_fill_(z.abs().amax(dim=-1, keepdim=True) <= rounding, 0.0)  # constant: only rounding errors are left
        eps = 0.0
    norm = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
    length = norm + eps
    length.masked_fill_(length == 0, math.inf)
    u = z / length

    buffer = z.new_empty(G * rows * T)
    spare = torch.empty_like(buffer) if grad is not None or variant == "decorrelation" else None
    smallest = math.acos(1 - clamp)  # angle, in radians
    if variant == "angular_spread":
        shift = z.new_full((G, 1, 1), smallest)
        if (math.pi - 2 * smallest) / (math.pi * tau) > LARGEST_EXPONENT:  # then use the smallest angle in the sequence
            largest = z.new_full((G,), -2.0)
            for _, _, strip in _strips(u, rows, buffer):
                strip.diagonal(dim1=1, dim2=2).fill_(-2.0)
                largest = torch.maximum(largest, strip.amax(dim=(1, 2)))
            shift = largest.clamp_(clamp - 1, 1 - clamp).acos_().view(G, 1, 1)

    total = z.new_zeros(G, dtype=_wide(z))
    if grad is not None:
        grad.zero_()
    for start, stop, strip in _strips(u, rows, buffer):
        diagonal = strip.diagonal(dim1=1, dim2=2)
        if variant == "decorrelation":
            diagonal.zero_()
            total += _sum_both(torch.square(strip, out=spare[: strip.numel()].view_as(strip)))
        else:
            strip.clamp_(clamp - 1, 1 - clamp).acos_()
            sine = torch.sin(strip, out=spare[: strip.numel()].view_as(strip)) if grad is not None else None
            if variant == "angular_spread":
                strip.sub_(shift).mul_(-1 / (math.pi * tau)).exp_()
                diagonal.zero_()
                total += _sum_both(strip)
                if grad is not None:
                    strip.div_(sine)
            else:
                strip.mul_(-1 / math.pi).add_(0.5).relu_()
                diagonal.zero_()
                if grad is not None:
                    torch.div(strip, sine, out=sine)
                total += _sum_both(strip.square_())
                strip = sine
        if grad is not None:
            _apply_both(grad, start, stop, strip, u)

    pairs = T * (T - 1)
    if variant == "angular_spread":
        loss = (total / pairs).log() - shift.view(G) / (math.pi * tau)
        scale = (2 / (math.pi * tau) / total).to(z.dtype).view(G, 1, 1)
    else:
        loss = total / pairs
        scale = 4 / pairs if variant == "decorrelation" else 4 / (math.pi * pairs)
    if grad is not None:  # through u = z / (norm + eps), and through the centring
        grad.mul_(scale)
        radial = (u * grad).sum(dim=-1, keepdim=True) / norm.masked_fill(norm == 0, math.inf)
        grad.div_(length).addcmul_(u, radial, value=-1)  # squares of norms would underflow below 1e-15
        if variant == "decorrelation":
            grad.sub_(grad.mean(dim=-1, keepdim=True)).masked_fill_(norm == 0, 0.0)
    return loss.sum()


def _distance_pairs(
    z: Tensor, variant: str, tau: float, clamp: float, eps: float, rows: int, grad: Tensor | None
) -> Tensor:
    """Like _cosine_pairs. In float64 if supported, with the mean token at the origin, like the reference."""
    G, T, _ = z.shape
    wide = z.to(_wide(z))
    wide = wide - wide.mean(dim=1, keepdim=True)
    square = wide.square().sum(dim=-1)  # (G, T)
    buffer = wide.new_empty(G * rows * T)
    wide_grad = torch.zeros_like(wide) if grad is not None else None

    if variant == "l2_repel":
        total, degree = wide.new_zeros(G), wide.new_zeros(G, T, 1)
        for start, stop, strip in _strips(wide, rows, buffer):
            strip.mul_(2).sub_(square[:, start:stop, None]).sub_(square[:, None, start:])
            strip.diagonal(dim1=1, dim2=2).zero_()  # instead of rounding errors
            strip.mul_(1 / tau).clamp_(max=0).exp_()
            total += _sum_both(strip)
            if wide_grad is not None:
                _apply_both(wide_grad, start, stop, strip, wide)
                degree[:, start:stop, 0] += strip.sum(dim=2)
                degree[:, stop:, 0] += strip[:, :, stop - start :].sum(dim=1)
        if grad is not None:
            wide_grad.addcmul_(degree, wide, value=-1).mul_((4 / tau / total).view(G, 1, 1))
            grad.copy_(wide_grad)
        return (total / T**2).log().sum()

    total, spare = wide.new_zeros(()), torch.empty_like(buffer)
    for start in range(0, T, rows):  # whole rows: p_ij is not symmetric
        stop = min(start + rows, T)
        here = wide[:, start:stop]
        p = torch.bmm(here, wide.mT, out=buffer[: G * (stop - start) * T].view(G, stop - start, T))
        p.mul_(2).sub_(square[:, None]).sub_(square[:, start:stop, None]).mul_(1 / tau)
        p.diagonal(start, dim1=1, dim2=2).fill_(-math.inf)
        p.sub_(p.amax(dim=2, keepdim=True)).exp_()
        p.div_(p.sum(dim=2, keepdim=True))
        h = torch.add(p, 0.01, out=spare[: p.numel()].view_as(p))
        if grad is None:
            total += h.log2_().mul_(p).sum()
            continue
        slope = p / h  # d/dp of p log2(p + 0.01) is log2(p + 0.01) + p / ((p + 0.01) ln 2)
        h.log2_()
        total += torch.dot(h.flatten(), p.flatten())
        h.add_(slope, alpha=1 / math.log(2))
        g = h.sub_(slope.copy_(h).mul_(p).sum(dim=2, keepdim=True)).mul_(p)
        wide_grad[:, start:stop].addcmul_(here, g.sum(dim=2, keepdim=True)).baddbmm_(g, wide, alpha=-1)
        wide_grad.addcmul_(wide, g.sum(dim=1).unsqueeze(2)).baddbmm_(g.mT, here, alpha=-1)
    if grad is not None:
        grad.copy_(wide_grad.mul_(-2 / (T * tau)))
    return total / T
