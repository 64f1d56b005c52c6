"""README and docs: links have targets, command lines are valid, and the commands run, at the smallest scale.

Commands are found in code blocks without a language and in inline code. A command is a line that begins with one of
PROGRAMS; `# ...` after it is a comment, a line that ends with a backslash continues, and a `for` loop on one line is
unrolled. The Python blocks of how_to.md are run between its commands.
"""

import argparse
import ast
import contextlib
import dataclasses
import glob
import gzip
import importlib.util
import io
import itertools
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.run import get_args_parser

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # if this file is run as a script, in a copy of the project

import minidisp  # noqa: E402
from data.prepare import VOCAB_SIZE  # noqa: E402
from minidisp.config import PRESETS, command_line, flags, parse  # noqa: E402
from minidisp.flags import kebab  # noqa: E402
from minidisp.runtime import init_from  # noqa: E402

try:
    import tomllib
except ImportError:  # Python 3.10
    tomllib = None

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [*PAGES, *sorted((ROOT / "results").glob("*.md")), ROOT / "CHANGELOG.md"]
PROGRAMS = ("python ", "pip ", "torchrun ", "bash ")
WITHOUT_ARGUMENTS = ("pytest", "minidisp.ops")
BLOCK = re.compile(r"^ *```([^\n]*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of the code blocks of a page."""
    return [(m[1].strip(), m[2]) for m in BLOCK.finditer(page.read_text(encoding="utf-8"))]


def prose(page: Path) -> str:
    return BLOCK.sub("", page.read_text(encoding="utf-8"))


def unrolled(line: str) -> list[str]:
    """The commands of a loop on one line, with its variable replaced; any other line as it is."""
    loop = re.fullmatch(r"for (\w+) in (.+?); do (.+?);? done", line)
    if not loop:
        return [line]
    return [part.strip().replace(f"${loop[1]}", value) for value in loop[2].split() for part in loop[3].split(";")]


def commands(page: Path) -> list[list[str]]:
    """The words of every command on a page, in order."""
    text = page.read_text(encoding="utf-8")
    lines = []
    for block in re.split(r"(^ *```[^\n]*\n.*?^ *```$)", text, flags=re.MULTILINE | re.DOTALL):
        if fenced := BLOCK.fullmatch(block):
            if fenced[1].strip() in ("", "sh", "bash"):
                for line in fenced[2].replace("\\\n", " ").splitlines():
                    lines += unrolled(line.strip())
            elif page.name == "how_to.md":
                lines.append(shlex.join(["python", "-c", fenced[2]]))
        else:
            lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", block)]
    found = [part.strip() for line in lines for part in ([line] if " -c " in line else re.split("&&| [|] ", line))]
    return [shlex.split(line, comments=True) for line in found if line.startswith(PROGRAMS)]


ALL = [(name_of(page), words) for page in PAGES for words in commands(page)]


# --- what is written --------------------------------------------------------------------------------------------------


def test_readme_is_short():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    assert len(text.split()) <= 1600
    assert [line for line in text.splitlines() if len(line) > 120] == []


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_lines_are_short(page):
    """Table rows and program output cannot be wrapped."""
    long = [line for line in prose(page).splitlines() if len(line) > 120 and not line.startswith(("|", "#", "!["))]
    assert long == []


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.+?) *$", prose(page), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        number = sum(1 for other in found if re.fullmatch(rf"{re.escape(slug)}(-\d+)?", other))
        found.add(f"{slug}-{number}" if number else slug)
    return found


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_links_lead_somewhere(page):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        if not there.exists() or (anchor and anchor not in anchors(there)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_are_named_exist(page):
    """`minidisp/model.py` in inline code must be a file of the project, except placeholders and generated files."""
    named = re.findall(r"`((?:minidisp|csrc|data|bench|experiments|examples|tests|docs)/[\w./-]+\.\w+)`", prose(page))
    assert [path for path in named if not (ROOT / path).is_file()] == []


def test_the_index_has_every_page():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES[2:] if page.name != "README.md" and f"({page.name})" not in index] == []


