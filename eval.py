"""Evaluate runs: how well they predict, how far they have condensed, and what they write; one, or several side by side.

    python eval.py runs/NAME
    python eval.py runs/BASELINE runs/OTHER --split test --json results.json
    python eval.py runs/BASELINE runs/OTHER --html report.html --figures figures
    python eval.py runs/NAME --sample "def main("
    python eval.py runs/NAME --sample -
    python eval.py runs/NAME --minimal-pairs "blimp/*.jsonl" --split none
    python eval.py --hf FOLDER --data NAME

Every token of the split is predicted exactly once, from as much text before it as fits: windows are as long as the
model's context, and each one advances by --stride tokens. The first token of the split follows an end-of-document
token. Exit codes: 0 done; 2 bad usage or input.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # python -P leaves it out
if __name__ == "__main__":  # Ctrl-C while torch is imported
    __import__("minidisp").end_on_interrupt()

import argparse
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from data.prepare import find_or_prepare
from minidisp import InputError, hf, printable, report
from minidisp.comparison import Comparison, Run, short_names
from minidisp.config import Config, read_json, to_dict
from minidisp.data import Dataset
from minidisp.model import GPT
from minidisp.runtime import checkpoint, files
from minidisp.runtime.cli import Parser, exit_code, take_over
from minidisp.runtime.device import pick_device
from minidisp.sampling import Sampling, check_text, read_prompts, sample_all, stream_sample, typed_prompts, visible
from minidisp.scoring import (
    CONTINUATION_TOKENS,
    PROMPT_TOKENS,
    Text,
    choose_texts,
    compare_texts,
    score_text,
    writing,
)
from minidisp.tasks import compare_pairs, read_pairs, score_pairs, summarise_pairs


class Subject(NamedTuple):
    """What is evaluated: a model, and what is known of its training."""

    name: str
    model: GPT  # in eval mode, on the device
    tokenizer: object
    config: dict | None  # settings of its training
    metrics: list[dict]  # lines of its metrics.jsonl, none if there is no such file
    data_hash: str | None = None  # of the corpus that it was trained on

    @property
    def run(self) -> Run:
        """What comparisons need to know of it."""
        return Run(self.name, self.tokenizer.hash, self.config, self.data_hash)


class Findings(NamedTuple):
    """What is printed and put on the page: tables, tables to fold away there, and sentences that compare runs."""

    tables: list[report.Table]
    details: list[report.Table]
    sentences: list[str]

    def add(self, comparison: Comparison, scores: list[dict], of: str) -> None:
        """What the runs differ by in a score, which is called `of` in the JSON file."""
        self.sentences.extend(comparison.sentences)
        if len(scores) > 1:
            for group in comparison.groups:
                for score in (score for score in scores if score["name"] in group["runs"]):
                    score.setdefault("over_seeds", {})[of] = group


def main(argv: list[str] | None = None) -> list[dict]:
    """Evaluate what the command line names; prints tables and returns the list of scores that --json writes."""
    take_over()
    args = parse(argv)
    device = pick_device(args.device)
    pairs = read_pairs(args.minimal_pairs) if args.minimal_pairs is not None else []
    prompts = read_prompts(args.prompts) if args.prompts is not None else []
    subjects = load_subjects(args.runs, args.hf, args.block_size, device)
    if args.sampling or args.texts:
        refuse_broken(subjects)
    scores = [
        {
            "name": s.name,
            "tokenizer": s.tokenizer.hash,
            "parameters": s.model.num_params(),
            "block_size": s.model.config.block_size,
        }
        for s in subjects
    ]
    found, measured_on = Findings([], [], []), ""
    if args.split != "none":
        corpus = Dataset(find_or_prepare(args.data or subjects[0].config["data"]))
        if not args.data:
            found.sentences.extend(other_corpus(subjects, corpus))
        text = Text.read(corpus, args.split, args.tokens)
        chosen = choose_texts(text, [s.tokenizer for s in subjects], args.texts) if args.texts else None
        measure_text(subjects, scores, found, text, args.stride, device)
        measured_on = (
            f"{corpus.meta['name']}, {args.split} split: {scores[0]['bytes']:,} bytes, {scores[0]['words']:,} words"
        )
    if pairs:
        measure_pairs(subjects, scores, found, pairs, device)
    if args.texts:
        measure_writing(subjects, scores, found, *chosen, args.seed or 0, device)
    if seeds := report.seeds_table(scores):
        found.tables.append(seeds)
    if args.split != "none":  # last, since it is long
        found.tables.extend([report.condensation_table(scores), report.further_table(scores)])

    # Files first: whatever is printed or sampled then can fail without taking the numbers along.
    if args.json:
        write_json(args.json, scores)
    figures = report.draw_comparison(scores, [s.metrics for s in subjects], args.figures) if args.figures else []
    if args.html:
        write_page(args.html, measured_on, subjects, scores, found)
    layers = [] if args.split == "none" or not args.layers else [report.layer_table(s) for s in scores]
    blocks = ["\n".join(found.sentences)] if found.sentences else []  # the answer first
    if blocks := [*blocks, *found.tables, *layers]:
        print(*blocks, sep="\n\n")
    for path in figures:
        print(f"figure  {printable(path)}")
    if args.html:
        print(f"page    {printable(args.html)}")
    if args.sampling:
        texts = typed_prompts() if args.sample == "-" else [] if args.sample is None else [args.sample]
        sample_prompts(subjects, scores, texts, prompts, args.sampling)
        if args.json:
            write_json(args.json, scores)
        if args.html:
            write_page(args.html, measured_on, subjects, scores, found)
    return scores


# --- the command line -------------------------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line, complete and checked: what can be refused without a model is refused here.

    Adds `sampling`, a Sampling, or None if nothing is sampled. json, html and figures are paths or None.
    """
    parser = Parser(
        prog="eval.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    _add_flags(parser)
    args = parser.parse_intermixed_args(argv)  # a RUN may stand anywhere
    if min(args.tokens, args.stride, args.block_size, args.texts) < 0:
        raise InputError("--tokens, --stride, --block-size and --texts must be 0 or more")
    if args.block_size and not args.hf:
        raise InputError("--block-size goes with --hf: a run is evaluated with the context that it was trained with")
    if wrong := next((run for run in args.runs if run.endswith(".jsonl")), None):
        raise InputError(f"{wrong} is no run: if it is for --minimal-pairs, put the pattern in quotes")
    needs_text = [
        flag for flag in ("data", "tokens", "stride", "layers", "figures", "html", "texts") if getattr(args, flag)
    ]
    if args.split is None:
        args.split = "none" if args.sample == "-" and not needs_text else "val"
    if args.split == "none" and needs_text:
        raise InputError(f"--{needs_text[0]} goes with held-out text: leave --split none out, or that flag")
    if args.split == "none" and args.sample is args.prompts is args.minimal_pairs is None:
        raise InputError("--split none leaves nothing to do: add --sample, --prompts or --minimal-pairs")
    if not args.runs and not (args.hf and (args.data or args.split == "none")):
        raise InputError("give a RUN, or --hf DIR with --data NAME (python eval.py --help lists the flags)")
    given = {name: value for name in Sampling.__dataclass_fields__ if (value := getattr(args, name)) is not None}
    args.sampling = Sampling(**given)
    if args.sample is args.prompts is None:
        args.sampling = None
        if alone := next((name for name in given if name != "seed" or not args.texts), None):
            raise InputError(f"--{alone.replace('_', '-')} goes with --sample or --prompts: add one of them")
    check_text(args.sample or "", "--sample")
    for flag in ("json", "html", "figures"):
        if getattr(args, flag) is not None:
            setattr(args, flag, output_path(f"--{flag}", getattr(args, flag), folder=flag == "figures"))
    outputs = [os.path.realpath(path) for path in (args.json, args.html, args.figures) if path]
    if len(set(outputs)) < len(outputs):
        raise InputError("--json, --html and --figures must be different paths")
    if args.figures and (reason := report.cannot_draw()):
        raise InputError(f"--figures: {reason}")
    return args


def _add_flags(parser: Parser) -> None:
    what = parser.add_argument_group("what is evaluated")
    what.add_argument(
        "runs", nargs="*", metavar="RUN", help="run folder (its best checkpoint is taken), or checkpoint file"
    )
    what.add_argument(
        "--hf",
        action="append",
        default=[],
        metavar="DIR",
        help="a GPT-2, Qwen3 or Apertus model: its Hugging Face folder, or owner/name on the hub, with its own tokenizer; may "
        "be repeated",
    )
    what.add_argument(
        "--block-size", type=int, default=0, metavar="N", help="context of the --hf models in tokens; 0 = their own"
    )
    what.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="default auto")

    text = parser.add_argument_group("held-out text")
    text.add_argument("--data", default="", metavar="TEXT", help="corpus to evaluate on; default: the first run's own")
    text.add_argument(
        "--split",
        choices=("val", "test", "none"),
        help="held-out part of the corpus; none: measure nothing on it (default: val, but none for --sample - alone)",
    )
    text.add_argument(
        "--tokens", type=int, default=0, metavar="N", help="evaluate the first N tokens only; 0 = all (default)"
    )
    text.add_argument(
        "--stride",
        type=int,
        default=0,
        metavar="N",
        help="tokens a window advances by, 1 to the model's context; smaller is slower and gives every token more "
        "context (default: half the context)",
    )
    text.add_argument("--layers", action="store_true", help="print the further metrics layer by layer, too")
    text.add_argument(
        "--texts",
        type=int,
        default=0,
        metavar="N",
        help=f"let every run go on with the first {PROMPT_TOKENS} tokens of N documents for {CONTINUATION_TOKENS} "
        "more, greedy and nucleus, and measure how often it repeats itself",
    )

    pairs = parser.add_argument_group("minimal pairs")
    pairs.add_argument(
        "--minimal-pairs",
        metavar="GLOB",
        help="JSON lines with sentence_good and sentence_bad, as in BLiMP: how often is the good one likelier? Put a "
        'pattern in quotes, such as "blimp/*.jsonl"',
    )

    default = Sampling()
    sample = parser.add_argument_group("samples")
    sample.add_argument(
        "--sample",
        metavar="TEXT",
        help="let every run go on with this text; -: with what you type, until an empty line or Ctrl-D",
    )
    sample.add_argument("--prompts", metavar="FILE", help="let every run go on with each line of this file")
    sample.add_argument(
        "--samples", type=int, metavar="N", help=f"continuations of every prompt (default {default.samples})"
    )
    sample.add_argument(
        "--max-new-tokens", type=int, metavar="N", help=f"most tokens of each (default {default.max_new_tokens})"
    )
    sample.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help=f"lower is tamer, higher wilder; 0 takes the likeliest token (default {default.temperature})",
    )
    sample.add_argument("--top-k", type=int, metavar="K", help="draw among the K likeliest tokens (default: all)")
    sample.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="draw among the fewest tokens that have probability P together (default: all)",
    )
    sample.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help=f"of the first sample; the next has N + 1; the same for every run (default {default.seed})",
    )
    sample.add_argument("--stop", metavar="TEXT", help="end a continuation before this text")

    files = parser.add_argument_group("files, written before anything is printed")
    files.add_argument(
        "--json", metavar="FILE", help="all scores, condensation per layer included, and at the end the samples"
    )
    files.add_argument(
        "--figures", metavar="DIR", help="heat maps, cosine by layer and loss by step, as PNG and PDF, into this folder"
    )
    files.add_argument(
        "--html", metavar="FILE", help="all scores, with the course of the training, as one page that opens offline"
    )


