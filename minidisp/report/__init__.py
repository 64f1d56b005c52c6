"""What a person sees of runs: tables, figures (matplotlib), one HTML page, and the loggers of other tools.

`scores` is always what eval.py writes with --json, one dictionary per model; `metrics` the lines of a metrics.jsonl.
"""

import html
import importlib
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minidisp import InputError, parse_json, read_bytes
from minidisp.dispersion import select_layers
from minidisp.runtime.checkpoint import to_json

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
PAGE_POINTS = 100  # evaluations of a run, and training steps times ten, that the HTML page shows at most
PAIR_DENSITY = 4  # top of the colour scale for individual pairs, whose histograms are wider than the paper's
# Scores per layer that answer what a mean cosine hides: name in the JSON, what it is, decimals.
FURTHER = [
    ("off_diagonal_mean", "mean cosine, i != j", 3),
    ("centred_mean", "mean cosine, i != j, centred", 3),
    ("standardised_mean", "mean cosine, i != j, standardised", 3),
    ("isoscore_star", "IsoScore*", 4),
    ("effective_rank", "effective rank", 1),
    ("singular_entropy", "singular-value entropy (bits)", 3),
    ("mev", "MEV, share of the first direction", 3),
    ("hfc_lfc_ratio", "HFC / LFC", 3),
    ("log_hfc_growth", "log HFC growth", 3),
]


class Table(NamedTuple):
    """Text cells, to be printed or put on a page; the first column names the rows."""

    caption: str
    headers: list[str]
    rows: list[list[str]]
    note: str = ""

    def __str__(self) -> str:
        return table([self.caption, *self.headers[1:]], self.rows) + (f"\n{self.note}" if self.note else "")

    def to_html(self) -> str:
        cells = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in self.headers)
        rows = "".join(
            f'<tr><th scope="row">{html.escape(row[0])}</th>'
            + "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:])
            + "</tr>\n"
            for row in self.rows
        )
        note = f'<p class="muted">{html.escape(self.note)}</p>' if self.note else ""
        return (
            f'<div class="scroll"><table><caption>{html.escape(self.caption)}</caption>\n'
            f"<thead><tr>{cells}</tr></thead>\n<tbody>{rows}</tbody></table>{note}</div>"
        )


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


def score_table(scores: list[dict]) -> Table:
    """Loss and what follows from it, one column per run."""
    mark = " *" if len({s["tokenizer"] for s in scores}) > 1 else ""
    rows = [["tokens", *(f"{s['tokens']:,}" for s in scores)]]
    for label, key, digits in ((f"loss (nats/token){mark}", "loss", 4), (f"perplexity{mark}", "perplexity", 2),
                               ("bits per byte", "bits_per_byte", 4), ("word perplexity", "word_perplexity", 1)):  # fmt: skip
        rows.append([label, *(number(s[key], digits) for s in scores)])
    note = "* not comparable, since the tokenizers differ: compare bits per byte and word perplexity" if mark else ""
    return Table("scores", ["", *(s["name"] for s in scores)], rows, note)


def condensation_table(scores: list[dict]) -> Table:
    """Mean cosine per layer, one column per run, and its scores below."""
    measured = [s["condensation"] for s in scores]
    by_layer = [m["mean_cosine_by_layer"] for m in measured]
    rows = []
    for layer in range(max(map(len, by_layer))):
        label = "embeddings" if layer == 0 else f"layer {layer}"
        rows.append([label, *(number(mu[layer] if layer < len(mu) else None, 3) for mu in by_layer)])
    for k in range(2, 6):
        means = [m["last_1_to_5_means"] for m in measured]
        if any(len(mean) >= k for mean in means):
            rows.append([f"last {k} layers", *(number(m[k - 1] if len(m) >= k else None, 3) for m in means)])
    for label, key in (("last half", "last_half_mean"), ("Spearman with depth", "spearman"), ("Kendall with depth", "kendall")):  # fmt: skip
        rows.append([label, *(number(m[key], 3) for m in measured)])
    return Table("mean cosine", ["", *(s["name"] for s in scores)], rows, _protocol(measured))


def _protocol(measured: list[dict]) -> str:
    """What was measured, and how far that is from the paper's protocol."""
    sizes = list(dict.fromkeys((m["sequences"], m["tokens_per_sequence"]) for m in measured))
    text = "over " + " and ".join(f"{sequences} sequences of {tokens} tokens" for sequences, tokens in sizes)
    return text if sizes == [(100, 512)] else text + " (the paper: 100 of 512)"