def test_every_study_has_a_page_with_its_command_and_the_verdict_is_short():
    """results/README.md lists each file and stays within 8 KB; each study has the command to repeat it."""
    verdict = ROOT / "results" / "README.md"
    assert len(verdict.read_bytes()) <= 8192
    studies = sorted(verdict.parent.glob("20*.md"))
    assert studies
    for study in studies:
        assert f"({study.name})" in verdict.read_text(encoding="utf-8")
        assert re.search(r"^python (experiments/|bench/|train\.py)", study.read_text(encoding="utf-8"), re.MULTILINE)


def test_the_file_tree_of_the_readme_is_the_tree():
    """Every name in the tree exists, and every file is named. Names are at most two spaces apart."""
    tree = next(text for _, text in blocks(ROOT / "README.md") if text.startswith("train.py "))
    named = {ROOT: set(), ROOT / "minidisp": set()}
    for line in tree.splitlines():
        indent, names = re.match(r"( *)(\S+(?: {1,2}\S+)*?)(?: {3,}|$)", line).groups()
        named[ROOT / "minidisp" if indent else ROOT] |= {name.rstrip("/") for name in names.split()}
    for folder, names in named.items():
        assert {name for name in names if not (folder / name).exists()} == set()
    modules = {path.name for path in (ROOT / "minidisp").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert modules - {"__init__.py", "__pycache__"} == named[ROOT / "minidisp"]


def test_the_resume_table_matches_the_flags():
    """The table in resuming.md; it omits flags that only name things (the folder, the corpus)."""
    rows = (ROOT / "docs" / "resuming.md").read_text(encoding="utf-8").splitlines()
    naming = {"out", "resume", "overwrite", "preset", "data", "init_from", "distill"}
    for kind, words in (("silent", "| change freely"), ("reported", "| change, and")):
        row = next(line for line in rows if line.startswith(words))
        listed = {flag.replace("-", "_") for flag in re.findall(r"`([\w-]+)`", row)}
        assert listed == {field.name for field in flags() if field.metadata["resume"] == kind} - naming


def shown(value) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "on", False: "off", None: "lr / 10"}[value]
    return f"`{value}`" if isinstance(value, str) else f"{value:g}"


def test_the_tables_of_presets_and_recipes_are_the_configuration():
    """In how_to.md: every preset, and every field in which the recipes differ, except those implied by the block."""
    text = (ROOT / "docs" / "how_to.md").read_text(encoding="utf-8")
    presets = dict(re.findall(r"^\| `([a-z][\w.-]*)` \| (.*) \|$", text, re.MULTILINE))
    assert list(presets) == list(PRESETS)
    for name, row in presets.items():
        config = dataclasses.replace(parse(["--preset", name]), vocab_size=VOCAB_SIZE)
        size = f"{config.n_layer} x {config.n_embd} | {config.n_head} | {config.block_size:,}"
        steps = f"{config.tokens_per_step:,} | {config.max_steps:,} | {config.lr:g}"
        assert row == f"{size} | {steps} | {config.parameter_count:,}"
    gpt2, fast = (parse(["--recipe", recipe]) for recipe in ("gpt2", "fast"))
    names = [field.name for field in flags() if field.name not in ("recipe", "out", "norm_eps")]
    rows = {
        (kebab(n), shown(getattr(gpt2, n)), shown(getattr(fast, n)))
        for n in names
        if getattr(gpt2, n) != getattr(fast, n)
    }
    assert set(re.findall(r"^\| `--([\w-]+)` \| (.*) \| (.*) \|$", text, re.MULTILINE)) == rows


# --- the command lines ------------------------------------------------------------------------------------------------


class Parsed(BaseException):
    """Raised by a program as soon as its command line has been parsed; no error handler catches it."""


@contextlib.contextmanager
def only_parsing():
    """Programs end with Parsed as soon as their argument parser has accepted the command line; --help with
    SystemExit(0)."""

    def stopping(original):
        def stop(parser, *args, **kwargs):
            original(parser, *args, **kwargs)
            raise Parsed

        return stop

    with pytest.MonkeyPatch.context() as patch:
        for name in ("parse_args", "parse_intermixed_args"):
            patch.setattr(argparse.ArgumentParser, name, stopping(getattr(argparse.ArgumentParser, name)))
        try:
            yield
        except Parsed:
            return
        except SystemExit as end:
            assert end.code == 0, "the command line is refused"  # noqa: PT017
            return
    pytest.fail("the program did not look at its command line")


