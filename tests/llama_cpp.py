"""Runs in llama.cpp: the same tokens for fifty texts, the same greedy continuations, and the same chat prompts
if the run was trained on examples.

    pip install xllamacpp                              # a compiled llama.cpp with its server
    python tests/llama_cpp.py runs/NAME ...            # every --dtype of every run
    python -m pytest tests/test_gguf.py                # small runs of every kind

Exit code 0: all agree.
"""

import argparse
import importlib.util
import json
import math
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import minidisp
from minidisp.hf import gguf
from minidisp.template import Template, load_template

TEXTS = [
    "",
    " ",
    "a",
    "  ",
    "hello world",
    " a leading space",
    "a trailing space ",
    "two  spaces   and more    .",
    "\n",
    "\n\n\n",
    "a\nb",
    "a\r\nb\rc",
    "\ttab\tand\ttab",
    " " * 77 + "\n" + " " * 31,
    "x" * 300,
    "0123456789",
    "3.14159 and 1,000,000",
    "a=b+c*d/e-f%g",
    "def read_lines(path):\n    with open(path) as file:\n        return [line.rstrip() for line in file]\n",
    "class A(B):\n\tpass\n",
    "import os, sys\n\n\nif __name__ == '__main__':\n    main()\n",
    "it's, we'll, I'd, they're, IT'S, don't",
    "CamelCase snake_case SCREAMING",
    "</s> <unk> <s> <0x41> <|endoftext|> [INST] <pad>",
    '{"json": [1, 2, {"a": null}]}',
    '<p class="x">&amp;</p>',
    "a\x00b\x00",
    "\x01\x02\u007f",
    "\u00e9\u00e8\u00ea \u00fc\u00f6\u00e4 \u00f1 \u00df",
    "A\u030a is not \u00c5, e\u0301 is not \u00e9",
    "\ufb01 \ufb02 \u2122 \u00bd \u2460",
    "\u0420\u0443\u0441\u0441\u043a\u0438\u0439 \u0442\u0435\u043a\u0441\u0442",
    "\u0395\u03bb\u03bb\u03b7\u03bd\u03b9\u03ba\u03ac",
    "\u05e2\u05d1\u05e8\u05d9\u05ea \u05d5\u05e2\u05d5\u05d3",
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629\u060c \u0646\u0639\u0645",
    "\u0939\u093f\u0928\u094d\u0926\u0940 \u092e\u0947\u0902",
    "\u0e44\u0e17\u0e22\u0e44\u0e21\u0e48\u0e21\u0e35\u0e0a\u0e48\u0e2d\u0e07\u0e27\u0e48\u0e32\u0e07",
    "\u6f22\u5b57\u4eee\u540d\u4ea4\u3058\u308a\u6587\u3002",
    "\u4e2d\u6587\uff0c\u6ca1\u6709\u7a7a\u683c",
    "\ud55c\uad6d\uc5b4 \ubb38\uc7a5",
    "\u1200\u121b\u122d\u129b",
    "\u10e5\u10d0\u10e0\u10d7\u10e3\u10da\u10d8",
    "\u13e3\u13b3\u13a9",
    "\U0001f642",
    "\U0001f469\u200d\U0001f680 \U0001f1ea\U0001f1fa \U0001f44d\U0001f3fd",
    "\u3000 \u00a0 \u200b \u2003 wide spaces",
    "\ufeffa byte-order mark",
    "\U0010ffff \ud7ff \ue000",
    "\u2211\u222b\u221a\u221e \u2264 \u2260 \u2190\u2192",
    "the end.\n\n    \n\t\n  x",
]
PROMPTS = ["import ", "def read_", "class A:\n    "]
DIALOGUES = [
    [{"role": "user", "content": "What is 12 plus 30?"}],
    [
        {"role": "system", "content": "Be brief.  "},
        {"role": "user", "content": "\u00fcber\n\n  two  spaces \U0001f642"},
        {"role": "assistant", "content": "It's, we'll."},
        {"role": "user", "content": " and then?\n"},
    ],
]


def installed() -> bool:
    return importlib.util.find_spec("xllamacpp") is not None