def further_table(scores: list[dict]) -> Table:
    """The further metrics, each averaged over the later half of the layers, one column per run."""
    rows = []
    for key, label, digits in FURTHER:
        row = [label]
        for s in scores:
            values = s["condensation"][f"{key}_by_layer"]
            late_half = [values[layer] for layer in select_layers("late_half", len(values) - 1)]
            row.append(number(float(np.mean(late_half)), digits))
        rows.append(row)
    return Table("later half of the layers", ["", *(s["name"] for s in scores)], rows)


def layer_table(score: dict) -> Table:
    """The further metrics of one run, layer by layer."""
    measured = score["condensation"]
    short = ["mean cosine", "i != j", "centred", "standardised", "IsoScore*", "eff. rank", "entropy", "MEV", "HFC/LFC", "HFC growth"]  # fmt: skip
    columns = [("mean_cosine", "", 3), *FURTHER]
    rows = [
        [str(layer) if layer else "embeddings", *(number(measured[f"{key}_by_layer"][layer], digits) for key, _, digits in columns)]
        for layer in range(len(measured["mean_cosine_by_layer"]))
    ]  # fmt: skip
    return Table(score["name"], ["layer", *short], rows)


def settings_table(names: list[str], configs: list[dict | None], differing: bool = True) -> Table:
    """The settings of the runs, one column each, "-" where one has none; only those that differ unless told otherwise."""
    rows = []
    for field in dict.fromkeys(field for config in configs if config for field in config):
        cells = ["-" if not config or config.get(field) in (None, "") else str(config[field]) for config in configs]
        known = {cell for cell, config in zip(cells, configs, strict=True) if config}
        if len(known) > 1 or not differing:
            rows.append([field, *cells])
    return Table("settings that differ" if differing else "all settings", ["setting", *names], rows)


# What is drawn from a line of metrics.jsonl, and how many lists deep its numbers are.
_DRAWN = {"ce": 0, "val_loss": 0, "mean_cosine_by_layer": 1, "histogram_by_layer": 2}


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl, in order. Raises InputError naming the file and the line that is damaged.

    A last line without its end is left out: it is being written, or its writer was killed.
    """
    return [line for line, _ in metrics_lines(read_bytes(path), path)]


def metrics_lines(content: bytes, path: Path) -> Iterator[tuple[dict, int]]:
    """Every whole line of a metrics.jsonl with the number of bytes up to its end; see read_metrics."""
    end, last_step = 0, 0
    for number, text in enumerate(content.split(b"\n")[:-1], start=1):
        end += len(text) + 1
        line = parse_json(text, f"{path}, line {number},")
        step = line.get("step") if isinstance(line, dict) else None
        if type(step) is not int or not last_step <= step < 1 << 31:
            raise InputError(f"{path}, line {number}, is damaged: it has no step, or one that was there before")
        if wrong := _wrong_value(line):
            raise InputError(f"{path}, line {number}, is damaged: {wrong} is missing or of the wrong type")
        last_step = step
        yield line, end


def _wrong_value(line: dict) -> str | None:
    """The first value of a line of metrics.jsonl that a table or a figure could not use."""
    depths = dict(_DRAWN)
    if "loss" in line:
        depths |= {"loss": 0}
    if "val_loss" in line:
        depths |= dict.fromkeys(("perplexity", "bits_per_byte", "spearman", "kendall", "last_half_mean"), 0)
    required = {"loss": ("loss", "ce"), "val_loss": depths.keys() - {"loss", "ce"}}
    needed = {name for key, names in required.items() if key in line for name in names}
    for name, depth in depths.items():
        if name in line and not _is_numbers(line[name], depth):
            return name
        if name in needed and name not in line:
            return name
    if "val_loss" in line:
        if line["val_loss"] is None:  # such an evaluation ends the run
            return "val_loss"
        cosines, histogram = line["mean_cosine_by_layer"], line["histogram_by_layer"]
        if len(cosines) < 2:
            return "mean_cosine_by_layer"
        if len(histogram) != len(cosines) or len({len(layer) for layer in histogram}) > 1 or not histogram[0]:
            return "histogram_by_layer"
    return None


def _is_numbers(value, depth: int) -> bool:
    """Whether this is a number, or None for one that is not finite, or with depth > 0 a list of such of depth - 1."""
    if depth:
        return isinstance(value, list) and all(_is_numbers(item, depth - 1) for item in value)
    return value is None or (type(value) in (int, float) and abs(value) < 1e300)


def _import(module: str, package: str, extra: str, need: str):
    """An optional package, or InputError that says how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise InputError(
            f"{need} needs a package that is not there: pip install {package}, or the extra minidisp[{extra}]"
        ) from None


