"""Text generation: streaming a single sample, sampling many prompts in batches, and chatting in the terminal."""

import codecs
import itertools
import sys
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from minidisp import TEXT, InputError, printable, read_bytes
from minidisp.decoding import check_sampling, look_every
from minidisp.model import GPT
from minidisp.template import Messages, Template

ROWS = 64  # sequences per batch
MOST_PROMPTS = 1 << 22  # bytes of a file of prompts


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters. Raises InputError, naming the flag, if one is out of range.

    See GPT.generate for the rest.
    """

    samples: int = 1  # per prompt; sample i uses seed + i
    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    stop: str | None = None  # generation stops before this text

    def __post_init__(self):
        for name in ("samples", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} is {getattr(self, name)}, but must be at least 1")
        if not 0 <= self.seed < 1 << 32:
            raise InputError(f"--seed is {self.seed}, but must be from 0 to 2^32 - 1")
        try:
            check_sampling(self.temperature, self.top_k, self.top_p)
        except ValueError as error:
            name, rest = str(error).split(" ", 1)
            raise InputError(f"--{name.replace('_', '-')} {rest}") from None
        if self.stop is not None:
            check_text(self.stop, "--stop")
            if not self.stop:
                raise InputError("--stop is empty: pass the text that ends a sample, or leave out --stop")


def check_text(text: str, what: str) -> None:
    """Raise InputError, naming `what`, unless the text can be encoded as UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"{what} is not UTF-8 text") from None


def read_prompts(path: str | Path) -> list[str]:
    """The non-blank lines of a text file. Raises InputError, with the line number, on invalid UTF-8."""
    prompts = []
    for number, line in enumerate(read_bytes(path, MOST_PROMPTS).removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1):
        try:
            prompt = line.removesuffix(b"\r").decode("utf-8")
        except UnicodeDecodeError:
            raise InputError(f"{path}, line {number}, is not UTF-8 text") from None
        if prompt.strip():
            prompts.append(prompt)
    if not prompts:
        raise InputError(f"{path} contains no prompts: write one per line")
    return prompts


def visible(text: str) -> str:
    """A text of several lines, safe to print in a terminal; see printable."""
    return printable(text, keep="\n\t" + TEXT)


def typed_lines() -> Iterator[str]:
    """Lines read from stdin until its end (Ctrl-D). In a terminal, Ctrl-C only discards the current line.

    Raises InputError on a line that is not UTF-8.
    """
    while sys.stdin is not None:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        except UnicodeDecodeError:
            raise InputError("the prompt is not UTF-8 text") from None
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            print("\n(Ctrl-D exits)")
            continue
        check_text(line, "the prompt")
        yield line


def typed_prompts() -> Iterator[str]:
    """Lines read from stdin until an empty line or its end (Ctrl-D)."""
    return itertools.takewhile(bool, typed_lines())


def prompt_ids(tokenizer, prompt: str) -> list[int]:
    """The tokens of a prompt, preceded by EOS as every text is in training."""
    return [tokenizer.eos_id, *tokenizer.encode(prompt)]


def stream_sample(
    model: GPT, tokenizer, prompt: str, sampling: Sampling, seed: int, write: Callable[[str], object]
) -> dict:
    """Continue one prompt; write(text) is called as by `stream_text`. Returns the entry of the JSON file:

    prompt, seed, continuation, new_tokens and seconds.
    """
    began, stops, bits = time.perf_counter(), {tokenizer.eos_id}, []
    ids = prompt_ids(tokenizer, prompt)
    tokens = stream_text(model, tokenizer, ids, sampling, seed, stops, lambda bit: bits.append(bit) or write(bit))
    seconds = time.perf_counter() - began
    return {"prompt": prompt, "seed": seed, "continuation": "".join(bits), "new_tokens": tokens, "seconds": seconds}


def stream_text(
    model: GPT,
    tokenizer,
    ids: list[int],
    sampling: Sampling,
    seed: int,
    stops: Collection[int],
    write: Callable[[str], object],
) -> int:
    """Continue a prompt; returns the number of new tokens. write(text) is called with every new piece of text.

    The text ends at one of the tokens `stops`, before sampling.stop, or after max_new_tokens. Pieces are whole
    characters; invalid UTF-8 is replaced by U+FFFD, as in Tokenizer.decode.
    """
    idx = torch.tensor([ids], device=model.wte.weight.device)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    text, shown, new_tokens = "", 0, 0
    for token in _fetched(_stream(model, idx, sampling, seed, stops), idx.device, stops):
        new_tokens += 1
        text += decoder.decode(tokenizer.token_bytes[token])
        if sampling.stop and (found := text.find(sampling.stop, shown)) >= 0:
            text = text[:found]
            break
        end = len(text) - _begun(text, sampling.stop or "")
        write(text[shown:end])
        shown = end
    else:
        text += decoder.decode(b"", final=True)
    write(text[shown:])
    return new_tokens


