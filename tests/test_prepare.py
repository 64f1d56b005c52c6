"""data/prepare.py: the handling of documents, rejected input, and atomic creation of corpora."""

import errno
import gzip
import hashlib
import http.server
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest

from data import downloads, pieces, prepare, sources
from minidisp import InputError
from minidisp.data import Dataset
from minidisp.shards import SPLITS
from minidisp.tokenizer import ByteTokenizer

SCRIPT = Path(prepare.__file__)


def make_texts(count: int = 120, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    words = [
        "alpha",
        "beta",
        "  gamma",
        "\tdelta\r\n",
        "\n\n",
        "\u00e9t\u00e9",
        "\U0001f642",
        "\u2581",
        "x = 1\n",
        "</s>",
    ]
    return [" ".join(rng.choices(words, k=rng.randint(1, 60))) for _ in range(count)]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)))
    return path


def documents_of(folder: Path) -> dict[str, list[str]]:
    """The documents of each split, decoded from the shards."""
    dataset, documents = Dataset(folder), {}
    for name in SPLITS:
        tokens = dataset.split(name).slice(0, dataset.split(name).tokens)
        assert tokens[-1] == dataset.tokenizer.eos_id
        pieces = np.split(tokens, np.flatnonzero(tokens == dataset.tokenizer.eos_id) + 1)[:-1]
        documents[name] = [dataset.tokenizer.decode(piece) for piece in pieces]
    return documents


def all_documents_of(folder: Path) -> list[str]:
    return sorted(text for documents in documents_of(folder).values() for text in documents)


def split_of(text: str) -> str:
    percent = int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) % 100
    return "train" if percent < 90 else "val" if percent < 95 else "test"


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def jsonl(tmp_path):
    return write_jsonl(tmp_path / "texts.jsonl", make_texts())


@pytest.fixture
def run(tmp_path, capsys):
    """Run the command with --out tmp_path/out; returns its exit code, stdout and stderr."""

    def run(*argv: str | Path) -> tuple[int, str, str]:
        code = prepare.main([*map(str, argv), "--out", str(tmp_path / "out")])
        return code, *capsys.readouterr()

    return run


def assert_nothing_left(folder: Path, but: tuple[str, ...] = ()) -> None:
    assert [path.name for path in folder.iterdir() if path.name.startswith((".", "out")) and path.name not in but] == []


# --- the handling of documents ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [["--tokenizer", "byte"], ["--vocab-size", "310"]])
def test_documents_reach_their_split_unchanged(run, tmp_path, jsonl, options):
    texts = make_texts()
    code, table, _ = run("--input", jsonl, "--name", "t", *options)
    assert code == 0
    documents = documents_of(tmp_path / "out")
    for name in SPLITS:
        expected = [text for text in texts if split_of(text) == name]
        assert documents[name] == expected
        split = Dataset(tmp_path / "out").split(name)
        assert split.documents == len(expected)
        assert split.bytes == sum(len(text.encode()) for text in expected)
        assert split.words == sum(len(text.split()) for text in expected)
        row = next(line for line in table.splitlines() if line.startswith(name))
        assert f"{split.tokens:,}" in row
        assert f"{split.bytes / split.tokens:.3f}" in row
    Dataset(tmp_path / "out").verify()
    assert_nothing_left(tmp_path, but=("out",))


def test_all_kinds_of_files(run, tmp_path):
    texts = make_texts(80)
    (tmp_path / "sub").mkdir()
    for i, text in enumerate(texts[:60]):
        (tmp_path / "sub" / f"{i:02d}{('.txt', '.md', '.py')[i % 3]}").write_bytes(text.encode())
    (tmp_path / "sub" / "empty.txt").touch()
    (tmp_path / "odd[1].jsonl").write_text("".join(f'{{"body": {json.dumps(text)}}}\n\n' for text in texts[60:70]))
    with gzip.open(tmp_path / "b.JSONL.GZ", "wt") as file:
        file.write("".join(json.dumps({"body": text}) + "\n" for text in texts[70:]))
    patterns = ["sub/**/*.txt", "sub/*", "odd[1].jsonl", "*.GZ"]
    code, _, _ = run(
        "--input", *[tmp_path / p for p in patterns], "--field", "body", "--name", "t", "--tokenizer", "byte"
    )
    assert code == 0
    assert all_documents_of(tmp_path / "out") == sorted(texts)


