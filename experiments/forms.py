"""Does another form of the dispersion loss help?

    python data/prepare.py --input books10m.jsonl.gz --name books       # 142 English books, see docs/verdict.md
    python experiments/forms.py --scale laptop --threads 1

Trains each form with the fast and with the gpt2 recipe, at the recipe's best learning rate (docs/verdict.md) and at 1.5
times that, and compares it with the baseline of the same recipe and learning rate. Unless stated otherwise, a form has
the weight, tau, clamp, layers and pairs of the published loss, `--dispersion 0.1`:

lambda 0.1          the published loss
negative            the published loss, weight -0.1: states are pulled together
first tenth         lambda 0.3, decaying to 0 in the first tenth of the run
target-aware        without pairs of tokens with the same target
contrastive         last layer, all tokens of the batch: -log of the softmax mass, temperature 0.1, on the same target
standardised        after standardising each feature over the batch
whole batch         pairs across the sequences of the batch, too
output rows         the rows of the output matrix, 1,024 at random in each step, instead of the hidden states
centred output      no loss; the mean row of the output matrix is subtracted after each step (arXiv 2601.02031)

The measure is bits per byte of the validation books at the end, over eight paired seeds. Ten conditions, two recipes
and two learning rates are 320 runs; --arms selects some. A form that is ahead of its baseline with an interval below 0
is to be confirmed with other seeds, more tokens and the default model.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # python -P omits it

import study  # isort: split

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from minidisp import objective, optim
from minidisp.config import Config
from minidisp.dispersion import _angles, _fill_diagonal, _unit, dispersion_loss, full_precision
from minidisp.model import GPT
from minidisp.objective import Forward, Objective, Term

WEIGHT = 0.1
ROWS = 1024  # of the output matrix in one step


def target_aware(forward: Forward, model: GPT) -> Tensor:
    """log mean exp(-D_ij) over the pairs i, j of a sequence with different targets; its mean over layers and batch."""
    differ = forward.targets.unsqueeze(1) != forward.targets.unsqueeze(2)  # never true for i = j
    return torch.stack([_log_mean(z, differ) for z in forward.hidden_states[1:]]).mean()


@full_precision
def _log_mean(z: Tensor, pairs: Tensor) -> Tensor:
    """pairs: (B, T, T) bool, the pairs that count. A sequence without any counts as 0."""
    exponents = -_angles(z, clamp=0.25, eps=1e-2)  # tau = 1
    number = pairs.sum(dim=(1, 2))
    log_mean = exponents.masked_fill(~pairs, -math.inf).logsumexp(dim=(1, 2)) - number.clamp(min=1).to(z.dtype).log()
    return log_mean.where(number > 0, 0.0).mean()


def contrastive(forward: Forward, model: GPT) -> Tensor:
    """Supervised contrastive loss (arXiv 2004.11362, its L_in) of the last layer, over the tokens whose target occurs
    again in the batch.
    """
    return _contrastive(forward.hidden_states[-1], forward.targets.flatten())


@full_precision
def _contrastive(z: Tensor, targets: Tensor, tau: float = 0.1) -> Tensor:
    """mean_i -log(sum_{j != i, y_j = y_i} exp(u_i.u_j / tau) / sum_{j != i} exp(u_i.u_j / tau)), u of length 1."""
    u = _unit(z.flatten(0, 1), eps=0.0)
    exponents = _fill_diagonal(u @ u.mT / tau, -math.inf)
    same = _fill_diagonal(targets.unsqueeze(0) == targets.unsqueeze(1), False)
    counted = same.any(1)
    mass = exponents[counted].masked_fill(~same[counted], -math.inf).logsumexp(1) - exponents[counted].logsumexp(1)
    return -mass.sum() / counted.sum().clamp(min=1)


def standardised(forward: Forward, model: GPT) -> Tensor:
    """The published loss of (z - mean) / std, both per feature over the tokens of the batch, without gradients."""

    def standardise(z: Tensor) -> Tensor:
        std, mean = torch.std_mean(z.detach().float(), dim=(0, 1))
        return (z - mean) / (std + 1e-6)

    return _mean_loss([standardise(z) for z in forward.hidden_states[1:]])


def whole_batch(forward: Forward, model: GPT) -> Tensor:
    """The published loss of the batch as a single sequence."""
    return _mean_loss([z.flatten(0, 1).unsqueeze(0) for z in forward.hidden_states[1:]])


def output_rows(forward: Forward, model: GPT) -> Tensor:
    """The published loss of random rows of the output matrix, a set per step."""
    weight = model.lm_head.weight
    order = torch.randperm(len(weight), generator=torch.Generator().manual_seed(forward.step))
    return dispersion_loss(weight[order[:ROWS].to(weight.device)].unsqueeze(0))


def negative(forward: Forward, model: GPT) -> Tensor:
    """Minus the published loss."""
    return -_mean_loss(forward.hidden_states[1:])


def _mean_loss(states: Sequence[Tensor]) -> Tensor:
    return torch.stack([dispersion_loss(z) for z in states]).mean()


def with_term(form: Callable[[Forward, GPT], Tensor]) -> Callable[..., Objective]:
    """train.build_objective with this form as another term."""

    def build_objective(config: Config, model: GPT, *args) -> Objective:
        built = objective.build_objective(config, model, *args)
        name = form.__name__.replace("_", " ")
        term = Term("dispersion", WEIGHT, lambda forward: form(forward, model), name, f"{name}, weight {WEIGHT}")
        return Objective([*built.terms, term])

    return build_objective


def centring_optimizers(model: GPT, config: Config) -> list[torch.optim.Optimizer]:
    """train.build_optimizers; the last one also subtracts the mean row of the output matrix after its step."""

    def centre() -> None:
        model.lm_head.weight.sub_(model.lm_head.weight.mean(dim=0))

    return study.after_each_step(centre, optim.build_optimizers(model, config))


FORMS = {  # what each condition changes
    "baseline": {},
    "lambda 0.1": {"dispersion": WEIGHT},
    "negative": {"build_objective": with_term(negative)},
    "first tenth": {"dispersion": 0.3, "dispersion_schedule": "linear:0.1"},
    "target-aware": {"build_objective": with_term(target_aware)},
    "contrastive": {"build_objective": with_term(contrastive)},
    "standardised": {"build_objective": with_term(standardised)},
    "whole batch": {"build_objective": with_term(whole_batch)},
    "output rows": {"build_objective": with_term(output_rows)},
    "centred output": {"build_optimizers": centring_optimizers},
}
RECIPES = {  # the best learning rate of the baseline at 8 x 64, and the warm-up, fixed for the study
    "fast": study.FAST,
    "gpt2": {"recipe": "gpt2", "lr": 2e-3, "warmup_steps": 100},
}
SCALES = {
    "smoke": {"seeds": 2, "recipes": ("fast",), "factors": (1.0,), "train": study.SMOKE},
    "laptop": {"seeds": 8, "recipes": ("fast", "gpt2"), "factors": (1.0, 1.5), "train": study.BOOKS},
    "gpu": {"seeds": 4, "recipes": ("fast", "gpt2"), "factors": (1.0,),
            "train": {**study.BOOKS, "n_head": 6, "n_embd": 192, "block_size": 256, "max_steps": 3000,
                      "device": "cuda"}},
}  # fmt: skip


def prefix(recipe: str, factor: float) -> str:
    return f"{recipe}, " if factor == 1 else f"{recipe} at {factor:g} x lr, "


def arms(scale: dict) -> dict[str, dict]:
    conditions = {}
    for factor in scale["factors"]:
        for recipe in scale["recipes"]:
            settings = RECIPES[recipe]
            for form, changes in FORMS.items():
                label = prefix(recipe, factor) + form
                conditions[label] = {**settings, "lr": factor * settings["lr"], **changes}
    return conditions


def of_a_group(recipe: str, factor: float):
    """A view of the conditions with this recipe and learning rate."""
    return study.at_the_end_of(f"{recipe}_{factor:g}", lambda label: label.startswith(prefix(recipe, factor)))


def main(argv: list[str] | None = None) -> int:
    views = [of_a_group(recipe, factor) for factor in (1.0, 1.5) for recipe in RECIPES]
    return study.cli(__file__, __doc__, SCALES, arms, views=tuple(views), argv=argv)


if __name__ == "__main__":
    sys.exit(main())