def _stream(
    model: GPT, idx: torch.Tensor, sampling: Sampling, seed: int | list[int], stops: Collection[int]
) -> Iterator[torch.Tensor]:
    return model.stream(
        idx, sampling.max_new_tokens, sampling.temperature, sampling.top_k, sampling.top_p, seed, stop_token=[*stops]
    )


def _fetched(tokens: Iterator[torch.Tensor], device: torch.device, stops: Collection[int]) -> Iterator[int]:
    """The tokens, each (1, 1), as integers up to the first stop token; see look_every."""
    while group := list(itertools.islice(tokens, look_every(device))):
        for token in torch.cat(group, dim=1)[0].tolist():
            yield token
            if token in stops:
                return


def _begun(text: str, stop: str) -> int:
    """The number of characters at the end of the text that may be the start of `stop`, and are held back."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def sample_all(model: GPT, tokenizer, prompts: list[str], sampling: Sampling) -> list[dict]:
    """The samples of all prompts, in order, generated in batches; each equals the sample of its seed generated alone.

    Returns entries as stream_sample does; the total time is divided equally among them.
    """
    seeds = range(sampling.seed, sampling.seed + sampling.samples)
    wanted = [(prompt, seed) for prompt in prompts for seed in seeds]
    encoded = {prompt: prompt_ids(tokenizer, prompt) for prompt in prompts}
    began = time.perf_counter()
    drawn = continue_all(
        model, [encoded[prompt] for prompt, _ in wanted], sampling, [seed for _, seed in wanted], {tokenizer.eos_id}
    )
    seconds = (time.perf_counter() - began) / len(wanted)
    found = []
    for (prompt, seed), ids in zip(wanted, drawn, strict=True):
        text = tokenizer.decode(ids)
        text = text.split(sampling.stop, 1)[0] if sampling.stop else text
        sample = {"prompt": prompt, "seed": seed, "continuation": text, "new_tokens": len(ids), "seconds": seconds}
        found.append(sample)
    return found


def continue_all(
    model: GPT, prompts: list[list[int]], sampling: Sampling, seeds: list[int], stops: Collection[int]
) -> list[list[int]]:
    """The generated tokens for each prompt, up to and including one of the tokens `stops`.

    Prompts of equal length are batched, up to ROWS at a time.
    """
    found: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    groups = [list(group) for _, group in itertools.groupby(order, key=lambda i: len(prompts[i]))]
    progress = tqdm(total=len(prompts), unit="text", leave=False, disable=None)
    for rows in (group[start : start + ROWS] for group in groups for start in range(0, len(group), ROWS)):
        idx = torch.tensor([prompts[i] for i in rows], device=model.wte.weight.device)
        drawn = list(_stream(model, idx, sampling, [seeds[i] for i in rows], stops))
        for i, ids in zip(rows, torch.cat(drawn, dim=1).tolist(), strict=True):
            end = next((n for n, token in enumerate(ids, start=1) if token in stops), len(ids))
            found[i] = ids[:end]
        progress.update(len(rows))
    progress.close()
    return found


def answer_all(
    model: GPT, tokenizer, template: Template, prompts: list[str | Messages], sampling: Sampling
) -> list[tuple[str, int]]:
    """The answer to each prompt, a user message or a whole dialogue, and its number of tokens."""
    stops = {template.stop_id, tokenizer.eos_id}
    dialogues = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]
    rendered = [template.render(messages, True).ids for messages in dialogues]
    room = model.config.block_size - 1
    drawn = continue_all(model, [ids[-room:] for ids in rendered], sampling, [sampling.seed] * len(prompts), stops)
    return [(tokenizer.decode(ids), len(ids)) for ids in drawn]


def chat(model: GPT, tokenizer, template: Template, lines: Iterator[str], sampling: Sampling, system: str) -> None:
    """Answer each line, given as much of the conversation so far as fits into the context.

    Ctrl-C stops an answer. system: the system message, "" for none. An empty line is ignored.
    """
    opening = [{"role": "system", "content": system}] if system else []
    stops = {template.stop_id, tokenizer.eos_id}
    block_size = model.config.block_size
    room = block_size - min(sampling.max_new_tokens, block_size // 2)  # for the prompt
    history: list[dict] = []
    for turn, line in enumerate(line for line in lines if line.strip()):
        history.append({"role": "user", "content": line})
        cut = 0
        while len(ids := template.render(opening + history, True).ids) > room and len(history) > 1:
            history, cut = history[2:], cut + 2
        if cut:
            print(f"(the context is full: the first {cut} messages were dropped)")
        if len(ids) > room:
            print(f"(this message is longer than the context: only its last {room} tokens are used)")
        bits: list[str] = []

        def write(bit: str, bits: list[str] = bits) -> None:
            bits.append(bit)
            print(visible(bit), end="", flush=True)

        try:
            stream_text(model, tokenizer, ids[-room:], sampling, (sampling.seed + turn) % (1 << 32), stops, write)
        except KeyboardInterrupt:
            print(" (stopped)", end="")
        print(flush=True)
        history.append({"role": "assistant", "content": "".join(bits)})
