"""Evaluate runs on held-out text and on tasks, compare them, sample from them, and talk to them.

    python eval.py runs/NAME
    python eval.py runs/BASELINE-s{0,1,2} runs/OTHER-s{0,1,2} --html report.html --figures figures
    python eval.py runs/NAME --sample "def main("
    python eval.py runs/NAME --sample -
    python eval.py runs/NAME --choices "tasks/arc*.jsonl"
    python eval.py runs/NAME --completions lambada.jsonl.gz --json scores.json
    python eval.py runs/NAME --chat
    python eval.py runs/NAME --text-file letter.txt
    python eval.py --hf FOLDER --data NAME

Every token of the held-out text is scored exactly once, with a sliding window: windows are as long as the model's
context and advance by --stride tokens. The first token follows an end-of-text token. With several runs,
configurations are compared over their seeds. Exit codes: 0 done; 2 bad usage or input.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # python -P leaves it out
if __name__ == "__main__":  # Ctrl-C while torch is imported
    __import__("minidisp").end_on_interrupt()

import argparse
import codecs
import dataclasses
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from data.prepare import open_corpora
from minidisp import InputError, hf, printable, read_bytes, report
from minidisp.comparison import Comparison, Run, short_names
from minidisp.config import Config, parse_corpora, to_dict
from minidisp.data import Corpora, Dataset
from minidisp.hf.other import OtherModel, is_other, load_other
from minidisp.model import GPT
from minidisp.ops import registered
from minidisp.runtime import checkpoint, files
from minidisp.runtime.cli import Parser, exit_code, take_over
from minidisp.runtime.device import pick_device
from minidisp.runtime.run_folder import environment_of
from minidisp.sampling import (
    Sampling,
    answer_all,
    chat,
    check_text,
    read_prompts,
    sample_all,
    stream_sample,
    typed_lines,
    typed_prompts,
    visible,
)
from minidisp.scoring import (
    CONTINUATION_TOKENS,
    PROMPT_TOKENS,
    Examples,
    Text,
    choose_texts,
    compare_texts,
    score_text,
    writing,
)
from minidisp.tasks import (
    Completion,
    Pair,
    Question,
    compare_choices,
    compare_completions,
    compare_pairs,
    complete,
    no_sacrebleu,
    read_choices,
    read_completions,
    read_pairs,
    score_choices,
    score_pairs,
    summarise_choices,
    summarise_completions,
    summarise_pairs,
)
from minidisp.template import Template, load_template

MOST_TEXT = 1 << 25  # bytes of --text-file


class Subject(NamedTuple):
    """A model to evaluate, with what is known about its training."""

    name: str
    model: GPT | OtherModel  # in eval mode, on the device
    tokenizer: object
    config: dict | None  # the configuration it was trained with
    metrics: list[dict]  # lines of its metrics.jsonl; empty if there is none
    data_hash: str | None = None  # of the corpus that it was trained on
    folder: Path | None = None  # of the run

    @property
    def template(self) -> Template:
        """The prompt template the run was trained with, else that of its tokenizer."""
        own = load_template(self.folder, self.tokenizer) if self.folder else None
        return own or Template.of(self.tokenizer)

    @property
    def run(self) -> Run:
        """The information that a comparison needs."""
        return Run(self.name, self.tokenizer.hash, self.config, self.data_hash)


class Findings(NamedTuple):
    """The output of an evaluation: tables, further tables (collapsed on the page), and sentences that compare runs."""

    tables: list[report.Table]
    details: list[report.Table]
    sentences: list[str]

    def add(self, comparison: Comparison, scores: list[dict], of: str) -> None:
        """Add the comparison of the runs in one score, whose key in the JSON file is `of`."""
        self.sentences.extend(comparison.sentences)
        if len(scores) > 1:
            for group in comparison.groups:
                for score in (score for score in scores if score["name"] in group["runs"]):
                    score.setdefault("over_seeds", {})[of] = group


def main(argv: list[str] | None = None) -> list[dict]:
    """Run the evaluation of a command line; prints tables and returns the list of scores that --json writes."""
    take_over()
    args = parse(argv)
    device = pick_device(args.device)
    pairs = read_pairs(args.minimal_pairs) if args.minimal_pairs is not None else []
    questions = read_choices(args.choices) if args.choices is not None else []
    completions = read_completions(args.completions) if args.completions is not None else []
    prompts = read_prompts(args.prompts) if args.prompts is not None else []
    written = read_text(args.text_file) if args.text_file is not None else ""
    if only_curves(args):
        return draw_curves(args)
    subjects = load_subjects(args.runs, args.hf, args.block_size, device)
    refuse_other(subjects, args)
    if args.sampling or args.texts or args.chat or any(row.answered for row in completions):
        refuse_broken(subjects)
    with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
        if args.chat:
            (subject,) = subjects
            chat(subject.model, subject.tokenizer, subject.template, typed_lines(), args.sampling, args.system or "")
            return []
        return evaluate(args, subjects, pairs, questions, completions, prompts, written, device)


def evaluate(
    args: argparse.Namespace,
    subjects: list[Subject],
    pairs: list[Pair],
    questions: list[Question],
    completions: list[Completion],
    prompts: list[str],
    written: str,
    device: torch.device,
) -> list[dict]:
    """Compute all scores, write the files, print the tables, and sample. written: a text to use instead of a corpus."""
    scores = [
        {
            "name": s.name,
            "tokenizer": s.tokenizer.hash,
            "parameters": s.model.num_params(),
            "block_size": s.model.config.block_size,
        }
        for s in subjects
    ]
    found, measured_on = Findings([], [], []), []
    texts: dict[str, Text | Examples] = {}
    if written:
        where = printable(args.text_file)
        texts[where] = Text.of(written, subjects[0].tokenizer)
    elif args.split != "none":
        corpus = open_corpora(parse_corpora(args.data or subjects[0].config["data"]))
        where = f"{corpus.meta['name']}, {args.split} split"
        for part, name in zip(corpus.parts, short_names([str(part.folder) for part in corpus.parts]), strict=True):
            texts[name] = (Examples if part.template else Text).read(part, args.split, args.tokens)
        if not args.data:
            found.sentences.extend(other_corpus(subjects, corpus))
    if texts:
        chosen = choose_texts(only_text(texts), [s.tokenizer for s in subjects], args.texts) if args.texts else None
        measure_text(subjects, scores, found, texts, args.stride, device)
        measured_on = [f"{where}: {scores[0]['bytes']:,} bytes, {scores[0]['words']:,} words"]
    if pairs:
        measure_pairs(subjects, scores, found, pairs, device)
        measured_on.append(f"{len(pairs):,} minimal pairs")
    if questions:
        measure_choices(subjects, scores, found, questions, device)
        measured_on.append(f"{len(questions):,} questions")
    if completions:
        measure_completions(subjects, scores, found, completions, args, device)
        measured_on.append(f"{len(completions):,} completions")
    if args.texts:
        measure_writing(subjects, scores, found, *chosen, args.seed or 0, device)
    if seeds := report.seeds_table(scores):
        found.tables.append(seeds)
    if texts:  # last, as it is long
        found.tables.extend([report.condensation_table(scores), report.further_table(scores)])

    measured = "; ".join(measured_on)
    # Files first, so that a failure while printing or sampling does not lose the scores.
    if args.json:
        write_json(args.json, scores)
    figures = report.draw_comparison(scores, [s.metrics for s in subjects], args.figures) if args.figures else []
    if args.html:
        write_page(args.html, measured, subjects, scores, found)
    layers = [report.layer_table(s) for s in scores] if args.layers else []
    blocks = ["\n".join(found.sentences)] if found.sentences else []  # conclusions first
    if blocks := [*blocks, *found.tables, *layers]:
        print(*blocks, sep="\n\n")
    for path in figures:
        print(f"figure  {printable(path)}")
    if args.html:
        print(f"page    {printable(args.html)}")
    if args.sampling:
        if device.type == "cpu":
            registered("cpu")  # compiles on first use: now, and not in the middle of a sample
        typed = typed_prompts() if args.sample == "-" else [] if args.sample is None else [args.sample]
        sample_prompts(subjects, scores, typed, prompts, args.sampling)
        if args.json:
            write_json(args.json, scores)
        if args.html:
            write_page(args.html, measured, subjects, scores, found)
    return scores


def only_text(texts: dict[str, Text | Examples]) -> Text:
    """The only text, which must be plain text. Raises InputError otherwise."""
    text, *others = texts.values()
    if others or isinstance(text, Examples):
        raise InputError("--texts needs a single plain-text corpus: choose it with --data")
    return text


def only_curves(args: argparse.Namespace) -> bool:
    """Whether only training curves are requested, for which metrics.jsonl is enough."""
    other = (args.json, args.html, args.sampling, args.minimal_pairs, args.choices, args.completions, args.text_file)
    return bool(args.figures) and args.split == "none" and all(asked is None for asked in other)


def draw_curves(args: argparse.Namespace) -> list[dict]:
    """Draw the training curves of the runs, without their models."""
    if args.hf:
        raise InputError("--figures --split none draws training curves, which --hf models do not have")
    metrics = []
    for run in args.runs:
        path = Path(run) / "metrics.jsonl" if Path(run).is_dir() else Path(run).parent / "metrics.jsonl"
        if not path.is_file():
            raise InputError(f"{run} has no metrics.jsonl, from which --figures --split none draws training curves")
        metrics.append(report.read_metrics(path))
    scores = [{"name": name} for name in short_names(args.runs)]
    for path in report.draw_comparison(scores, metrics, args.figures):
        print(f"figure  {printable(path)}")
    return scores


def read_text(path: str) -> str:
    """Read a text file. Raises InputError if it is empty, not UTF-8, or too long to be in memory as tokens."""
    try:
        text = read_bytes(path, MOST_TEXT).removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: byte {error.start:,}") from None
    if not text.strip():
        raise InputError(f"{path} contains no text")
    if "\0" in text:
        raise InputError(f"{path} is a binary file, not text: it has NUL bytes")
    return text


# --- the command line -------------------------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse and check the command line; everything that can be rejected without loading a model is rejected here.

    Adds `sampling`, a Sampling, or None if nothing is sampled. json, html and figures are paths or None.
    """
    parser = Parser(
        prog="eval.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    _add_flags(parser)
    args = parser.parse_intermixed_args(argv)  # a RUN may appear anywhere
    if min(args.tokens, args.stride, args.block_size, args.texts) < 0:
        raise InputError("--tokens, --stride, --block-size and --texts must be 0 or more")
    if wrong := next((run for run in args.runs if run.endswith((".jsonl", ".jsonl.gz"))), None):
        raise InputError(f"{wrong} is not a run: if it belongs to --minimal-pairs or a task, quote the pattern")
    tasks = [flag for flag in ("choices", "completions", "chat") if getattr(args, flag) not in (None, False)]
    if args.text_file is not None and (args.data or args.tokens or args.split not in (None, "none")):
        raise InputError("--text-file replaces the corpus: leave out --data, --split and --tokens")
    of_text = [flag for flag in ("data", "tokens", "stride", "layers", "texts") if getattr(args, flag)]
    if args.split is None:
        silent = tasks or args.sample == "-"
        args.split = "none" if args.text_file is not None or (silent and not of_text) else "val"
    no_text = args.split == "none" and args.text_file is None
    measured = tasks or not args.minimal_pairs is args.text_file is None
    if no_text and not measured and args.html is not None:
        of_text.append("html")
    if no_text and of_text:
        raise InputError(f"--{of_text[0]} needs held-out text: leave out --split none or --{of_text[0]}")
    if no_text and not measured and args.sample is args.prompts is args.figures is None:
        raise InputError(
            "--split none leaves nothing to do: add --sample, --prompts, --choices, --completions or --chat"
        )
    if not args.runs and not (args.hf and (args.data or args.split == "none")):
        raise InputError("pass a RUN, or --hf DIR with --data NAME (python eval.py --help lists the flags)")
    if args.chat:
        refuse_beside_chat(args)
    elif args.system is not None:
        raise InputError("--system needs --chat: add it")
    given = {name: value for name in Sampling.__dataclass_fields__ if (value := getattr(args, name)) is not None}
    args.sampling = Sampling(**given)
    if args.sample is args.prompts is None and not args.chat:
        args.sampling = None
        allowed = {"seed"} if args.texts else set()
        allowed |= {"max_new_tokens"} if args.completions is not None else set()
        if alone := next((name for name in given if name not in allowed), None):
            raise InputError(f"--{alone.replace('_', '-')} needs --sample or --prompts: add one of them")
    args.answering = Sampling(temperature=0.0, max_new_tokens=args.max_new_tokens or Sampling.max_new_tokens)
    check_text(args.system or "", "--system")
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


def refuse_beside_chat(args: argparse.Namespace) -> None:
    """Raise InputError for flags that cannot be combined with --chat, which needs the terminal and one model."""
    if len(args.runs) + len(args.hf) != 1:
        raise InputError("--chat needs exactly one model: pass one RUN or one --hf DIR")
    others = ("minimal_pairs", "choices", "completions", "sample", "prompts", "text_file", "json", "html", "figures")
    if found := next((flag for flag in others if getattr(args, flag) is not None), None):
        raise InputError(f"--{found.replace('_', '-')} cannot be combined with --chat: run them separately")
    if args.split != "none":
        raise InputError("--chat does not evaluate held-out text: leave out --split and its related flags")
    if args.samples is not None or args.stop is not None:
        raise InputError("--samples and --stop cannot be combined with --chat")


def _add_flags(parser: Parser) -> None:
    what = parser.add_argument_group("models")
    what.add_argument(
        "runs", nargs="*", metavar="RUN", help="run folder (its best checkpoint is used) or checkpoint file"
    )
    what.add_argument(
        "--hf",
        action="append",
        default=[],
        metavar="DIR",
        help="Hugging Face causal language model (folder, or owner/name on the hub) with its own tokenizer; may be "
        "repeated. Families other than GPT-2, Qwen3 and Apertus need transformers and support held-out text only",
    )
    what.add_argument(
        "--block-size",
        type=int,
        default=0,
        metavar="N",
        help="context length in tokens; beyond the training context only with rotary positions; 0 = the model's own",
    )
    what.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="compute dtype; bfloat16 is faster on hardware that supports it, see docs/evaluation.md for its error "
        "(default float32)",
    )
    what.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="default auto")

    text = parser.add_argument_group("held-out text")
    text.add_argument(
        "--data", default="", metavar="TEXT", help="corpus to evaluate on (default: that of the first run)"
    )
    text.add_argument("--text-file", metavar="FILE", help="evaluate on this text file instead of a corpus")
    text.add_argument(
        "--split",
        choices=("val", "test", "none"),
        help="held-out split of the corpus; none: skip held-out text (default: val, or none if only a task, --chat or "
        "--sample - is requested)",
    )
    text.add_argument(
        "--tokens", type=int, default=0, metavar="N", help="evaluate only the first N tokens; 0 = all (default)"
    )
    text.add_argument(
        "--stride",
        type=int,
        default=0,
        metavar="N",
        help="tokens by which the sliding window advances, 1 to the context length; smaller is slower and gives "
        "every token more context (default: half the context)",
    )
    text.add_argument("--layers", action="store_true", help="also print the further metrics layer by layer")
    text.add_argument(
        "--texts",
        type=int,
        default=0,
        metavar="N",
        help=f"continue the first {PROMPT_TOKENS} tokens of N documents for {CONTINUATION_TOKENS} tokens, greedily and "
        "with nucleus sampling, and measure repetition in the generated text",
    )

    pairs = parser.add_argument_group("minimal pairs")
    pairs.add_argument(
        "--minimal-pairs",
        metavar="GLOB",
        help="JSON lines with sentence_good and sentence_bad, as in BLiMP: accuracy of preferring the good sentence. "
        'Quote patterns: "blimp/*.jsonl"',
    )

    tasks = parser.add_argument_group("tasks (JSON lines, optionally .gz; quote patterns)")
    tasks.add_argument(
        "--choices",
        metavar="GLOB",
        help="rows of context, choices and answer (index of the correct choice): accuracy by log-likelihood, as "
        "lm-evaluation-harness computes acc and acc_norm",
    )
    tasks.add_argument(
        "--completions",
        metavar="GLOB",
        help="rows of context and completion are scored (accuracy, perplexity); prompts with completions and dialogues "
        "are answered greedily (exact match, and chrF and BLEU with sacrebleu)",
    )
    tasks.add_argument("--chat", action="store_true", help="chat with a model; Ctrl-C stops an answer, Ctrl-D exits")
    tasks.add_argument("--system", metavar="TEXT", help="system message of the chat")

    default = Sampling()
    sample = parser.add_argument_group("samples")
    sample.add_argument(
        "--sample",
        metavar="TEXT",
        help="prompt to continue with every run; -: read prompts from the terminal, until an empty line or Ctrl-D",
    )
    sample.add_argument("--prompts", metavar="FILE", help="file of prompts, one per line")
    sample.add_argument("--samples", type=int, metavar="N", help=f"samples per prompt (default {default.samples})")
    sample.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help=f"maximum number of generated tokens (default {default.max_new_tokens})",
    )
    sample.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help=f"sampling temperature; 0 is greedy decoding (default {default.temperature})",
    )
    sample.add_argument("--top-k", type=int, metavar="K", help="sample among the K most likely tokens (default: all)")
    sample.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="nucleus (top-p) sampling: sample from the smallest set of tokens with total probability P (default: all)",
    )
    sample.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help=f"seed of the first sample; the next sample uses N + 1; the same for every run (default {default.seed})",
    )
    sample.add_argument("--stop", metavar="TEXT", help="stop generating before this text")

    files = parser.add_argument_group("output files (written before anything is printed)")
    files.add_argument("--json", metavar="FILE", help="all scores, including condensation per layer, and the samples")
    files.add_argument(
        "--figures", metavar="DIR", help="folder for figures as PNG and PDF: heat maps, cosine by layer, loss by step"
    )
    files.add_argument("--html", metavar="FILE", help="all scores and training curves as one self-contained page")