def output_path(flag: str, given: str, folder: bool) -> Path:
    """The path to write to. Raises InputError if that could not be done, long before it is; nothing is created."""
    path = Path(os.path.expanduser(given))
    try:
        if folder and path.exists() and not path.is_dir():
            raise InputError(f"{flag} {given} is no folder: give another one")
        if not folder and path.is_dir():
            raise InputError(f"{flag} {given!r} is a folder: give a file")
        if not folder and path.exists() and not path.is_file():
            raise InputError(f"{flag} {given} is not a regular file: give another one")
        if not folder and path.exists() and not os.access(path, os.W_OK):
            raise InputError(f"{flag} {given} is read-only: give another one")
        if not folder:
            path.with_name(f"{path.name}.tmp").exists()  # raises if the name is too long
        there = path if folder else path.parent
        while not there.exists():
            there = there.parent
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise InputError(f"{flag} {given} cannot be written: {error.strerror}") from None
    return path


# --- what is evaluated ------------------------------------------------------------------------------------------------


def load_subjects(runs: list[str], folders: list[str], block_size: int, device: torch.device) -> list[Subject]:
    """Run folders or checkpoint files, and Hugging Face models behind them, as evaluation needs them.

    block_size: the context of the Hugging Face models in tokens, 0 = their own.
    """
    subjects, names = [], short_names([*runs, *folders])
    for run, name in zip(runs, names, strict=False):
        model, vocabulary, config = checkpoint.load_run(run, device)
        metrics = checkpoint.find(run).parent / "metrics.jsonl"
        lines = report.read_metrics(metrics) if metrics.is_file() else []
        subjects.append(Subject(name, model, vocabulary, _recipe(config), lines, _data_hash(metrics.parent)))
    for folder, name in zip(folders, names[len(runs) :], strict=True):
        subjects.append(Subject(name, *hf.load(folder, device, block_size), None, []))
    return subjects


