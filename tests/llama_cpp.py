"""Runs in llama.cpp: the same tokens for fifty texts, and the same greedy continuations as in minidisp.

    npm install -E node-llama-cpp@3.21.1                                 # in any folder; brings a built llama.cpp
    LLAMA_CPP=that/folder python tests/llama_cpp.py runs/NAME ...        # every --dtype of every run
    LLAMA_CPP=that/folder python -m pytest tests/test_gguf.py            # small runs of every kind

Exit code 0: all agree.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import minidisp
from minidisp.hf import gguf

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


def installed() -> bool:
    return "LLAMA_CPP" in os.environ


def ask(path: Path, texts: list[str], prompts: list[list[int]], tokens: int) -> dict:
    """The output of llama.cpp for a file; see llama_cpp.mjs."""
    question = json.dumps({"model": str(path), "texts": texts, "prompts": prompts, "tokens": tokens})
    script = Path(__file__).with_name("llama_cpp.mjs")
    command = ["node", str(script), os.environ["LLAMA_CPP"]]
    done = subprocess.run(command, input=question, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"llama.cpp does not take {path}: {done.stderr[-2000:]}")
    return json.loads(done.stdout)


def compare(run: Path, dtype: str, tokens: int = 40) -> list[str]:
    """The differences between a run and its file in llama.cpp, in words; [] if there are none."""
    model, vocabulary = minidisp.load(run)
    prompts = [[vocabulary.eos_id, *vocabulary.encode(text)] for text in PROMPTS]
    with tempfile.TemporaryDirectory() as folder:
        answer = ask(gguf.export_run(run, folder, dtype), TEXTS, prompts, tokens)
    found = [] if answer["context"] == model.config.block_size else [f"a context of {answer['context']}"]
    for text, ids, back in zip(TEXTS, answer["ids"], answer["back"], strict=True):
        if ids != vocabulary.encode(text):
            found.append(f"{text!r} is {ids}, not {vocabulary.encode(text)}")
        if back not in (text, text.replace(" .", ".")):  # whitespace may be normalised for display
            found.append(f"{text!r} comes back as {back!r}")
    within = {"float32": 1e-4, "float16": 1e-3, "bfloat16": 5e-3, "q8_0": 2e-2}[dtype]
    for prompt, pairs, continuation in zip(prompts, answer["probabilities"], answer["continuations"], strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + continuation[:-1]])).logits[0, len(prompt) - 1 :]
        ours = logits[0].softmax(-1)
        error = max(abs(ours[i].item() - p) for i, p in pairs)
        if error > within or len(pairs) != len(ours):
            found.append(f"{len(pairs)} probabilities, off by up to {error:.1g}")
        greedy = model.generate(torch.tensor([prompt]), tokens, temperature=0)[0, len(prompt) :].tolist()
        # Rounded weights may resolve near ties differently, but each of llama.cpp's tokens must be close to the best.
        behind = (logits.max(-1).values - logits.gather(1, torch.tensor(continuation)[:, None])[:, 0]).max().item()
        if continuation != greedy and (dtype == "float32" or behind > 10 * within):
            found.append(f"continues {continuation}, not {greedy}")
    return found


def main(runs: list[str]) -> int:
    for run in runs:
        for dtype in gguf.DTYPES:
            found = compare(Path(run), dtype)
            print(
                f"{run} {dtype}: " + ("; ".join(found) or f"{len(TEXTS)} texts and {len(PROMPTS)} continuations agree")
            )
            if found:
                return 1
    return 0


if __name__ == "__main__":
    if not installed() or len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1:]))