def output_path(flag: str, given: str, folder: bool) -> Path:
    """The path of an output. Raises InputError early if it cannot be written; creates nothing."""
    path = Path(os.path.expanduser(given))
    try:
        if folder and path.exists() and not path.is_dir():
            raise InputError(f"{flag} {given} is not a folder: choose another path")
        if not folder and path.is_dir():
            raise InputError(f"{flag} {given!r} is a folder: pass a file name")
        if not folder and path.exists() and not path.is_file():
            raise InputError(f"{flag} {given} is not a regular file: choose another path")
        if not folder and path.exists() and not os.access(path, os.W_OK):
            raise InputError(f"{flag} {given} is read-only: choose another path")
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


# --- models -----------------------------------------------------------------------------------------------------------


def load_subjects(runs: list[str], folders: list[str], block_size: int, device: torch.device) -> list[Subject]:
    """Load run folders or checkpoint files, followed by Hugging Face models.

    block_size: context length in tokens; 0 = each model's own.
    """
    subjects, names = [], short_names([*runs, *folders])
    for run, name in zip(runs, names, strict=False):
        model, tokenizer, config = checkpoint.load_run(run, device)
        metrics = checkpoint.find(run).parent / "metrics.jsonl"
        lines = report.read_metrics(metrics) if metrics.is_file() else []
        if block_size:
            model = with_context(model, block_size, run)
        subjects.append(
            Subject(name, model, tokenizer, _recipe(config), lines, _data_hash(metrics.parent), metrics.parent)
        )
    for folder, name in zip(folders, names[len(runs) :], strict=True):
        if is_other(folder):
            subjects.append(Subject(name, load_other(folder, device, block_size), hf.load_tokenizer(folder), None, []))
        else:
            subjects.append(Subject(name, *hf.load(folder, device, block_size), None, []))
    return subjects


