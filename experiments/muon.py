"""Which variant of Muon makes the fast recipe better?

    python data/prepare.py --input books10m.jsonl.gz --name books       # 142 English books, see docs/verdict.md
    python experiments/muon.py --scale laptop --threads 1
    python experiments/muon.py --scale default --threads 1              # the default model and corpus

Replaces Muon in the fast recipe by a variant, at the recipe's best learning rate at this size. Every variant keeps the
root mean square of an update, 0.2 times the learning rate, so that the same learning rate suits it:

apart            queries, keys and values are orthogonalised separately
per head         every head of queries, keys and values is orthogonalised separately
normuon          NorMuon (arXiv 2510.05491): rows are divided by the root of a running mean of their squares, beta2 0.95
cautious decay   weight decay only where it has the sign of the update (arXiv 2510.12402)
polar express    other coefficients of the five Newton-Schulz steps (arXiv 2505.16932)

The measure is bits per byte of the validation books at the end, over eight paired seeds. A variant becomes part of the
recipe only if its interval is below 0 here and at the default size.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # python -P omits it

import study  # isort: split

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from minidisp import optim
from minidisp.config import Config
from minidisp.model import GPT


class Apart(optim.Muon):
    """Orthogonalises equal parts of the rows of each attention's input matrix separately."""

    model: GPT

    def parts(self) -> int:
        config = self.model.config
        if config.n_kv_head != config.n_head:
            raise ValueError("there must be as many heads of keys as of queries")
        return 3

    def directions(self, updates: Tensor, parameters: list[nn.Parameter], group: dict) -> Tensor:
        attention = {id(block.attn.c_attn.weight) for block in self.model.h}
        chosen = [id(p) in attention for p in parameters]
        if not any(chosen):
            return super().directions(updates, parameters, group)
        if not all(chosen):
            raise ValueError("another matrix has the shape of the attention's input")
        N, rows, columns = updates.shape
        parts = updates.reshape(N * self.parts(), rows // self.parts(), columns)
        # The root mean square of an orthogonal matrix is 1 / sqrt(its larger dimension), and that of the whole counts.
        scale = math.sqrt(max(parts.shape[1:]) / max(rows, columns))
        return scale * super().directions(parts, parameters, group).reshape(updates.shape)


class PerHead(Apart):
    def parts(self) -> int:
        return super().parts() * self.model.config.n_head


class NorMuon(optim.Muon):
    BETA2, EPS = 0.95, 1e-8

    def directions(self, updates: Tensor, parameters: list[nn.Parameter], group: dict) -> Tensor:
        directions = super().directions(updates, parameters, group)
        for p, direction in zip(parameters, directions, strict=True):
            squares = self.state[p].setdefault("row_squares", torch.zeros(len(p), 1, device=p.device))
            squares.lerp_(direction.square().mean(dim=1, keepdim=True), 1 - self.BETA2)
            direction.div_(squares.sqrt() + self.EPS)
            norm = direction.norm().clamp(min=self.EPS)  # 0 in the first step, where projections are 0
            direction.mul_(math.sqrt(min(p.shape)) / norm)  # to the norm of an orthogonal matrix
        return directions


class CautiousDecay(optim.Muon):
    def decay(self, parameters: list[nn.Parameter], directions: Tensor, factor: float) -> None:
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


def with_variant(variant: type[optim.Muon]) -> Callable[[GPT, Config], list[torch.optim.Optimizer]]:
    """train.build_optimizers with this variant of Muon."""

    def build_optimizers(model: GPT, config: Config) -> list[torch.optim.Optimizer]:
        adamw, muon = optim.build_optimizers(model, config)
        replaced = variant(muon.param_groups[0]["params"], **muon.defaults)
        replaced.model = model
        return [adamw, replaced]

    return build_optimizers


VARIANTS = {
    "apart": Apart,
    "per head": PerHead,
    "normuon": NorMuon,
    "cautious decay": CautiousDecay,
    "polar express": PolarExpress,
}
SCALES = {
    "smoke": {"seeds": 2, "train": {**study.SMOKE, "recipe": "fast", "warmup_steps": 1}},
    "laptop": {"seeds": 8, "train": {**study.FAST, **study.BOOKS}},
    "default": {"seeds": 4, "train": {"recipe": "fast", "max_steps": 400, "eval_every": 400, "device": "cpu"}},
    "gpu": {"seeds": 4, "train": {**study.FAST, "n_layer": 8, "n_head": 6, "n_embd": 192, "block_size": 256,
                                  "batch_size": 32, "max_steps": 3000, "eval_every": 3000, "device": "cuda",
                                  "data": "books"}},
}  # fmt: skip


def arms(scale: dict) -> dict[str, dict]:
    variants = {label: {"build_optimizers": with_variant(variant)} for label, variant in VARIANTS.items()}
    return {"fast": {}, **variants}


def main(argv: list[str] | None = None) -> int:
    return study.cli(__file__, __doc__, SCALES, arms, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
