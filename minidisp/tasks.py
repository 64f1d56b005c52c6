"""Tasks: minimal pairs, multiple-choice questions, and completions, scored by log-probability or generated.

Files are JSON lines, optionally compressed (.gz); everything is read and checked before a model is needed.
Continuations are scored as in lm-evaluation-harness. Nats are -log p, natural logarithm.
"""

import glob
import gzip
import math
import os
import stat
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from minidisp import TEXT, InputError, parse_json, printable
from minidisp.comparison import Comparison, Measure, Run, bootstrap_mean, compare, short_names
from minidisp.data import strided_windows
from minidisp.decoding import PrefixTree
from minidisp.examples import Unusable, as_messages
from minidisp.metrics import minimal_pair_values
from minidisp.model import GPT
from minidisp.runtime.device import to_device
from minidisp.template import Messages

BATCH_TOKENS = 4096  # per forward pass
ROW_TOKENS = 96  # of texts with common prefixes per row: longer rows share more, but cost more attention
MOST_LINE = 1 << 24  # bytes of a row
MOST_BYTES, MOST_LINES = 1 << 28, 1 << 20  # of a file, decompressed
LOGITS = 1 << 24  # materialised at a time
RESAMPLES = 1000


# --- files ------------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A line of a file of rows."""

    record: dict
    where: str  # "FILE, line N,"
    file: str  # short name of the file, without its suffixes


def read_rows(flag: str, pattern: str) -> list[Row]:
    """The JSON objects of all files that match a pattern, folder or path, in order; blank lines are skipped.

    Raises InputError, with file and line, if one is not a JSON object.
    """
    pattern = os.path.expanduser(pattern)
    if os.path.isfile(pattern):
        files = [pattern]
    elif os.path.isdir(pattern):
        inside = os.path.join(glob.escape(pattern), "*.jsonl")
        files = sorted(glob.glob(inside) + glob.glob(inside + ".gz"))
    else:
        files = [file for file in sorted(glob.glob(pattern, recursive=True)) if os.path.isfile(file)]
    if not files:
        raise InputError(f"{flag} {pattern}: no such file")
    if twice := next((file for file in files if f"{file}.gz" in files), None):
        raise InputError(f"{flag} {pattern}: {twice} and {twice}.gz are the same rows: remove one of them")
    rows = []
    for file, name in zip(files, short_names(files), strict=True):
        stem = name.removesuffix(".gz").removesuffix(".jsonl")
        for number, line in enumerate(_lines(file), start=1):
            if line.strip():
                where = f"{file}, line {number},"
                record = parse_json(line, where)
                if not isinstance(record, dict):
                    raise InputError(f"{where} is not a JSON object")
                rows.append(Row(record, where, name if stem == "overall" else stem))
    if not rows:
        raise InputError(f"{flag} {pattern}: no rows in {', '.join(files[:3])}")
    return rows


def _lines(path: str) -> Iterator[bytes]:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise InputError(f"{path}: not a regular file")
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
            number = size = 0
            while line := file.readline(MOST_LINE + 1):
                number, size = number + 1, size + len(line)
                if len(line) > MOST_LINE:
                    raise InputError(f"{path}, line {number}: longer than {MOST_LINE:,} bytes")
                if size > MOST_BYTES or number > MOST_LINES:
                    most = f"{MOST_LINES:,} lines or {MOST_BYTES:,} bytes"
                    raise InputError(f"{path}, line {number}: the file has more than {most}: split it")
                yield line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path} is damaged, or not compressed with gzip: {error}") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None


def _text(record: dict, key: str, where: str, empty: bool = False) -> str:
    """The text in a field. Raises InputError unless it is a string that UTF-8 can represent."""
    value = record.get(key)
    if not isinstance(value, str):
        raise InputError(f"{where} has no {key}, or it is not a string")
    if not value and not empty:
        raise InputError(f"{where} has an empty {key}")
    if not _is_utf8(value):
        raise InputError(f"{where} has a {key} that is not valid Unicode: it contains a lone surrogate")
    return value


