"""Guards of a run against NaN or Inf in loss and gradients, and against running out of memory."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from minidisp import InputError
from minidisp.config import Config
from minidisp.flags import MOST
from minidisp.model import GPT
from minidisp.objective import Forward, Objective
from minidisp.runtime.checkpoint import gathered
from minidisp.runtime.cli import is_out_of_memory
from minidisp.runtime.device import refuse_larger_than_memory
from minidisp.runtime.processes import World

# An update with NaN or Inf in the loss or the gradient is skipped. This many in a row, or in total, end the run.
MAX_SKIPPED_IN_A_ROW = 10
MAX_SKIPPED_IN_A_ROW_FLOAT16 = 30  # its gradient scale starts at 2^16, and each skipped step halves it
MAX_SKIPPED = 20  # plus one per hundred steps


class Diverged(RuntimeError):
    """Too many updates were skipped because of NaN or Inf."""


class Guard:
    """Counts the steps with NaN or Inf in the loss or the gradient. The counts are on the device; only `fetch`
    synchronises with it.

    total, in_a_row, longest and last_skipped (the index of the last such step) are as of the last `fetch`.
    """

    def __init__(self, device: torch.device, float16: bool):
        # total, in a row, longest row, index of the last
        self._counts = torch.zeros(4, dtype=torch.int64, device=device)
        self._most_in_a_row = MAX_SKIPPED_IN_A_ROW_FLOAT16 if float16 else MAX_SKIPPED_IN_A_ROW
        self.total, self.in_a_row, self.longest, self.last_skipped = 0, 0, 0, 0

    def count(self, finite: Tensor, step: int) -> None:
        """finite: a bool scalar on the device; step: the index of the step."""
        total, in_a_row, longest, last = self._counts.unbind()
        row = (in_a_row + 1) * ~finite
        self._counts = torch.stack(
            [total + ~finite, row, torch.maximum(longest, row), torch.where(finite, last, torch.full_like(last, step))]
        )

    def fetch(self, step: int) -> None:
        """Synchronise with the device, fetch the counts, and report updates skipped since the last call."""
        before = self.total
        self.total, self.in_a_row, self.longest, self.last_skipped = self._counts.tolist()
        if self.total > before:
            times = "" if self.total == before + 1 else f" {self.total - before} times"
            reason = "loss or gradient was NaN or Inf and the update skipped"
            tqdm.write(f"up to step {step}, {reason}{times}: {self.total} in total")

    def hopeless(self, step: int) -> bool:
        """Whether too many of the first `step` updates were skipped to continue."""
        return self.longest >= self._most_in_a_row or self.total > max(MAX_SKIPPED, self._most_in_a_row) + step // 100

    def state(self) -> dict[str, int]:
        return dict(zip(("total", "in_a_row", "longest", "last_skipped"), self._counts.tolist(), strict=True))

    def load_state(self, state: dict[str, int]) -> None:
        if state.keys() != self.state().keys() or not all(type(n) is int and 0 <= n <= MOST for n in state.values()):
            raise ValueError("invalid counts of skipped steps")
        # Earlier rows were judged then, maybe by the larger limit of float16.
        state = {**state, "longest": state["in_a_row"]}
        self._counts = torch.tensor([state[name] for name in self.state()], device=self._counts.device)
        self.total, self.in_a_row, self.longest, self.last_skipped = self._counts.tolist()


class Interval:
    """The mean loss and the largest gradient norm since the last line of metrics.jsonl, without skipped steps.

    Kept on the device, which avoids synchronising. A loss spike between two lines shows in the largest norm.
    """

    def __init__(self, device: torch.device):
        self._values = torch.zeros(3, device=device)  # sum of the losses, number of steps, largest norm

    def add(self, finite: Tensor, loss: Tensor, grad_norm: Tensor) -> None:
        """finite: a bool scalar; loss: the cross-entropy of a step; grad_norm: before clipping."""
        total, steps, largest = self._values.unbind()
        loss, norm = (torch.where(finite, value.float(), 0.0) for value in (loss, grad_norm))
        self._values = torch.stack([total + loss, steps + finite, torch.maximum(largest, norm)])

    def take(self) -> dict[str, Tensor]:
        """The fields of metrics.jsonl for this interval; starts the next one."""
        total, steps, largest = self._values.unbind()
        self._values = torch.zeros_like(self._values)
        return {"ce_mean": total / steps, "grad_norm_max": largest}

    def state(self) -> list[float]:
        return self._values.tolist()

    def load_state(self, state: list[float]) -> None:
        numbers = isinstance(state, list) and all(type(x) is float and 0 <= x < math.inf for x in state)
        if not numbers or len(state) != 3:
            raise ValueError("invalid losses since the last line of metrics.jsonl")
        self._values = torch.tensor(state, device=self._values.device)


def is_finite(tensor: Tensor) -> bool:
    """Whether all elements of a tensor, sharded or not, are finite."""
    return bool(torch.isfinite(gathered(tensor)).all())


def first_bad_tensor(model: GPT, objective: Objective, forwards: Iterator[tuple[float, Forward]]) -> str:
    """A description of the tensor that first becomes NaN or Inf in a step, found by repeating the step without an
    update.

    forwards: per micro-batch, its share of the step and the forward pass, computed lazily.
    """
    for name, p in model.named_parameters():
        if not is_finite(p):
            return f"the weights {name} became NaN or Inf first"
    model.zero_grad(set_to_none=True)
    for share, forward in forwards:
        for layer, z in enumerate(forward.hidden_states):
            if not is_finite(z):
                name = f"hidden state of layer {layer}" if layer else "embeddings"
                return f"the {name} became NaN or Inf first"
        with torch.no_grad():  # one sequence at a time, as logits are large
            if not all(is_finite(model.logits(sequence)) for sequence in forward.hidden_states[-1]):
                return "the logits became NaN or Inf first"
        values = objective(forward)
        for term in objective.terms:
            if term.name in values and not is_finite(values[term.name]):
                return f"the {term.title} became NaN or Inf first"
        with torch.autocast(values["loss"].device.type, enabled=False):
            (values["loss"] * share).backward()
    for name, p in reversed(list(model.named_parameters())):  # in the order of the backward pass
        if p.grad is not None and not is_finite(p.grad):
            return f"the gradient of {name} became NaN or Inf first"
    return "no tensor is NaN or Inf when the step is repeated, since the weights have changed"


def half_of(batch: int, error: BaseException, where: str, world: World, dropout: float = 0.0) -> int:
    """Half the micro-batch size, rounded up, after an out-of-memory error; other errors are re-raised.

    dropout: the model's dropout probability, for the message. Raises InputError if there was only one sequence, or if
    other processes are waiting in the middle of their step.
    """
    if not is_out_of_memory(error):
        raise error
    if world.size > 1 and batch > 1:
        raise InputError(
            f"{where}: process {world.rank} is out of memory: lower --batch-size and raise --grad-accum by the same "
            "factor, which keeps the effective batch size, or use --shard"
        ) from None
    if batch == 1:
        raise InputError(
            f"{where}: out of memory with one sequence at a time: lower --block-size or the size of the model "
            "(--n-layer, --n-embd), or the memory of the dispersion loss with --dispersion-tokens 256"
        ) from None
    half = (batch + 1) // 2
    remark = ", but other random numbers for dropout" if dropout else ""
    tqdm.write(
        f"{where}: out of memory; retrying with micro-batches of {half} sequences instead of {batch}, "
        f"the same effective batch size{remark}"
    )
    return half


def refuse_too_large(config: Config, device: torch.device, shards: int) -> None:
    """Raise InputError if weights, gradients and optimiser state cannot fit in memory, before allocating them."""
    count = config.parameter_count
    what = f"training {count:,} parameters, with gradients and optimiser state,"
    needed = 16 * count / shards  # weights, gradients, two moments, in float32
    refuse_larger_than_memory(what, needed, device, ": lower --n-layer or --n-embd")
