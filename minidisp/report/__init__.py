"""Output for users: tables, figures (matplotlib), an HTML page, progress, and TensorBoard and wandb loggers.

`scores` is always the output of eval.py --json, one dictionary per model; `metrics` the lines of a metrics.jsonl.
Names are loaded on first use, so `python -m minidisp.report` draws curves without importing torch.
"""

import importlib

_HOME = {
    "figures": ("CYCLE", "cannot_draw", "draw_comparison", "draw_curves", "draw_differences", "draw_run", "draw_study"),
    "page": ("html_page",),
    "progress": ("Progress",),
    "summary": ("introduction", "next_command", "summarise", "summary_table"),
    "tables": ("FURTHER", "Table", "choices_table", "completions_tables", "condensation_table", "corpora_table",
               "further_table", "layer_table", "number", "pairs_table", "score_table", "seeds_table", "settings_table",
               "table", "writing_table"),
    "trackers": ("loggers",),
}  # fmt: skip
_MODULES = {name: f"minidisp.report.{module}" for module, names in _HOME.items() for name in names}
_MODULES |= dict.fromkeys(("metrics_lines", "read_metrics"), "minidisp.runtime.metrics_log")
__all__ = sorted(_MODULES)


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module 'minidisp.report' has no attribute '{name}'")
    return getattr(importlib.import_module(_MODULES[name]), name)
