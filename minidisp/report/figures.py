"""Figures, drawn with matplotlib into files: of one training, of runs side by side, of a study."""

import contextlib
import functools
import importlib.util
import io
import itertools
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from minidisp.runtime.files import write_atomic

# Okabe-Ito, told apart by colour-blind readers and in print.
BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#999999"
CYCLE = [BLUE, ORANGE, "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"]
# Also told apart without any colour.
DASHES = [
    "-",
    (0, (6, 2)),
    (0, (2, 1.5)),
    (0, (7, 2, 1.5, 2)),
    (0, (4, 1.5, 1.5, 1.5, 1.5, 1.5)),
    (0, (10, 3)),
    (0, (1, 1)),
]
MARKERS = "osv^D<>Xp*"
PAIR_DENSITY = 4  # top of the colour scale for individual pairs, whose histograms are wider than the paper's
STYLE = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 150, "pdf.fonttype": 42,
         "text.parse_math": False}  # fmt: skip


def cannot_draw() -> str | None:
    """One line that says why no figure can be drawn here and what to do, or None. It takes no time."""
    if importlib.util.find_spec("matplotlib") is None:
        return "no figures: matplotlib is not there: pip install matplotlib, or the extra minidisp[figures]"
    return None


def drawing(draw: Callable[..., list[Path]]) -> Callable[..., list[Path]]:
    """Decorator: the function draws with our style, whatever the environment says, and never fails.

    It returns the paths of its figures. If drawing goes wrong, it returns none, and the reason is one line on stderr: a
    run that is finished is worth more than its figures. Where cannot_draw has a reason, commands say it before they
    begin.
    """

    @functools.wraps(draw)
    def draw_or_warn(*args, **kwargs) -> list[Path]:
        if cannot_draw():
            return []
        try:
            with _our_style():
                return draw(*args, **kwargs)
        except Exception as error:  # matplotlib, its fonts and its settings can fail in any way
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            print(f"warning: no figures: {reason}", file=sys.stderr)
            return []

    return draw_or_warn


@contextlib.contextmanager
def _our_style() -> Iterator[None]:
    """Import matplotlib late, since it takes half a second, and draw as it does by default but for STYLE.

    MPLBACKEND names a way to show windows, which Jupyter sets for all commands. Figures here are only written to files,
    so no backend is chosen; but importing matplotlib alone fails where the one named is not installed. The user's
    matplotlibrc counts no more: it may ask for LaTeX, for example.
    """
    log = logging.getLogger("matplotlib")  # that it keeps its fonts elsewhere, since HOME cannot be written, is no news
    level, backend = log.level, os.environ.pop("MPLBACKEND", None)
    log.setLevel(logging.ERROR)
    try:
        matplotlib = importlib.import_module("matplotlib")
        style = {name: value for name, value in matplotlib.rcParamsDefault.items() if name != "backend"}
        style |= {**STYLE, "axes.prop_cycle": matplotlib.cycler(color=CYCLE)}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph")  # a name in a script that the font lacks
            warnings.filterwarnings("ignore", category=matplotlib.MatplotlibDeprecationWarning)
            with matplotlib.rc_context(style):
                yield
    finally:
        log.setLevel(level)
        if backend is not None:
            os.environ["MPLBACKEND"] = backend