def extras() -> set[str]:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    if tomllib:
        return set(tomllib.loads(text)["project"]["optional-dependencies"])
    section = re.search(r"^\[project.optional-dependencies\]\n(.*?)^\[", text, re.MULTILINE | re.DOTALL)[1]
    return set(re.findall(r"^([\w-]+) *=", section, re.MULTILINE))


@pytest.mark.filterwarnings("ignore:.*found in sys.modules after import of package")
@pytest.mark.parametrize(("page", "words"), ALL, ids=[f"{page}: {' '.join(words)[:60]}" for page, words in ALL])
def test_every_command_is_understood(page, words, monkeypatch, tmp_path):
    """With the program's own parser: an unknown flag, an unknown choice or a missing file fails."""
    monkeypatch.chdir(tmp_path)
    program, *rest = words
    if program == "pip":
        check_pip(rest)
    elif program == "bash":
        assert (ROOT / rest[0]).is_file()
    elif program == "torchrun":
        with only_parsing():
            get_args_parser().parse_args(rest)
        check_train(rest[rest.index("train.py") + 1 :])
    elif rest[0] == "train.py":
        check_train(rest[1:])
    elif rest[0] == "-c":
        compile(rest[1], page, "exec")
    elif rest[0] == "-m" and rest[1] in WITHOUT_ARGUMENTS:
        assert importlib.util.find_spec(rest[1])
        assert all(word in ("-m", "slow", "-n", "0") or (ROOT / word).is_file() for word in rest[2:])
    else:
        with only_parsing():
            run_program(rest)


def check_pip(words: list[str]) -> None:
    """Requirements files and extras exist; nothing is installed."""
    assert words[0] in ("install", "wheel")
    for before, word in itertools.pairwise(words):
        if before == "-r":
            assert (ROOT / word).is_file()
        if extra := re.fullmatch(r"(?:\.|minidisp)\[([\w,-]+)\]", word):
            assert set(extra[1].split(",")) <= extras()


def check_train(line: list[str]) -> None:
    """All checks of values and combinations; the files of --config and --init-from need not exist."""
    if "--config" in line:
        saved = Path(line[line.index("--config") + 1])
        saved.parent.mkdir(parents=True, exist_ok=True)
        saved.write_text("{}")
    if "--help" in line:
        with only_parsing():
            parse(line)
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(init_from, "architecture_of", lambda _: None)
            parse(line, begin_if_missing=True)


def run_program(words: list[str]) -> None:
    """`python words...` in this process. Raises SystemExit if the program does."""
    argv, path = sys.argv, sys.path
    sys.argv = words[1:] if words[0] == "-m" else words
    sys.path = [str(ROOT if words[0] == "-m" else (ROOT / words[0]).parent), *path]
    try:
        if words[0] == "-m":
            runpy.run_module(words[1], run_name="__main__", alter_sys=False)
        else:
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    finally:
        sys.argv, sys.path = argv, path


# --- the commands, really run -----------------------------------------------------------------------------------------

TINY = shlex.split(
    "--max-steps 2 --eval-every 2 --eval-tokens 64 --batch-size 2 --grad-accum 1 --device cpu --threads 1 "
    "--dispersion-impl streamed"
)
# Replaces every preset: as flags, these would be part of the names of run folders.
TINY_SIZE = {"n_layer": 2, "n_head": 2, "n_kv_head": 0, "head_dim": 0, "mlp_dim": 0, "n_embd": 16, "block_size": 32}
TEXT = {".txt": "a text of a few words, number {}\n" * 40, ".md": "# a page, number {}\n" * 40, ".py": "x = {}\n" * 80}


def runs_here(words: list[str]) -> bool:
    """Whether a command runs offline, on a CPU, in one process, with the packages of requirements-dev.txt."""
    if words[0] != "python":
        return False
    line = " ".join(words)
    if "--hf" in words and "/" in words[words.index("--hf") + 1]:  # on the hub
        return False
    if (
        "--gguf" in words and "runs/fast" not in words
    ):  # in other commands, the run may be one that llama.cpp cannot represent
        return False
    needs = (
        "--compile",
        "--wandb",
        "--device cuda",
        "--init-from openai",
        "--tokenizer hf:",
        "--input -",
        ".parquet",
        ".zst",
    )
    if any(need in f"{line} " for need in needs):
        return False
    return (
        words[1] in ("train.py", "eval.py", "-c")
        or words[1:3] in (["-m", "minidisp.hf"], ["-m", "minidisp.report"])
        or "--input" in words
    )


