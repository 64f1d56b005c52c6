"""Dataclass fields that are also command-line flags, declared together with their default, help text and bounds."""

import dataclasses
import math
from typing import Literal, NamedTuple

from minidisp import InputError

MOST = 2**31 - 1  # the largest integer, unless a flag says otherwise
LARGEST = 1e38  # the largest magnitude of a float, unless a flag says otherwise: it fits into float32


class Bounds(NamedTuple):
    """The range of a number; None: unbounded."""

    low: float | None = None  # inclusive
    high: float | None = None
    above: float | None = None  # exclusive
    below: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        words = {"at least": self.low, "above": self.above, "at most": self.high, "below": self.below}
        return " and ".join(f"{text} {bound}" for text, bound in words.items() if bound is not None)


def flag(
    default,
    help: str | None = None,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    resume: Literal["refused", "reported", "silent"] = "refused",
):
    """A dataclass field that is also a command-line flag: its default, and its help text with the unit.

    help: None for a field that has bounds and no flag.
    low, high: inclusive bounds of a number; above, below: exclusive ones. Values outside raise InputError.
    resume: whether --resume may change it. "silent": yes, as it affects the results at most by rounding. "reported":
    yes, but training differs from there on, which is reported. "refused": no, as it would no longer be the same run.
    """
    metadata: dict = {"resume": resume, "bounds": Bounds(low, high, above, below)}
    return dataclasses.field(default=default, metadata=metadata if help is None else {"help": help, **metadata})


def check_bounds(config) -> None:
    """Raise InputError, naming the flag, for the first number of a dataclass that is NaN, Inf or out of bounds."""
    for field in dataclasses.fields(config):
        value, bounds = getattr(config, field.name), field.metadata.get("bounds", Bounds())
        if value is None or isinstance(value, bool | str | tuple):
            continue
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"--{kebab(field.name)} is {value}, but must be a finite number")
        if value not in bounds:
            raise InputError(f"--{kebab(field.name)} is {shown(value)}, but must be {bounds}")
        implied = Bounds(high=MOST) if isinstance(value, int) else Bounds(-LARGEST, LARGEST)
        if bounds.high is None and bounds.below is None and value not in implied:
            raise InputError(f"--{kebab(field.name)} is {shown(value)}, but must be {implied}")


def kebab(name: str) -> str:
    """The name of a field as that of its flag."""
    return name.replace("_", "-")


def shown(value: object) -> str:
    """A value of any size and type, shortened for an error message."""
    if type(value) is int and abs(value) > 10**20:
        return "an integer of more than 20 digits"
    if value is None or isinstance(value, str | int | float):
        return f"{value!a:.60}"
    return f"of type {type(value).__name__}"