def _is_utf8(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


# --- scoring ----------------------------------------------------------------------------------------------------------


class Passage(NamedTuple):
    """A token sequence, and which of its tokens are scored, each given all tokens before it."""

    ids: list[int]
    counted: list[bool]  # whether each token is scored; never the first


class Score(NamedTuple):
    nats: np.ndarray  # summed over the counted tokens of each passage, (N,) float64
    greedy: np.ndarray  # whether every counted token is the most likely one, (N,) bool


class Forest(NamedTuple):
    """Passages with common prefixes in one row; each common prefix is stored once."""

    tokens: list[int]
    targets: list[int]  # the token that follows each
    parents: list[int]  # see PrefixTree
    depth: list[int]
    counted: list[bool]  # whether the target is scored in any passage
    passages: list[tuple[int, list[int]]]  # for each passage its index and the nodes that are scored


def plant(passages: Sequence[Passage]) -> list[Forest]:
    """Pack all passages into rows of up to ROW_TOKENS tokens; a row is longer if its passages share long prefixes.

    A node is a token and its target, so two passages branch one token before the first that differs.
    """
    rows, last = [], []
    for i in sorted(range(len(passages)), key=lambda i: passages[i].ids):  # so that neighbours share long prefixes
        ids, counted = passages[i]
        same = next((n for n, (a, b) in enumerate(zip(ids, last, strict=False)) if a != b), min(len(ids), len(last)))
        shared = max(0, same - 1)  # nodes
        new = len(ids) - 1 - shared
        size = len(rows[-1].tokens) + new if rows else math.inf
        # A passage that shares more than it adds may exceed ROW_TOKENS, up to twice its own length.
        if size > ROW_TOKENS and (new > shared or size > 2 * len(ids)):
            rows.append(Forest([], [], [], [], [], []))
            shared, path = 0, []
        row = rows[-1]
        first = len(row.tokens)
        path = [*path[:shared], *range(first, first + len(ids) - 1 - shared)]
        row.tokens.extend(ids[shared:-1])
        row.targets.extend(ids[shared + 1 :])
        row.parents.extend(path[max(0, depth - 1)] for depth in range(shared, len(ids) - 1))
        row.depth.extend(range(shared, len(ids) - 1))
        row.counted.extend([False] * (len(ids) - 1 - shared))
        nodes = [node for node, count in zip(path, counted[1:], strict=True) if count]
        for node in nodes:
            row.counted[node] = True
        row.passages.append((i, nodes))
        last = ids
    return rows


@torch.no_grad()
def score(model: GPT, passages: list[Passage], device: torch.device) -> Score:
    """-log p of the counted tokens of each passage, and whether they are the most likely ones.

    Common prefixes are computed once. Rows of similar length are batched, and the output layer is only applied where a
    token is counted. A passage longer than the context is read in windows that overlap by half.
    """
    pieces, of = [], []
    for i, passage in enumerate(passages):
        for piece in _pieces(passage, model.config.block_size):
            pieces.append(piece)
            of.append(i)
    nats, greedy = np.zeros(len(passages)), np.ones(len(passages), dtype=bool)
    rows = sorted(plant(pieces), key=lambda row: len(row.tokens))
    progress = tqdm(total=len(pieces), unit="text", unit_scale=True, leave=False, disable=None)
    while rows:
        size = max(1, BATCH_TOKENS // len(rows[-1].tokens))
        rows, batch = rows[:-size], rows[-size:]
        losses, hits = _score_rows(model, batch, device)
        for row, loss, hit in zip(batch, losses, hits, strict=True):
            for i, nodes in row.passages:
                nats[of[i]] += loss[nodes].sum()
                greedy[of[i]] &= bool(hit[nodes].all())
        progress.update(sum(len(row.passages) for row in batch))
    progress.close()
    return Score(nats, greedy)


def _pieces(passage: Passage, block_size: int) -> Iterator[Passage]:
    """The passage, or windows of it that together count every counted token once."""
    ids, counted = passage
    if len(ids) <= block_size + 1:
        yield passage
        return
    for window in strided_windows(len(ids) - 1, block_size, max(1, block_size // 2)):
        seen = window.start - window.context_start
        part = [False] * (seen + 1) + counted[window.start + 1 : window.stop + 1]
        if any(part):
            yield Passage(ids[window.context_start : window.stop + 1], part)


def _score_rows(model: GPT, rows: list[Forest], device: torch.device) -> tuple[np.ndarray, np.ndarray]:
    """Nats, and whether the target is the most likely token, (B, T) each; 0 and True where not counted."""
    T = max(len(row.tokens) for row in rows)
    fields = np.zeros((5, len(rows), T), dtype=np.int64)
    fields[2] = np.arange(T)  # padding tokens are roots of their own, which no other token attends to
    for b, row in enumerate(rows):
        fields[:, b, : len(row.tokens)] = row[:5]
    idx, targets, parents, depth, counted = to_device(fields, device)
    x, _ = model._backbone(idx, False, PrefixTree(parents, depth))
    where = fields[4].astype(bool)
    x, targets = x[counted.bool()], targets[counted.bool()]
    losses, hits = [], []
    step = max(1, LOGITS // model.config.vocab_size)
    for start in range(0, len(x), step):
        logits = model.logits(x[start : start + step]).float()
        losses.append(F.cross_entropy(logits, targets[start : start + step], reduction="none"))
        hits.append(logits.argmax(dim=-1) == targets[start : start + step])
    nats, hit = np.zeros(where.shape), np.ones(where.shape, dtype=bool)
    nats[where], hit[where] = torch.cat(losses).double().cpu().numpy(), torch.cat(hits).cpu().numpy()
    return nats, hit


def continuations(tokenizer, block_size: int, rows: list[tuple[str, str, str]]) -> list[Passage]:
    """Contexts and the continuations to score, tokenized as in lm-evaluation-harness.

    rows: (context, continuation, where). Whitespace at the end of the context is moved to the continuation. Context and
    continuation are tokenized together; the continuation's tokens are those after as many as the context has alone. An
    empty context becomes EOS. Sequences that are too long are truncated at the start. Raises InputError, naming the
    row, if no token is left to score.
    """
    moved = []
    for context, continuation, _ in rows:
        kept = context.rstrip()
        moved.append((kept, context[len(kept) :] + continuation))
    threads = torch.get_num_threads()
    contexts = list(dict.fromkeys(context for context, _ in moved if context))
    encoded = dict(zip(contexts, tokenizer.encode_batch(contexts, threads=threads), strict=True)) if contexts else {}
    wholes = tokenizer.encode_batch([context + continuation for context, continuation in moved], threads=threads)
    passages = []
    for (context, _), whole, (_, _, where) in zip(moved, wholes, rows, strict=True):
        size = len(encoded[context]) if context else 1
        ids = whole if context else [tokenizer.eos_id, *whole]
        if len(ids) <= size:
            raise InputError(f"{where}: a continuation adds no token to its context: start it with a space")
        if len(ids) - size <= block_size:
            cut = max(0, len(ids) - block_size - 1)
            ids, size = ids[cut:], size - cut
        passages.append(Passage(ids, [False] * size + [True] * (len(ids) - size)))
    return passages


def _resampled(values: np.ndarray) -> list[float]:
    """The 95 % interval of the mean, [low, high]."""
    return [*bootstrap_mean(values)[1:]]


def _by_file(files: list[str], summary: Callable[[np.ndarray], dict]) -> dict[str, dict]:
    """The summary of all rows ("overall") and of each file. summary: a function of the rows' indices."""
    entries = {"overall": summary(np.arange(len(files)))}
    for name in dict.fromkeys(files):
        entries[name] = summary(np.array([i for i, file in enumerate(files) if file == name]))
    return entries


# --- minimal pairs ----------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    """A minimal pair: an acceptable and an unacceptable sentence that differ in one respect."""

    good: str
    bad: str
    file: str  # name of its file
    term: str | None  # linguistic phenomenon
    field: str | None  # field of linguistics


def read_pairs(pattern: str) -> list[Pair]:
    """The minimal pairs of all files that match the pattern, in order, in the format of BLiMP (arXiv 1912.00582).

    A row has sentence_good and sentence_bad, and optionally field, linguistics_term and UID. Raises InputError, with
    file and line, if a row is invalid.
    """
    return [_parse_pair(row) for row in read_rows("--minimal-pairs", pattern)]


DIRECTION_MARKS = "\u061c\u200e\u200f"  # part of Arabic and Hebrew text


def _parse_pair(row: Row) -> Pair:
    record = row.record
    for key in ("sentence_good", "sentence_bad", "field", "linguistics_term", "UID"):
        value, is_sentence = record.get(key), key.startswith("sentence")
        if value is None and not is_sentence:
            continue
        keep = TEXT + DIRECTION_MARKS if is_sentence else TEXT
        if not isinstance(value, str) or not value.strip() or printable(value, keep=keep) != value:
            raise InputError(f"{row.where} is not a minimal pair: its {key} is missing, or not a single line of text")
    return Pair(
        record["sentence_good"], record["sentence_bad"], row.file, record.get("linguistics_term"), record.get("field")
    )


def sentence_nats(model: GPT, tokenizer, sentences: list[str], device: torch.device) -> np.ndarray:
    """-log p of whole sentences, each preceded by EOS like a text in training, (N,) float64."""
    distinct = {sentence: i for i, sentence in enumerate(dict.fromkeys(sentences))}
    texts = tokenizer.encode_batch(list(distinct), threads=torch.get_num_threads())
    passages = [Passage([tokenizer.eos_id, *ids], [False] + [True] * len(ids)) for ids in texts]
    return score(model, passages, device).nats[[distinct[sentence] for sentence in sentences]]


def score_pairs(model: GPT, tokenizer, pairs: list[Pair], device: torch.device) -> np.ndarray:
    """The score of every pair, (N,); see minimal_pair_values."""
    nats = sentence_nats(model, tokenizer, [s for pair in pairs for s in (pair.good, pair.bad)], device)
    return minimal_pair_values(-nats[0::2], -nats[1::2])


def summarise_pairs(pairs: list[Pair], values: list[np.ndarray]) -> list[dict]:
    """For every model: accuracy with its interval over all pairs, and by_field, by_term and by_file where known.

    values: scores of all pairs, an array per model. From the second model on, versus_first is the paired difference.
    """

    def summary(which: np.ndarray, model: int) -> dict:
        accuracy, low, high = bootstrap_mean(values[model][which])
        scores = {"pairs": len(which), "accuracy": accuracy, "low": low, "high": high}
        if model:
            difference, low, high = bootstrap_mean(values[model][which] - values[0][which])
            scores["versus_first"] = {"accuracy": difference, "low": low, "high": high}
        return scores

    summaries = [summary(np.arange(len(pairs)), model) for model in range(len(values))]
    for key in ("field", "term", "file"):
        members: dict[str, list[int]] = {}
        for i, pair in enumerate(pairs):
            if (name := getattr(pair, key)) is not None:
                members.setdefault(name, []).append(i)
        for model, scores in enumerate(summaries):
            scores[f"by_{key}"] = {name: summary(np.array(which), model) for name, which in sorted(members.items())}
    return summaries


def compare_pairs(runs: list[Run], values: list[np.ndarray], summaries: list[dict]) -> Comparison:
    """Compare every run with the first; also stores the verdicts in the summaries. values: as in summarise_pairs."""
    measure = _mean_measure("accuracy", values, "pairs", "% of the minimal pairs")
    found = compare(runs, measure)
    for summary, versus in zip(summaries[1:], found.versus_first, strict=True):
        summary["versus_first"]["verdict"] = versus["verdict"]
    return found


def _mean_measure(key: str, values: list[np.ndarray], sampled: str, unit: str) -> Measure:
    """The mean score of all rows as a percentage. values: scores of the rows, (N,), for each model."""

    def difference(i: int, j: int) -> tuple[float, float, float]:
        return bootstrap_mean(values[j] - values[i])

    return Measure(key, [float(v.mean()) for v in values], difference, sampled, unit, percent=True)


# --- multiple-choice questions ----------------------------------------------------------------------------------------


class Question(NamedTuple):
    context: str
    choices: list[str]  # continuations of the context, including a leading space
    answer: int  # index of the correct choice
    where: str
    file: str


def read_choices(pattern: str) -> list[Question]:
    """The questions of all files that match the pattern: rows of context, choices and answer.

    Raises InputError, with file, line and field, if a row is invalid.
    """
    questions = []
    for record, where, file in read_rows("--choices", pattern):
        context = _text(record, "context", where, empty=True)
        choices, answer = record.get("choices"), record.get("answer")
        if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(choice, str) for choice in choices):
            raise InputError(f"{where} has no choices, or they are not a list of at least two strings")
        if not all(choice.removeprefix(" ") and _is_utf8(choice) for choice in choices):
            raise InputError(f"{where} has a choice that is empty or contains a lone surrogate")
        if type(answer) is not int or not 0 <= answer < len(choices):
            raise InputError(f"{where} has no answer, or it is not an index from 0 to {len(choices) - 1}")
        questions.append(Question(context, choices, answer, where, file))
    return questions


class Chosen(NamedTuple):
    """The score of every question, 0 or 1, (N,) float64."""

    acc: np.ndarray  # by total log-probability
    acc_norm: np.ndarray  # by log-probability per character


def score_choices(model: GPT, tokenizer, questions: list[Question], device: torch.device) -> Chosen:
    """Which questions are answered correctly: `acc` and `acc_norm` of lm-evaluation-harness.

    The answer is the choice with the highest log-probability, or for acc_norm the highest log-probability per
    character, not counting one leading space; the first one on a tie. A question with a NaN counts as 0.
    """
    distinct = {(question.context, choice): question.where for question in questions for choice in question.choices}
    passages = continuations(tokenizer, model.config.block_size, [(*key, where) for key, where in distinct.items()])
    nats = dict(zip(distinct, score(model, passages, device).nats, strict=True))
    acc, acc_norm = np.zeros(len(questions)), np.zeros(len(questions))
    for i, question in enumerate(questions):
        log_p = -np.array([nats[question.context, choice] for choice in question.choices])
        if np.isfinite(log_p).all():
            characters = np.array([float(len(choice.removeprefix(" "))) for choice in question.choices])
            acc[i] = log_p.argmax() == question.answer
            acc_norm[i] = (log_p / characters).argmax() == question.answer
    return Chosen(acc, acc_norm)


def summarise_choices(questions: list[Question], chosen: list[Chosen]) -> list[dict]:
    """For every model, per file and overall: questions, chance level, acc and acc_norm with their intervals.

    From the second model on, versus_first: the paired differences.
    """
    chance = np.array([1 / len(question.choices) for question in questions])

    def of(model: int) -> Callable[[np.ndarray], dict]:
        def summary(which: np.ndarray) -> dict:
            found = {"questions": len(which), "chance": float(chance[which].mean())}
            versus = {}
            for key in Chosen._fields:
                values = getattr(chosen[model], key)[which]
                found |= {key: float(values.mean()), f"{key}_interval": _resampled(values)}
                if model:
                    difference = values - getattr(chosen[0], key)[which]
                    versus |= {key: float(difference.mean()), f"{key}_interval": _resampled(difference)}
            return found | ({"versus_first": versus} if versus else {})

        return summary

    return [_by_file([question.file for question in questions], of(model)) for model in range(len(chosen))]


def compare_choices(runs: list[Run], chosen: list[Chosen], summaries: list[dict]) -> dict[str, Comparison]:
    """Compare every run with the first, by acc and by acc_norm; also stores the verdicts in the summaries."""
    return {
        key: _compare_key(
            runs, key, [getattr(c, key) for c in chosen], summaries, "questions", f"% of the choices ({key})"
        )
        for key in Chosen._fields
    }


def _compare_key(
    runs: list[Run], key: str, values: list[np.ndarray], summaries: list[dict], sampled: str, unit: str
) -> Comparison:
    found = compare(runs, _mean_measure(key, values, sampled, unit))
    _note_verdicts(key, found, summaries)
    return found


def _note_verdicts(key: str, found: Comparison, summaries: list[dict]) -> None:
    for summary, versus in zip(summaries[1:], found.versus_first, strict=True):
        summary["overall"]["versus_first"][f"{key}_verdict"] = versus["verdict"]


# --- completions ------------------------------------------------------------------------------------------------------


class Completion(NamedTuple):
    start: str | Messages  # a context or prompt, or the messages before an answer
    completion: str
    answered: bool  # True: an answer to the prompt is generated; False: the completion of the context is scored
    where: str
    file: str


def read_completions(pattern: str) -> list[Completion]:
    """Rows of context and completion, of prompt and completion, or dialogues in any form that can be trained on: every
    assistant message is a completion. All rows of a file are of the same kind.

    Raises InputError, with file, line and field, if a row is invalid.
    """
    rows, kinds = [], {}
    for record, where, file in read_rows("--completions", pattern):
        kind = "context" if "context" in record else "prompt" if "prompt" in record else "dialogue"
        if kind == "dialogue":
            found = _answers(record, where)
        elif kind == "context" and "prompt" in record:
            raise InputError(f"{where} must have either a prompt or a context, not both")
        else:
            start = _text(record, kind, where, empty=kind == "context")
            found = [(start, _text(record, "completion", where))]
            if kind == "prompt" and not found[0][1].strip():
                raise InputError(f"{where} has an empty completion")
        if kinds.setdefault(file, kind) != kind:
            raise InputError(
                f"{where} has a {kind}, but the rows before it have a {kinds[file]}: use a separate file for each kind"
            )
        rows += [Completion(start, completion, kind != "context", where, file) for start, completion in found]
    return rows


def _answers(record: dict, where: str) -> list[tuple[Messages, str]]:
    """The assistant messages of a dialogue, each with the messages before it."""
    try:
        messages = as_messages(record)
    except Unusable as error:
        raise InputError(f"{where} {error}") from None
    if messages is None:
        raise InputError(f"{where} must have either a prompt or a context, with a completion, or be a dialogue")
    return [(messages[:i], m["content"]) for i, m in enumerate(messages) if m["role"] == "assistant"]


class Completed(NamedTuple):
    """The results of a model for all rows, in order; NaN or None where a row is of the other kind."""

    nats: np.ndarray  # (N,), of the completion
    tokens: np.ndarray  # (N,), of the completion
    greedy: np.ndarray  # (N,), 1 if every token of the completion is the most likely one
    answers: list[str | None]
    exact: np.ndarray  # (N,), 1 if the answer equals the completion, both stripped
    new_tokens: np.ndarray  # (N,), of the answer
    seconds: float  # spent on generation
    translated: dict[tuple[int, ...], "Translated"]  # see translations


def complete(
    model: GPT,
    tokenizer,
    rows: list[Completion],
    answer: Callable[[list[str | Messages]], list[tuple[str, int]]],
    device: torch.device,
) -> Completed:
    """Score the rows with a context, and generate answers to the prompts. answer: prompts -> [(text, tokens), ...]."""
    N = len(rows)
    nats, tokens, greedy, exact, new_tokens = (np.full(N, math.nan) for _ in range(5))
    answers: list[str | None] = [None] * N
    scored = [i for i, row in enumerate(rows) if not row.answered]
    if scored:
        parts = [(rows[i].start, rows[i].completion, rows[i].where) for i in scored]
        passages = continuations(tokenizer, model.config.block_size, parts)
        nats[scored], greedy[scored] = score(model, passages, device)
        tokens[scored] = [sum(passage.counted) for passage in passages]
        greedy[scored] *= np.isfinite(nats[scored])
    asked, began = [i for i, row in enumerate(rows) if row.answered], time.perf_counter()
    if asked:
        for i, (text, count) in zip(asked, answer([rows[i].start for i in asked]), strict=True):
            answers[i], new_tokens[i] = text, count
            exact[i] = text.strip() == rows[i].completion.strip()
    return Completed(nats, tokens, greedy, answers, exact, new_tokens, time.perf_counter() - began, {})


def no_sacrebleu() -> str:
    """The reason why chrF and BLEU cannot be computed; "" if they can."""
    try:
        import sacrebleu  # noqa: F401
    except ImportError:
        return "chrF and BLEU need the package sacrebleu: pip install sacrebleu"
    return ""


class Translated:
    """chrF and BLEU of a corpus with sacrebleu's defaults, and their bootstrap; statistics are extracted only once."""

    METRICS = ("chrf", "bleu")

    def __init__(self, answers: list[str], references: list[str]):
        from sacrebleu.metrics import BLEU, CHRF

        answers, references = [a.strip() for a in answers], [r.strip() for r in references]
        self.N, self._parts, self._resampled = len(answers), {}, {}
        for key, metric in (("chrf", CHRF()), ("bleu", BLEU())):
            # Sufficient statistics per answer, as used by sacrebleu's own significance tests.
            counts = np.array(metric._extract_corpus_statistics(answers, [references]), dtype=np.float64)
            self._parts[key] = (metric, counts, metric.corpus_score(answers, [references]).score)

    def score(self, key: str) -> float:
        return self._parts[key][2]

    def resampled(self, key: str) -> np.ndarray:
        """The scores of RESAMPLES bootstrap samples of the answers, the same for every model, (RESAMPLES,)."""
        if key not in self._resampled:  # used by the interval and by every comparison
            metric, counts, _ = self._parts[key]
            drawn = np.random.default_rng(0).multinomial(self.N, np.full(self.N, 1 / self.N), size=RESAMPLES)
            scores = [metric._compute_score_from_stats(row.tolist()).score for row in drawn @ counts]
            self._resampled[key] = np.array(scores)
        return self._resampled[key]

    def interval(self, key: str) -> list[float]:
        if self.N < 2:
            return [math.nan, math.nan]
        return np.quantile(self.resampled(key), (0.025, 0.975)).tolist()

    def against(self, first: "Translated", key: str) -> tuple[float, float, float]:
        """The difference to the first model on the same prompts, and its paired 95 % interval."""
        difference = self.score(key) - first.score(key)
        if self.N < 2:
            return difference, math.nan, math.nan
        low, high = np.quantile(self.resampled(key) - first.resampled(key), (0.025, 0.975)).tolist()
        return difference, low, high


def summarise_completions(rows: list[Completion], completed: list[Completed]) -> list[dict]:
    """For every model, per file and overall: the number of rows, and the metrics of their kind.

    context: acc and perplexity as in lm-evaluation-harness, and token_perplexity. prompt: exact_match; chrf and bleu if
    sacrebleu is installed; overall, tokens_per_second; per file, the answers. From the second model on, versus_first.
    """
    answered = np.array([row.answered for row in rows])
    files = [row.file for row in rows]
    translated = not no_sacrebleu()

    def of(model: int) -> Callable[[np.ndarray], dict]:
        own, first = completed[model], completed[0]

        def summary(which: np.ndarray) -> dict:
            found, versus = {"rows": len(which)}, {}
            if len(scored := which[~answered[which]]):
                nats = own.nats[scored]
                mean, low, high = bootstrap_mean(nats)
                found |= {"acc": float(own.greedy[scored].mean()), "acc_interval": _resampled(own.greedy[scored])}
                found |= {"perplexity": _exp(mean), "perplexity_interval": [_exp(low), _exp(high)]}
                found |= {"token_perplexity": _exp(float(nats.sum() / own.tokens[scored].sum()))}
                found |= {"tokens": int(own.tokens[scored].sum())}
                if model:
                    difference = own.greedy[scored] - first.greedy[scored]
                    versus |= {"acc": float(difference.mean()), "acc_interval": _resampled(difference)}
            if len(asked := which[answered[which]]):
                found |= {"exact_match": float(own.exact[asked].mean())}
                found |= {"exact_match_interval": _resampled(own.exact[asked])}
                if model:
                    difference = own.exact[asked] - first.exact[asked]
                    versus |= {"exact_match": float(difference.mean()), "exact_match_interval": _resampled(difference)}
                if translated:
                    answers, firsts = (translations(rows, c, asked) for c in (own, first))
                    for key in Translated.METRICS:
                        found |= {key: answers.score(key), f"{key}_interval": answers.interval(key)}
                        if model:
                            difference, low, high = answers.against(firsts, key)
                            versus |= {key: difference, f"{key}_interval": [low, high]}
                if len(which) < len(rows) or len(set(files)) == 1:
                    found["answers"] = [
                        {"prompt": rows[i].start, "completion": rows[i].completion, "answer": own.answers[i]}
                        for i in asked
                    ]
            return found | ({"versus_first": versus} if versus else {})

        return summary

    summaries = []
    for model, own in enumerate(completed):
        entries = _by_file(files, of(model))
        if answered.any():
            entries["overall"].pop("answers", None)  # listed with their file
            entries["overall"]["new_tokens"] = int(np.nansum(own.new_tokens))
            entries["overall"]["tokens_per_second"] = float(np.nansum(own.new_tokens)) / own.seconds
        summaries.append(entries)
    return summaries


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf if nats == nats else math.nan


def translations(rows: list[Completion], completed: Completed, which: Sequence[int]) -> Translated:
    """The answers to these rows, whose counts are extracted and resampled once for summaries and comparisons."""
    key = tuple(which)
    if key not in completed.translated:
        completed.translated[key] = Translated([completed.answers[i] for i in key], [rows[i].completion for i in key])
    return completed.translated[key]


def compare_completions(
    runs: list[Run], rows: list[Completion], completed: list[Completed], summaries: list[dict]
) -> dict[str, Comparison]:
    """Compare every run with the first, by each score; also stores the verdicts in the summaries."""
    answered = np.array([row.answered for row in rows])
    found = {}
    if not answered.all():
        values = [c.greedy[~answered] for c in completed]
        found["acc"] = _compare_key(runs, "acc", values, summaries, "completions", "% of the completions (acc)")
    if answered.any():
        values = [c.exact[answered] for c in completed]
        found["exact_match"] = _compare_key(
            runs, "exact_match", values, summaries, "prompts", "% of the answers (exact match)"
        )
        if not no_sacrebleu():
            all_of = [translations(rows, c, np.flatnonzero(answered)) for c in completed]
            for key, name in (("chrf", "chrF"), ("bleu", "BLEU")):
                measure = Measure(
                    key,
                    [t.score(key) for t in all_of],
                    lambda i, j, key=key: all_of[j].against(all_of[i], key),
                    "prompts",
                    name,
                    digits=2,
                )
                found[key] = compare(runs, measure)
                _note_verdicts(key, found[key], summaries)
    return found
