"""Figures, drawn with matplotlib into files: training curves of any number of runs, comparisons of models, studies."""

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

from minidisp import printable
from minidisp.runtime.files import write_atomic

# Okabe-Ito: distinguishable in print and with colour blindness.
BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#999999"
CYCLE = [BLUE, ORANGE, "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"]
# Distinguishable without colour.
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
X_AXES = {"step": "step", "tokens": "training tokens", "seconds": "training time (s)"}  # keys of metrics.jsonl
VISIBLE = 0.02  # lower densities stay white in heat maps
STYLE = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "savefig.dpi": 150,
    "pdf.fonttype": 42,
    "text.parse_math": False,
}


def cannot_draw() -> str | None:
    """One line that says why no figures can be drawn and what to do, or None. Does not import matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return "no figures: matplotlib is not installed: pip install matplotlib, or the extra minidisp[figures]"
    return None


def drawing(draw: Callable[..., list[Path]]) -> Callable[..., list[Path]]:
    """Decorator: the function draws with our style, independent of the environment, and never raises.

    It returns the paths of its figures. If drawing fails, it returns none and prints the reason as one line on stderr:
    a finished run matters more than its figures. If cannot_draw returns a reason, commands print it before they start.
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
            print(f"warning: no figures: {printable(reason, 300)}", file=sys.stderr)
            return []

    return draw_or_warn


@contextlib.contextmanager
def _our_style() -> Iterator[None]:
    """Import matplotlib late, since that takes half a second, and use its default settings plus STYLE.

    MPLBACKEND names the backend for showing windows; Jupyter sets it for all commands. Figures are only written to
    files here, so it is not needed, but importing matplotlib fails if the named backend is not installed. The user's
    matplotlibrc is ignored as well: it may enable LaTeX, for example.
    """
    log = logging.getLogger("matplotlib")  # silences the notice that fonts are cached elsewhere if HOME is read-only
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


def new_figure(size: tuple[float, float]):
    """An empty figure of this size in inches, without pyplot, which would keep it in memory and look for a display."""
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained")


def subplots(rows: int = 1, columns: int = 1, *, size: tuple[float, float], **options):
    """(figure, axes) as pyplot.subplots returns them."""
    figure = new_figure(size)
    return figure, figure.subplots(rows, columns, **options)


def save(figure, path: Path) -> Path:
    """Write the figure atomically in the format that the suffix names; the same figure gives the same bytes."""
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

    loss = save(_curves({title: metrics}), folder / "loss.png")

    evals = [line for line in metrics if "val_loss" in line]
    steps = [line["step"] for line in evals]
    n_layer = len(evals[0]["mean_cosine_by_layer"]) - 1
    figure, axes = subplots(size=(7, 4.2))
    by_layer = np.array([r["mean_cosine_by_layer"] for r in evals], dtype=float)  # (evaluations, n_layer + 1)
    colours = matplotlib.colormaps["viridis"]
    for layer in range(n_layer + 1):
        axes.plot(steps, by_layer[:, layer], color=colours(layer / n_layer * 0.95), marker="o", ms=3, lw=1.4)
    bar = figure.colorbar(ScalarMappable(Normalize(0, n_layer), colours), ax=axes)
    bar.set_label(f"layer (0 = embeddings, {n_layer} = after the final norm)")
    bar.ax.yaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="step", ylabel="mean pairwise cosine similarity", title=f"Mean cosine during training: {title}")
    cosine = save(figure, folder / "cosine.png")

    figure, panels = subplots(1, 2, size=(10, 4.2), sharey=True)
    cosines = _cosine_range([line["histogram_by_layer"] for line in (evals[0], evals[-1])])
    for axes, line in zip(panels, (evals[0], evals[-1]), strict=True):
        image = draw_heatmap(axes, line["histogram_by_layer"], line["mean_cosine_by_layer"], cosines)
        axes.set_title(f"step {line['step']:,}: validation loss {line['val_loss']:.3f}", fontsize=11)
        axes.set_xlabel("layer (0 = embeddings)")
    panels[0].set_ylabel("pairwise cosine similarity")
    panels[0].legend(frameon=False, loc="upper left")
    figure.colorbar(image, ax=panels, label=f"density (clipped at {image.norm.vmax:g})")
    figure.suptitle(title)
    return [loss, cosine, save(figure, folder / "heatmap.png")]


