"""Speed of generation, evaluation, export and corpus preparation, beside what one would use instead.

    python bench/inference.py                            # about two minutes on one core; needs no network
    python bench/inference.py --recipe gpt2 --seconds 20
    python bench/inference.py --only generation --no-others --n-layer 12 --n-embd 768 --n-head 12
    python bench/inference.py --only corpus --input "books/*.txt"

A freshly initialised model, saved as a run, with a SentencePiece tokenizer trained on the text, by default the
project's own files. Beside each measurement, what is installed of: transformers on the exported run (perplexity with
the same windows; generate; pairs in padded batches; save_pretrained and from_pretrained), llama.cpp on the exported
GGUF file (the package xllamacpp), and numpy, sentencepiece and tokenizers for encoding the same text and writing the
tokens to a file.

All must first give the same results in float32: losses, pairs, greedy continuations, weights, token counts. Then they
are timed, interleaved, in one process. "Speed" is the median over the rounds of the other's CPU time divided by
minidisp's. Samples are drawn at temperature 1 with a seed for each, and never end early. The CPU time of a process
counts all of its threads. Loading models and tokenizers counts only in "import". Prints a table, then one JSON line.
"""

import os
import sys

# Before other imports: a folder beside this file, such as a corpus named email, must not be imported as a module.
HERE = os.path.dirname(os.path.realpath(__file__))
sys.path[:] = [os.path.dirname(HERE), *(path for path in sys.path if os.path.realpath(path) != HERE)]

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import io
import itertools
import json
import operator
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
import torch

from data.prepare import prepare_corpus
from data.sources import input_files
from minidisp import InputError, hf
from minidisp.config import RECIPES, command_line, parse, to_dict
from minidisp.data import Dataset
from minidisp.hf import gguf
from minidisp.hf.other import OtherModel
from minidisp.model import GPT, GPTConfig
from minidisp.runtime import checkpoint
from minidisp.runtime.cli import Parser, exit_code
from minidisp.runtime.device import cpu_model
from minidisp.scoring import token_nats
from minidisp.shards import SPLITS
from minidisp.tasks import sentence_nats
from minidisp.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
OWN_TEXT = [str(ROOT / pattern) for pattern in ("*.py", "*/*.py", "minidisp/*/*.py", "docs/*.md", "results/*.md")]
CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PROMPT_TOKENS = 16
GREEDY_TOKENS = 8  # that must be the same before anything is timed


class Task(NamedTuple):
    """One measurement. forms: minidisp and the alternatives, by name; each returns what `agree` compares."""

    name: str
    amount: float  # of `unit`, per call
    unit: str
    forms: dict[str, Callable[[], object]]
    agree: Callable[[object, object], bool]


class Bench(NamedTuple):
    """The run that everything is measured on."""

    args: argparse.Namespace
    folder: Path  # for temporary files
    model: GPT
    tokenizer: Tokenizer
    run: Path
    exported: Path  # the run as a transformers folder
    corpus: Path

    def has(self, package: str) -> bool:
        return self.args.others and importlib.util.find_spec(package) is not None

    def text(self, most: int) -> list[int]:
        """The first tokens of the training split."""
        split = Dataset(self.corpus).split("train")
        return split.slice(0, min(most, split.tokens)).tolist()

    def transformer(self, dtype: str = "float32"):
        """The exported run in transformers."""
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        return transformers.AutoModelForCausalLM.from_pretrained(self.exported, dtype=DTYPES[dtype]).eval()

    def fresh(self, name: str) -> Path:
        """A path in the temporary folder at which nothing exists."""
        shutil.rmtree(self.folder / name, ignore_errors=True)
        return self.folder / name


def autocast(dtype: str) -> torch.autocast:
    return torch.autocast("cpu", DTYPES[dtype], enabled=dtype != "float32")


# --- evaluation -------------------------------------------------------------------------------------------------------


