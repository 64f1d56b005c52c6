"""One self-contained HTML page; its layout and scripts are in report.html beside this file."""

import math
from pathlib import Path

import numpy as np

from minidisp import TEXT, printable
from minidisp.report.figures import line_styles, pair_density
from minidisp.report.tables import FURTHER, Table, escaped
from minidisp.runtime.files import to_json

PAGE_POINTS = 100  # evaluations of a run, and a tenth of the training steps, that the page shows at most
_TRAINING = ("step", "tokens", "seconds", "ce", "lr", "grad_norm", "tokens_per_second")


def html_page(
    subtitle: str,
    sentences: list[str],
    tables: list[Table],
    details: list[Table],
    scores: list[dict],
    metrics: list[list[dict]],
) -> str:
    """The text of a self-contained HTML page: comparison, tables, curves, heat maps and samples.

    scores: of each run; without "condensation" (no held-out text), a run has no heat maps. details: tables that are
    collapsed at first. metrics: one list of lines per run, possibly empty. All text is escaped, and the page's content
    security policy forbids loading anything.
    """
    runs = []
    styles = line_styles(len(scores))
    for s, lines, style in zip(scores, metrics, styles, strict=True):
        measured = s.get("condensation")
        evaluations = [line for line in lines if "val_loss" in line]
        training = _thin([line for line in lines if "ce" in line], 10 * PAGE_POINTS)
        runs.append(
            {
                "name": s["name"],
                "color": style["color"],
                "dash": "" if style["ls"] == "-" else " ".join(str(length * 2) for length in style["ls"][1]),
                "by_layer": measured and {key: measured[f"{key}_by_layer"] for key in _LAYER_METRICS},
                "histogram": measured and _coarse(measured["histogram_by_layer"]),
                "pair_histogram": measured and _coarse(measured["pair_histogram_by_layer"]),
                "training": {key: [line.get(key) for line in training] for key in _TRAINING},
                "evaluations": [
                    {
                        **{key: line.get(key) for key in _EVALUATION},
                        "histogram": _coarse(line["histogram_by_layer"]) if "histogram_by_layer" in line else None,
                    }
                    for line in _thin(evaluations, PAGE_POINTS)
                ],
                "samples": [
                    {
                        "order": order,
                        "seed": sample["seed"],
                        **{key: printable(sample[key], keep="\n\t" + TEXT) for key in ("prompt", "continuation")},
                    }
                    for order, sample in enumerate(s.get("samples", []))
                ],
            }
        )
    data = {
        "runs": runs,
        "configurations": _configurations(scores),
        "layer_metrics": list(_LAYER_METRICS.items()),
        "step_metrics": list(_STEP_METRICS.items()),
        "pair_density": pair_density(
            [s["condensation"]["pair_histogram_by_layer"] for s in scores if "condensation" in s]
        ),
    }
    parts = {
        "SUBTITLE": escaped(subtitle),
        "SENTENCES": "<ul>" + "".join(f"<li>{escaped(s)}</li>" for s in sentences) + "</ul>" if sentences else "",
        "TABLES": "".join(t.to_html() for t in tables),
        "DETAILS": "".join(f"<details><summary>{escaped(t.caption)}</summary>{t.to_html()}</details>" for t in details),
        "DATA": to_json(data).replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"),
    }
    page = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    for name, text in parts.items():
        before, after = page.split(f"<!--{name}-->")  # escaped text cannot contain this marker
        page = before + text + after
    return page


_LAYER_METRICS = {"mean_cosine": "mean cosine (the paper's)", **{key: label for key, label, _ in FURTHER}}
_STEP_METRICS = {
    "val_loss": "cross-entropy, nats per token (faint: training)",
    "bits_per_byte": "validation bits per byte",
    "last_half_mean": "mean cosine, last half of the layers",
    "spearman": "Spearman, mean cosine against depth",
    "kendall": "Kendall, mean cosine against depth",
}
_EVALUATION = ("step", "tokens", "seconds", *_STEP_METRICS, "mean_cosine_by_layer")


def _configurations(scores: list[dict]) -> list[dict]:
    """The configurations compared in bits per byte, the baseline first, and which of them won.

    A configuration wins if it has the lowest mean and is better than the first, or if it is the first and all others
    are worse.
    """
    groups = []
    for s in scores:
        group = s.get("over_seeds", {}).get("bits_per_byte")
        if group and group not in groups:
            groups.append(group)
    found = []
    for group in groups:
        versus = group.get("versus_first", {})
        found.append(
            {
                "name": group["name"],
                "runs": group["runs"],
                "mean": group["mean"],
                "winner": False,
                "reason": "",
                "difference": versus.get("mean"),
                **{key: versus.get(key) for key in ("low", "high", "pairs", "verdict")},
            }
        )
    if len(found) > 1:
        first, *others = found
        best = min(others, key=lambda c: c["mean"] if math.isfinite(c["mean"]) else math.inf)
        if best["verdict"] == "better":
            best |= {"winner": True, "reason": f"has fewer bits per byte than {first['name']}: {_interval(best)}"}
        elif all(c["verdict"] == "worse" for c in others):
            first |= {"winner": True, "reason": f"has fewer bits per byte; next is {best['name']}: {_interval(best)}"}
    return found


def _interval(c: dict) -> str:
    return f"{c['difference']:+.4f}, 95 % interval {c['low']:+.4f} to {c['high']:+.4f} over {c['pairs']} pairs of seeds"


def _thin(items: list, most: int) -> list:
    """At most `most` of the items, evenly spaced, with the first and the last."""
    if len(items) <= most:
        return items
    return [items[i] for i in np.linspace(0, len(items) - 1, most).round().astype(int)]


def _coarse(histograms: list[list[float]]) -> list[list[float]]:
    """Densities rounded to two digits, which is enough for colours and makes most of them 0."""
    return [[round(density or 0, 2) or 0 for density in histogram] for histogram in histograms]
