"""The output of a training run: a progress bar, or lines without a terminal, and a row per evaluation."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from tqdm import tqdm

from minidisp.runtime.device import peak_memory_mib

SECONDS_BETWEEN_LINES = 5  # at least, without a terminal


def watched(items: Sequence, what: str, hidden: bool) -> Iterator:
    """Iterate over items with a progress bar if it takes long, or lines without a terminal. hidden: print nothing."""
    bar = tqdm(
        items, desc=what, leave=False, delay=SECONDS_BETWEEN_LINES, dynamic_ncols=True, disable=True if hidden else None
    )
    start = printed = time.perf_counter()
    for done, item in enumerate(bar):
        now = time.perf_counter()
        if done and bar.disable and not hidden and now - printed >= SECONDS_BETWEEN_LINES:
            printed = now
            left = tqdm.format_interval((len(items) - done) * (now - start) / done)
            print(f"{what}: {done / len(items):.0%}, {left} left", flush=True)
        yield item


class Progress:
    """The progress bar, the rows of evaluations, and a clock that counts training time only.

    steps: total number. step, seconds: of the run so far. hidden: print nothing (in all but the main process).
    """

    def __init__(self, steps: int, step: int, seconds: float, hidden: bool):
        self.step, self.seconds = step, seconds  # of training
        self._steps, self._hidden = steps, hidden
        self._bar = tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True, disable=True if hidden else None)
        self._since = time.perf_counter()  # start of the time not yet counted
        self._logged_seconds, self._logged_step, self._printed = seconds, step, self._since
        self._first_row = True
        self._estimate_from: tuple[int, float] | None = None  # step and seconds after the first step, which is slower
        self._estimated = False

    def advance(self) -> None:
        """Count a finished step."""
        self.step += 1
        self._bar.update()

    def stop_clock(self) -> float:
        """Seconds of training so far."""
        now = time.perf_counter()
        self.seconds += now - self._since
        self._since = now
        return self.seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside this context does not count as training time."""
        self.stop_clock()
        try:
            yield
        finally:
            self._since = time.perf_counter()

    def steps_per_second(self) -> float:
        """Steps per second since the last call."""
        seconds = self.stop_clock()
        speed = (self.step - self._logged_step) / (seconds - self._logged_seconds)
        self._logged_seconds, self._logged_step = seconds, self.step
        return speed

    def estimate(self, device: torch.device) -> None:
        """Print, once, the estimated remaining time and the peak memory, some steps after the first.

        Call it when the device has finished all steps so far.
        """
        if self._estimated or self._hidden:
            return
        seconds = self.stop_clock()
        if self._estimate_from is None:
            self._estimate_from = self.step, seconds
        elif self.step >= self._estimate_from[0] + 2:
            self._estimated = True
            step_seconds = (seconds - self._estimate_from[1]) / (self.step - self._estimate_from[0])
            left = tqdm.format_interval((self._steps - self.step) * step_seconds)
            peak = peak_memory_mib(device)
            memory = "" if peak is None else f", peak memory {peak:,.0f} MiB so far"
            tqdm.write(f"time    {1000 * step_seconds:,.0f} ms per step, about {left} left without evaluations{memory}")

    def show(self, loss: float, tokens_per_second: float, skipped: int) -> None:
        """Show the loss (cross-entropy, nats per token) and the speed, next to the bar or as a line."""
        words = f"loss {loss:.3f}, {tokens_per_second:,.0f} tokens/s" + (f", {skipped} skipped" if skipped else "")
        self._bar.set_postfix_str(words, refresh=False)
        now = time.perf_counter()
        if self._hidden or not self._bar.disable or now - self._printed < SECONDS_BETWEEN_LINES:
            return
        self._printed = now
        left = (self._steps - self.step) * self.seconds / max(1, self.step)
        print(f"step {self.step:,} of {self._steps:,}: {words}, {tqdm.format_interval(left)} left", flush=True)

    def show_evaluation(self, scores: dict) -> None:
        """Print a row of the table of evaluations."""
        if self._first_row:
            tqdm.write(
                "  step  val loss  perplexity  bits/byte  | mean cosine: embedding  last half  last layer | spearman"
            )
        self._first_row = False
        cosines = scores["mean_cosine_by_layer"]
        row = (
            self.step,
            scores["val_loss"],
            scores["perplexity"],
            scores["bits_per_byte"],
            cosines[0],
            scores["last_half_mean"],
            cosines[-1],
            scores["spearman"],
        )
        tqdm.write("{:6d}  {:8.4f}  {:10.2f}  {:9.4f}  | {:22.3f}  {:9.3f}  {:10.3f} | {:8.2f}".format(*row))
        sys.stdout.flush()

    def close(self) -> None:
        self._bar.close()
