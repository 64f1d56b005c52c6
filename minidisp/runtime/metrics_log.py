"""Reading a run's metrics.jsonl: one JSON object per logged step and per evaluation, in the order of the steps."""

import sys
from collections.abc import Iterator
from pathlib import Path

from minidisp import InputError, parse_json, read_bytes

# The values of metrics.jsonl that figures use, and how deep their lists are nested.
_DRAWN = {"ce": 0, "val_loss": 0, "mean_cosine_by_layer": 1, "histogram_by_layer": 2}
_CURVES = dict.fromkeys(("tokens", "seconds", "lr", "grad_norm", "tokens_per_second"), 0)


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl, in order. Raises InputError naming the file and the line that is damaged.

    An incomplete last line is skipped: it is being written, or its writer was killed.
    """
    return [line for line, _ in metrics_lines(read_bytes(path), path)]


def metrics_lines(content: bytes, path: Path) -> Iterator[tuple[dict, int]]:
    """Every complete line of a metrics.jsonl with the number of bytes up to its end; see read_metrics."""
    end, last_step = 0, 0
    for number, text in enumerate(content.split(b"\n")[:-1], start=1):
        end += len(text) + 1
        line = parse_json(text, f"{path}, line {number},")
        step = line.get("step") if isinstance(line, dict) else None
        if type(step) is not int or not last_step <= step < 1 << 31:
            raise InputError(f"{path}, line {number}, is damaged: its step is missing, or below the previous one")
        if wrong := _wrong_value(line):
            raise InputError(f"{path}, line {number}, is damaged: {wrong} is missing or of the wrong type")
        last_step = step
        yield line, end


def _wrong_value(line: dict) -> str | None:
    """The first value of a line of metrics.jsonl that a table or a figure could not use."""
    depths = _DRAWN | _CURVES
    if "loss" in line:
        depths |= {"loss": 0}
    if "val_loss" in line:
        depths |= dict.fromkeys(("perplexity", "bits_per_byte", "spearman", "kendall", "last_half_mean"), 0)
    required = {"loss": ("loss", "ce"), "val_loss": depths.keys() - {"loss", "ce", *_CURVES}}
    needed = {name for key, names in required.items() if key in line for name in names}
    for name, depth in depths.items():
        # Plot axes overflow near the float64 maximum; perplexity, which is not drawn, gets there at a loss of 691 nats.
        largest = sys.float_info.max if name == "perplexity" else 1e300
        if name in line and not _is_numbers(line[name], depth, largest):
            return name
        if name in needed and name not in line:
            return name
    if "val_loss" in line:
        if line["val_loss"] is None:  # a run ends at such an evaluation, without logging it
            return "val_loss"
        cosines, histogram = line["mean_cosine_by_layer"], line["histogram_by_layer"]
        if len(cosines) < 2:
            return "mean_cosine_by_layer"
        if len(histogram) != len(cosines) or len({len(layer) for layer in histogram}) > 1 or not histogram[0]:
            return "histogram_by_layer"
    return None


def _is_numbers(value, depth: int, largest: float) -> bool:
    """Whether this is a number up to `largest`, or None (NaN or Inf); with depth > 0, a nested list of those."""
    if depth:
        return isinstance(value, list) and all(_is_numbers(item, depth - 1, largest) for item in value)
    return value is None or (type(value) in (int, float) and abs(value) <= largest)