def test_splits_are_stable_and_keep_copies_together(run, tmp_path):
    texts = make_texts(150)
    write_jsonl(tmp_path / "few.jsonl", texts)
    write_jsonl(tmp_path / "many.jsonl", [*make_texts(50, seed=1), *texts, *texts[:30]])
    found = []
    for name in ("few", "many"):
        assert run("--input", tmp_path / f"{name}.jsonl", "--name", "t", "--tokenizer", "byte", "--overwrite")[0] == 0
        found.append(documents_of(tmp_path / "out"))
    for name in SPLITS:
        assert set(found[0][name]) <= set(found[1][name])
    assert not set(found[1]["train"]) & set(found[1]["test"])


def test_single_document_is_cut_by_position(run, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "BLOCK_CHARS", 100)
    text = "".join(make_texts(100)).replace("\0", "")
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert run("--input", tmp_path / "a.txt", "--name", "t", "--tokenizer", "byte")[0] == 0
    a, b = len(text) * 90 // 100, len(text) * 95 // 100
    assert documents_of(tmp_path / "out") == {"train": [text[:a]], "val": [text[a:b]], "test": [text[b:]]}
    dataset = Dataset(tmp_path / "out")
    assert dataset.meta["split_by"] == "position"
    assert dataset.split("train").words == pytest.approx(len(text[:a].split()), abs=2)
    assert dataset.split("train").bytes == len(text[:a].encode())


def test_one_document_joins_files(run, tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"chapter {i}. " * 30)
    argv = ["--input", tmp_path / "*.txt", "--name", "t", "--tokenizer", "byte"]
    code, _, err = run(*argv)
    assert code == 2
    assert "3 documents leave nothing for" in err
    assert "--one-document" in err
    assert run(*argv, "--one-document")[0] == 0
    documents = documents_of(tmp_path / "out")
    assert "".join(documents[name][0] for name in SPLITS) == "\n".join(f"chapter {i}. " * 30 for i in range(3))


def test_limit(run, tmp_path, jsonl):
    assert run("--input", jsonl, "--name", "t", "--tokenizer", "byte", "--limit", 100)[0] == 0
    assert all_documents_of(tmp_path / "out") == sorted(make_texts()[:100])


