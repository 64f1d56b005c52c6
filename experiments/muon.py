"""Which variant of Muon makes the fast recipe better?

    python data/prepare.py --input books10m.jsonl.gz --name books       # 142 English books, see docs/verdict.md
    python experiments/muon.py --scale laptop --threads 1
    python experiments/muon.py --scale default --threads 1              # the default model and corpus
    python experiments/muon.py --scale large --threads 1

Replaces Muon in the fast recipe by a variant, at the recipe's best learning rate at this size. The recipe's own Muon
orthogonalises every head of queries, keys and values separately. Every variant keeps the root mean square of an update,
0.2 times the learning rate, so that the same learning rate suits it:

whole            queries, keys and values of all heads are orthogonalised as one matrix, as in the original Muon
apart            queries, keys and values are orthogonalised separately
output heads     every head's columns of the attention's output matrix are orthogonalised separately, too
normuon          NorMuon (arXiv 2510.05491): rows are divided by the root of a running mean of their squares, beta2 0.95
cautious decay   weight decay only where it has the sign of the update (arXiv 2510.12402)
polar express    other coefficients of the five Newton-Schulz steps (arXiv 2505.16932)
norm bound       no weight decay; after each step, matrices whose root mean square exceeds 0.04 are scaled down to it;
                 Hyperball (arXiv 2606.16899) fixes the norm, which a recipe whose projections start at 0 cannot
long momentum    the momentum is mixed with an average over 100 steps, whose share falls from 1/2 to 0 with the learning
                 rate
tail average     at the end, the weights are replaced by their mean over the last fifth of the steps
tail average, constant    the same, and the learning rate stays constant instead of decaying to 0

The measure is bits per byte of the validation books at the end, over eight paired seeds. A variant becomes part of the
recipe if its interval is below 0 here and at the default size, and it is not worse at 12 x 384 (--scale large).
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # python -P omits it

import study  # isort: split

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from minidisp import InputError, optim
from minidisp.config import Config
from minidisp.model import GPT, Attention


class NorMuon(optim.Muon):
    BETA2, EPS = 0.95, 1e-8

    def directions(self, updates: Tensor, parameters: list[nn.Parameter], group: dict) -> Tensor:
        directions = super().directions(updates, parameters, group)
        for p, parts in zip(parameters, directions.chunk(len(parameters)), strict=True):
            squares = self.state[p].setdefault("row_squares", torch.zeros(len(p), 1, device=p.device))
            squares = squares.view(*parts.shape[:2], 1)
            squares.lerp_(parts.square().mean(dim=2, keepdim=True), 1 - self.BETA2)
            parts.div_(squares.sqrt() + self.EPS)
            norm = parts.norm().clamp(min=self.EPS)  # 0 in the first step, where projections are 0
            parts.mul_(math.sqrt(len(parts) * min(parts.shape[1:])) / norm)  # to that of orthogonal matrices
        return directions


class CautiousDecay(optim.Muon):
    def decay(self, parameters: list[nn.Parameter], directions: list[Tensor], factor: float) -> None:
        for p, direction in zip(parameters, directions, strict=True):
            p.mul_(torch.where(p * direction >= 0, factor, 1.0))


class PolarExpress(optim.Muon):
    COEFFICIENTS = (
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    )

    def directions(self, updates: Tensor, parameters: list[nn.Parameter], group: dict) -> Tensor:
        # The paper divides x by 1.01 at the start and in every step but the last, against rounding errors: singular
        # values above 1 would grow. Dividing a, b and c by these powers does the same.
        divisors = (1.01**2, 1.01, 1.01, 1.01, 1.0)
        steps = [(a / d, b / d**3, c / d**5) for (a, b, c), d in zip(self.COEFFICIENTS, divisors, strict=True)]
        return optim.newton_schulz(updates, steps, group["eps"]).float()


class OutputHeads(optim.Muon):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.heads: dict[nn.Parameter, int] = {}  # of these matrices, each of as many columns

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "heads": self.heads}

    def directions(self, updates: Tensor, parameters: list[nn.Parameter], group: dict) -> Tensor:
        heads = self.heads.get(parameters[0])
        if heads is None:
            return super().directions(updates, parameters, group)
        N, rows, columns = updates.shape
        parts = updates.mT.reshape(N * heads, columns // heads, rows)
        # The size of the step is that of the whole matrix, whose larger dimension may be another one.
        scale = math.sqrt(max(parts.shape[1:]) / max(rows, columns))
        return scale * super().directions(parts, parameters, group).reshape(N, columns, rows).mT


class NormBound(optim.Muon):
    RMS = 0.04  # that of all matrices at the end of a run of the fast recipe, at 8 x 64 and at 8 x 192

    @torch.no_grad()
    def step(self) -> None:
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_((self.RMS / p.square().mean().sqrt()).clamp(max=1.0))

    def decay(self, parameters: list[nn.Parameter], directions: list[Tensor], factor: float) -> None:
        """None: the bound replaces it."""


class LongMomentum(optim.Muon):
    BETA, SHARE = 0.99, 0.5

    def averaged(self, parameters: list[nn.Parameter], group: dict) -> list[Tensor]:
        share = self.SHARE * group["lr"] / self.defaults["lr"]
        mixed = super().averaged(parameters, group)
        for p, update in zip(parameters, mixed, strict=True):
            average = self.state[p].setdefault("long_average", torch.zeros_like(p))
            average.lerp_(p.grad, 1 - self.BETA)
            update.lerp_(average, share)
        return mixed


def with_variant(
    variant: type[optim.Muon] = optim.Muon, rows: Callable[[Attention], int] = lambda attention: attention.head_dim
) -> dict:
    """The condition with this variant of Muon, which splits attention's input matrix into matrices of so many rows."""

    def build_optimizers(model: GPT, config: Config) -> list[torch.optim.Optimizer]:
        adamw, muon = optim.build_optimizers(model, config)
        parts = {block.attn.c_attn.weight: rows(block.attn) for block in model.h}
        replaced = variant(muon.param_groups[0]["params"], rows=parts, **muon.defaults)
        if isinstance(replaced, OutputHeads):
            replaced.heads = {block.attn.c_proj.weight: block.attn.n_head for block in model.h}
        return [adamw, replaced]

    return {"build_optimizers": build_optimizers}


