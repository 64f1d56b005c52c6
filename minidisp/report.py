"""What a person sees of a run: plain tables, and figures drawn from metrics.jsonl alone (matplotlib)."""

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

# Okabe-Ito, told apart by colour-blind readers and in print.
BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#999999"
CYCLE = [BLUE, ORANGE, "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"]


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """An aligned plain-text table; the first column is left-aligned, the others right-aligned."""
    cells = [[str(cell) for cell in row] for row in (headers, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headers))]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in cells
    )


def number(value: float | None, digits: int = 4) -> str:
    """A number for a table, "-" for one that is undefined (None or NaN), and powers of ten from a billion on."""
    if value is None or math.isnan(value):
        return "-"
    return f"{value:,.{digits}f}" if abs(value) < 1e9 else f"{value:.3g}"


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl, in order."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _pyplot():
    """matplotlib.pyplot with our style; imported late, since it takes half a second that training need not wait for."""
    import matplotlib

    matplotlib.use("Agg")  # no window, no display
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 150,
                         "axes.prop_cycle": matplotlib.cycler(color=CYCLE)})  # fmt: skip
    return plt


def _save(figure, path: Path) -> None:
    figure.savefig(path, bbox_inches="tight")
    _pyplot().close(figure)


def draw_run(metrics: list[dict], title: str, folder: Path) -> list[Path]:
    """Draw loss.png, cosine.png and heatmap.png of a training run into `folder`; returns their paths.

    metrics: the lines of metrics.jsonl, with at least one evaluation among them.
    """
    plt = _pyplot()
    folder.mkdir(parents=True, exist_ok=True)
    train = [line for line in metrics if "loss" in line]
    evals = [line for line in metrics if "val_loss" in line]
    steps = [line["step"] for line in evals]
    n_layer = len(evals[0]["mean_cosine_by_layer"]) - 1
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    if train:
        axes.plot([r["step"] for r in train], [r["ce"] for r in train], color=GREY, lw=1, label="training batch")
    axes.plot(steps, [r["val_loss"] for r in evals], color=BLUE, marker="o", ms=3.5, label="validation")
    axes.annotate(f"{evals[-1]['val_loss']:.3f}", (steps[-1], evals[-1]["val_loss"]), xytext=(0, 8),
                  textcoords="offset points", ha="right", color=BLUE)  # fmt: skip
    axes.set(xlabel="step", ylabel="cross-entropy (nats per token)", title=title)
    axes.legend(frameon=False)
    _save(figure, folder / "loss.png")

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    by_layer = np.array([r["mean_cosine_by_layer"] for r in evals])  # (evaluations, n_layer + 1)
    colours = plt.get_cmap("viridis")
    for layer in range(n_layer + 1):
        axes.plot(steps, by_layer[:, layer], color=colours(layer / n_layer * 0.95), marker="o", ms=3, lw=1.4)
    bar = figure.colorbar(plt.cm.ScalarMappable(plt.Normalize(0, n_layer), colours), ax=axes)
    bar.set_label(f"layer (0 = embeddings, {n_layer} = after the final norm)")
    bar.ax.yaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="step", ylabel="mean cosine between tokens", title=f"Condensation while training: {title}")
    _save(figure, folder / "cosine.png")

    figure, panels = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained", sharey=True)
    for axes, line in zip(panels, (evals[0], evals[-1]), strict=True):
        image = draw_heatmap(axes, line["histogram_by_layer"], line["mean_cosine_by_layer"])
        axes.set_title(f"step {line['step']:,}: validation loss {line['val_loss']:.3f}")
    panels[0].set_ylabel("cosine between tokens")
    panels[0].legend(frameon=False, loc="lower left", labelcolor="white")
    figure.colorbar(image, ax=panels, label="density (clipped at 10)")
    figure.suptitle(title)
    _save(figure, folder / "heatmap.png")
    return [folder / name for name in ("loss.png", "cosine.png", "heatmap.png")]


def draw_comparison(scores: list[dict], folder: Path) -> list[Path]:
    """Draw heatmap.png and cosine_by_layer.png of evaluated models side by side into `folder`; returns their paths.

    scores: what eval.py writes with --json, one dictionary per model.
    """
    plt = _pyplot()
    folder.mkdir(parents=True, exist_ok=True)
    figure, panels = plt.subplots(
        1, len(scores), figsize=(1 + 4.5 * len(scores), 4.2), layout="constrained", sharey=True, squeeze=False
    )
    for axes, s in zip(panels[0], scores, strict=True):
        image = draw_heatmap(axes, s["condensation"]["histogram_by_layer"], s["condensation"]["mean_cosine_by_layer"])
        axes.set_title(f"{s['name']}\nloss {s['loss']:.3f} nats/token", fontsize=10)
    panels[0][0].set_ylabel("cosine between tokens")
    panels[0][0].legend(frameon=False, loc="lower left", labelcolor="white")
    figure.colorbar(image, ax=panels[0], label="density (clipped at 10)")
    _save(figure, folder / "heatmap.png")

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for s, marker in zip(scores, itertools.cycle("osv^D<>Xp*")):
        mu = s["condensation"]["mean_cosine_by_layer"]
        axes.plot(np.arange(len(mu)) / (len(mu) - 1), mu, marker=marker, label=s["name"])
    axes.set(xlabel="layer fraction (0 = embeddings, 1 = after the final norm)", ylabel="mean cosine between tokens")
    axes.legend(frameon=False)
    _save(figure, folder / "cosine_by_layer.png")
    return [folder / "heatmap.png", folder / "cosine_by_layer.png"]


def draw_heatmap(axes, histogram_by_layer: list[list[float]], mean_cosine_by_layer: list[float]):
    """The paper's heat map on matplotlib axes: one column per layer, cosine upwards, density as colour 0..10.

    A line through it shows the mean cosine. Returns the image, for a colour bar.
    """
    n_layer = len(mean_cosine_by_layer) - 1
    half = 0.5 / n_layer  # columns are centred on their layer
    image = axes.imshow(
        np.array(histogram_by_layer).T, origin="lower", aspect="auto", interpolation="nearest",
        extent=(-half, 1 + half, -1, 1), cmap="viridis", vmin=0, vmax=10,
    )  # fmt: skip
    x = np.arange(n_layer + 1) / n_layer
    axes.plot(x, mean_cosine_by_layer, color="white", marker="o", ms=4, mec=ORANGE, mfc=ORANGE, lw=1.2, label="mean")
    axes.set(xlabel="layer / n_layer  (0 = embeddings)", ylim=(-1, 1))
    return image