def _pyplot():
    """matplotlib.pyplot with our style; imported late, since it takes half a second that training need not wait for."""
    matplotlib = _import("matplotlib", "matplotlib", "figures", "drawing figures")
    matplotlib.use("Agg")  # no window, no display
    plt = importlib.import_module("matplotlib.pyplot")
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 150, "pdf.fonttype": 42,
                         "text.parse_math": False, "axes.prop_cycle": matplotlib.cycler(color=CYCLE)})  # fmt: skip
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
    by_layer = np.array([r["mean_cosine_by_layer"] for r in evals], dtype=float)  # (evaluations, n_layer + 1)
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
        axes.set_xlabel("layer / n_layer  (0 = embeddings)")
    panels[0].set_ylabel("cosine between tokens")
    panels[0].legend(frameon=False, loc="lower left", labelcolor="white")
    figure.colorbar(image, ax=panels, label="density (clipped at 10)")
    figure.suptitle(title)
    _save(figure, folder / "heatmap.png")
    return [folder / name for name in ("loss.png", "cosine.png", "heatmap.png")]


def draw_comparison(scores: list[dict], metrics: list[list[dict]], folder: Path) -> list[Path]:
    """Draw evaluated models side by side into `folder`; returns the paths. Each figure is a PNG and, for papers, a PDF.

    heatmap: a row per model, the paper's averaged matrices on the left and the individual pairs on the right.
    cosine_by_layer: mean cosine against layer fraction. loss_by_step: for the models with metrics (a list each, which may
    be empty), if there is one.
    """
    plt = _pyplot()
    folder.mkdir(parents=True, exist_ok=True)
    paths = []

    def save(figure, name: str) -> None:
        for suffix in (".png", ".pdf"):
            paths.append(folder / (name + suffix))
            figure.savefig(
                paths[-1], bbox_inches="tight", metadata={"CreationDate": None} if suffix == ".pdf" else None
            )
        plt.close(figure)

    figure, rows = plt.subplots(len(scores), 2, figsize=(8.6, 1.5 + 2.7 * len(scores)), layout="constrained", sharey=True,
                                squeeze=False)  # fmt: skip
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

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for s, style in zip(scores, _styles(len(scores)), strict=True):
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
        figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
        for s, lines, style in zip(scores, metrics, _styles(len(scores)), strict=True):
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


def _styles(n: int) -> list[dict]:
    """Line styles that differ in colour, dashes and marker."""
    return [
        {"color": CYCLE[i % len(CYCLE)], "ls": DASHES[i % len(DASHES)], "marker": MARKERS[i % len(MARKERS)], "ms": 4.5, "lw": 1.6}
        for i in range(n)
    ]  # fmt: skip


def _shorten(name: str) -> str:
    return name if len(name) <= 28 else f"{name[:13]}...{name[-13:]}"


def _label(name: str) -> str:
    """A legend entry; matplotlib leaves out those that begin with an underscore."""
    return _shorten(f" {name}" if name.startswith("_") else name)