def smaller(words: list[str], page: str) -> list[str]:
    """The same command with flags that make it tiny. No two commands of the README may use the same folder."""
    if words[0] == "train.py":
        sized = any(f"--{name.replace('_', '-')}" in words for name in TINY_SIZE)
        tiny = [
            *words,
            *(command_line(TINY_SIZE) if sized else []),
            *TINY,
            *(["--active-forgetting", "1"] if "--active-forgetting" in words else []),
        ]
        return tiny if "--resume" in words or page == "README.md" else [*tiny, "--overwrite"]
    if words[0] == "eval.py":
        return [
            *words,
            *([] if {"none", "--chat", "--text-file"} & {*words} else ["--tokens", "300"]),
            "--device",
            "cpu",
        ]
    if words[0] == "data/prepare.py":
        return [
            *words,
            "--workers",
            "1",
            "--overwrite",
            *([] if {"--tokenizer", "--tokenizer-from"} & {*words} else ["--vocab-size", "300"]),
        ]
    return words


def provide(words: list[str], corpus: Path) -> None:
    """Create the inputs of a command that no earlier command has created: runs, corpora, texts."""
    trained = Path("runs/pystdlib-tiny-d0.1-s0")  # of the first command of README.md
    out = words[words.index("--out") + 1] if "--out" in words and "--resume" not in words else None
    for word in words:
        if word.startswith("runs/") and word != out and not glob.glob(word):
            run = Path(*Path(word).parts[:2])
            shutil.copytree(trained, run, dirs_exist_ok=True)
            if not Path(word).exists():  # a numbered checkpoint
                shutil.copy(run / "ckpt_last.pt", word)
    for flag, word in itertools.pairwise(words):
        if flag == "--data" and not Path(word).exists() and not Path("data", word).exists():
            shutil.copytree(corpus, word if "/" in word else Path("data", word))
        if flag == "--minimal-pairs":
            pairs = Path(word.replace("*", "some"))
            pairs.parent.mkdir(parents=True, exist_ok=True)
            pairs.write_text('{"sentence_good": "they are", "sentence_bad": "they is"}\n')
        if flag == "--choices":
            questions = Path(word.replace("*", "some").removesuffix(".gz"))
            questions.parent.mkdir(parents=True, exist_ok=True)
            questions.write_text('{"context": "they", "choices": [" are", " is"], "answer": 0}\n')
            if word.endswith(".gz"):
                Path(f"{questions}.gz").write_bytes(gzip.compress(questions.read_bytes()))
        if flag in ("--text-file", "--completions"):
            write_texts(word)
        if flag == "--prompts":
            Path(word).write_text("a text of\n")
    for word in itertools.takewhile(
        lambda w: not w.startswith("--"), words[words.index("--input") + 1 :] if "--input" in words else []
    ):
        write_texts(word)


def write_texts(pattern: str) -> None:
    """Create files that match a pattern: enough for three splits if there may be several."""
    suffix = Path(pattern.removesuffix(".gz")).suffix
    names = [pattern.replace("*", f"{i}") for i in range(60 if "*" in pattern else 1)]
    if not suffix:
        names, suffix = [f"{pattern}/{i}.txt" for i in range(60)], ".txt"
    for i, name in enumerate(names):
        if Path(name).exists():  # created by a command, or for one
            continue
        if suffix in TEXT:
            text = TEXT[suffix].format(*[i] * 80)
        else:
            rows = [{"text": TEXT[".txt"].format(*[k] * 80)} for k in range(60)]
            if Path(name).name.startswith(("dialogues", "assistant", "translate")):
                rows = [{"prompt": f"what is {k}?", "completion": f"a number, {k}"} for k in range(60)]
            text = json.dumps(rows) if suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        data = text.encode()
        Path(name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)


