"""What a training shows while it runs: a bar, or lines where there is no terminal, and a row per evaluation."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 5  # at least, without a terminal


class Progress:
    """The bar, the rows, and the clock of a training: time in which it does something else is left out.

    steps: how many there will be. step, seconds: where it goes on. hidden: print nothing (all but the main process).
    """

    def __init__(self, steps: int, step: int, seconds: float, hidden: bool):
        self.step, self.seconds = step, seconds  # of training
        self._steps, self._hidden = steps, hidden
        self._bar = tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True, disable=True if hidden else None)
        self._since = time.perf_counter()  # the clock goes from here
        self._logged_seconds, self._logged_step, self._printed = seconds, step, self._since
        self._first_row = True

    def advance(self) -> None:
        """Another step is done."""
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
        """What is done inside is no training time."""
        self.stop_clock()
        try:
            yield
        finally:
            self._since = time.perf_counter()

    def steps_per_second(self) -> float:
        """The speed since this was last asked for."""
        seconds = self.stop_clock()
        speed = (self.step - self._logged_step) / (seconds - self._logged_seconds)
        self._logged_seconds, self._logged_step = seconds, self.step
        return speed

    def show(self, loss: float, tokens_per_second: float, skipped: int) -> None:
        """The loss (cross-entropy, nats per token) and the speed, beside the bar or as a line."""
        words = f"loss {loss:.3f}, {tokens_per_second:,.0f} tokens/s" + (f", {skipped} skipped" if skipped else "")
        self._bar.set_postfix_str(words, refresh=False)
        now = time.perf_counter()
        if self._hidden or not self._bar.disable or now - self._printed < SECONDS_BETWEEN_LINES:
            return
        self._printed = now
        left = (self._steps - self.step) * self.seconds / max(1, self.step)
        print(f"step {self.step:,} of {self._steps:,}: {words}, {tqdm.format_interval(left)} left", flush=True)

    def show_evaluation(self, scores: dict) -> None:
        """A row of the table of evaluations."""
        if self._first_row:
            tqdm.write(
                "  step  val loss  perplexity  bits/byte  | mean cosine: embedding  last half  last layer | spearman"
            )
        self._first_row = False
        cosines = scores["mean_cosine_by_layer"]
        row = (self.step, scores["val_loss"], scores["perplexity"], scores["bits_per_byte"], cosines[0],
               scores["last_half_mean"], cosines[-1], scores["spearman"])  # fmt: skip
        tqdm.write("{:6d}  {:8.4f}  {:10.2f}  {:9.4f}  | {:22.3f}  {:9.3f}  {:10.3f} | {:8.2f}".format(*row))
        sys.stdout.flush()

    def close(self) -> None:
        self._bar.close()