@pytest.mark.parametrize("tokenizer", ["byte", "sentencepiece"])
def test_same_bytes_on_any_number_of_cores(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(pieces, "SHARD_TOKENS", 100_000)
    monkeypatch.setattr(prepare, "SAMPLE_BYTES", 100_000)
    folders = []
    for workers, batch_chars in ((1, 1 << 23), (2, 50_000)):
        monkeypatch.setattr(pieces, "BATCH_CHARS", batch_chars)
        folders.append(tmp_path / str(workers))
        source = downloads.standard_library()
        options = {"tokenizer": tokenizer, "vocab_size": 500, "limit": 60, "workers": workers, "one_document": True}
        prepare.prepare_corpus("pystdlib", source, folders[-1], **options)
    assert files_of(folders[0]) == files_of(folders[1])
    assert len(list(folders[0].glob("train_*.bin"))) > 1


def test_a_batch_is_bounded_in_pieces_too(monkeypatch):
    monkeypatch.setattr(pieces, "BATCH_PIECES", 3)
    names = [pieces.Piece("train", "ab" * (1 << 22 if i == 1 else 1), True) for i in range(9)]  # the second: 8 MB
    batches = list(pieces._batches(iter(names)))
    assert [len(batch) for batch in batches] == [2, 3, 3, 1]
    assert [piece for batch in batches for piece in batch] == names


def test_tokenizer_sees_a_fixed_sample_of_the_training_split():
    documents = [sources.Document("", [text]) for text in make_texts(400)]
    train = [text for text in make_texts(400) if split_of(text) == "train"]
    counts, chars, everything = pieces.survey(pieces.by_hash(documents), 10**9)
    assert everything == train
    assert counts["train"] == len(train)
    assert chars == sum(map(len, make_texts(400)))
    _, _, sample = pieces.survey(pieces.by_hash(documents), 5000)
    assert 5000 <= len("".join(sample).encode()) < 6000
    assert sample == [text for text in train if text in sample]  # in the order of the corpus
    _, _, reversed_sample = pieces.survey(pieces.by_hash(documents[::-1]), 5000)
    assert sample == reversed_sample[::-1]
    assert pieces.survey(pieces.by_hash(documents), 0)[2] == []


def test_tokenizer_of_another_corpus(run, tmp_path, jsonl):
    assert run("--input", jsonl, "--name", "t", "--vocab-size", "310")[0] == 0
    (tmp_path / "out").rename(tmp_path / "first")
    write_jsonl(jsonl, make_texts(100, seed=5))
    assert run("--input", jsonl, "--name", "t", "--tokenizer-from", tmp_path / "first/tokenizer.model")[0] == 0
    assert Dataset(tmp_path / "out").tokenizer.hash == Dataset(tmp_path / "first").tokenizer.hash


def test_standard_library_is_sources_without_tests():
    source = downloads.standard_library()
    names = [document.name for document in source.documents()]
    assert len(names) > 400
    assert not any("site-packages" in name or "/test/" in name for name in names)
    assert any(name.endswith("argparse.py") for name in names)
    assert sys.version.split()[0] in source.description


def test_file_blocks_end_at_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "BLOCK_CHARS", 50)
    path = tmp_path / "a.txt"
    text = "some words in a line\r\n" * 20 + "long" * 100 + "\n\u00e9\n"
    path.write_bytes(text.encode())
    blocks = list(sources.text_blocks(sources.Input(path)))
    assert "".join(blocks) == text
    assert max(map(len, blocks)) <= 100
    assert all(block.endswith("\n") for block in blocks[:6])


# --- rejected input ---------------------------------------------------------------------------------------------------