def with_context(model: GPT, block_size: int, name: str) -> GPT:
    """The model with another context length. Raises InputError if its learned positions do not reach that far."""
    weights, device = model.state_dict(), model.wte.weight.device
    if "wpe.weight" in weights:
        if block_size > len(weights["wpe.weight"]):
            most = len(weights["wpe.weight"])
            raise InputError(f"--block-size {block_size}: {name} has learned positions for {most} tokens only")
        weights["wpe.weight"] = weights["wpe.weight"][:block_size]
    other = GPT(dataclasses.replace(model.config, block_size=block_size))
    other.load_state_dict(weights)
    return other.to(device).eval()


def _recipe(config: Config) -> dict:
    """The settings of a run, without --out, --resume and --overwrite."""
    return {key: value for key, value in to_dict(config).items() if key not in ("out", "resume", "overwrite")}


def _data_hash(run: Path) -> str | None:
    """The hash of the corpus that a run was trained on, from its config.json; None if not recorded."""
    found = environment_of(run).get("data_hash")
    return found if isinstance(found, str) else None


def refuse_other(subjects: list[Subject], args: argparse.Namespace) -> None:
    """Raise InputError if anything but held-out text is requested of a model that runs in transformers."""
    flags = ("minimal_pairs", "choices", "completions", "chat", "sample", "prompts", "texts")
    asked = next((flag for flag in flags if getattr(args, flag) not in (None, False, 0)), None)
    other = next((s.name for s in subjects if isinstance(s.model, OtherModel)), None)
    if asked and other:
        raise InputError(
            f"{other} runs in transformers, which supports held-out text only: leave out --{asked.replace('_', '-')}"
        )