def draw_curves(
    runs: dict[str, list[dict]], path: Path, x: str = "step", log: bool = False, smooth: int | None = None
) -> None:
    """Draw the training curves of any number of runs into one file; see _curves. Unlike the others, it raises."""
    with _our_style():
        save(_curves(runs, x, log, smooth), path)


def _curves(runs: dict[str, list[dict]], x: str = "step", log: bool = False, smooth: int | None = None):
    """A figure with the loss of every run and, below it, gradient norm, learning rate and throughput where logged.

    runs: name -> lines of metrics.jsonl. x: a key of X_AXES. log: logarithmic loss axis over the whole range; without
    it, the axis is scaled to the loss after the warm-up. smooth: logged steps in the moving average of the training
    loss (default: about a twentieth of all); with one run, the raw values are drawn faintly behind it.
    """
    alone = len(runs) == 1
    panels = {
        "grad_norm": ("gradient norm", "log"),
        "lr": ("learning rate", "linear"),
        "tokens_per_second": ("tokens per second", "linear"),
    }
    logged = {key for lines in runs.values() for line in lines for key in panels if line.get(key) is not None}
    shown = [key for key in panels if key in logged]
    figure = new_figure((9, 7 if shown else 4.6))
    layout = [["loss"] * max(1, len(shown))] + ([shown] if shown else [])
    axes = figure.subplot_mosaic(layout, height_ratios=[2.2, 1][: len(layout)])
    times = [line["seconds"] for lines in runs.values() for line in lines if line.get("seconds") is not None]
    scale, label = (60, "training time (minutes)") if x == "seconds" and times and max(times) > 300 else (1, X_AXES[x])

    heights = []  # the losses to which the axis is scaled
    for (name, lines), style in zip(runs.items(), line_styles(len(runs)), strict=True):
        start = 0 if log else _after_warm_up(lines, x)
        train, val = _points(lines, x, "ce"), _points(lines, x, "val_loss")
        window = smooth or 2 * (len(train[0]) // 40) + 1
        smoothed = (train[0], moving_average(train[1], window))
        if alone:
            axes["loss"].plot(train[0] / scale, train[1], color=GREY, lw=0.6, alpha=0.5)
        over = f" (moving average over {window} logged steps)" if window > 1 else ""
        colour = GREY if alone else style["color"]
        last = f" (last {val[1][-1]:.3f})" if len(val[1]) else ""
        alpha, label_of = (1, f"training{over}") if alone else (0.45, None)
        axes["loss"].plot(smoothed[0] / scale, smoothed[1], color=colour, lw=1.2, alpha=alpha, label=label_of)
        label_of = f"validation{last}" if alone else _label(name)
        look = {**style, "ms": 3.5, "markevery": max(1, len(val[0]) // 20)}
        axes["loss"].plot(val[0] / scale, val[1], label=label_of, **look)
        heights += [y[at >= start] for at, y in (smoothed, val)]
        for key in shown:
            at, y = _points(lines, x, key)
            axes[key].plot(at / scale, y, color=style["color"], ls=style["ls"], lw=1.2)
    heights = np.concatenate(heights)
    heights = heights[np.isfinite(heights)]
    if log:
        _log_scale(axes["loss"])
    elif len(heights):
        room = 0.06 * (np.ptp(heights) or abs(heights[0]) or 1)
        axes["loss"].set_ylim(heights.min() - room, heights.max() + room)
    title = "Training and validation loss" if alone else "Validation loss (training loss, smoothed, faint)"
    axes["loss"].set(xlabel=label, ylabel="cross-entropy (nats per token)", title=title)
    if axes["loss"].get_legend_handles_labels()[0]:
        axes["loss"].legend(frameon=False)
    for key in shown:
        axes[key].set_title(panels[key][0], fontsize=10)
        axes[key].tick_params(labelsize=9)
        axes[key].locator_params(axis="x", nbins=4)
        if panels[key][1] == "log":
            _log_scale(axes[key])
        else:
            axes[key].set_ylim(bottom=0)
            axes[key].yaxis.set_major_formatter("{x:g}")
    if x == "tokens":
        from matplotlib.ticker import EngFormatter

        for panel in axes.values():
            panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    if alone:
        figure.suptitle(_shorten(next(iter(runs)), 72))
    return figure


def _log_scale(axes) -> None:
    """A logarithmic y axis with plain numbers, even within one decade; unchanged if no value is above 0."""
    from matplotlib.ticker import MaxNLocator, NullFormatter, NullLocator

    if not any((np.asarray(line.get_ydata()) > 0).any() for line in axes.get_lines()):
        return
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high < 20 * low:
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _points(lines: list[dict], x: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    """x and y of the lines that have both."""
    pairs = [(line[x], line[key]) for line in lines if line.get(x) is not None and line.get(key) is not None]
    at, y = np.array(pairs, dtype=float).reshape(-1, 2).T
    return at, y


def _after_warm_up(lines: list[dict], x: str) -> float:
    """The x after which the loss axis is scaled: the peak of the learning rate, within 5 % and 50 % of the run."""
    at, lr = _points(lines, x, "lr")
    if len(at) < 2:
        return 0.0
    end = at[-1]
    return float(np.clip(at[lr.argmax()], 0.05 * end, 0.5 * end))


def moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """Centred moving average over `window` values, fewer at both ends: (N,) -> (N,)."""
    sums = np.concatenate(([0.0], np.cumsum(values)))
    here = np.arange(len(values))
    starts, ends = np.maximum(0, here - (window - 1) // 2), np.minimum(len(values), here + window // 2 + 1)
    return (sums[ends] - sums[starts]) / (ends - starts)


@drawing
def draw_comparison(scores: list[dict], metrics: list[list[dict]], folder: Path) -> list[Path]:
    """Draw evaluated models side by side into `folder`; returns the paths. Each figure is a PNG and, for papers, a PDF.

    heatmap: a row per model, the paper's averaged matrices on the left and the individual pairs on the right.
    cosine_by_layer: mean cosine against layer fraction. loss_by_step: the training curves of the models with metrics
    (one list per model, possibly empty), if any. Scores without condensation give only the last figure.
    """
    paths = []

    def both(figure, name: str) -> None:
        paths.extend(save(figure, folder / (name + suffix)) for suffix in (".png", ".pdf"))

    if all("condensation" in s for s in scores):
        measured = [s["condensation"] for s in scores]
        kinds = (
            ("average over sequences, i = j included", "histogram_by_layer", "mean_cosine_by_layer", 10),
            (
                "pairs i != j of single sequences",
                "pair_histogram_by_layer",
                "off_diagonal_mean_by_layer",
                pair_density([m["pair_histogram_by_layer"] for m in measured]),
            ),
        )
        figure, rows = subplots(len(scores), 2, size=(9, 1.6 + 2.6 * len(scores)), sharey="col", squeeze=False)
        for column, (title, histogram, mean, density) in zip(rows.T, kinds, strict=True):
            cosines = _cosine_range([m[histogram] for m in measured])
            for axes, m in zip(column, measured, strict=True):
                image = draw_heatmap(axes, m[histogram], m[mean], cosines, density)
            column[0].set_title(title, fontsize=11)
            column[-1].set_xlabel("layer (0 = embeddings)")
            bar = figure.colorbar(image, ax=list(column), location="bottom", shrink=0.8, aspect=30)
            bar.set_label(f"density (clipped at {density:g})")
        for left, s in zip(rows[:, 0], scores, strict=True):
            left.set_ylabel(f"{_shorten(s['name'])}\ncosine similarity", fontsize=10)
        rows[0][0].legend(frameon=False, loc="upper left")
        both(figure, "heatmap")

        figure, axes = subplots(size=(7, 4.2))
        for s, style in zip(scores, line_styles(len(scores)), strict=True):
            mu = s["condensation"]["mean_cosine_by_layer"]
            axes.plot(np.arange(len(mu)) / (len(mu) - 1), mu, label=_label(s["name"]), **style)
        axes.axhline(0, color=GREY, lw=0.8, zorder=0)
        axes.set(
            xlabel="layer / n_layer (0 = embeddings, 1 = after the final norm)",
            ylabel="mean pairwise cosine similarity",
        )
        axes.legend(frameon=False)
        both(figure, "cosine_by_layer")

    if any(metrics):
        names = _unique([s["name"] for s in scores])
        both(_curves({name: lines for name, lines in zip(names, metrics, strict=True) if lines}), "loss_by_step")
    return paths


def _unique(names: list[str]) -> list[str]:
    """The names, with a number added to repeated ones."""
    return [name if names.count(name) == 1 else f"{name} ({names[:i].count(name) + 1})" for i, name in enumerate(names)]


def line_styles(n: int) -> list[dict]:
    """Line styles that differ in colour, dashes and marker."""
    looks = zip(range(n), itertools.cycle(CYCLE), itertools.cycle(DASHES), itertools.cycle(MARKERS), strict=False)
    return [
        {"color": color, "ls": dashes, "marker": marker, "ms": 4.5, "lw": 1.6} for _, color, dashes, marker in looks
    ]


def _shorten(name: str, most: int = 28) -> str:
    return name if len(name) <= most else f"{name[: most // 2]}...{name[3 - most // 2 :]}"


def _label(name: str) -> str:
    """A legend entry; matplotlib omits those that begin with an underscore."""
    return _shorten(f" {name}" if name.startswith("_") else name)


def _cosine_range(histograms: list[list[list[float]]]) -> tuple[float, float]:
    """The range of cosines with a visible density in any of the heat maps, plus a margin, within -1 to 1.

    histograms: of each heat map, per layer, densities over equal bins from -1 to 1. The last bin, which holds the pairs
    i = j of averaged matrices, is ignored.
    """
    low, high = 1.0, -1.0
    for histogram in histograms:
        density = np.nan_to_num(np.array(histogram, dtype=float))  # (layers, bins)
        edges = np.linspace(-1, 1, density.shape[1] + 1)
        visible = np.flatnonzero((density[:, :-1] > VISIBLE).any(axis=0))
        if len(visible):
            low, high = min(low, edges[visible[0]]), max(high, edges[visible[-1] + 1])
    return (max(-1.0, low - 0.05), min(1.0, high + 0.05)) if low < high else (-1.0, 1.0)


def pair_density(histograms: list[list[list[float]]]) -> float:
    """Top of the colour scale for individual pairs, whose histograms are wider than the paper's: at most 10.

    Rounded up to a multiple of 0.5. The last bin, which equal tokens fill, is ignored.
    """
    tops = (np.nan_to_num(np.array(histogram, dtype=float))[:, :-1].max() for histogram in histograms)
    top = max([0.5, *tops])
    return float(min(10, np.ceil(2 * top) / 2))


def draw_heatmap(
    axes,
    histogram_by_layer: list[list[float]],
    mean_cosine_by_layer: list[float],
    cosines: tuple[float, float] = (-1, 1),
    density: float = 10,
):
    """The paper's heat map on matplotlib axes: a column per layer, cosine upwards, density as colour (paper: 0..10).

    A line shows the mean cosine; nearly empty cells stay white. cosines: the range to show. Returns the image, for a
    colour bar.
    """
    layers = len(mean_cosine_by_layer)
    histogram = np.array(histogram_by_layer, dtype=float).T
    image = axes.imshow(
        np.ma.masked_where(~(histogram > VISIBLE), histogram),
        origin="lower",
        aspect="auto",
        interpolation="nearest",
        extent=(-0.5, layers - 0.5, -1, 1),
        cmap="Blues",
        vmin=0,
        vmax=density,
    )
    axes.plot(range(layers), mean_cosine_by_layer, color=ORANGE, marker="o", ms=4, lw=1.4, label="mean")
    axes.set(ylim=cosines, xlim=(-0.5, layers - 0.5))
    axes.xaxis.get_major_locator().set_params(integer=True)
    return image


@drawing
def draw_study(evaluations: dict[str, list[list[dict]]], title: str, path: Path) -> list[Path]:
    """Draw the conditions of a study over seeds into one PNG: cosine by layer, cosine and loss during training.

    evaluations: condition -> for each seed, the evaluations in its run's metrics.jsonl. Lines are means over the seeds;
    bands reach from the lowest seed to the highest.
    """
    figure, (by_layer, while_training, loss) = subplots(1, 3, size=(14, 4.4))

    def line(axes, x, over_seeds, label, marker) -> None:
        y = np.array(over_seeds, dtype=float)  # (seeds, points)
        (drawn,) = axes.plot(x, y.mean(axis=0), marker=marker, ms=4, lw=1.5, label=label)
        axes.fill_between(x, y.min(axis=0), y.max(axis=0), color=drawn.get_color(), alpha=0.2, lw=0)

    for (condition, runs), marker in zip(evaluations.items(), itertools.cycle("osv^D<>")):
        final = [run[-1]["mean_cosine_by_layer"] for run in runs]
        steps = [e["step"] for e in runs[0]]
        line(by_layer, np.linspace(0, 1, len(final[0])), final, condition, marker)
        line(while_training, steps, [[e["last_half_mean"] for e in run] for run in runs], condition, marker)
        after = range(1 if len(steps) > 2 else 0, len(steps))  # step 0 would take most of the axis
        bits = [[run[k]["bits_per_byte"] for k in after] for run in runs]
        line(loss, [steps[k] for k in after], bits, condition, marker)
    by_layer.set(
        xlabel="layer / n_layer (0 = embeddings)",
        ylabel="mean pairwise cosine similarity",
        title="Mean cosine by layer, after training",
    )
    title_of = "Mean cosine during training"
    while_training.set(xlabel="step", ylabel="mean cosine, last half of the layers", title=title_of)
    loss.set(xlabel="step", ylabel="validation bits per byte", title="Validation bits per byte")
    loss.legend(frameon=False)
    seeds = len(next(iter(evaluations.values())))
    figure.suptitle(f"{title} (mean and range of {seeds} seeds)")
    return [save(figure, path)]


@drawing
def draw_differences(
    compared: dict[str, dict[str, dict]], measures: dict[str, tuple[str, tuple[str, str]]], title: str, path: Path
) -> list[Path]:
    """Draw paired differences to a baseline with intervals into one PNG: a panel per measure, a row per condition.

    compared: measure -> condition -> difference, low, high; the first condition is the baseline. measures: those to
    draw -> label and the words for a lower and a higher value. Intervals that exclude 0 have the colour of their side,
    others are grey.
    """
    base, *conditions = next(iter(compared.values()))
    size = 4.8 * len(measures) + 0.09 * max(map(len, conditions), default=0), 2.0 + 0.32 * len(conditions)
    figure, panels = subplots(1, len(measures), size=size, sharey=True, squeeze=False)
    for axes, (key, (label, words)) in zip(panels[0], measures.items(), strict=True):
        colours = (ORANGE, BLUE) if words[0] == "worse" else (BLUE, ORANGE)
        for y, condition in enumerate(conditions):
            c = compared[key][condition]
            colour = colours[0] if c["high"] < 0 else colours[1] if c["low"] > 0 else GREY
            axes.plot([c["low"], c["high"]], [y, y], color=colour, lw=2.5, solid_capstyle="butt")
            axes.plot(c["difference"], y, "o", color=colour, ms=6)
        axes.axvline(0, color="black", lw=1)
        axes.set(xlabel=f"{label}:\ndifference to {base}, 95 % interval")
        axes.locator_params(axis="x", nbins=6)  # the labels of more would overlap
        for word, colour, side, text in zip(
            words, colours, (0, 1), ("\N{LEFTWARDS ARROW} {}", "{} \N{RIGHTWARDS ARROW}"), strict=True
        ):
            axes.annotate(
                text.format(word),
                (side, 1),
                xytext=(0, 4),
                xycoords="axes fraction",
                color=colour,
                textcoords="offset points",
                ha=("left", "right")[side],
                weight="bold",
            )
    panels[0][0].set_yticks(range(len(conditions)), conditions)
    panels[0][0].set_ylim(max(len(conditions), 1) - 0.5, -0.5)
    figure.suptitle(f"{title} (grey: not significant)")
    return [save(figure, path)]
