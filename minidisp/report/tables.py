"""Tables, as text and as HTML. `scores` is always the output of eval.py --json, one dictionary per model."""

import html
import math
import shutil
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from minidisp import TEXT, printable
from minidisp.comparison import LOGGING
from minidisp.dispersion import select_layers

# Metrics by layer that show what a mean cosine hides: key in the JSON without "_by_layer", label, decimals.
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
    """Text cells, to be printed or shown on a page; the first column names the rows."""

    caption: str
    headers: list[str]
    rows: list[list[str]]
    note: str = ""

    def __str__(self) -> str:
        """As text, transposed if it is wider than the terminal, or 120 characters, and narrower that way."""
        rows = [[self.caption, *self.headers[1:]], *self.rows]
        text, transposed = (table(headers, rest) for headers, *rest in (rows, zip(*rows, strict=True)))
        if _width(text) > max(shutil.get_terminal_size((120, 24)).columns, _width(transposed)):
            text = transposed
        return text + (f"\n{self.note}" if self.note else "")

    def to_html(self) -> str:
        cells = "".join(f'<th scope="col">{escaped(cell)}</th>' for cell in self.headers)
        rows = "".join(
            f'<tr><th scope="row">{escaped(row[0])}</th>'
            + "".join(f"<td>{escaped(cell)}</td>" for cell in row[1:])
            + "</tr>\n"
            for row in self.rows
        )
        note = f'<p class="muted">{escaped(self.note)}</p>' if self.note else ""
        return (
            f'<div class="scroll"><table><caption>{escaped(self.caption)}</caption>\n'
            f"<thead><tr>{cells}</tr></thead>\n<tbody>{rows}</tbody></table>{note}</div>"
        )


def _width(text: str) -> int:
    return max(map(len, text.splitlines()))


def escaped(text: str) -> str:
    """A text escaped for HTML; characters that could reorder or hide other text are made visible."""
    return html.escape(printable(text, keep="\n\t" + TEXT))


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """An aligned plain-text table; the first column is left-aligned, the others right-aligned."""
    cells = [[str(cell) for cell in row] for row in (headers, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headers))]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in cells
    )


def number(value: float | None, digits: int = 4, sign: str = "") -> str:
    """A number for a table: "-" if it is undefined (None or NaN), in scientific notation from 1e9 on.

    sign: "+" writes a plus before positive numbers.
    """
    if value is None or math.isnan(value):
        return "-"
    return f"{value:{sign},.{digits}f}" if abs(value) < 1e9 else f"{value:{sign}.3g}"


def score_table(scores: list[dict]) -> Table:
    """Loss and the scores computed from it, one column per run."""
    mark = " *" if len({s["tokenizer"] for s in scores}) > 1 else ""
    rows = [["tokens", *(f"{s['tokens']:,}" for s in scores)]]
    measures = [
        (f"loss (nats/token){mark}", "loss", 4),
        (f"perplexity{mark}", "perplexity", 2),
        ("bits per byte", "bits_per_byte", 4),
        ("word perplexity", "word_perplexity", 1),
    ]
    for label, key, digits in measures:
        rows.append([label, *(number(s[key], digits) for s in scores)])
    note = "* not comparable, since the tokenizers differ: compare bits per byte and word perplexity" if mark else ""
    return Table("scores", ["", *(s["name"] for s in scores)], rows, note)


def corpora_table(scores: list[dict]) -> Table:
    """Loss and bits per byte of each corpus, one column per run."""
    rows = []
    for name in scores[0]["corpora"]:
        parts = [s["corpora"][name] for s in scores]
        rows.append([f"{name}: tokens", *(f"{part['tokens']:,}" for part in parts)])
        rows.append([f"{name}: loss (nats/token)", *(number(part["loss"]) for part in parts)])
        rows.append([f"{name}: bits per byte", *(number(part["bits_per_byte"]) for part in parts)])
    return Table("by corpus", ["", *(s["name"] for s in scores)], rows)