def run_all(corpus: Path) -> None:
    """In a copy of the project, as a child process: every command that can run here, in the order of the pages."""
    from minidisp import report

    for preset in PRESETS.values():
        preset |= TINY_SIZE
    done = set()
    shutil.copytree(corpus, "data/pystdlib")
    rows = "".join(f'{i},"a text, and ""more"", of row {i}"\n' * 20 for i in range(80))
    Path("table.csv").write_text(f"id,review\n{rows}")
    for page, words in ALL:
        if not runs_here(words) or tuple(words) in done:
            continue
        done.add(tuple(words))
        small = smaller(words[1:], page)
        if words[1] == "-c":
            print(f"\n$ python of {page}", flush=True)
            exec(compile(words[2], page, "exec"), {"__name__": "__main__"})
            continue
        print(f"\n$ {shlex.join(small)}    ({page})", flush=True)
        provide(small, corpus)
        small = [
            name for word in small for name in (sorted(glob.glob(word)) if word.startswith("runs/") else []) or [word]
        ]
        sys.stdin = io.StringIO("")
        try:
            run_program(small)
        except SystemExit as end:
            if end.code:
                sys.exit(f"exit code {end.code}: {shlex.join(small)} ({page})")
        if words[1] == "train.py":  # the figures, most of a tiny run's time, are drawn once
            report.draw_run = lambda *arguments: []
    print(f"\n{len(done)} commands were run")


@pytest.mark.slow
def test_the_commands_run(bpe_corpus, tmp_path):
    """As a newcomer would type them, one after the other, in a fresh copy of the project; tiny, and in one process."""
    copy = tmp_path / "minidisp"
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in listed.stdout.splitlines():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    done = subprocess.run(
        [sys.executable, "tests/test_docs.py", str(bpe_corpus)], cwd=copy, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    for name in ("runs/pystdlib-tiny-d0.1-s0/summary.json", "data/mine/meta.json", "report.html", "figures"):
        assert (copy / name).exists(), name
    assert int(done.stdout.split()[-4]) > 10


# --- Python in README and docs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "hacking.md"], ids=name_of)
def test_python_is_valid(page):
    """The code compiles, and its imports from the project exist. hacking.md shows diffs, and has its own test."""
    for language, text in blocks(page):
        if language != "python":
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in ("minidisp", "train", "eval", "data"):
                home = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(home, alias.name) or importlib.util.find_spec(f"{node.module}.{alias.name}")
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("minidisp."):
                home = importlib.import_module(".".join(ast.unparse(node.func).split(".")[:-1]))
                assert hasattr(home, node.func.attr), ast.unparse(node.func)


def test_the_loss_of_the_readme_is_the_loss():
    """The five lines, for one layer. They exclude the diagonal in words only, so it is excluded here by hand."""
    text = next(text for language, text in blocks(ROOT / "README.md") if language == "python" and "arccos" in text)
    z = torch.randn(2, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    off_diagonal = ~torch.eye(6, dtype=torch.bool)
    for sequence in z:
        names = {"z": sequence[None], "tau": 0.5, "cross_entropy": 2.0, "torch": torch}
        lines = text.strip().splitlines()
        assert len(lines) == 5
        exec("\n".join(lines[:3]), names)
        names["angle"] = names["angle"][:, off_diagonal]
        exec("\n".join(lines[3:]), names)
        wanted = minidisp.dispersion_loss(sequence[None], tau=0.5, impl="reference")
        torch.testing.assert_close(names["disp"], wanted)
        torch.testing.assert_close(names["objective"], 2 + 0.1 * wanted)


def test_the_other_python_of_the_readme_runs(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run, "runs/pystdlib-tiny-d0.1-s0")
    hidden_states = [torch.randn(2, 6, 8) for _ in range(3)]
    names = {"hidden_states": hidden_states, "cross_entropy": torch.tensor(2.0)}
    others = [text for language, text in blocks(ROOT / "README.md") if language == "python" and "arccos" not in text]
    for text in others:
        exec(text, names)
    assert len(others) >= 2
    assert len(names["hidden_states"]) == 3
    assert names["objective"] < 2


if __name__ == "__main__":
    run_all(Path(sys.argv[1]))
