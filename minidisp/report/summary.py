"""The first and last lines of a training run: its settings, and its results in a dozen numbers (summary.json)."""

import shlex
from collections.abc import Sequence
from pathlib import Path

import minidisp
from minidisp.config import Config
from minidisp.data import Batches, Corpora, Dataset, Examples, Mixture
from minidisp.optim import learning_rate
from minidisp.report.figures import cannot_draw
from minidisp.report.tables import number, table
from minidisp.runtime.metrics_log import read_metrics

MANY_EPOCHS = 10  # above these, a run gets a warning
MOMENTS = ("first", "best", "last")
SCORES = (
    "step",
    "val_loss",
    "perplexity",
    "bits_per_byte",
    "mean_cosine_by_layer",
    "spearman",
    "kendall",
    "last_half_mean",
)
ROWS = {
    "validation loss (nats/token)": "val_loss",
    "perplexity": "perplexity",
    "bits per byte": "bits_per_byte",
    "mean cosine, last half of layers": "last_half_mean",
    "Spearman, cosine against depth": "spearman",
}


def introduction(
    dataset: Dataset | Corpora,
    batches: Batches | Examples | Mixture,
    config: Config,
    parameters: int,
    terms: Sequence,
    where: str,
    step: int,
    changed: Sequence[str],
) -> str:
    """The first lines of a run.

    batches: the training sequences. terms: of the objective. where: the device and how it is used. step, changed: where
    a resumed run continues, and the settings that have changed, in words.
    """
    data, epochs = _data(dataset, batches, config)
    seen = config.max_steps * config.tokens_per_step
    times = ", ".join(f"{number:,.2f}" if number < MANY_EPOCHS else f"{number:,.0f}" for number in epochs)
    steps = f"{config.max_steps:,} of {config.tokens_per_step:,} tokens: {seen:,} tokens, {times} epochs"
    steps += f"; {config.optimizer}, {config.schedule} schedule, lr {config.lr:g}"
    if 0 < config.max_steps <= config.warmup_steps:
        top = learning_rate(config.max_steps - 1, config)
        steps += (
            f" (all of it warm-up: the learning rate reaches {top:.2g}; lower --warmup-steps {config.warmup_steps})"
        )
    objective = " + ".join(f"{term.weight:g} x {term.details}".removeprefix("1 x ") for term in terms)
    if config.noisy_embedding:
        objective += f"; noise of up to {config.noisy_embedding:g} / sqrt(T C) on the token embeddings"
    if config.active_forgetting:
        tied = ", tied to the output layer," if config.tied else ""
        objective += f"; token embeddings{tied} reset every {config.active_forgetting:,} steps"
    lines = [
        f"minidisp {minidisp.__version__}  {config.run_dir}",
        *data,
        f"model   {config.arch} {config.n_layer} layers x {config.n_embd}, context {config.block_size}: "
        f"{parameters:,} parameters",
        f"steps   {steps}",
        f"loss    {objective}",
        f"device  {where}",
    ]
    if max(epochs) > MANY_EPOCHS:
        enough = max(1, int(config.max_steps * MANY_EPOCHS / max(epochs)))
        lines.append(
            f"warning: {max(epochs):,.0f} epochs of the same text, so the model will overfit: pass a larger corpus "
            f"with --data, or --max-steps {enough}"
        )
    if reason := cannot_draw():
        lines.append(reason)
    if config.resume:
        lines += ["", f"resumed at step {step}" + ", from here on with " * bool(changed) + ", ".join(changed)]
        return "\n".join(lines)
    return "\n".join(lines) + "\n"


def _data(
    dataset: Dataset | Corpora, batches: Batches | Examples | Mixture, config: Config
) -> tuple[list[str], list[float]]:
    """For each corpus, a line with its size and its share of a mixture, and the number of epochs in this run."""
    lines, epochs, total = [], [], sum(dataset.weights)
    sequences = config.max_steps * config.batch_size * config.grad_accum
    read = batches.parts if isinstance(batches, Mixture) else [batches]
    for part, weight, examples in zip(dataset.parts, dataset.weights, read, strict=True):
        split = part.split("train")
        windows = split.tokens / config.block_size
        line = f"{part.meta['name']}: {split.tokens:,} training tokens, vocabulary {config.vocab_size:,}"
        if part.template:
            counted = part.meta["splits"]["train"]["counted"]
            line += f"; {counted:,} of them counted, in {split.documents:,} examples in {examples.n:,} windows"
            windows = examples.n
            if examples.cut:
                line += f"; {examples.cut:,} examples are longer than the context and lose their start"
        if total > weight:
            line += f"; {weight} of {total} sequences"
        lines.append(f"data    {line}")
        epochs.append(sequences * weight / total / windows)
    return lines, epochs


def next_command(run: Path, text: str) -> str:
    """The command to try next: generates text from the start of a line of the corpus."""
    lines = text.splitlines()
    # Not one such as "---", which would be read as a flag.
    words = next((line.split() for line in lines[1:] or lines if line.strip(" \t-") == line.strip() != ""), ["The"])
    prompt = " ".join(words[:3])[:40]
    return f"next    {shlex.join(['python', 'eval.py', str(run), '--split', 'none', '--sample', prompt])}"


def summarise(run: Path, parameters: int, tokens: int, seconds: float, skipped: int) -> dict:
    """The cost of the run, and the scores of its first, best and last evaluation."""
    lines = [line for line in read_metrics(run / "metrics.jsonl") if "val_loss" in line]
    chosen = (lines[0], min(lines, key=lambda line: line["val_loss"]), lines[-1])
    return {
        "run": str(run),
        "parameters": parameters,
        "tokens": tokens,
        "seconds": seconds,
        "skipped": skipped,
        "tokens_per_second": tokens / seconds if seconds else None,
        **{when: {key: line[key] for key in SCORES} for when, line in zip(MOMENTS, chosen, strict=True)},
    }


def summary_table(summary: dict) -> str:
    """The result of `summarise` as text."""
    rows = [[label, *(number(summary[when][key]) for when in MOMENTS)] for label, key in ROWS.items()]
    headers = ["", *(f"{when} (step {summary[when]['step']:,})" for when in MOMENTS)]
    speed = f", {summary['tokens_per_second']:,.0f} tokens/s" if summary["tokens_per_second"] else ""
    speed += f", {summary['skipped']} updates skipped" if summary["skipped"] else ""
    return (
        table(headers, rows)
        + f"\n\n{summary['parameters']:,} parameters, {summary['tokens']:,} tokens in {summary['seconds']:.0f} s{speed}"
    )
