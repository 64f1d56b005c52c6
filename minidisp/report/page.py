"""One HTML page that needs nothing but itself; its form and its scripts are report.html beside this file."""

from pathlib import Path

import numpy as np

from minidisp.report.figures import line_styles, pair_density
from minidisp.report.tables import FURTHER, Table, escaped
from minidisp.runtime.files import to_json

PAGE_POINTS = 100  # evaluations of a run, and training steps times ten, that the page shows at most


def html_page(
    subtitle: str,
    sentences: list[str],
    tables: list[Table],
    details: list[Table],
    scores: list[dict],
    metrics: list[list[dict]],
) -> str:
    """The text of one HTML page that needs nothing but itself: tables, curves, and heat maps through the training.

    details: tables to fold away. metrics: a list of lines for every model, empty where there are none. All text is
    escaped, and the page forbids itself to load anything.
    """
    runs = []
    styles = line_styles(len(scores))
    for s, lines, style in zip(scores, metrics, styles, strict=True):
        measured = s["condensation"]
        evaluations = [line for line in lines if "val_loss" in line]
        training = [[line["step"], line["ce"]] for line in lines if "ce" in line]
        runs.append({
            "name": s["name"],
            "color": style["color"],
            "dash": "" if style["ls"] == "-" else " ".join(str(length * 2) for length in style["ls"][1]),
            "by_layer": {key: measured[f"{key}_by_layer"] for key in _LAYER_METRICS},
            "histogram": _coarse(measured["histogram_by_layer"]),
            "pair_histogram": _coarse(measured["pair_histogram_by_layer"]),
            "training": _thin(training, 10 * PAGE_POINTS),
            "evaluations": [
                {"step": line["step"], **{key: line.get(key) for key in (*_STEP_METRICS, "mean_cosine_by_layer")},
                 "histogram": _coarse(line["histogram_by_layer"]) if "histogram_by_layer" in line else None}
                for line in _thin(evaluations, PAGE_POINTS)
            ],
        })  # fmt: skip
    data = {
        "runs": runs,
        "layer_metrics": list(_LAYER_METRICS.items()),
        "step_metrics": list(_STEP_METRICS.items()),
        "pair_density": pair_density([s["condensation"]["pair_histogram_by_layer"] for s in scores]),
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
        before, after = page.split(f"<!--{name}-->")  # escaped text holds no such mark
        page = before + text + after
    return page


_LAYER_METRICS = {"mean_cosine": "mean cosine (the paper's)", **{key: label for key, label, _ in FURTHER}}
_STEP_METRICS = {
    "val_loss": "cross-entropy, nats per token (faint: training batches)",
    "bits_per_byte": "validation, bits per byte",
    "last_half_mean": "mean cosine, later half of the layers",
    "spearman": "Spearman, mean cosine with depth",
    "kendall": "Kendall, mean cosine with depth",
}


def _thin(items: list, most: int) -> list:
    """At most so many of the items, evenly spaced, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[i] for i in np.linspace(0, len(items) - 1, most).round().astype(int)]


def _coarse(histograms: list[list[float]]) -> list[list[float]]:
    """Two digits are enough for a colour, and most are 0."""
    return [[round(density or 0, 2) or 0 for density in histogram] for histogram in histograms]