def averaging_optimizers(model: GPT, config: Config) -> list[torch.optim.Optimizer]:
    """train.build_optimizers; the last one replaces the weights by their mean over the last fifth, in the last step."""
    optimizers = optim.build_optimizers(model, config)
    steps, sums = itertools.count(1), [torch.zeros_like(p) for p in model.parameters()]
    last = config.max_steps - config.max_steps // 5  # before the average

    def average() -> None:
        taken = next(steps)
        if any(state["step"] != taken for state in optimizers[0].state.values()):  # AdamW's own count
            raise InputError("the sums of a tail average are not saved: remove the folder of this run, and repeat it")
        if taken > last:
            torch._foreach_add_(sums, list(model.parameters()))
        if taken == config.max_steps > last:
            torch._foreach_copy_(list(model.parameters()), torch._foreach_div(sums, taken - last))

    return study.after_each_step(average, optimizers)


VARIANTS = {
    "whole": with_variant(rows=lambda attention: len(attention.c_attn.weight)),
    "apart": with_variant(rows=lambda attention: attention.n_head * attention.head_dim),  # as many heads of each
    "output heads": with_variant(OutputHeads),
    "normuon": with_variant(NorMuon),
    "cautious decay": with_variant(CautiousDecay),
    "polar express": with_variant(PolarExpress),
    "norm bound": with_variant(NormBound),
    "long momentum": with_variant(LongMomentum),
    "tail average": {"build_optimizers": averaging_optimizers},
    "tail average, constant": {"build_optimizers": averaging_optimizers, "schedule": "constant"},
}
SCALES = {
    "smoke": {"seeds": 2, "train": {**study.SMOKE, "recipe": "fast", "warmup_steps": 1}},
    "laptop": {"seeds": 8, "train": {**study.FAST, **study.BOOKS}},
    "default": {"seeds": 4, "train": {"recipe": "fast", "max_steps": 400, "eval_every": 400, "device": "cpu"}},
    "large": {"seeds": 4, "train": {**study.FAST, **study.BOOKS, "n_layer": 12, "n_head": 6, "n_embd": 384,
                                    "max_steps": 150, "eval_every": 150, "eval_tokens": 51_200}},
    "gpu": {"seeds": 4, "train": {**study.FAST, "n_layer": 8, "n_head": 6, "n_embd": 192, "block_size": 256,
                                  "batch_size": 32, "max_steps": 3000, "eval_every": 3000, "device": "cuda",
                                  "data": "books"}},
}  # fmt: skip


def arms(scale: dict) -> dict[str, dict]:
    return {"fast": {}, **VARIANTS}


def main(argv: list[str] | None = None) -> int:
    return study.cli(__file__, __doc__, SCALES, arms, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