def perplexity(bench: Bench) -> Iterator[Task]:
    """The nats of every token of a text, with a window that advances by half the context."""
    tokens = np.array(bench.text(bench.args.tokens))
    stride = max(1, bench.model.config.block_size // 2)

    def of(model: torch.nn.Module) -> np.ndarray:
        return token_nats(model, tokens, bench.tokenizer.eos_id, stride, CPU)

    def ours(dtype: str) -> np.ndarray:
        with autocast(dtype):
            return of(bench.model)

    for dtype in DTYPES:
        forms = {"minidisp": lambda dtype=dtype: ours(dtype)}
        if bench.has("transformers"):
            other = OtherModel(bench.transformer(dtype), bench.model.config.block_size)
            forms["transformers"] = lambda other=other: of(other)
        agree = same_nats if dtype == "float32" else same_mean
        yield Task(f"perplexity, {dtype}", len(tokens), "tokens", forms, agree)


def same_nats(a: np.ndarray, b: np.ndarray) -> bool:
    return len(a) == len(b) and np.allclose(a, b, rtol=1e-4, atol=1e-3)


def same_mean(a: np.ndarray, b: np.ndarray) -> bool:
    """In bfloat16, which rounds every token's loss differently."""
    return len(a) == len(b) and abs(a.mean() - b.mean()) <= 0.01


def pairs(bench: Bench) -> Iterator[Task]:
    """Minimal pairs, as those of BLiMP: two sentences that differ by the order of two words in the middle."""
    text = bench.tokenizer.decode(bench.text(200_000))
    sentences = []
    for line in dict.fromkeys(text.split("\n")):
        words = line.split()
        if 6 <= len(words) <= 12 and words[2] != words[3] and len(sentences) < 2 * bench.args.pairs:
            pair = [" ".join(words), " ".join([*words[:2], words[3], words[2], *words[4:]])]
            if max(map(len, bench.tokenizer.encode_batch(pair))) <= bench.model.config.block_size:
                sentences += pair
    if not sentences:
        raise InputError("the text has no short line of 6 to 12 words, of which pairs are made: pass another --input")
    forms = {"minidisp": lambda: sentence_nats(bench.model, bench.tokenizer, sentences, CPU)}
    if bench.has("transformers"):
        other = bench.transformer()
        forms["transformers"] = lambda: padded_nats(other, bench.tokenizer, sentences)
    yield Task("pairs, float32", len(sentences) // 2, "pairs", forms, same_nats)


@torch.no_grad()
def padded_nats(model: torch.nn.Module, tokenizer: Tokenizer, sentences: list[str], rows: int = 64) -> np.ndarray:
    """-log p of each sentence after EOS, (N,), in padded batches of sentences of similar length."""
    encoded = [[tokenizer.eos_id, *ids] for ids in tokenizer.encode_batch(sentences)]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    nats = np.zeros(len(encoded))
    for start in range(0, len(order), rows):
        batch = order[start : start + rows]
        lengths = torch.tensor([len(encoded[i]) for i in batch])
        idx = torch.full((len(batch), int(lengths.max())), tokenizer.eos_id)
        for row, i in zip(idx, batch, strict=True):
            row[: len(encoded[i])] = torch.tensor(encoded[i])
        log_probs = model(idx[:, :-1], use_cache=False).logits.log_softmax(-1)
        found = -log_probs.gather(-1, idx[:, 1:, None])[..., 0]
        nats[batch] = (found * (torch.arange(found.shape[1]) < lengths[:, None] - 1)).sum(1).numpy()
    return nats


# --- generation -------------------------------------------------------------------------------------------------------


def generation(bench: Bench) -> Iterator[Task]:
    """Samples after a prompt of 16 tokens, for one sequence and for a batch. The forms return their length."""
    prompt = [bench.tokenizer.eos_id, *bench.text(PROMPT_TOKENS - 1)]
    greedy = bench.model.generate(torch.tensor([prompt]), GREEDY_TOKENS, temperature=0)[0, len(prompt) :].tolist()
    for rows, dtype in itertools.product((1, bench.args.batch), DTYPES):
        new, idx = max(1, bench.args.new_tokens // (1 if rows == 1 else 4)), torch.tensor([prompt] * rows)
        forms = {"minidisp": functools.partial(sampled, bench.model, idx, new, dtype)}
        if bench.has("transformers"):
            other = bench.transformer(dtype)
            other.generation_config.eos_token_id = None  # samples do not end early
            if dtype == "float32":
                refuse_other_text("transformers", greedy, continued(other, idx[:1], GREEDY_TOKENS, False).tolist()[0])
            forms["transformers"] = lambda other=other, idx=idx, new=new: continued(other, idx, new, True).shape[1]
        if rows == 1 and bench.has("xllamacpp") and bench.has("gguf"):
            ask = llama_cpp(bench, prompt, dtype)
            if dtype == "float32":
                refuse_other_text("llama.cpp", greedy, ask(GREEDY_TOKENS, 0))
            forms["llama.cpp"] = lambda ask=ask, new=new: len(ask(new, 1))
        sequences = "1 sequence" if rows == 1 else f"{rows} sequences"
        yield Task(f"generate, {sequences}, {dtype}", rows * new, "tokens", forms, operator.eq)


def sampled(model: GPT, idx: torch.Tensor, new: int, dtype: str) -> int:
    with autocast(dtype):
        return model.generate(idx, new, seed=list(range(len(idx)))).shape[1] - idx.shape[1]


def continued(model: torch.nn.Module, idx: torch.Tensor, new: int, sampled: bool) -> torch.Tensor:
    """The new tokens of generate in transformers, which may be any of the vocabulary."""
    options = {"top_k": 0, "top_p": 1.0, "temperature": 1.0} if sampled else {}
    mask = torch.ones_like(idx)
    out = model.generate(idx, attention_mask=mask, max_new_tokens=new, do_sample=sampled, pad_token_id=0, **options)
    return out[:, idx.shape[1] :]


def refuse_other_text(name: str, ours: list[int], theirs: list[int]) -> None:
    """Raise InputError unless a greedy continuation is the same."""
    if theirs != ours:
        raise InputError(f"{name} is wrong: its greedy continuation is {theirs}, not {ours}")


def llama_cpp(bench: Bench, prompt: list[int], dtype: str) -> Callable[[int, float], list[int]]:
    """llama.cpp's server in this process, with the run as a GGUF file; see tests/llama_cpp.py.

    Returns a function that continues the prompt: its arguments are the number of tokens and the temperature.
    """
    path = bench.folder / f"{dtype}.gguf"
    gguf.export_run(bench.run, path, dtype)
    spec = importlib.util.spec_from_file_location("llama_cpp", ROOT / "tests" / "llama_cpp.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    server = module.Server(path, threads=bench.args.threads)
    # Only the temperature changes the probabilities, and the prompt is read each time, as by the others.
    options = {"samplers": ["temperature"], "ignore_eos": True, "cache_prompt": False, "return_tokens": True}
    return lambda new, temperature: server.ask(
        "/completion", prompt=prompt, n_predict=new, temperature=temperature, **options
    )["tokens"]


# --- export and import ------------------------------------------------------------------------------------------------


def export_and_import(bench: Bench) -> Iterator[Task]:
    """Writing the run as a transformers folder, with its tokenizer and the check of its logits, and reading it."""
    size = sum(file.stat().st_size for file in bench.exported.iterdir()) / 1e6
    writing = {"minidisp": lambda: hf.export(bench.run, bench.fresh("export"))}
    reading = {"minidisp": lambda: hf.load(bench.exported)[0]}
    if bench.has("transformers"):
        import transformers

        model, tokenizer = bench.transformer(), transformers.AutoTokenizer.from_pretrained(bench.exported)

        def save() -> Path:
            folder = bench.fresh("saved")
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            return folder

        def load() -> torch.nn.Module:
            transformers.AutoTokenizer.from_pretrained(bench.exported)
            return bench.transformer()

        writing["transformers"], reading["transformers"] = save, load
    yield Task("export, float32", size, "MB", writing, same_weights)
    yield Task("import, float32", size, "MB", reading, same_logits)


def same_weights(ours: Path, theirs: Path) -> bool:
    """Whether two folders have the same tensors."""
    import safetensors.torch

    a, b = (safetensors.torch.load_file(folder / hf.WEIGHTS) for folder in (ours, theirs))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@torch.no_grad()
def same_logits(ours: GPT, theirs: torch.nn.Module) -> bool:
    idx = torch.arange(PROMPT_TOKENS)[None]
    return torch.allclose(ours(idx).logits, theirs(idx).logits, rtol=1e-3, atol=1e-4)


# --- corpus preparation -----------------------------------------------------------------------------------------------


def corpus_preparation(bench: Bench) -> Iterator[Task]:
    """Text files to shards of tokens, without training a tokenizer; each alternative keeps the tokens in one file.

    The forms return the number of tokens, including an EOS for each document, which the alternatives do not write.
    """
    documents = ["".join(document.blocks) for document in input_files(bench.args.input).documents()]
    size, target = sum(len(text.encode()) for text in documents) / 1e6, bench.folder / "tokens.bin"
    dtype = np.uint16 if bench.tokenizer.vocab_size <= 1 << 16 else np.uint32

    def prepared(tokenizer: str | Tokenizer) -> int:
        corpus = Dataset(make_corpus(bench.args, bench.fresh("prepared"), tokenizer))
        return sum(corpus.split(name).tokens for name in SPLITS)

    def written(encoded: list) -> int:
        np.concatenate([np.array(ids, dtype=dtype) for ids in encoded]).tofile(target)
        return sum(map(len, encoded)) + len(encoded)

    forms = {"minidisp": lambda: prepared("byte")}
    if bench.args.others:
        forms["numpy"] = lambda: written([np.frombuffer(text.encode(), dtype=np.uint8) for text in documents])
    yield Task("preparation, bytes", size, "MB", forms, operator.eq)

    forms = {"minidisp": lambda: prepared(bench.tokenizer)}
    if bench.args.others:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(bench.run / "tokenizer.model"))
        forms["sentencepiece"] = lambda: written(processor.encode(documents, num_threads=bench.args.threads))
    yield Task("preparation, SentencePiece", size, "MB", forms, operator.eq)

    imported = hf.load_tokenizer(bench.exported)
    forms = {"minidisp": lambda: prepared(imported)}
    if bench.has("tokenizers"):
        import tokenizers

        os.environ["TOKENIZERS_PARALLELISM"] = str(bench.args.threads > 1).lower()
        theirs = tokenizers.Tokenizer.from_file(str(bench.exported / "tokenizer.json"))
        theirs.encode_special_tokens = True  # as text

        def encode(texts: list[str]) -> list[list[int]]:
            return [found.ids for found in theirs.encode_batch(texts, add_special_tokens=False)]

        forms["tokenizers"] = lambda: written(encode(documents))
    yield Task("preparation, Hugging Face", size, "MB", forms, operator.eq)


def make_corpus(args: argparse.Namespace, out: Path, tokenizer: str | Tokenizer = "sentencepiece") -> Path:
    size = args.vocab_size if tokenizer == "sentencepiece" else 0
    with silent():
        return prepare_corpus("bench", input_files(args.input), out, tokenizer, size, workers=args.threads)


# --- measurement ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def silent() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def measure(task: Task, seconds: float) -> dict[str, dict]:
    """Rates of the forms, which must agree; at least three interleaved rounds, except with `seconds` 0: one."""
    results = {name: form() for name, form in task.forms.items()}  # also warms up
    for name, result in results.items():
        if not task.agree(results["minidisp"], result):
            raise InputError(f"{name} is wrong: {task.name} gives something else than minidisp's")
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in task.forms}
    end = time.monotonic() + seconds
    while len(times["minidisp"]) < (3 if seconds else 1) or time.monotonic() < end:
        for name, form in task.forms.items():
            wall, cpu = time.perf_counter(), time.process_time()
            form()
            times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    rows = {}
    for name, rounds in times.items():
        wall, cpu = (statistics.median(column) for column in zip(*rounds, strict=True))
        ratios = (theirs[1] / ours[1] for ours, theirs in zip(times["minidisp"], rounds, strict=True))
        rows[name] = {
            "unit": task.unit,
            "per_cpu_second": task.amount / cpu,
            "per_second": task.amount / wall,
            "speed": statistics.median(ratios),
            "rounds": len(rounds),
        }
    return rows


def print_rows(task: Task, rows: dict[str, dict]) -> None:
    for name, row in rows.items():
        rates = row["per_cpu_second"], row["per_second"]
        cpu, wall = (f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}" for rate in rates)
        first = name == "minidisp"
        speed = "" if first else f"{row['speed']:.2f}x"
        print(f"| {task.name if first else ''} | {name} | {cpu} {task.unit} | {wall} | {speed} |", flush=True)


def set_up(args: argparse.Namespace, folder: Path) -> Bench:
    """A corpus, a fresh model saved as a run, and its export."""
    corpus = make_corpus(args, folder / "corpus")
    tokenizer = Dataset(corpus).tokenizer
    sizes = {name: getattr(args, name) for name in SIZES}
    # llama.cpp has the tanh form of GELU alone. Blocks whose output is zero at first would make every check pass.
    flags = [*command_line(sizes), "--recipe", args.recipe, "--gelu", "tanh", "--no-zero-init"]
    config = dataclasses.replace(parse(flags), vocab_size=tokenizer.vocab_size)
    torch.manual_seed(0)
    model = GPT(config).eval()
    run = folder / "run"
    run.mkdir()
    tokenizer.save(run / "tokenizer.model")
    checkpoint.write(run / checkpoint.LAST, {"model": model.state_dict(), "config": to_dict(config), "step": 0})
    return Bench(args, folder, model, tokenizer, run, hf.export(run, folder / "exported"), corpus)


PARTS = {
    "perplexity": perplexity,
    "pairs": pairs,
    "generation": generation,
    "export": export_and_import,
    "corpus": corpus_preparation,
}
SIZES = ("n_layer", "n_head", "n_embd", "block_size")


def main(argv: list[str] | None = None) -> None:
    parser = Parser("bench/inference.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=[*PARTS], help="measure only these (default: all)")
    parser.add_argument(
        "--others", action=argparse.BooleanOptionalAction, default=True, help="time the alternatives, too"
    )
    parser.add_argument("--recipe", choices=RECIPES, default="fast", help="default: that of train.py, fast")
    for name in SIZES:
        default = getattr(GPTConfig, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--vocab-size", type=int, default=8192, help="default 8192")
    parser.add_argument("--input", nargs="+", default=OWN_TEXT, help="files of text (default: those of the project)")
    parser.add_argument("--tokens", type=int, default=1024, help="of the text for perplexity (default 1024)")
    parser.add_argument("--pairs", type=int, default=128, help="default 128")
    parser.add_argument(
        "--new-tokens", type=int, default=64, help="generated for one sequence; for a batch a quarter (default 64)"
    )
    parser.add_argument("--batch", type=int, default=32, help="sequences generated together (default 32)")
    parser.add_argument("--threads", type=int, default=1, help="default 1")
    parser.add_argument("--seconds", type=float, default=2.0, help="per row; at least three rounds (default 2)")
    args = parser.parse_args(argv)
    for name in ("tokens", "pairs", "new_tokens", "batch", "threads"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(args, name)}, but must be at least 1")
    if args.new_tokens + PROMPT_TOKENS > args.block_size:
        raise InputError(
            f"--new-tokens {args.new_tokens} and a prompt of {PROMPT_TOKENS} tokens exceed the context: pass "
            f"--block-size {args.new_tokens + PROMPT_TOKENS} or more"
        )

    torch.set_num_threads(args.threads)
    results = {}
    with tempfile.TemporaryDirectory() as name:
        bench = set_up(args, Path(name))
        config = bench.model.config
        where = f"{cpu_model()}, {args.threads} threads"
        size = f"{config.n_layer} x {config.n_embd}, vocabulary {config.vocab_size:,}"
        size += f", {bench.model.num_params():,} parameters"
        print(f"{where}, torch {torch.__version__}; --recipe {args.recipe}, {size}\n")
        print("| | by | per CPU second | per second | speed of minidisp |\n|---|---|---|---|---|")
        for part in args.only:
            for task in PARTS[part](bench):
                results[task.name] = measure(task, args.seconds)
                print_rows(task, results[task.name])
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    environment = {"torch": torch.__version__, "python": platform.python_version(), "platform": platform.platform()}
    settings = {name: getattr(args, name) for name in ("recipe", *SIZES, "vocab_size", "threads")}
    print(json.dumps({"device": where, **environment, "commit": git.stdout.strip(), **settings, "results": results}))


if __name__ == "__main__":
    sys.exit(exit_code("bench/inference.py", main))