def _recipe(config: Config) -> dict:
    """The settings that make a run what it is."""
    return {key: value for key, value in to_dict(config).items() if key not in ("out", "resume", "overwrite")}


def _data_hash(run: Path) -> str | None:
    """The hash of the corpus that a run was trained on, from its config.json; None if that does not say."""
    path = run / "config.json"
    environment = read_json(path).get("environment") if path.is_file() else None
    found = environment.get("data_hash") if isinstance(environment, dict) else None
    return found if isinstance(found, str) else None


def refuse_broken(subjects: list[Subject]) -> None:
    """Raise InputError naming a model that cannot be sampled from, since its weights are not finite."""
    for subject in subjects:
        if not all(parameter.isfinite().all() for parameter in subject.model.parameters()):
            raise InputError(
                f"{subject.name} cannot be sampled from: its weights are not finite, its training diverged"
            )


# --- what is measured: each adds to the scores, and to what is shown --------------------------------------------------


def measure_text(
    subjects: list[Subject], scores: list[dict], found: Findings, text: Text, stride: int, device: torch.device
) -> None:
    """Prediction and condensation on held-out text."""
    results = [score_text(s.name, s.model, s.tokenizer, text, stride, device) for s in subjects]
    found.add(compare_texts([s.run for s in subjects], results), scores, "bits_per_byte")
    for score, result in zip(scores, results, strict=True):
        score.update(result.scores)
    names, configs = [s.name for s in subjects], [s.config for s in subjects]
    settings = report.settings_table(names, configs)
    found.tables.append(report.score_table(scores))
    if settings.rows:
        found.tables.append(settings)
    found.details.extend(report.layer_table(score) for score in scores)
    found.details.append(report.settings_table(names, configs, differing=False))