def draw_heatmap(axes, histogram_by_layer: list[list[float]], mean_cosine_by_layer: list[float], density: float = 10):
    """The paper's heat map on matplotlib axes: one column per layer, cosine upwards, density as colour (0..10 in the paper).

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


def draw_study(evaluations: dict[str, list[list[dict]]], title: str, path: Path) -> Path:
    """Draw what several arms of a study do, over seeds, into one PNG: cosine by layer, cosine and loss while training.

    evaluations: arm -> for each seed the evaluations of its run in metrics.jsonl. Lines are means over the seeds, bands
    reach from the lowest seed to the highest.
    """
    plt = _pyplot()
    figure, (by_layer, while_training, loss) = plt.subplots(1, 3, figsize=(14, 4.4), layout="constrained")

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
    _save(figure, path)
    return path


def draw_differences(compared: dict[str, dict[str, dict]], measures: dict[str, str], title: str, path: Path) -> Path:
    """Draw paired differences to a baseline with their intervals into one PNG: a panel per measure, a row per arm.

    compared: measure -> arm -> difference, low, high; the first arm is the baseline. measures: those to draw -> label.
    Intervals that leave out 0 are blue, the others grey.
    """
    plt = _pyplot()
    base, *arms = next(iter(compared.values()))
    figure, panels = plt.subplots(1, len(measures), figsize=(5.5 * len(measures) + 1.5, 1.6 + 0.32 * len(arms)),
                                  layout="constrained", sharey=True, squeeze=False)  # fmt: skip
    for axes, (key, label) in zip(panels[0], measures.items(), strict=True):
        for y, arm in enumerate(arms):
            c = compared[key][arm]
            clear = c["low"] > 0 or c["high"] < 0
            axes.plot([c["low"], c["high"]], [y, y], color=BLUE if clear else GREY, lw=2.5, solid_capstyle="butt")
            axes.plot(c["difference"], y, "o", color=BLUE if clear else GREY, ms=6)
        axes.axvline(0, color="black", lw=1)
        axes.set(xlabel=f"{label}:\ndifference to {base}, 95 % interval")
    panels[0][0].set_yticks(range(len(arms)), arms)
    panels[0][0].set_ylim(len(arms) - 0.5, -0.5)
    figure.suptitle(f"{title} (grey: no difference that these seeds can show)")
    _save(figure, path)
    return path


def html_page(
    subtitle: str,
    sentences: list[str],
    tables: list[Table],
    details: list[Table],
    scores: list[dict],
    metrics: list[list[dict]],
) -> str:
    """The text of one HTML page that needs nothing but itself: tables, curves, and heat maps through the training.

    details: tables to fold away. metrics: a list of lines for every model, empty where there are none. All text is escaped, and
    the page forbids itself to load anything.
    """
    runs = []
    styles = _styles(len(scores))
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
        "pair_density": PAIR_DENSITY,
    }
    parts = {
        "SUBTITLE": html.escape(subtitle),
        "SENTENCES": "<ul>" + "".join(f"<li>{html.escape(s)}</li>" for s in sentences) + "</ul>" if sentences else "",
        "TABLES": "".join(t.to_html() for t in tables),
        "DETAILS": "".join(
            f"<details><summary>{html.escape(t.caption)}</summary>{t.to_html()}</details>" for t in details
        ),
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


def loggers(tensorboard: bool, wandb: bool) -> list:
    """The loggers asked for: open(run, config, step), then log(line of metrics.jsonl), at last close().

    Raises InputError if a package is missing, so that a run does not begin without them.
    """
    return [*([TensorBoardLogger()] if tensorboard else ()), *([WandbLogger()] if wandb else ())]


class TensorBoardLogger:
    """Writes scalars to <run>/tensorboard: view them with `tensorboard --logdir runs`."""

    def __init__(self):
        self._module = _import("torch.utils.tensorboard", "tensorboard", "tensorboard", "--tensorboard")

    def open(self, run: Path, config: dict, step: int) -> None:
        """step: where the run goes on; what an earlier session has logged behind it is hidden."""
        self._writer = self._module.SummaryWriter(run / "tensorboard", purge_step=step + 1 if step else None)

    def log(self, line: dict) -> None:
        for name, value in _scalars(line).items():
            self._writer.add_scalar(name, value, line["step"])
        self._writer.flush()  # to be seen now, and there after a crash

    def close(self) -> None:
        self._writer.close()


class WandbLogger:
    """Logs to the project minidisp under the run folder's name; wandb's own files go into the run folder.

    A run that is resumed is another one there, in the same group.
    """

    def __init__(self):
        self._module = _import("wandb", "wandb", "wandb", "--wandb")

    def open(self, run: Path, config: dict, step: int) -> None:
        try:
            self._run = self._module.init(
                project="minidisp", name=run.name, group=run.name, dir=str(run), config=config
            )
        except self._module.Error as error:
            raise InputError(f"--wandb: {error}; WANDB_MODE=offline needs neither account nor network") from None

    def log(self, line: dict) -> None:
        self._run.log(_scalars(line), step=line["step"])

    def close(self) -> None:
        self._run.finish()


def _scalars(line: dict) -> dict[str, float]:
    """The numbers in a line of metrics.jsonl; a list by layer becomes name/00, name/01, ...; histograms stay behind."""
    scalars = {}
    for name, value in line.items():
        if isinstance(value, list) and not isinstance(value[0], list):
            scalars.update({f"{name}/{layer:02d}": number for layer, number in enumerate(value)})
        elif name != "step" and not isinstance(value, list):
            scalars[name] = value
    return scalars
