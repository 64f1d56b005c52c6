"""What a person sees of runs: tables, figures (matplotlib), one HTML page, and the trackers of other projects.

`scores` is always what eval.py writes with --json, one dictionary per model; `metrics` the lines of a metrics.jsonl.
"""

from minidisp.report.figures import CYCLE, cannot_draw, draw_comparison, draw_differences, draw_run, draw_study
from minidisp.report.page import html_page
from minidisp.report.progress import Progress
from minidisp.report.summary import introduction, summarise, summary_table
from minidisp.report.tables import (
    FURTHER,
    Table,
    condensation_table,
    further_table,
    layer_table,
    number,
    pairs_table,
    score_table,
    seeds_table,
    settings_table,
    table,
    writing_table,
)
from minidisp.report.trackers import loggers
from minidisp.runtime.metrics_log import metrics_lines, read_metrics

__all__ = [
    "CYCLE", "FURTHER", "Progress", "Table", "cannot_draw", "condensation_table", "draw_comparison",
    "draw_differences", "draw_run", "draw_study", "further_table", "html_page", "introduction", "layer_table",
    "loggers", "metrics_lines", "number", "pairs_table", "read_metrics", "score_table", "seeds_table", "settings_table", "summarise",
    "summary_table", "table", "writing_table",
]  # fmt: skip