def _subplots(rows: int = 1, columns: int = 1, *, size: tuple[float, float], **options):
    """(figure, axes) as pyplot.subplots gives them, without pyplot: nothing is kept, and no window is thought of."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def _save(figure, path: Path) -> Path:
    """Write the figure as the kind of file that its name says, whole or not at all, the same bytes each time."""
    content = io.BytesIO()
    metadata = {"CreationDate": None} if path.suffix == ".pdf" else None
    figure.savefig(content, format=path.suffix[1:], bbox_inches="tight", metadata=metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda file: file.write(content.getvalue()))
    return path


@drawing
def draw_run(metrics: list[dict], title: str, folder: Path) -> list[Path]:
    """Draw loss.png, cosine.png and heatmap.png of a training run into `folder`; returns their paths.

    metrics: the lines of metrics.jsonl, with at least one evaluation among them.
    """
    import matplotlib
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    train = [line for line in metrics if "loss" in line]
    evals = [line for line in metrics if "val_loss" in line]
    steps = [line["step"] for line in evals]
    n_layer = len(evals[0]["mean_cosine_by_layer"]) - 1
    figure, axes = _subplots(size=(7, 4.2))
    if train:
        axes.plot([r["step"] for r in train], [r["ce"] for r in train], color=GREY, lw=1, label="training batch")
    axes.plot(steps, [r["val_loss"] for r in evals], color=BLUE, marker="o", ms=3.5, label="validation")
    axes.annotate(f"{evals[-1]['val_loss']:.3f}", (steps[-1], evals[-1]["val_loss"]), xytext=(0, 8),
                  textcoords="offset points", ha="right", color=BLUE)  # fmt: skip
    axes.set(xlabel="step", ylabel="cross-entropy (nats per token)", title=title)
    axes.legend(frameon=False)
    loss = _save(figure, folder / "loss.png")

    figure, axes = _subplots(size=(7, 4.2))
    by_layer = np.array([r["mean_cosine_by_layer"] for r in evals], dtype=float)  # (evaluations, n_layer + 1)
    colours = matplotlib.colormaps["viridis"]
    for layer in range(n_layer + 1):
        axes.plot(steps, by_layer[:, layer], color=colours(layer / n_layer * 0.95), marker="o", ms=3, lw=1.4)
    bar = figure.colorbar(ScalarMappable(Normalize(0, n_layer), colours), ax=axes)
    bar.set_label(f"layer (0 = embeddings, {n_layer} = after the final norm)")
    bar.ax.yaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="step", ylabel="mean cosine between tokens", title=f"Condensation while training: {title}")
    cosine = _save(figure, folder / "cosine.png")

    figure, panels = _subplots(1, 2, size=(10, 4.2), sharey=True)
    for axes, line in zip(panels, (evals[0], evals[-1]), strict=True):
        image = draw_heatmap(axes, line["histogram_by_layer"], line["mean_cosine_by_layer"])
        axes.set_title(f"step {line['step']:,}: validation loss {line['val_loss']:.3f}")
        axes.set_xlabel("layer / n_layer  (0 = embeddings)")
    panels[0].set_ylabel("cosine between tokens")
    panels[0].legend(frameon=False, loc="lower left", labelcolor="white")
    figure.colorbar(image, ax=panels, label="density (clipped at 10)")
    figure.suptitle(title)
    return [loss, cosine, _save(figure, folder / "heatmap.png")]


@drawing
def draw_comparison(scores: list[dict], metrics: list[list[dict]], folder: Path) -> list[Path]:
    """Draw evaluated models side by side into `folder`; returns the paths. Each figure is a PNG and, for papers, a PDF.

    heatmap: a row per model, the paper's averaged matrices on the left and the individual pairs on the right.
    cosine_by_layer: mean cosine against layer fraction. loss_by_step: for the models with metrics (a list each, which
    may be empty), if there is one.
    """
    paths = []

    def save(figure, name: str) -> None:
        paths.extend(_save(figure, folder / (name + suffix)) for suffix in (".png", ".pdf"))

    figure, rows = _subplots(len(scores), 2, size=(8.6, 1.5 + 2.7 * len(scores)), sharey=True, squeeze=False)
    for (left, right), s in zip(rows, scores, strict=True):
        measured = s["condensation"]
        images = (
            draw_heatmap(left, measured["histogram_by_layer"], measured["mean_cosine_by_layer"]),
            draw_heatmap(
                right, measured["pair_histogram_by_layer"], measured["off_diagonal_mean_by_layer"], PAIR_DENSITY
            ),
        )
        left.set_ylabel("cosine between tokens")
        left.annotate(
            _shorten(s["name"]), (-0.27, 0.5), xycoords="axes fraction", rotation=90, va="center", weight="bold"
        )
    titles = "average over sequences, i = j included", "pairs i != j of single sequences"
    for axes, column, image, title in zip(rows[0], rows.T, images, titles, strict=True):
        axes.set_title(title, fontsize=11)
        axes.set_yticks(np.linspace(-1, 1, 5))
        column[-1].set_xlabel("layer / n_layer  (0 = embeddings)")
        bar = figure.colorbar(image, ax=column, location="bottom", shrink=0.8, aspect=30)
        bar.set_label(f"density (clipped at {image.norm.vmax:g})")
    rows[0][0].legend(frameon=False, loc="lower left", labelcolor="white")
    save(figure, "heatmap")

    figure, axes = _subplots(size=(7, 4.2))
    for s, style in zip(scores, line_styles(len(scores)), strict=True):
        mu = s["condensation"]["mean_cosine_by_layer"]
        axes.plot(np.arange(len(mu)) / (len(mu) - 1), mu, label=_label(s["name"]), **style)
    axes.axhline(0, color=GREY, lw=0.8, zorder=0)
    axes.set(
        xlabel="layer / n_layer  (0 = embeddings, 1 = after the final norm)",
        ylabel="mean cosine between tokens (1: all alike)",
    )
    axes.legend(frameon=False)
    save(figure, "cosine_by_layer")

    if any(metrics):
        figure, axes = _subplots(size=(7, 4.2))
        for s, lines, style in zip(scores, metrics, line_styles(len(scores)), strict=True):
            train = [(line["step"], line["ce"]) for line in lines if "ce" in line]
            evals = [(line["step"], line["val_loss"]) for line in lines if "val_loss" in line]
            if train:
                axes.plot(*zip(*train, strict=True), color=style["color"], ls=style["ls"], lw=0.8, alpha=0.35)
            if evals:
                every = -(-len(evals) // 20)
                axes.plot(*zip(*evals, strict=True), label=_label(s["name"]), markevery=every, **style)
        axes.set(
            xlabel="step", ylabel="cross-entropy (nats per token)", title="validation, and faint the training batches"
        )
        axes.legend(frameon=False)
        save(figure, "loss_by_step")
    return paths


def line_styles(n: int) -> list[dict]:
    """Line styles that differ in colour, dashes and marker."""
    looks = zip(range(n), itertools.cycle(CYCLE), itertools.cycle(DASHES), itertools.cycle(MARKERS), strict=False)
    return [
        {"color": color, "ls": dashes, "marker": marker, "ms": 4.5, "lw": 1.6} for _, color, dashes, marker in looks
    ]


def _shorten(name: str) -> str:
    return name if len(name) <= 28 else f"{name[:13]}...{name[-13:]}"


def _label(name: str) -> str:
    """A legend entry; matplotlib leaves out those that begin with an underscore."""
    return _shorten(f" {name}" if name.startswith("_") else name)


def draw_heatmap(axes, histogram_by_layer: list[list[float]], mean_cosine_by_layer: list[float], density: float = 10):
    """The paper's heat map on matplotlib axes: a column per layer, cosine upwards, density as colour (its: 0..10).

    A line through it shows the mean cosine. Returns the image, for a colour bar.
    """
    n_layer = len(mean_cosine_by_layer) - 1
    half = 0.5 / n_layer  # columns are centred on their layer
    image = axes.imshow(
        np.array(histogram_by_layer, dtype=float).T, origin="lower", aspect="auto", interpolation="nearest",
        extent=(-half, 1 + half, -1, 1), cmap="viridis", vmin=0, vmax=density,
    )  # fmt: skip
    x = np.arange(n_layer + 1) / n_layer
    axes.plot(x, mean_cosine_by_layer, color="white", marker="o", ms=4, mec=ORANGE, mfc=ORANGE, lw=1.2, label="mean")
    axes.set(ylim=(-1, 1))
    return image


@drawing
def draw_study(evaluations: dict[str, list[list[dict]]], title: str, path: Path) -> list[Path]:
    """Draw what several arms of a study do, over seeds, into one PNG: cosine by layer, cosine and loss while training.

    evaluations: arm -> for each seed the evaluations of its run in metrics.jsonl. Lines are means over the seeds, bands
    reach from the lowest seed to the highest.
    """
    figure, (by_layer, while_training, loss) = _subplots(1, 3, size=(14, 4.4))

    def line(axes, x, over_seeds, label, marker) -> None:
        y = np.array(over_seeds, dtype=float)  # (seeds, points)
        (drawn,) = axes.plot(x, y.mean(axis=0), marker=marker, ms=4, lw=1.5, label=label)
        axes.fill_between(x, y.min(axis=0), y.max(axis=0), color=drawn.get_color(), alpha=0.2, lw=0)

    for (arm, runs), marker in zip(evaluations.items(), itertools.cycle("osv^D<>")):
        final = [run[-1]["mean_cosine_by_layer"] for run in runs]
        steps = [e["step"] for e in runs[0]]
        line(by_layer, np.linspace(0, 1, len(final[0])), final, arm, marker)
        line(while_training, steps, [[e["last_half_mean"] for e in run] for run in runs], arm, marker)
        line(loss, steps, [[e["bits_per_byte"] for e in run] for run in runs], arm, marker)
    by_layer.set(
        xlabel="layer / n_layer  (0 = embeddings)", ylabel="mean cosine between tokens", title="after training"
    )
    while_training.set(xlabel="step", ylabel="mean cosine, last half of the layers", title="while training")
    loss.set(xlabel="step", ylabel="validation bits per byte", title="prediction")
    loss.legend(frameon=False)
    seeds = len(next(iter(evaluations.values())))
    figure.suptitle(f"{title} (mean and range of {seeds} seeds)")
    return [_save(figure, path)]


@drawing
def draw_differences(
    compared: dict[str, dict[str, dict]], measures: dict[str, str], title: str, path: Path
) -> list[Path]:
    """Draw paired differences to a baseline with their intervals into one PNG: a panel per measure, a row per arm.

    compared: measure -> arm -> difference, low, high; the first arm is the baseline. measures: those to draw -> label.
    Intervals that leave out 0 are blue, the others grey.
    """
    base, *arms = next(iter(compared.values()))
    size = 5.5 * len(measures) + 1.5, 1.6 + 0.32 * len(arms)
    figure, panels = _subplots(1, len(measures), size=size, sharey=True, squeeze=False)
    for axes, (key, label) in zip(panels[0], measures.items(), strict=True):
        for y, arm in enumerate(arms):
            c = compared[key][arm]
            clear = c["low"] > 0 or c["high"] < 0
            axes.plot([c["low"], c["high"]], [y, y], color=BLUE if clear else GREY, lw=2.5, solid_capstyle="butt")
            axes.plot(c["difference"], y, "o", color=BLUE if clear else GREY, ms=6)
        axes.axvline(0, color="black", lw=1)
        axes.set(xlabel=f"{label}:\ndifference to {base}, 95 % interval")
        axes.locator_params(axis="x", nbins=6)  # more of them would touch
    panels[0][0].set_yticks(range(len(arms)), arms)
    panels[0][0].set_ylim(len(arms) - 0.5, -0.5)
    figure.suptitle(f"{title} (grey: no difference that these seeds can show)")
    return [_save(figure, path)]