def measure_pairs(
    subjects: list[Subject], scores: list[dict], found: Findings, pairs: list, device: torch.device
) -> None:
    """Accuracy on minimal pairs."""
    values = [score_pairs(s.model, s.tokenizer, pairs, device) for s in subjects]
    summaries = summarise_pairs(pairs, values)
    found.add(compare_pairs([s.run for s in subjects], values, summaries), scores, "minimal_pairs")
    for score, summary in zip(scores, summaries, strict=True):
        score["minimal_pairs"] = summary
    found.tables.append(report.pairs_table(scores))


def measure_writing(
    subjects: list[Subject],
    scores: list[dict],
    found: Findings,
    texts: list[str],
    kind: str,
    seed: int,
    device: torch.device,
) -> None:
    """How often the continuations of held-out texts repeat themselves. kind: what choose_texts says of them."""
    for subject, score in zip(subjects, scores, strict=True):
        ways = writing(subject.model, subject.tokenizer, texts, seed, device)
        score["writing"] = {"texts": len(texts), "of": kind, "seed": seed, **ways}
    found.tables.append(report.writing_table(scores))


def other_corpus(subjects: list[Subject], corpus: Dataset) -> list[str]:
    """A sentence for runs that were trained on another state of the corpus than the one that is measured on."""
    same = [s for s in subjects if s.config and s.config["data"] == subjects[0].config["data"]]
    changed = [s.name for s in same if s.data_hash not in (None, corpus.hash)]
    if not changed:
        return []
    return [
        f"{corpus.folder} is not what {' and '.join(changed)} was trained on: the corpus has changed, or it is another one. "
        "This text may be in their training data"
    ]


# --- what comes out ---------------------------------------------------------------------------------------------------


def write_json(path: Path, scores: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, scores)


def write_page(path: Path, measured_on: str, subjects: list[Subject], scores: list[dict], found: Findings) -> None:
    metrics = [s.metrics for s in subjects]
    page = report.html_page(measured_on, found.sentences, found.tables, found.details, scores, metrics)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomic(path, lambda file: file.write(page.encode()))


def sample_prompts(
    subjects: list[Subject], scores: list[dict], typed: Iterable[str], prompts: list[str], sampling: Sampling
) -> None:
    """Let every run go on with each prompt, the same seeds for all, and show it; at last, how fast that was.

    typed: prompts that are answered one by one, and shown as they are. prompts: those that are answered together.
    """
    for score in scores:
        score["samples"] = []

    def head(name: str, seed: int) -> str:
        return f"\n--- {name}" + (f", seed {seed}" if sampling.samples > 1 else "")

    for prompt in typed:
        for subject, score in zip(subjects, scores, strict=True):
            for seed in range(sampling.seed, sampling.seed + sampling.samples):
                print(head(subject.name, seed), visible(prompt), sep="\n", end="", flush=True)
                sample = stream_sample(
                    subject.model,
                    subject.tokenizer,
                    prompt,
                    sampling,
                    seed,
                    lambda bit: print(visible(bit), end="", flush=True),
                )
                print()
                score["samples"].append(sample)
    if prompts:
        for subject, score in zip(subjects, scores, strict=True):
            for sample in sample_all(subject.model, subject.tokenizer, prompts, sampling):
                print(head(subject.name, sample["seed"]), visible(sample["prompt"] + sample["continuation"]), sep="\n")
                score["samples"].append(sample)
    for subject, score in zip(subjects, scores, strict=True):
        if score["samples"]:
            tokens, seconds = (sum(sample[key] for sample in score["samples"]) for key in ("new_tokens", "seconds"))
            print(f"\n{subject.name}: {tokens:,} tokens in {seconds:.1f} s, {tokens / seconds:,.0f} per second")


def cli(argv: list[str] | None = None) -> int:
    return exit_code("eval.py", lambda: main(argv))


if __name__ == "__main__":
    sys.exit(cli())