def condensation_table(scores: list[dict]) -> Table:
    """Mean cosine by layer, one column per run, followed by its summary statistics."""
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
    below = {"last half": "last_half_mean", "Spearman with depth": "spearman", "Kendall with depth": "kendall"}
    for label, key in below.items():
        rows.append([label, *(number(m[key], 3) for m in measured)])
    return Table("mean cosine", ["", *(s["name"] for s in scores)], rows, _protocol(measured))


def _protocol(measured: list[dict]) -> str:
    """The number of sequences and tokens, and those of the paper if they differ."""
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
    short = ["mean cosine", "i != j", "centred", "standardised", "IsoScore*", "eff. rank", "entropy", "MEV"]
    short += ["HFC/LFC", "HFC growth"]
    columns = [("mean_cosine", "", 3), *FURTHER]
    rows = []
    for layer in range(len(measured["mean_cosine_by_layer"])):
        cells = (number(measured[f"{key}_by_layer"][layer], digits) for key, _, digits in columns)
        rows.append([str(layer) if layer else "embeddings", *cells])
    return Table(score["name"], ["layer", *short], rows)


def pairs_table(scores: list[dict]) -> Table:
    """Accuracy on minimal pairs in per cent with its interval, one column per run, then the difference to the first."""
    measured = [s["minimal_pairs"] for s in scores]

    def row(label: str, parts: list[dict]) -> list[str]:
        cells = [_percent(part, "accuracy", "") for part in parts]
        return [
            label,
            f"{parts[0]['pairs']:,}",
            *cells,
            *(_percent(part["versus_first"], "accuracy", "+") for part in parts[1:]),
        ]

    rows = [row("all", measured)]
    for key, label in (("by_field", "field"), ("by_term", "term"), ("by_file", "file")):
        rows += [row(f"{label} {name}", [m[key][name] for m in measured]) for name in measured[0][key]]
    names = [s["name"] for s in scores]
    headers = ["", "pairs", *names, *(f"{name} - {names[0]}" for name in names[1:])]
    return Table(
        "minimal pairs", headers, rows, "% of the pairs whose good sentence is more likely (95 % interval); chance: 50"
    )


def _percent(part: dict, key: str, sign: str) -> str:
    value, low, high = (number(100 * part[end], 1, sign) for end in (key, "low", "high"))
    return f"{value} ({low} to {high})"


def choices_table(scores: list[dict]) -> Table:
    """Accuracy on questions with choices in per cent, overall and per file, two rows each: acc and acc_norm."""
    measured = [s["choices"] for s in scores]
    keys = {"acc": "", "acc_norm": ", per character"}
    rows = []
    for name, first in measured[0].items():
        for key, how in keys.items():
            parts = [m[name] for m in measured]
            label = f"{name}{how} ({key})"
            cells = [f"{first['questions']:,}", number(100 * first["chance"], 1)]
            rows.append([label, *cells, *_with_differences(parts, key, share=True)])
    if len(measured[0]) == 2:  # one file: overall says the same
        rows = rows[:2]
    note = "% of the questions whose right choice has the highest log-probability (95 % interval over the questions)"
    return Table("choices", ["", "questions", "chance", *_names_and_differences(scores)], rows, note)


def completions_tables(scores: list[dict]) -> list[Table]:
    """A table of scored completions and one of generated answers, whichever were measured."""
    measured = [s["completions"] for s in scores]
    single = len(measured[0]) == 2
    kinds = [
        ("completions", "rows", {"acc": ("accuracy (acc), %", True), "perplexity": ("perplexity", False),
                                 "token_perplexity": ("perplexity per token", False)},
         "acc: every token of the completion is the most likely one; perplexity: of a completion"),
        ("answers", "rows", {"exact_match": ("exact match, %", True), "chrf": ("chrF", False), "bleu": ("BLEU", False)},
         "greedy answers; 95 % intervals over the prompts"),
    ]  # fmt: skip
    tables = []
    for caption, count, keys, note in kinds:
        rows = []
        for name in measured[0]:
            parts = [m[name] for m in measured]
            for key, (label, share) in keys.items():
                if key in parts[0] and not (single and name == "overall"):
                    cells = _with_differences(parts, key, share)
                    rows.append([f"{name}, {label}", f"{parts[0]['rows']:,}", *cells])
        if rows:
            if caption == "answers":
                speeds = [f"{m['overall']['tokens_per_second']:,.0f}" for m in measured]
                rows.append(["tokens per second", "", *speeds, *[""] * (len(scores) - 1)])
            tables.append(Table(caption, ["", count, *_names_and_differences(scores)], rows, note))
    return tables