def refuse_broken(subjects: list[Subject]) -> None:
    """Raise InputError if a model cannot be sampled from because its weights contain NaN or Inf."""
    for subject in subjects:
        if not all(parameter.isfinite().all() for parameter in subject.model.parameters()):
            raise InputError(
                f"{subject.name} cannot be sampled from: its weights contain NaN or Inf, as its training diverged"
            )


# --- measurements: each adds to the scores and to the findings --------------------------------------------------------


def measure_text(
    subjects: list[Subject],
    scores: list[dict],
    found: Findings,
    texts: dict[str, Text | Examples],
    stride: int,
    device: torch.device,
) -> None:
    """Prediction quality and condensation on held-out text."""
    results = [score_text(s.name, s.model, s.tokenizer, texts, stride, device) for s in subjects]
    found.add(compare_texts([s.run for s in subjects], results), scores, "bits_per_byte")
    for score, result in zip(scores, results, strict=True):
        score.update(result.scores)
    names, configs = [s.name for s in subjects], [s.config for s in subjects]
    settings = report.settings_table(names, configs)
    found.tables.append(report.score_table(scores))
    if len(texts) > 1:
        found.tables.append(report.corpora_table(scores))
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


def measure_choices(
    subjects: list[Subject], scores: list[dict], found: Findings, questions: list[Question], device: torch.device
) -> None:
    """Accuracy on multiple-choice questions."""
    chosen = [score_choices(s.model, s.tokenizer, questions, device) for s in subjects]
    summaries = summarise_choices(questions, chosen)
    for key, comparison in compare_choices([s.run for s in subjects], chosen, summaries).items():
        found.add(comparison, scores, f"choices {key}")
    for score, summary in zip(scores, summaries, strict=True):
        score["choices"] = summary
    found.tables.append(report.choices_table(scores))


