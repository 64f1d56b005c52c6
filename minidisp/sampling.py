"""Continue a prompt with a model: shown character by character, or many prompts at a time."""

import codecs
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from minidisp import InputError, read_bytes
from minidisp.decoding import check_sampling, look_every
from minidisp.model import GPT

ROWS = 64  # sequences that are generated at a time


@dataclass(frozen=True)
class Sampling:
    """How a prompt is continued. Raises InputError naming what is out of range. See GPT.generate for the rest."""

    samples: int = 1  # of every prompt; the first has the seed, the next seed + 1, and so on
    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    stop: str | None = None  # a continuation ends before this text

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
                raise InputError("--stop is empty: give the text that ends a sample, or leave it out")


def check_text(text: str, what: str) -> None:
    """Raise InputError naming `what` unless UTF-8 can represent the text."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"{what} is not UTF-8 text") from None


def read_prompts(path: str | Path) -> list[str]:
    """The lines of a text file that are not blank. Raises InputError naming the line that is not UTF-8."""
    prompts = []
    for number, line in enumerate(read_bytes(path).removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1):
        try:
            prompt = line.removesuffix(b"\r").decode("utf-8")
        except UnicodeDecodeError:
            raise InputError(f"{path}, line {number}, is not UTF-8 text") from None
        if prompt.strip():
            prompts.append(prompt)
    if not prompts:
        raise InputError(f"{path} holds no prompt: write one on each line")
    return prompts


def typed_prompts() -> Iterator[str]:
    """What a person types, line by line, until an empty line or the end of the input (Ctrl-D)."""
    while sys.stdin is not None:
        try:
            prompt = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        except UnicodeDecodeError:
            raise InputError("the prompt is not UTF-8 text") from None
        if not prompt:
            return
        check_text(prompt, "the prompt")
        yield prompt


def prompt_ids(vocabulary, prompt: str) -> list[int]:
    """The tokens of a prompt, behind EOS, as a text begins in training."""
    return [vocabulary.eos_id, *vocabulary.encode(prompt)]


def stream_sample(
    model: GPT, vocabulary, prompt: str, sampling: Sampling, seed: int, write: Callable[[str], object]
) -> dict:
    """Continue one prompt. write(text) is called with every new piece of text, in whole characters.

    The sample ends with EOS, before sampling.stop, or after max_new_tokens. Returns what goes into the JSON file:
    prompt, seed, continuation, new_tokens and seconds. Bytes that are no UTF-8 become U+FFFD, as Tokenizer.decode has
    it.
    """
    idx = torch.tensor([prompt_ids(vocabulary, prompt)], device=model.wte.weight.device)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    text, shown, new_tokens, began = "", 0, 0, time.perf_counter()
    for token in _fetched(_stream(model, idx, sampling, seed, vocabulary.eos_id), idx.device, vocabulary.eos_id):
        new_tokens += 1
        text += decoder.decode(vocabulary.token_bytes[token])
        if sampling.stop and (found := text.find(sampling.stop, shown)) >= 0:
            text = text[:found]
            break
        end = len(text) - _begun(text, sampling.stop or "")
        write(text[shown:end])
        shown = end
    else:
        text += decoder.decode(b"", final=True)
    write(text[shown:])
    seconds = time.perf_counter() - began
    return {"prompt": prompt, "seed": seed, "continuation": text, "new_tokens": new_tokens, "seconds": seconds}


def _stream(model: GPT, idx: torch.Tensor, sampling: Sampling, seed: int, eos_id: int) -> Iterator[torch.Tensor]:
    return model.stream(
        idx, sampling.max_new_tokens, sampling.temperature, sampling.top_k, sampling.top_p, seed, stop_token=eos_id
    )


def _fetched(tokens: Iterator[torch.Tensor], device: torch.device, last: int) -> Iterator[int]:
    """The tokens (1, 1) as numbers, up to the first that is `last`; see look_every."""
    while group := list(itertools.islice(tokens, look_every(device))):
        for token in torch.cat(group, dim=1)[0].tolist():
            yield token
            if token == last:
                return


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of the text may be the beginning of `stop`: they are held back."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def sample_all(model: GPT, vocabulary, prompts: list[str], sampling: Sampling) -> list[dict]:
    """The samples of all prompts, in their order; those of equally many tokens are drawn together.

    So what is drawn for a prompt depends on the others, but is the same each time. Returns what stream_sample does,
    with an equal share of the seconds each.
    """
    by_length = {}
    for i, prompt in enumerate(prompts):
        ids = prompt_ids(vocabulary, prompt)
        by_length.setdefault(len(ids), []).append((i, ids))
    found = {}
    for group in by_length.values():
        for start in range(0, len(group), ROWS):
            rows = group[start : start + ROWS]
            idx = torch.tensor([ids for _, ids in rows], device=model.wte.weight.device)
            for seed in range(sampling.seed, sampling.seed + sampling.samples):
                began = time.perf_counter()
                drawn = list(_stream(model, idx, sampling, seed, vocabulary.eos_id))
                new = torch.cat(drawn, dim=1).tolist()
                seconds = (time.perf_counter() - began) / len(rows)
                for (i, _), ids in zip(rows, new, strict=True):
                    if vocabulary.eos_id in ids:
                        ids = ids[: ids.index(vocabulary.eos_id) + 1]
                    text = vocabulary.decode(ids)
                    text = text.split(sampling.stop, 1)[0] if sampling.stop else text
                    found[i, seed] = {"prompt": prompts[i], "seed": seed, "continuation": text, "new_tokens": len(ids),
                                      "seconds": seconds}  # fmt: skip
    return [found[key] for key in sorted(found)]