class Server:
    """llama.cpp's own server in this process, with one GGUF file."""

    def __init__(self, path: Path, threads: int = 1):
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = 0  # that of the file
        params.n_parallel, params.cpuparams.n_threads = 1, threads
        params.warmup, params.use_jinja, params.verbosity = False, True, 1
        self._server = xllamacpp.Server(params)

    def ask(self, endpoint: str, **body) -> dict:
        """The answer of an endpoint, which are described in llama.cpp's tools/server/README.md."""
        request = urllib.request.Request(
            self._server.listening_address + endpoint,
            json.dumps(body).encode() if body else None,
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"llama.cpp's {endpoint}: {error.read().decode()}") from None

    def tokens(self, text: str, special: bool = False) -> list[int]:
        return self.ask("/tokenize", content=text, add_special=False, parse_special=special)["tokens"]


def compare(run: Path, dtype: str, tokens: int = 40) -> list[str]:
    """The differences between a run and its file in llama.cpp, in words; [] if there are none."""
    model, tokenizer = minidisp.load(run)
    template = load_template(run, tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        server = Server(gguf.export_run(run, folder, dtype))
        context = server.ask("/props")["default_generation_settings"]["n_ctx"]
        found = [] if context == model.config.block_size else [f"a context of {context}"]
        found += _texts(server, tokenizer)
        found += _continuations(server, model, tokenizer, template, dtype, tokens)
        return found + (_dialogues(server, template) if template else [])


def _texts(server: Server, tokenizer) -> list[str]:
    found = []
    for text in TEXTS:
        ids = server.tokens(text)
        if ids != tokenizer.encode(text):
            found.append(f"{text!r} is {ids}, not {tokenizer.encode(text)}")
        back = server.ask("/detokenize", tokens=ids)["content"]
        if back != text:
            found.append(f"{text!r} comes back as {back!r}")
    return found


def _continuations(server: Server, model, tokenizer, template: Template | None, dtype: str, tokens: int) -> list[str]:
    found = []
    ends = {tokenizer.eos_id, *([template.stop_id] if template else [])}
    within = {"float32": 1e-4, "float16": 1e-3, "bfloat16": 5e-3, "q8_0": 2e-2}[dtype]
    # The server does not report a token's probabilities before its text is complete UTF-8, so that token must be "a".
    one = {"n_predict": 1, "n_probs": tokenizer.vocab_size, "logit_bias": [[tokenizer.encode("a")[-1], 100]]}
    for text in PROMPTS:
        prompt = [tokenizer.eos_id, *tokenizer.encode(text)]
        (choice,) = server.ask("/completion", prompt=prompt, **one)["completion_probabilities"]
        theirs = {p["id"]: p["logprob"] for p in choice["top_logprobs"]}  # without the bias
        new = min(tokens, model.config.block_size - len(prompt))  # llama.cpp stops at the end of the context
        many = {"n_predict": new, "temperature": 0, "return_tokens": True}
        continuation = server.ask("/completion", prompt=prompt, **many)["tokens"]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + continuation])).logits[0, len(prompt) - 1 :]
        ours = logits[0].softmax(-1)
        error = max(abs(math.exp(logprob) - ours[i].item()) for i, logprob in theirs.items())
        if error > within or len(theirs) != len(ours):
            found.append(f"{len(theirs)} probabilities after {text!r}, off by up to {error:.1g}")
        greedy = model.generate(torch.tensor([prompt]), new, temperature=0)[0, len(prompt) :].tolist()
        stopped = next((i + 1 for i, token in enumerate(greedy) if token in ends), new)
        # Rounded weights may resolve near ties differently, but each of llama.cpp's tokens must be close to the best.
        chosen = logits[:-1].gather(1, torch.tensor(continuation)[:, None])[:, 0]
        behind = (logits[:-1].max(-1).values - chosen).max().item()
        if continuation != greedy[:stopped] and (dtype == "float32" or behind > 10 * within):
            found.append(f"continues {text!r} with {continuation}, not {greedy[:stopped]}")
    return found


def _dialogues(server: Server, template: Template) -> list[str]:
    """The prompts of llama.cpp's chat mode."""
    found = []
    for messages in DIALOGUES:
        ids = template.render(messages, add_generation_prompt=True).ids
        text = server.ask("/apply-template", messages=messages)["prompt"]
        if server.tokens(text, special=True) != ids:
            found.append(f"the chat prompt is {text!r}, in tokens {server.tokens(text, special=True)}, not {ids}")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    runs = parser.parse_args(argv).runs
    if not installed():
        parser.error("needs the package xllamacpp: pip install xllamacpp")
    for run in runs:
        for dtype in gguf.DTYPES:
            found = compare(Path(run), dtype)
            print(f"{run} {dtype}: {'; '.join(found) or 'agrees'}")
            if found:
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