def measure_completions(
    subjects: list[Subject],
    scores: list[dict],
    found: Findings,
    rows: list[Completion],
    args: argparse.Namespace,
    device: torch.device,
) -> None:
    """Scores of given completions and of generated answers."""
    completed = []
    for s in subjects:
        answer = lambda prompts, s=s: answer_all(s.model, s.tokenizer, s.template, prompts, args.answering)  # noqa: E731
        completed.append(complete(s.model, s.tokenizer, rows, answer, device))
    summaries = summarise_completions(rows, completed)
    for key, comparison in compare_completions([s.run for s in subjects], rows, completed, summaries).items():
        found.add(comparison, scores, f"completions {key}")
    for score, summary in zip(scores, summaries, strict=True):
        score["completions"] = summary
    if any(row.answered for row in rows) and (why := no_sacrebleu()):
        found.sentences.append(why)
    found.tables.extend(report.completions_tables(scores))


def measure_writing(
    subjects: list[Subject],
    scores: list[dict],
    found: Findings,
    texts: list[str],
    kind: str,
    seed: int,
    device: torch.device,
) -> None:
    """Repetition in continuations of held-out texts. kind: as returned by choose_texts."""
    for subject, score in zip(subjects, scores, strict=True):
        ways = writing(subject.model, subject.tokenizer, texts, seed, device)
        score["writing"] = {"texts": len(texts), "of": kind, "seed": seed, **ways}
    found.tables.append(report.writing_table(scores))


