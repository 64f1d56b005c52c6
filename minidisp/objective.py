"""The objective: its terms and their weighted sum, as used by the training loop, the diagnosis of a diverged run, and
bench/train.py.

To add a term, edit `build_objective`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from minidisp import loss
from minidisp.config import Config
from minidisp.countermeasures import Teacher
from minidisp.dispersion import DispersionLoss
from minidisp.model import GPT
from minidisp.optim import weight_schedule


class Forward(NamedTuple):
    """The results of a forward pass, from which the terms are computed."""

    idx: torch.Tensor  # (B, T) int64
    targets: torch.Tensor  # (B, T) int64, -1 where masked
    ce: torch.Tensor  # cross-entropy x weight, a scalar
    hidden_states: tuple[torch.Tensor, ...]  # n_layer + 1 tensors (B, T, C)
    step: int  # index of the optimiser step
    segments: torch.Tensor | None = None  # (B, T) int64, index of the example of each token; None: one text per row
    # Multiply a mean over the unmasked targets of this micro-batch by it, so that the mean over the micro-batches is
    # the mean over all unmasked targets of the step.
    weight: torch.Tensor | float = 1.0


class Term(NamedTuple):
    """A summand of the objective: weight x schedule(step) x value(forward)."""

    name: str  # its key in metrics.jsonl
    weight: float
    value: Callable[[Forward], torch.Tensor]  # a scalar, the mean over the sequences
    title: str  # for messages
    details: str  # for the first lines of a run
    schedule: Callable[[int], float] | None = None  # a factor on the weight, by step; None: always 1

    def weight_at(self, step: int) -> float:
        return self.weight if self.schedule is None else self.weight * self.schedule(step)


class Objective:
    """The weighted sum of the terms."""

    def __init__(self, terms: list[Term]):
        self.terms = terms

    def __call__(self, forward: Forward) -> dict[str, torch.Tensor]:
        """The value of each term by name, and "loss", the weighted sum that is minimised.

        A term whose weight is 0 at this step is not computed.
        """
        weights = {term.name: term.weight_at(forward.step) for term in self.terms}
        values = {term.name: term.value(forward) for term in self.terms if weights[term.name]}
        return {**values, "loss": sum(weights[name] * value for name, value in values.items())}

    def scheduled_weights(self, step: int) -> dict[str, float]:
        """The weights of the terms with a schedule at a step, by name in metrics.jsonl."""
        return {f"{term.name}_weight": term.weight_at(step) for term in self.terms if term.schedule}


def build_objective(
    config: Config, model: GPT, dispersion: DispersionLoss, teacher: Teacher | None, how: str
) -> Objective:
    """The objective of a run, starting with the cross-entropy.

    how: a description of the implementation of the dispersion loss.
    """
    terms = [Term("ce", 1.0, lambda forward: forward.ce, "cross-entropy", loss.describe())]
    if config.dispersion:
        details = f"{config.dispersion_variant} ({config.dispersion_layers} layers), {how}"
        value = lambda forward: dispersion(forward.hidden_states, forward.step)  # noqa: E731
        schedule = weight_schedule(config.dispersion_schedule, config.max_steps)
        details += f", weight {config.dispersion_schedule}" if schedule else ""
        terms.append(Term("dispersion", config.dispersion, value, "dispersion loss", details, schedule))
    if teacher:
        details = f"distillation from {config.distill}, temperature {config.distill_temperature:g}"

        def value(forward: Forward) -> torch.Tensor:
            x = forward.hidden_states[-1]
            return forward.weight * teacher.divergence(forward.idx, x, model.logits, forward.targets, forward.segments)

        terms.append(Term("distillation", config.distill_weight, value, "distillation loss", details))
    return Objective(terms)