def _names_and_differences(scores: list[dict]) -> list[str]:
    names = [s["name"] for s in scores]
    return [*names, *(f"{name} - {names[0]}" for name in names[1:])]


def _with_differences(parts: list[dict], key: str, share: bool) -> list[str]:
    """A score of every run with its interval, and the differences to the first."""

    def cell(part: dict, sign: str) -> str:
        scale, digits = (100, 1) if share else (1, 2)
        if key not in part:
            return ""
        value = number(scale * part[key], digits, sign)
        if f"{key}_interval" not in part:
            return value
        low, high = (number(scale * end, digits, sign) for end in part[f"{key}_interval"])
        return f"{value} ({low} to {high})"

    return [*(cell(part, "") for part in parts), *(cell(part.get("versus_first", {}), "+") for part in parts[1:])]


def seeds_table(scores: list[dict]) -> Table | None:
    """Mean and standard deviation over seeds, a row per score and configuration; None if none has two seeds."""
    rows, several = [], False
    for measure in scores[0].get("over_seeds", {}):
        groups = []
        for score in scores:
            if (group := score["over_seeds"][measure]) not in groups:
                groups.append(group)
        for group in groups:
            several = several or not math.isnan(group["sd"])
            versus = group.get("versus_first", {})
            interval = f"{number(versus['low'], 5, '+')} to {number(versus['high'], 5, '+')}" if versus else ""
            cells = [", ".join(map(str, group["seeds"])), number(group["mean"], 5), number(group["sd"], 5)]
            difference = number(versus["mean"], 5, "+") if versus else ""
            label = f"{measure.replace('_', ' ')}, {group['name']}"
            rows.append([label, *cells, difference, interval, versus.get("verdict", "")])
    if not several:
        return None
    note = "over the pairs of seeds; with one pair, the interval covers the evaluation text only"
    headers = ["", "seeds", "mean", "sd", "difference to the first", "95 % interval", "verdict"]
    return Table("over seeds", headers, rows, f"difference and interval: {note}")


def writing_table(scores: list[dict]) -> Table:
    """Repetition in generated continuations, a row per run and decoding; the true continuations come first."""
    keys = ["rep_2", "rep_3", "rep_4", "distinct_1", "distinct_2"]
    same_tokenizer = len({s["tokenizer"] for s in scores}) == 1
    rows = []
    for i, s in enumerate(scores):
        for way in ("true", "greedy", "nucleus"):
            if way == "true" and same_tokenizer and i > 0:
                continue
            name = "the text itself" if way == "true" and same_tokenizer else f"{s['name']}, {way}"
            rows.append([name, *(number(s["writing"][way][key], 3) for key in keys)])
    measured = scores[0]["writing"]
    note = f"continuations of {measured['texts']} {measured['of']}; rep: share of repeated n-grams"
    if not same_tokenizer:
        note += "; not comparable across runs, since the tokenizers differ"
    return Table("text generation", ["", "rep-2", "rep-3", "rep-4", "distinct-1", "distinct-2"], rows, note)


def settings_table(names: list[str], configs: list[dict | None], differing: bool = True) -> Table:
    """The settings of the runs, one column each, "-" for unset ones. differing: only those that differ."""
    rows = []
    for field in dict.fromkeys(field for config in configs if config for field in config):
        cells = ["-" if not config or config.get(field) in (None, "") else str(config[field]) for config in configs]
        known = {cell for cell, config in zip(cells, configs, strict=True) if config}
        if (len(known) > 1 and field not in LOGGING) or not differing:
            rows.append([field, *cells])
    return Table("settings that differ" if differing else "all settings", ["setting", *names], rows)