def other_corpus(subjects: list[Subject], corpus: Dataset | Corpora) -> list[str]:
    """A warning for runs that were trained on a different version of the corpus from the one evaluated on."""
    same = [s for s in subjects if s.config and s.config["data"] == subjects[0].config["data"]]
    changed = [s.name for s in same if s.data_hash not in (None, corpus.hash)]
    if not changed:
        return []
    return [
        f"{corpus.folder} differs from the corpus that {' and '.join(changed)} was trained on. "
        "The evaluation text may be part of their training data"
    ]


# --- output -----------------------------------------------------------------------------------------------------------


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
    """Continue each prompt with every run, using the same seeds, print the samples, and finally the speed.

    typed: prompts continued one by one; a single sample is streamed to the terminal. prompts: prompts continued in
        batches.
    """
    for score in scores:
        score["samples"] = []

    def head(name: str, seed: int) -> str:
        return f"\n--- {name}" + (f", seed {seed}" if sampling.samples > 1 else "")

    def show_together(prompts: list[str]) -> None:
        for subject, score in zip(subjects, scores, strict=True):
            for sample in sample_all(subject.model, subject.tokenizer, prompts, sampling):
                print(head(subject.name, sample["seed"]), visible(sample["prompt"] + sample["continuation"]), sep="\n")
                score["samples"].append(sample)

    for prompt in typed:
        if sampling.samples > 1:
            show_together([prompt])
            continue
        for subject, score in zip(subjects, scores, strict=True):
            print(head(subject.name, sampling.seed), visible(prompt), sep="\n", end="", flush=True)
            write = lambda bit: print(visible(bit), end="", flush=True)  # noqa: E731
            sample = stream_sample(subject.model, subject.tokenizer, prompt, sampling, sampling.seed, write)
            print()
            score["samples"].append(sample)
    if prompts:
        show_together(prompts)
    for subject, score in zip(subjects, scores, strict=True):
        if score["samples"]:
            tokens, seconds = (sum(sample[key] for sample in score["samples"]) for key in ("new_tokens", "seconds"))
            print(f"\n{subject.name}: {tokens:,} tokens in {seconds:.1f} s, {tokens / seconds:,.0f} per second")


def cli(argv: list[str] | None = None) -> int:
    return exit_code("eval.py", lambda: main(argv))


if __name__ == "__main__":
    sys.exit(cli())