GOOD = b'{"text": "a"}\n'
BAD_INPUT = {
    "binary.txt": (b"text\0text", "binary.txt: a binary file"),
    "latin.md": ("caf\u00e9 ".encode("latin-1") * 3, "latin.md: not UTF-8 text"),
    "empty.txt": (b"", "characters are too few"),
    "short.txt": (b"abc", "3 characters are too few"),
    "none.jsonl": (b"\n", "there is no text"),
    "word.docx": (b"x", "word.docx: only .txt"),
    "a.jsonl": (GOOD + b"{oops\n", "a.jsonl, line 2: not JSON"),
    "deep.jsonl": (GOOD + b"[" * 100_000, "deep.jsonl, line 2: not JSON"),
    "digits.jsonl": (GOOD + b'{"text": ' + b"1" * 5000 + b"}", "digits.jsonl, line 2: "),
    "list.jsonl": (GOOD + b"[1]\n", "list.jsonl, line 2: not a JSON object"),
    "field.jsonl": (GOOD + GOOD + b'\n{"txt": "a", "b": 1}\n', "field.jsonl, line 4: no field 'text', only txt, b"),
    "number.jsonl": (b'{"text": 3}\n', "number.jsonl, line 1: field 'text' is 3, not a string"),
    "half.jsonl": (GOOD + b'{"text": "ab\\ud83d"}', "half.jsonl, line 2: field 'text' has half a surrogate pair"),
    "latin.jsonl": (GOOD + b'{"text": "\xe9"}', "latin.jsonl: not UTF-8 text"),
    "cut.jsonl.gz": (gzip.compress(GOOD * 1000)[:-20], "cut.jsonl.gz: damaged gzip file"),
    "text.jsonl.gz": (GOOD, "text.jsonl.gz: damaged gzip file"),
    "few.jsonl": (GOOD * 3, "3 documents leave nothing for"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_refused_in_one_line(run, tmp_path, name):
    content, message = BAD_INPUT[name]
    (tmp_path / name).write_bytes(content)
    code, out, err = run("--input", tmp_path / name, "--name", "t", "--tokenizer", "byte")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith("prepare.py: ")
    assert message in err
    assert_nothing_left(tmp_path)


def test_huge_documents_are_refused_or_streamed(run, tmp_path, jsonl, monkeypatch):
    monkeypatch.setattr(pieces, "MAX_DOCUMENT_CHARS", 10_000)
    (tmp_path / "huge.txt").write_text("many words " * 2000)
    argv = ["--input", jsonl, tmp_path / "huge.txt", "--name", "t", "--tokenizer", "byte"]
    code, _, err = run(*argv)
    assert code == 2
    assert "huge.txt: more than 10,000 characters" in err
    assert run(*argv, "--one-document")[0] == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nonsense"], "nonsense"),
        (["--nonsense"], "--nonsense"),
        (["--over"], "--over"),
        (["--input", "nowhere/*.txt", "--name", "t"], "--input nowhere/*.txt: no such file"),
        (["--input", "x.txt", "--name", "wikitext2"], "not a built-in name"),
        (["--input", "x.txt", "--name", "../x"], "use letters"),
        (["--name", "x"], "--name needs"),
        (["pystdlib", "--input", "x.txt", "--name", "t"], "one corpus at a time"),
        (["--hf", "x", "--input", "x.txt", "--name", "t"], "one corpus at a time"),
        (["--source", "x"], "--source needs"),
        (["pystdlib", "--source", "x"], "--source needs"),
        (["--tokenizer", "byte", "--vocab-size", "300"], "leave out --vocab-size"),
        (["--tokenizer", "byte", "--tokenizer-from", "x"], "leave out --tokenizer"),
        (["--tokenizer-from", "nowhere/tokenizer.model"], "nowhere/tokenizer.model"),
        (["--tokenizer", "words"], "words"),
        (["--vocab-size", "0"], "at least 1"),
        (["--vocab-size", "many"], "'many'"),
        (["--vocab-size", "3000000000"], "more than 1048576"),
        (["--hf-split", "test"], "--hf-split and --hf-column need --hf"),
        (["--field", "body"], "--field needs --input"),
        (["--hf", "x", "--field", "body", "--name", "t"], "--hf-column"),
        (["--workers", "0"], "at least 1"),
        (["--limit", "-1"], "--limit"),
        (["shakespeare", "--source", "nowhere.txt"], "nowhere.txt: No such file"),
    ],
)
def test_bad_usage_is_refused_in_one_line(run, tmp_path, argv, message):
    code, out, err = run(*argv)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert message in err
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize("flag", ["--input", "--hf"])
def test_a_custom_corpus_needs_a_name_or_a_folder(tmp_path, capsys, flag):
    assert prepare.main([flag, "x.txt"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert f"{flag} needs --name" in err


@pytest.mark.parametrize(("size", "message"), [(100_000, "lower --vocab-size to"), (260, "raise --vocab-size to")])
def test_vocabulary_that_does_not_fit_the_text(run, tmp_path, jsonl, size, message):
    code, _, err = run("--input", jsonl, "--name", "t", "--vocab-size", size)
    assert code == 2
    assert message in err
    assert_nothing_left(tmp_path)


def test_help_shows_examples(capsys):
    with pytest.raises(SystemExit) as stop:
        prepare.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "python data/prepare.py --input" in text
    assert all(name in text for name in prepare.BUILT_IN)


# --- atomic creation --------------------------------------------------------------------------------------------------


def test_existing_corpus_is_kept(run, tmp_path, jsonl):
    argv = ["--input", jsonl, "--name", "t", "--tokenizer", "byte"]
    assert run(*argv)[0] == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    code, _, err = run(*argv)
    assert code == 0
    assert "already exists and is intact" in err
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    for change, message in [
        (["--one-document"], "one_document False, not True"),
        (["--limit", "99"], "limit 0, not 99"),
        (["--tokenizer", "sentencepiece", "--vocab-size", "310"], "tokenizer 'byte', not 'sentencepiece'"),
    ]:
        code, _, err = run(*argv, *change)
        assert code == 2
        assert message in err
        assert "--overwrite" in err
    shard = tmp_path / "out" / "val_000.bin"
    shard.write_bytes(shard.read_bytes()[:-2] + b"\1\1")
    code, _, err = run(*argv)
    assert code == 2
    assert "val_000.bin has changed" in err
    assert run(*argv, "--overwrite")[0] == 0
    Dataset(tmp_path / "out").verify()
    assert_nothing_left(tmp_path, but=("out",))


def test_other_files_in_a_corpus_are_not_removed(run, tmp_path, jsonl):
    argv = ["--input", jsonl, "--name", "t", "--tokenizer", "byte"]
    assert run(*argv)[0] == 0
    (tmp_path / "out" / "thesis.txt").write_text("do not delete")
    code, _, err = run(*argv, "--overwrite")
    assert code == 2
    assert "also contains thesis.txt" in err
    assert (tmp_path / "out" / "thesis.txt").read_text() == "do not delete"
    Dataset(tmp_path / "out").verify()


def test_an_old_corpus_stays_where_the_new_one_cannot_take_its_place(run, tmp_path, jsonl, monkeypatch):
    argv = ["--input", jsonl, "--name", "t", "--tokenizer", "byte"]
    assert run(*argv)[0] == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    rename, calls = Path.rename, []

    def fails_once(path, target):
        calls.append(path.name)
        if path.name == ".out.building":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fails_once)
    assert run(*argv, "--overwrite")[0] == 130
    assert calls == ["out", ".out.building", ".out.old"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_empty_documents_are_left_out(run, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").touch()
    (folder / "book.txt").write_text("".join(f"{i}\n" for i in range(3000)))
    argv = ["--name", "t", "--tokenizer", "byte", "--overwrite"]
    assert run("--input", folder, *argv)[0] == 0  # a single document, cut by position
    assert Dataset(tmp_path / "out").meta["split_by"] == "position"
    rows = [{"text": ""}] * 5 + [{"text": f"document {i}"} for i in range(200)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run("--input", tmp_path / "rows.jsonl", *argv, "--limit", "150")[0] == 0
    assert sum(split["documents"] for split in Dataset(tmp_path / "out").meta["splits"].values()) == 150
    (tmp_path / "same.jsonl").write_text('{"text": "same"}\n' * 200 + '{"text": ""}\n')
    assert "one and the same text" in run("--input", tmp_path / "same.jsonl", *argv)[2]


def test_a_field_of_any_name(run, tmp_path):
    (tmp_path / "tab.jsonl").write_text("".join(f'{{"my\\tfield": "hello {i}"}}\n' for i in range(300)))
    argv = ["--input", tmp_path / "tab.jsonl", "--field", "my\tfield", "--name", "t", "--tokenizer", "byte"]
    assert run(*argv)[0] == 0
    assert r"field my\tfield" in Dataset(tmp_path / "out").meta["source"]


def test_folders_that_are_no_corpus_are_not_replaced(run, tmp_path, jsonl):
    argv = ["--input", jsonl, "--name", "t", "--tokenizer", "byte", "--overwrite"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("do not delete")
    code, _, err = run(*argv)
    assert code == 2
    assert "is not a corpus" in err
    (tmp_path / "out" / "thesis.txt").unlink()
    assert run(*argv)[0] == 0  # an empty folder is fine
    assert prepare.main([*map(str, argv), "--out", str(jsonl)]) == 2
    assert prepare.main([*map(str, argv), "--out", str(jsonl / "below")]) == 2
    assert len(jsonl.read_text().splitlines()) == 120


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "out: No space left on device"),
    ],
)
def test_failure_leaves_the_old_corpus(run, tmp_path, jsonl, monkeypatch, error, code, message):
    argv = ["--input", jsonl, "--name", "t", "--tokenizer", "byte"]
    assert run(*argv)[0] == 0
    before = files_of(tmp_path / "out")

    def fail(self, ids):
        raise error

    monkeypatch.setattr(pieces.ShardWriter, "write", fail)
    found = run(*argv, "--overwrite")
    assert found[0] == code
    assert found[2].splitlines()[-1].startswith("prepare.py: ")
    assert message in found[2]
    assert files_of(tmp_path / "out") == before
    assert_nothing_left(tmp_path, but=("out",))


def test_leftovers_of_a_killed_process_are_removed(run, tmp_path, jsonl):
    (tmp_path / ".out.building").mkdir()
    (tmp_path / ".out.building" / "train_000.bin.tmp").touch()
    (tmp_path / ".out.lock").touch()
    assert run("--input", jsonl, "--name", "t", "--tokenizer", "byte")[0] == 0
    assert_nothing_left(tmp_path, but=("out",))


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_clean_up(tmp_path, number, code):
    argv = [sys.executable, str(SCRIPT), "--out", str(tmp_path / "out"), "--one-document", "--tokenizer", "byte"]
    with subprocess.Popen(argv, stderr=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        deadline = time.monotonic() + 30
        while not (tmp_path / ".out.building").exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert b"Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(prepare.fcntl is None, reason="no file locks")
def test_two_processes_prepare_it_once(tmp_path, jsonl, capsys):
    """As the processes of torchrun do in a fresh clone."""
    calls = []
    whole = sources.input_files([str(jsonl)], "text")

    def documents():
        calls.append(threading.get_ident())
        time.sleep(0.05)
        yield from whole.documents()

    def work():
        prepare.prepare_corpus("t", whole._replace(documents=documents), tmp_path / "out", tokenizer="byte")

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(set(calls)) == 1
    err = capsys.readouterr().err
    assert "waiting for another process" in err
    assert err.count("already exists and is intact") == 2
    assert_nothing_left(tmp_path, but=("out",))


def test_prepare_does_not_import_torch():
    code = "import sys; sys.path.insert(0, sys.argv[1]); import prepare; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, str(SCRIPT.parent)], cwd="/", check=False).returncode == 0


# --- corpora that are downloaded --------------------------------------------------------------------------------------


class Server(http.server.ThreadingHTTPServer):
    """Serves `content` at every address; `faults` lists the failure of each request in order."""

    def __init__(self, content: bytes):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.faults, self.ranges = content, [], []
        self.url = f"http://127.0.0.1:{self.server_port}/file.txt"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        fault = self.server.faults.pop(0) if self.server.faults else ""
        start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        self.server.ranges.append(start)
        if fault in ("404", "503"):
            self.send_error(int(fault))
            return
        if fault == "hang up":
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        body = self.server.content
        if fault == "no range":
            self.send_response(200)
        else:
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            body = body[start:]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if fault == "cut" else body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    text = "".join(make_texts(500)) * 3
    server = Server(text.encode())
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(downloads, "PAUSE_S", 0)
    wanted = downloads.Download(
        sources.text_file, server.url, len(server.content), hashlib.sha256(server.content).hexdigest()
    )
    monkeypatch.setitem(prepare.DOWNLOADS, "shakespeare", wanted)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


ARGV = ["shakespeare", "--tokenizer", "byte"]


def test_download(run, server, tmp_path):
    assert run(*ARGV)[0] == 0
    documents = documents_of(tmp_path / "out")
    assert "".join(documents[name][0] for name in SPLITS).encode() == server.content
    assert Dataset(tmp_path / "out").meta["source"] == server.url
    assert run(*ARGV, "--overwrite")[0] == 0
    assert server.ranges == [0]  # kept, and not downloaded again
    assert [path.name for path in (tmp_path / ".downloads").iterdir()] == ["shakespeare-file.txt"]


def test_cut_off_download_is_continued(run, server):
    n = len(server.content)
    server.faults = ["cut", "hang up", "cut"]
    assert run(*ARGV)[0] == 0
    assert server.ranges == [0, n // 2, n // 2, n // 2 + (n - n // 2) // 2]


def test_download_that_a_server_cannot_continue_starts_over(run, server):
    server.faults = ["cut", "no range"]
    assert run(*ARGV)[0] == 0
    assert len(server.ranges) == 2


def test_cut_off_download_is_continued_by_the_next_run(run, server, tmp_path):
    server.faults = ["hang up", "cut", "hang up", "hang up", "hang up"]
    code, _, err = run(*ARGV)
    assert code == 2
    assert f"connection lost after {len(server.content) // 2:,} of {len(server.content):,} bytes: run this again" in err
    assert_nothing_left(tmp_path, but=(".downloads",))
    assert run(*ARGV)[0] == 0
    assert server.ranges[-1] == len(server.content) // 2


def test_complete_part_file_needs_no_server(run, server, tmp_path):
    (tmp_path / ".downloads").mkdir()
    (tmp_path / ".downloads" / "shakespeare-file.txt.part").write_bytes(server.content)
    assert run(*ARGV)[0] == 0
    assert server.ranges == []


@pytest.mark.parametrize("change", [lambda text: text[:-1] + b"?", lambda text: text + b"more" * 100_000])
def test_wrong_content_is_refused_and_removed(run, server, tmp_path, change):
    right, server.content = server.content, change(server.content)
    code, _, err = run(*ARGV)
    assert code == 2
    assert err.count("\n") == 1
    assert prepare.DOWNLOADS["shakespeare"].sha256 in err
    assert list((tmp_path / ".downloads").iterdir()) == []
    server.content = right
    assert run(*ARGV)[0] == 0


@pytest.mark.parametrize("fault", ["404", "503"])
def test_http_errors_name_the_address_and_the_way_out(run, server, fault):
    server.faults = [fault]
    code, _, err = run(*ARGV)
    assert code == 2
    assert err.count("\n") == 1
    assert f"{server.url}: HTTP {fault}" in err
    assert "python data/prepare.py shakespeare --source FILE" in err


def test_offline(run, server):
    server.shutdown()
    server.server_close()
    code, _, err = run(*ARGV)
    assert code == 2
    assert err.count("\n") == 1
    assert f"cannot reach {server.url}" in err
    assert "--source FILE" in err


def test_file_put_in_place_by_hand(run, server, tmp_path):
    (tmp_path / "mine.txt").write_bytes(server.content)
    assert run(*ARGV, "--source", tmp_path / "mine.txt")[0] == 0
    (tmp_path / "mine.txt").write_bytes(server.content[1:])
    code, _, err = run(*ARGV, "--source", tmp_path / "mine.txt", "--overwrite")
    assert code == 2
    assert "mine.txt is not the file of" in err
    assert (tmp_path / "mine.txt").exists()
    assert server.ranges == []


def test_downloads_are_pinned():
    for name, wanted in prepare.DOWNLOADS.items():
        assert wanted.url.startswith("https://"), name
        assert len(bytes.fromhex(wanted.sha256)) == 32
        assert "/main/" not in wanted.url
        assert "/master/" not in wanted.url


def test_wikitext_articles(tmp_path):
    articles = {
        "train": [
            " \n = A = \n \n Text . \n \n = = Part = = \n \n 1 = 2 \n",
            " \n = B @-@ 1 = \n \n Text . \n = no title = \n",
        ],
        "valid": [" \n = C = \n \n x \n"],
        "test": [" \n = D = \n \n \u00e9 \n"],
    }
    path = tmp_path / "wikitext.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("wikitext-2-raw/", "")
        for split, texts in articles.items():
            archive.writestr(f"wikitext-2-raw/wiki.{split}.raw", "".join(texts))
    documents = ["".join(document.blocks) for document in downloads.wikitext(path)]
    assert documents == [text for texts in articles.values() for text in texts]


def test_tinystories_are_separated(tmp_path, monkeypatch):
    stories = [f"Once there were {i} cats.\n\nThe end." for i in range(50)]
    (tmp_path / "stories.txt").write_text("\n<|endoftext|>\n".join(stories) + "\n<|endoftext|>\n")
    for block_chars in (10, 1 << 18):  # including separators that cross blocks
        monkeypatch.setattr(sources, "BLOCK_CHARS", block_chars)
        found = ["".join(document.blocks) for document in downloads.tinystories(tmp_path / "stories.txt")]
        assert found == stories


# --- Hugging Face -----------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the package datasets that records its calls and streams `rows`."""
    hub = types.SimpleNamespace(calls=[], rows=[{"text": text} for text in make_texts()])

    def load_dataset(*args, **kwargs):
        hub.calls.append((*args, kwargs))
        return iter(hub.rows)

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return hub


def test_hugging_face_is_streamed_once(run, tmp_path, hub):
    hub.rows = [{"id": 1, "body": text} for text in make_texts(130)]
    argv = ["--hf", "a/b:c", "--hf-column", "body", "--name", "t", "--limit", "120", "--vocab-size", "310"]
    assert run(*argv)[0] == 0
    assert hub.calls == [("a/b", "c", {"split": "train", "streaming": True})]
    assert all_documents_of(tmp_path / "out") == sorted(make_texts(130)[:120])
    assert not list((tmp_path / "out").glob("*.jsonl"))


def test_hugging_face_errors_are_one_line(run, tmp_path, hub, monkeypatch):
    argv = ["--hf", "a/b", "--name", "t"]
    hub.rows = [{"body": "x"}]
    code, _, err = run(*argv)
    assert code == 2
    assert "--hf a/b, row 1: no field 'text', only body; see --hf-column" in err

    def load_dataset(*args, **kwargs):
        raise ConnectionError("no route\nto the hub")

    sys.modules["datasets"].load_dataset = load_dataset
    code, _, err = run(*argv)
    assert (code, err) == (2, "prepare.py: --hf a/b: ConnectionError: no route\n")
    monkeypatch.setitem(sys.modules, "datasets", None)
    code, _, err = run(*argv)
    assert code == 2
    assert "pip install datasets" in err
    assert_nothing_left(tmp_path)


def test_prepare_provides_everything_that_the_trainer_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "DATA", tmp_path)
    source = sources.Source("s", lambda: iter([sources.Document("d", ["some text " * 50])]))
    monkeypatch.setattr(downloads, "standard_library", lambda: source)
    monkeypatch.setattr(prepare, "VOCAB_SIZE", 270)
    monkeypatch.setattr(prepare.prepare_corpus, "__defaults__", ("byte", 0, False, 0, 1, False))
    assert prepare.prepare("pystdlib") == tmp_path / "pystdlib"
    assert Dataset(tmp_path / "pystdlib").tokenizer.hash == ByteTokenizer().hash
    with pytest.raises(InputError):
        prepare.prepare_corpus("t", sources.Source("nothing", lambda: iter([])), tmp_path / "t")
