"""Text in real-world form: all kinds of files, folders, links, pipes, bad rows, changing inputs, unusual names."""

import csv
import errno
import gzip
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
import types
from pathlib import Path

import pytest
from test_prepare import SCRIPT, all_documents_of, assert_nothing_left, documents_of, files_of, make_texts, write_jsonl

from data import files, hub, pieces, prepare, sources
from minidisp import InputError, read_bytes
from minidisp.data import Dataset
from minidisp.shards import SPLITS

ROOT = SCRIPT.parents[1]
BYTES = ["--name", "t", "--tokenizer", "byte"]


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """Run the command in tmp_path with --out out; returns its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*argv: object) -> tuple[int, str, str]:
        code = prepare.main([*map(str, argv), "--out", "out"])
        return code, *capsys.readouterr()

    return run


def refused(result: tuple[int, str, str], *parts: str) -> None:
    """Exit code 2, and the last line on stderr has these parts."""
    code, out, err = result
    assert (code, out) == (2, ""), err
    assert "Traceback" not in err
    *_, line = err.splitlines(keepends=True)
    assert line.startswith("prepare.py: ")
    for part in parts:
        assert part in line


def text_of(folder: Path = Path("out")) -> str:
    """The text of a corpus that was split by position."""
    return "".join(documents[0] for documents in documents_of(folder).values())


# --- kinds of files ---------------------------------------------------------------------------------------------------


def pack(content: bytes, ending: str) -> bytes:
    if ending == ".zst":
        zstandard = pytest.importorskip("zstandard")
        half = len(content) // 2  # two frames, as from cat a.zst b.zst
        return zstandard.compress(content[:half]) + zstandard.compress(content[half:])
    return gzip.compress(content) if ending == ".gz" else content


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize(
    ("name", "dialect"),
    [
        ("a.csv", {}),
        ("a.csv", {"delimiter": ";", "quoting": csv.QUOTE_ALL}),
        ("a.tsv", {"delimiter": "\t"}),
        ("a.CSV", {"lineterminator": "\n"}),
    ],
)
def test_tables(run, name, dialect, ending):
    texts = [f'{text}, "quoted";\n\ttext {i}' for i, text in enumerate(make_texts(120))]
    table = io.StringIO(newline="")
    writer = csv.writer(table, **dialect)
    writer.writerows([["id", "body", "note"], *([i, text, None] for i, text in enumerate(texts))])
    content = b"\xef\xbb\xbf" + table.getvalue().encode()
    Path(name + ending).write_bytes(pack(content, ending))
    argv = ["--input", name + ending, *BYTES]
    refused(run(*argv), f"{name}{ending}, row 1: no field 'text', only id, body, note; see --field")
    assert run(*argv, "--field", "body")[0] == 0
    assert all_documents_of(Path("out")) == sorted(texts)


@pytest.mark.parametrize(
    ("bad", "reason", "message"),
    [
        (b"1,2,3\n", "not CSV", "row 41: 3 columns, not 2 as in the first row"),
        (b'"a"b,1\n', "not CSV", "row 41: not CSV"),
        (b'x,"never closed\n' + b"a,b\n" * 3000, "too long", "row 41: more than 9,000 characters"),
        (b"," * 4000 + b"\n", "too long", "or 3,000 columns"),
        (b"caf\xe9,1\n", "not UTF-8", "row 41: not UTF-8 text"),
    ],
)
def test_bad_rows_of_a_table(run, monkeypatch, bad, reason, message):
    monkeypatch.setattr(sources, "MAX_ROW_BYTES", 9000)
    monkeypatch.setattr(sources, "MAX_ROW_VALUES", 3000)
    texts = [f"text {i}" for i in range(150)]
    rows = [f"{text},{i}\n".encode() for i, text in enumerate(texts)]
    Path("a.csv").write_bytes(b"".join([b"text,id\n", *rows[:40], bad, b"\n", *rows[40:]]))
    refused(run("--input", "a.csv", *BYTES), "a.csv", message)
    whole = reason != "too long"  # after the others, the start of a row cannot be determined
    code, table, err = run("--input", "a.csv", *BYTES, "--bad-rows", "skip", *([] if whole else ["--one-document"]))
    assert code == 0, err
    assert table.endswith(f"left out: 1 {reason}\n")
    if whole:
        assert all_documents_of(Path("out")) == sorted(texts)


def test_a_table_that_is_still_being_written(run):
    rows = "text,id\n" + "".join(f"text {i},{i}\n" for i in range(150))
    Path("a.csv").write_text(rows + "text 150,1")
    source = sources.input_files(["a.csv"])
    append("a.csv", b"50\n")
    assert len([*source.documents()]) == 150


def test_links_that_lead_out_of_a_folder_are_counted(run, tmp_path):
    for name in ("in", "elsewhere"):
        (tmp_path / name).mkdir()
    for i, text in enumerate(make_texts(100)):
        Path("elsewhere" if i < 3 else "in", f"{i}.txt").write_bytes(text.encode())
    Path("in/one.txt").symlink_to("../elsewhere/0.txt")
    Path("in/more").symlink_to("../elsewhere")
    Path("in/own.txt").symlink_to("7.txt")
    for pattern in ("in", "in/**/*.txt"):
        code, _, err = run("--input", pattern, *BYTES, "--overwrite")
        assert code == 0
        assert f"{pattern}: 3 files are outside this folder, reached by links; they are read too" in err
    Path("in/more").unlink()
    Path("in/one.txt").unlink()
    assert "reached by links" not in run("--input", "in", *BYTES, "--overwrite")[2]


@pytest.mark.parametrize("ending", ["", ".gz", ".zst", ".GZ"])
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".values.json", ".strings.json"])
def test_rows(run, kind, ending):
    texts = make_texts()
    rows = [json.dumps({"id": [1, {"text": "no"}], "text": text}, ensure_ascii=i % 2) for i, text in enumerate(texts)]
    content = {
        ".jsonl": "\n\n".join(rows),
        ".json": "[\n" + ",\n  ".join(rows) + "\n]\n",
        ".values.json": " \r\n".join(rows),
        ".strings.json": json.dumps(texts, indent=1),
    }[kind]
    Path(f"rows{kind}{ending}").write_bytes(pack(content.encode(), ending.lower()))
    assert run("--input", f"rows{kind}{ending}", *BYTES)[0] == 0
    assert all_documents_of(Path("out")) == sorted(texts)


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_packed_text(run, ending):
    text = "".join(make_texts())
    Path(f"a.md{ending}").write_bytes(pack(text.encode(), ending))
    assert run("--input", f"a.md{ending}", *BYTES)[0] == 0
    assert text_of() == text


def test_json_arrays_are_read_in_pieces(run, monkeypatch):
    monkeypatch.setattr(sources, "BLOCK_CHARS", 7)
    texts = [*make_texts(60), 'brackets ]}[{ and "quotes\\" , ' * 20]
    Path("a.json").write_text(" [ " + " ,".join(json.dumps({"text": text, "n": 1.5}) for text in texts) + "]")
    assert run("--input", "a.json", *BYTES)[0] == 0
    assert all_documents_of(Path("out")) == sorted(texts)


def test_json_arrays_may_follow_one_another(run):
    texts = make_texts(90)
    arrays = [json.dumps([{"text": text} for text in texts[i : i + 30]]) for i in (0, 30, 60)]
    Path("joined.json").write_text("\n".join([*arrays, "[]"]))
    assert run("--input", "joined.json", *BYTES)[0] == 0
    assert sorted(text for documents in documents_of(Path("out")).values() for text in documents) == sorted(texts)
    Path("more.json").write_text(arrays[0] + " and more")
    refused(run("--input", "more.json", *BYTES, "--overwrite"), "more.json, row 31: not JSON")


def test_parquet(run):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = make_texts()
    table = pyarrow.table({"n": range(len(texts)), "body": texts})
    parquet.write_table(table, "a.parquet", row_group_size=17)
    assert run("--input", "a.parquet", "--field", "body", *BYTES)[0] == 0
    assert all_documents_of(Path("out")) == sorted(texts)
    refused(run("--input", "a.parquet", *BYTES, "--overwrite"), "a.parquet: no column 'text', only n, body")

    parquet.write_table(pyarrow.table({"text": [*texts, None, None]}), "nulls.parquet")
    refused(run("--input", "nulls.parquet", *BYTES, "--overwrite"), "nulls.parquet, row 121: field 'text'", "null")
    assert "left out: 2 null" in run("--input", "nulls.parquet", *BYTES, "--overwrite", "--bad-rows", "skip")[1]
    assert all_documents_of(Path("out")) == sorted(texts)

    file = files.Input("a.parquet", "parquet")
    rows = [*sources.READERS["parquet"](file, "body")]
    assert ["".join(row.blocks) for row in rows] == texts
    table = pyarrow.table({"n": range(len(texts)), "body": texts[::-1]})
    parquet.write_table(table, "a.parquet", row_group_size=17)
    with pytest.raises(InputError, match=r"a\.parquet (changed|was truncated) while it was read"):
        next(sources.READERS["parquet"](file, "body"))

    whole = Path("a.parquet").read_bytes()
    Path("cut.parquet").write_bytes(whole[: len(whole) // 2])
    refused(run("--input", "cut.parquet", *BYTES, "--overwrite"), "cut.parquet: damaged parquet file")
    invalid = pyarrow.Array.from_buffers(
        pyarrow.string(), 1, [None, pyarrow.array([0, 2], pyarrow.int32()).buffers()[1], pyarrow.py_buffer(b"\xff\xfe")]
    )
    parquet.write_table(pyarrow.table({"text": invalid}), "latin.parquet")
    refused(run("--input", "latin.parquet", *BYTES, "--overwrite"), "latin.parquet, row 1: not UTF-8")


@pytest.mark.parametrize(
    ("name", "package", "extra"), [("a.txt.zst", "zstandard", "zst"), ("a.parquet", "pyarrow", "parquet")]
)
def test_a_missing_package_is_named(run, monkeypatch, name, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    Path(name).write_bytes(b"x" * 100)
    refused(run("--input", name, *BYTES), f"pip install {package}")  # which works from a clone, too
    assert f"\n{extra} = [" in (SCRIPT.parents[1] / "pyproject.toml").read_text()


def test_format_overrides_the_file_name(run):
    texts = make_texts()
    write_jsonl(Path("rows.log"), texts)
    refused(run("--input", "rows.log", *BYTES), "rows.log: only .txt", "--format")
    assert run("--input", "rows.log", "--format", "jsonl", *BYTES)[0] == 0
    assert all_documents_of(Path("out")) == sorted(texts)
    assert run("--input", "rows.log", "--format", "text", *BYTES, "--overwrite")[0] == 0
    assert text_of() == Path("rows.log").read_text()


@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_standard_input(run, monkeypatch, kind):
    texts = make_texts()
    content = "".join(texts) if kind == "text" else "".join(json.dumps({"text": text}) + "\n" for text in texts)

    def give(text: str) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))

    give(content)
    argv = ["--input", "-", *BYTES, *(["--format", kind] if kind == "jsonl" else [])]
    assert run(*argv)[0] == 0
    assert text_of() == content if kind == "text" else all_documents_of(Path("out")) == sorted(texts)
    give(content)
    assert "already exists and is intact" in run(*argv)[2]
    give(content + "x")
    refused(run(*argv), "standard input has changed", "--overwrite")
    give("")
    assert run(*argv, "--overwrite")[0] == 2
    assert_nothing_left(Path(), but=("out",))


# --- bad rows ---------------------------------------------------------------------------------------------------------

BOM = b"\xef\xbb\xbf"
BAD_ROWS = {
    "null": (b'{"text": null}', "field 'text' is null, not a string"),
    "half a surrogate pair": (rb'{"text": "x\ud800y"}', "half a surrogate pair at character 1"),
    "not a text": (b'{"text": ["a"]}', 'is ["a"], not a string'),
    "no such field": (b'{"txt": "a"}', "no field 'text', only txt"),
    "no such field ": (rb'{"a\nb\u2028\ud800": "a"}', r"no field 'text', only a\nb\u2028\ud800"),
    "not an object": (b"17", "not a JSON object"),
    "not JSON": (b'{"text": "a"', "not JSON"),
    "not UTF-8": (b'{"text": "\xe9"}', "not UTF-8"),
    "too long": (b'{"text": "' + b"a" * 5000 + b'"}', "longer than 4,000 bytes"),
}


@pytest.mark.parametrize("reason", BAD_ROWS)
def test_bad_rows_stop_or_are_counted(run, monkeypatch, reason):
    monkeypatch.setattr(sources, "MAX_ROW_BYTES", 4000)
    bad, message = BAD_ROWS[reason]
    reason = reason.strip()
    texts = make_texts()
    good = [json.dumps({"text": text}).encode() for text in texts]
    Path("a.jsonl").write_bytes(b"\n".join([*good[:57], bad, *good[57:], bad, b""]))
    argv = ["--input", "a.jsonl", *BYTES]
    refused(run(*argv), "a.jsonl", "line 58", message, "--bad-rows skip")
    assert_nothing_left(Path())
    code, table, _ = run(*argv, "--bad-rows", "skip")
    assert code == 0
    assert table.endswith(f"left out: 2 {reason}\n")
    assert Dataset("out").meta["skipped"] == {reason: 2}
    assert all_documents_of(Path("out")) == sorted(texts)
    refused(run(*argv), "bad_rows 'skip', not 'stop'")


@pytest.mark.parametrize("ending", [".jsonl", ".json"])
def test_a_row_of_too_many_values_is_not_parsed(run, monkeypatch, ending):
    """A megabyte of [[],[],... takes twenty megabytes as Python lists, and compresses to a kilobyte."""
    monkeypatch.setattr(sources, "MAX_ROW_VALUES", 300_000)
    rows = [json.dumps({"text": text}) for text in make_texts()] + ['{"text": [' + "[]," * 1_000_000 + "[]]}"]
    Path(f"a{ending}.gz").write_bytes(
        gzip.compress(("[" + ",".join(rows) + "]" if ending == ".json" else "\n".join(rows)).encode())
    )
    argv = ["--input", f"a{ending}.gz", *BYTES]
    tracemalloc.start()
    try:
        refused(run(*argv), f"a{ending}.gz", "more than 300,000 commas and brackets in one row")
        assert tracemalloc.get_traced_memory()[1] < 25e6
    finally:
        tracemalloc.stop()
    assert run(*argv, "--bad-rows", "skip")[1].endswith("left out: 1 too many values\n")
    assert all_documents_of(Path("out")) == sorted(make_texts())


def test_zstd_is_unpacked_in_small_parts(tmp_path, monkeypatch):
    zstandard = pytest.importorskip("zstandard")
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(b"a" * (200 << 20)))
    tracemalloc.start()
    try:
        with files.Input(tmp_path / "a.txt.zst").unpacked() as file:
            assert sum(map(len, iter(lambda: file.read(1 << 20), b""))) == 200 << 20
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()
    monkeypatch.setattr(files, "MAX_WINDOW", 1 << 20)
    parameters = zstandard.ZstdCompressionParameters(window_log=23)
    content = "".join(make_texts(20_000)).encode()
    (tmp_path / "b.txt.zst").write_bytes(zstandard.ZstdCompressor(compression_params=parameters).compress(content))
    with files.Input(tmp_path / "b.txt.zst").unpacked() as file, pytest.raises(InputError, match="without --long"):
        file.read()


def test_parquet_that_is_no_text_or_does_not_fit(run, monkeypatch):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(sources, "MAX_UNPACKED", 1 << 20)
    parquet.write_table(pyarrow.table({"text": ["a" * 10_000_000]}), "a.parquet", compression="zstd")
    refused(run("--input", "a.parquet", *BYTES), "a.parquet", "of column 'text' decompress to 10,0", "not text")
    parquet.write_table(pyarrow.table({"text": make_texts()}), "b.parquet")
    argv = ["--input", "b.parquet", *BYTES, "--bad-rows", "skip"]
    with monkeypatch.context() as patch:
        no_memory = pyarrow.ArrowMemoryError("malloc of size 64 failed")
        patch.setattr(parquet.ParquetFile, "iter_batches", lambda *_, **__: (_ for _ in ()).throw(no_memory))
        refused(run(*argv), "b.parquet, after row 0: out of memory")
    assert run(*argv)[0] == 0


def packed(start: bytes, unit: bytes, megabytes: int) -> bytes:
    """A zstd file of so many megabytes of `unit`."""
    zstandard = pytest.importorskip("zstandard")
    packer = zstandard.ZstdCompressor().compressobj()
    parts = [packer.compress(part) for part in (start, *[unit * ((1 << 20) // len(unit))] * megabytes)]
    return b"".join(parts) + packer.flush()


@pytest.mark.parametrize(
    ("name", "unit", "message"),
    [
        ("a.jsonl.zst", b"a", f"a.jsonl.zst, line {len(make_texts()) + 1}: longer than"),
        ("a.jsonl.zst", b"\n", "1,000 blank lines"),
        ("a.jsonl.zst", b" ", "expand to more than"),
        ("a.txt.zst", b"ab", "expand to more than"),
        ("a.json.zst", b"\t", "expand to more than"),
        ("a.csv.zst", b"\n", "is a quote not closed?"),
    ],
)
def test_a_small_file_that_becomes_a_large_one_is_refused_early(run, monkeypatch, name, unit, message):
    monkeypatch.setattr(sources, "MAX_ROW_BYTES", 1 << 18)
    monkeypatch.setattr(sources, "MAX_ROW_VALUES", 1000)
    monkeypatch.setattr(files, "MAX_UNPACKED", 1 << 22)
    rows = "".join(json.dumps({"text": text}) + "\n" for text in make_texts())
    Path(name).write_bytes(packed(b'text\nx\n"' if "csv" in name else rows.encode(), unit, 30))
    read, decompress = [], files._Unzstd.readinto
    monkeypatch.setattr(
        files._Unzstd, "readinto", lambda self, buffer: read.append(decompress(self, buffer)) or read[-1]
    )
    refused(run("--input", name, *BYTES), name, message)
    assert sum(read) < 6 << 20  # of 30


@pytest.mark.skipif(sys.platform != "linux", reason="there is no limit")
def test_the_directory_of_a_parquet_file_is_not_believed(tmp_path):
    """The sizes in it need not be those of the pages. In a new process, which has no free memory to take it from."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["a" * 100_000_000]}), tmp_path / "a.parquet", compression="zstd")
    code = f"""import sys; sys.path.insert(0, {str(ROOT)!r})
from data import prepare, sources
sources.MAX_PARQUET, sources._bomb = 64 << 20, lambda *_: ""
sys.exit(prepare.main(["--input", "a.parquet", "--out", "out", "--tokenizer", "byte"]))"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "a.parquet, after row 0: out of memory, or the next rows need more than 64 MiB" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(os.name != "posix", reason="links")
@pytest.mark.parametrize("link", [".out.lock", ".out.building", "out/.building", "out/.ready"])
def test_a_preparation_writes_through_no_link(run, tmp_path, link):
    other = tmp_path / "other"
    other.mkdir()
    (other / "precious.txt").write_text("mine")
    Path("a.txt").write_text("\n".join(make_texts()))
    Path(link).parent.mkdir(exist_ok=True)
    Path(link).symlink_to(other / "precious.txt" if link.endswith("lock") else other)
    code, _, err = run("--input", "a.txt", *BYTES)
    assert code == 2
    assert f"{link} is a link" in err or "out/.building: Not a directory" in err
    assert [path.read_text() for path in other.iterdir()] == ["mine"]


def test_a_small_file_takes_little_memory(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    tracemalloc.start()
    try:
        assert read_bytes(tmp_path / "a.json") == b"{}"
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_file_that_is_cut_off_gives_its_whole_rows(run, ending):
    texts = [f"{i} {text}" for i, text in enumerate(make_texts(3000))]
    content = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    packed = gzip.compress(content) if ending == ".gz" else pytest.importorskip("zstandard").compress(content)
    Path(f"a.jsonl{ending}").write_bytes(packed[: len(packed) * 3 // 4])
    argv = ["--input", f"a.jsonl{ending}", *BYTES]
    refused(run(*argv), f"a.jsonl{ending}: damaged", "after line ")
    assert run(*argv, "--bad-rows", "skip")[0] == 0
    found = all_documents_of(Path("out"))
    assert set(found) < set(texts)
    assert len(found) > 1000
    assert sum(Dataset("out").meta["skipped"].values()) == 1


NO_TEXT = {
    "binary": (b"line\n\0line\n", "line 2 has a NUL byte"),
    "not UTF-8": ("caf\u00e9 ok\ncaf\u00e9".encode() + b"\n\xe9\n", "not UTF-8 text, in line 3"),
    "UTF-16": ("some words\n" * 5).encode("utf-16")
    and (("some words\n" * 5).encode("utf-16"), "UTF-16 text, not UTF-8"),
    "damaged gzip": (gzip.compress(os.urandom(500).hex().encode())[:-9], "damaged gzip"),
}


@pytest.mark.parametrize("reason", NO_TEXT)
@pytest.mark.parametrize("flags", [[], ["--one-document"]])
def test_files_that_are_no_text(run, reason, flags):
    content, message = NO_TEXT[reason]
    name = "b.txt.gz" if "gzip" in reason else "b.txt"
    Path("in").mkdir()
    texts = {f"in/{i:03d}.txt": text for i, text in enumerate(make_texts())}
    for path, text in texts.items():
        Path(path).write_bytes(text.encode())
    Path("in", name).write_bytes(content)
    argv = ["--input", "in", *BYTES, *flags]
    refused(run(*argv), f"in/{name}", message)
    assert run(*argv, "--bad-rows", "skip")[0] == 0
    assert Dataset("out").meta["skipped"] == {reason: 1}
    assert "\n".join(texts.values()) == text_of() if flags else all_documents_of(Path("out")) == sorted(texts.values())


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
def test_a_byte_order_mark_is_no_part_of_the_text(run, name):
    text = "\ufeff inside it is text " * 10
    content = text if name == "a.txt" else json.dumps({"text": text}, ensure_ascii=False)
    Path(name).write_bytes(BOM + content.encode())
    assert run("--input", name, *BYTES)[0] == 0
    assert text_of() == text


def test_copies_of_one_text_are_reported(run):
    write_jsonl(Path("a.jsonl"), ["always the same"] * 200)
    refused(run("--input", "a.jsonl", *BYTES), "200 documents leave nothing for", "all one and the same text")
    write_jsonl(Path("a.jsonl"), ["one", "two"] * 100)
    refused(run("--input", "a.jsonl", *BYTES), "all copies of 2 texts")


def test_nothing_but_bad_rows(run):
    Path("a.jsonl").write_text('{"text": null}\n' * 30)
    refused(run("--input", "a.jsonl", *BYTES, "--bad-rows", "skip"), "there is no text; left out: 30 null")


# --- which files ------------------------------------------------------------------------------------------------------


@pytest.fixture
def tree(run):
    """A folder with a text in each file, and the names of the files, except hidden ones and other types."""
    names = ["a.txt", "b.md", "sub/c.py", "sub/deep/d.txt", "sub/deep/e.txt.gz", "x[1]/f.txt", "x[1]/g.txt", "x1/h.txt"]
    for name in [*names, ".git/config.txt", "sub/.ipynb_checkpoints/c.py", ".hidden.txt", "cover.jpg"]:
        path = Path("in", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        text = f"this is the text of {name}\n".encode()
        path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    return names


def inputs_of(*patterns: str) -> list[str]:
    return [file.name for file in sources.input_files([*patterns], "text").inputs]


def test_folders_names_and_patterns(tree, capsys):
    assert inputs_of("in") == inputs_of("in/") == [f"in/{name}" for name in sorted(tree)]
    assert "left out, of another format: in/cover.jpg" in capsys.readouterr().err
    assert inputs_of("in/x[1]") == inputs_of("in/x[1]/*") == ["in/x[1]/f.txt", "in/x[1]/g.txt"]
    assert inputs_of("in/x[1]/f.txt") == ["in/x[1]/f.txt"]
    assert inputs_of("in/[x]1/*.txt") == ["in/x1/h.txt"]
    assert inputs_of("in/*.txt", "in/.hidden.txt", "in/*.txt") == ["in/a.txt", "in/.hidden.txt"]
    assert inputs_of("in/**/*.txt") == [f"in/{name}" for name in sorted(tree) if name.endswith(".txt")]
    assert inputs_of("in/s*/**/d.txt") == ["in/sub/deep/d.txt"]
    assert inputs_of("in/sub/**") == ["in/sub/c.py", "in/sub/deep/d.txt", "in/sub/deep/e.txt.gz"]
    for pattern, message in [
        ("in/*.doc", "no such file"),
        ("in/nothing", "no such file"),
        ("in/a.txt/*", "no such file"),
        ("", "no such file"),
        ("in/x?", "only folders match"),
        ("/dev/null", "not a regular file"),
        ("in/cover.jpg", "cover.jpg: only .txt"),
        ("in/*.jpg", "cover.jpg: only .txt"),
    ]:
        with pytest.raises(InputError, match=message.replace(".", r"\.")):
            inputs_of(pattern)
    for name in ("meta.json", "tokenizer.model", "inputs.jsonl"):
        Path("in/corpus").mkdir(exist_ok=True)
        Path("in/corpus", name).write_text("{}")
    assert inputs_of("in") == [f"in/{name}" for name in sorted(tree)]
    assert "left out, part of a corpus or a run: in/corpus/inputs.jsonl" in capsys.readouterr().err
    Path("pictures").mkdir()
    with pytest.raises(InputError, match="it is empty"):
        inputs_of("pictures")
    Path("pictures/a.png").touch()
    with pytest.raises(InputError, match=r"pictures/a\.png is of another format"):
        inputs_of("in", "pictures")


@pytest.mark.skipif(os.name != "posix", reason="links")
def test_every_file_is_read_once(tree, run, capsys):
    for path, target in [("in/loop", "."), ("in/sub/up", ".."), ("in/x1/self", "../x1"), ("in/z.txt", "a.txt")]:
        Path(path).symlink_to(target)
    os.link("in/b.md", "in/hard.md")
    Path("in/cover.jpg").unlink()
    Path("in/broken.txt").symlink_to("nowhere")
    expected = sorted(f"in/{name}" for name in tree)
    for patterns in (["in"], ["in/**"], ["in", "in/../in", "in/**/*"], ["in/loop/loop", "in"]):
        found = inputs_of(*patterns)
        err = capsys.readouterr().err
        assert sorted(os.path.realpath(name) for name in found) == sorted(map(os.path.realpath, expected)), patterns
        assert "broken.txt" in err
        assert "hard.md" in err
    with pytest.raises(InputError, match=r"in/broken\.txt: a link to nowhere, which does not exist"):
        inputs_of("in/broken.txt")
    os.mkfifo("in/pipe.txt")
    assert inputs_of("in/*.txt") == ["in/a.txt"]
    assert "left out, not a regular file: in/pipe.txt" in capsys.readouterr().err
    refused(run("--input", "in/pipe.txt", *BYTES), "in/pipe.txt: not a regular file", "--input -")


def test_many_loops_take_no_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("in/a/b").mkdir(parents=True)
    Path("in/a/b/c.txt").write_text("text")
    for i in range(6):
        Path(f"in/a/b/{i}").symlink_to("../..")
    assert len(inputs_of("in/**/*.txt")) == len(inputs_of("in/**/**/*")) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="names that are not UTF-8")
@pytest.mark.parametrize("name", [b"caf\xe9.txt", b"two\nlines.txt", b"\xff\xfe.jsonl", b"tab\tand \xe2\x80\xa8.txt"])
def test_names_of_any_bytes(run, name):
    path = os.fsdecode(name)
    text = '{"text": "some text and some more of it"}\n' * (1 if name.endswith(b"l") else 3)
    Path(path).write_text(text)
    code, out, _ = run("--input", path, "--tokenizer", "byte", "--one-document")
    assert code == 0
    assert out.count("\n") == 5
    source = Dataset("out").meta["source"]
    assert files.printable(path) in source
    assert source.isprintable()
    assert "already exists and is intact" in run("--input", path, "--tokenizer", "byte", "--one-document")[2]
    refused(run("--input", path, *BYTES, "--format", "json", "--one-document"), "already exists, but", "read as json")
    assert prepare.main(["--input", path, "--tokenizer", "byte", "--one-document", "--out", path + "-corpus"]) == 0
    assert Dataset(path + "-corpus").meta["name"] == files.printable(path + "-corpus")


def test_a_file_named_as_a_pattern_hides_no_other(run):
    Path("in").mkdir()
    for name in ("*", "a.txt", "b.txt"):
        Path("in", name).write_text("some words\n" * 9)
    assert inputs_of("in") == ["in/a.txt", "in/b.txt"]


def test_a_place_is_a_name(run, tmp_path, monkeypatch, capsys):
    Path("a.txt").write_text("words and more words\n" * 10)
    assert run("--input", "a.txt", "--tokenizer", "byte")[0] == 0
    assert Dataset("out").meta["name"] == "out"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert prepare.main(["--input", "~/a.txt", "--tokenizer", "byte", "--out", "~/x"]) == 0
    assert Dataset(tmp_path / "x").meta["name"] == "x"
    assert prepare.main(["--input", "a.txt", "--out", "/"]) == 2
    assert prepare.main(["a.txt", "--out", "y"]) == 2
    assert "for your own text, use --input" in capsys.readouterr().err


# --- input that changes -----------------------------------------------------------------------------------------------


def test_a_changed_input_is_reported(run):
    Path("in").mkdir()
    for name in "abc":
        Path("in", f"{name}.txt").write_text(f"text of {name}\n" * 100)
    argv = ["--input", "in/*.txt", *BYTES, "--one-document"]
    assert run(*argv)[0] == 0
    before = files_of(Path("out"))
    for name in "abc":
        os.utime(Path("in", f"{name}.txt"), ns=(0, 0))  # touched, copied or checked out again: same text
    assert "already exists and is intact" in run(*argv)[2]

    b = Path("in/b.txt")
    was, times = b.read_text(), b.stat()
    b.write_text(was.replace("b", "x"))
    os.utime(b, ns=(times.st_atime_ns, times.st_mtime_ns))  # same size, same time
    refused(run(*argv), "in/b.txt has changed", "--overwrite")
    b.write_text(was + "more")
    refused(run(*argv), "in/b.txt has changed: 1,004 bytes, not 1,000")
    b.unlink()
    refused(run(*argv), "in/b.txt is gone")
    b.write_text(was)
    assert "already exists and is intact" in run(*argv)[2]
    Path("in/d.txt").write_text("more")
    refused(run(*argv), "in/d.txt is new")
    assert files_of(Path("out")) == before
    Path("out", prepare.INPUTS).write_text('{"file": "in/d.txt"}')
    refused(run(*argv), "inputs.jsonl is damaged", "--overwrite")
    assert run(*argv, "--overwrite")[0] == 0
    assert text_of().endswith("\nmore")
    assert_nothing_left(Path(), but=("out",))


def test_a_corpus_is_self_contained(run):
    """The trainer needs only the prepared files; those of earlier versions do not record their input."""
    Path("a.txt").write_text("words and more words\n" * 10)
    argv = ["--input", "a.txt", *BYTES]
    assert run(*argv)[0] == 0
    Path("out", prepare.INPUTS).unlink()
    meta = json.loads(Path("out/meta.json").read_text())
    del meta["skipped"], meta["options"]["bad_rows"]
    Path("out/meta.json").write_text(json.dumps(meta))
    code, _, err = run(*argv)
    assert code == 0
    assert "has no record of its input" in err
    Path("a.txt").unlink()
    assert prepare.find_or_prepare("out") == Path("out")
    Dataset("out").verify()


def read(file: sources.Input) -> str:
    return "".join("".join(item.blocks) for item in sources.READERS[file.kind](file, "text"))


def append(path: str, content: bytes) -> None:
    with open(path, "ab") as file:
        file.write(content)


@pytest.mark.parametrize("later", [b"", b"\xa9 and more\n"])
def test_a_file_that_grows_is_read_as_it_was(tmp_path, monkeypatch, later):
    monkeypatch.chdir(tmp_path)
    append("a.txt", b"line\n" * 1000 + b"caf\xc3")
    file = files.Input("a.txt")
    append("a.txt", b"\xa9")
    for _ in range(3):
        assert read(file) == "line\n" * 1000 + "caf"  # without the incomplete character
        append("a.txt", later)
    append("b.jsonl", b'{"text": "one"}\n{"text": "tw')
    file = files.Input("b.jsonl", "jsonl")
    append("b.jsonl", b'o"}\n')
    assert read(file) == read(file) == "one"
    append("c.txt", b"\xc3")  # in a file that does not change, it is an error
    with pytest.raises(InputError, match="not UTF-8"):
        read(files.Input("c.txt"))


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    append("a.txt", b"line\n" * 1000)
    file = files.Input("a.txt")
    read(file)
    Path("a.txt").write_bytes(b"lime\n" * 1000)
    with pytest.raises(InputError, match=r"a\.txt changed while it was read"):
        read(file)
    Path("a.txt").write_bytes(b"line\n" * 999)
    with pytest.raises(InputError, match=r"a\.txt was truncated while it was read"):
        read(file)
    Path("a.txt").unlink()
    with pytest.raises(InputError, match=r"a\.txt: No such file"):
        read(file)


def test_a_long_survey_is_not_repeated(run, monkeypatch):
    """Interrupted after the text was read and the tokenizer trained, before anything is encoded."""
    monkeypatch.setattr(prepare, "SAVE_EVERY_S", 0)
    write_jsonl(Path("a.jsonl"), make_texts())
    argv = ["--input", "a.jsonl", "--name", "t", "--vocab-size", "310"]
    with monkeypatch.context() as stopping:
        stopping.setattr(prepare, "write_shards", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(*argv)[0] == 130
    monkeypatch.setattr(prepare, "train_sentencepiece", None)
    monkeypatch.setattr(prepare, "survey", None)
    assert run(*argv)[0] == 0
    assert all_documents_of(Path("out")) == sorted(make_texts())
    assert_nothing_left(Path(), but=("out",))


@pytest.mark.parametrize("how", ["append", "rewrite"])
def test_a_file_that_changes_between_two_readings(run, monkeypatch, how):
    """Like a log file that is being written."""
    Path("a.txt").write_text("line\n" * 1000)
    survey = prepare.survey

    def survey_and_write(*args):
        found = survey(*args)
        if how == "append":
            append("a.txt", b"more\n" * 5000)
        else:
            Path("a.txt").write_text("\u00e9\n" * 5000)
        return found

    monkeypatch.setattr(prepare, "survey", survey_and_write)
    result = run("--input", "a.txt", *BYTES)
    if how == "append":
        assert result[0] == 0
        assert text_of() == "line\n" * 1000
        refused(run("--input", "a.txt", *BYTES), "a.txt has changed: 30,000 bytes, not 5,000")
    else:
        refused(result, "a.txt changed while it was read")
        assert_nothing_left(Path())


def test_the_sample_is_bounded_in_pieces_too(monkeypatch):
    """The documents of the lowest ranks, in the order of the text, for any size of pieces."""
    found = [pieces.Piece("train" if i % 5 else "val", f"name {i % 300}", True) for i in range(2000)]
    training = [piece.text for piece in found if piece.split == "train"]
    rank = {text: hashlib.sha256(text.encode()).digest()[8:16] for text in training}
    monkeypatch.setattr(pieces, "SAMPLE_PIECES", 70)
    counts, chars, sample = pieces.survey(found, 1 << 20)
    assert (counts["train"], chars) == (len(training), sum(len(piece.text) for piece in found))
    assert len(sample) == 70
    assert sorted(map(rank.get, sample)) == sorted(rank[text] for text in training)[:70]
    positions = iter(training)
    assert all(text in positions for text in sample)
    monkeypatch.setattr(pieces, "SAMPLE_PIECES", 10**6)
    assert 200 <= sum(map(len, pieces.survey(found, 200)[2])) < 210


@pytest.mark.parametrize(
    "damage", ["[]", '{"file": ["a"]}', '{"file": [], "bytes": 1, "times": [], "sha256": ""}', "{", "\udcff"]
)
def test_damaged_records_of_the_input(run, damage):
    Path("a.txt").write_text("words and more words\n" * 10)
    assert run("--input", "a.txt", *BYTES)[0] == 0
    Path("out/inputs.jsonl").write_bytes(damage.encode("utf-8", "surrogateescape"))
    refused(run("--input", "a.txt", *BYTES), "out/inputs.jsonl", "damaged")


# --- interrupted ------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_steps(monkeypatch):
    monkeypatch.setattr(pieces, "SAVE_EVERY_S", 0)
    monkeypatch.setattr(pieces, "BATCH_CHARS", 1000)
    monkeypatch.setattr(pieces, "SHARD_TOKENS", 700)


@pytest.mark.parametrize(
    "flags", [["--tokenizer", "byte", "--bad-rows", "skip"], ["--one-document", "--vocab-size", "310"]]
)
def test_an_interrupted_preparation_continues(run, small_steps, monkeypatch, flags):
    texts = make_texts(150)
    write_jsonl(Path("a.jsonl"), texts)
    if "skip" in flags:
        append("a.jsonl", b"oops\n")
    argv = ["--input", "a.jsonl", "--name", "t", *flags]
    assert run(*argv)[0] == 0
    expected = files_of(Path("out"))
    write, encoded = pieces.ShardWriter.write, []

    def write_some(self, ids):
        encoded.append(len(ids))
        if sum(encoded) > 1500:
            raise KeyboardInterrupt
        write(self, ids)

    monkeypatch.setattr(pieces.ShardWriter, "write", write_some)
    interruptions = 0
    while (result := run(*argv, "--overwrite"))[0] != 0:
        assert result[0] == 130
        assert files_of(Path("out")) == expected  # the old one stays until the new one is complete
        assert "run the same command again" in result[2]
        interruptions += 1
        encoded.clear()
    assert interruptions > 2
    assert "resuming the interrupted preparation" in result[2]
    assert files_of(Path("out")) == expected
    assert_nothing_left(Path(), but=("out",))


def test_what_was_interrupted_is_forgotten_when_the_input_is_another(run, small_steps, monkeypatch):
    write, calls = pieces.ShardWriter.write, []

    def write_some(self, ids):
        calls.append(ids)
        if len(calls) == 100:
            raise KeyboardInterrupt
        write(self, ids)

    monkeypatch.setattr(pieces.ShardWriter, "write", write_some)
    write_jsonl(Path("a.jsonl"), make_texts(150))
    assert run("--input", "a.jsonl", *BYTES)[0] == 130
    write_jsonl(Path("a.jsonl"), make_texts(150, seed=1))
    code, _, err = run("--input", "a.jsonl", *BYTES)
    assert code == 0
    assert "resuming" not in err
    assert all_documents_of(Path("out")) == sorted(make_texts(150, seed=1))
    assert_nothing_left(Path(), but=("out",))


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_finished_work_outlives_any_number_of_failures(run, small_steps, monkeypatch, failure):
    """Including an interruption before the resumed preparation has saved anything."""
    write_jsonl(Path("a.jsonl"), make_texts(150))
    write, calls = pieces.ShardWriter.write, []

    def write_some(self, ids):
        calls.append(len(ids))
        if len(calls) == limit:
            raise failure
        write(self, ids)

    monkeypatch.setattr(pieces.ShardWriter, "write", write_some)
    for stop in (80, 3, 1):
        limit = stop
        assert run("--input", "a.jsonl", *BYTES)[0] in (2, 130)
        calls.clear()
        monkeypatch.setattr(pieces, "SAVE_EVERY_S", 1000)  # after the first failure, nothing is saved any more
    limit = 0
    code, _, err = run("--input", "a.jsonl", *BYTES)
    assert code == 0
    assert "resuming the interrupted preparation" in err
    assert len(calls) < 80
    assert all_documents_of(Path("out")) == sorted(make_texts(150))
    Dataset("out").verify()
    assert_nothing_left(Path(), but=("out",))


def put_elsewhere(path: Path) -> None:
    """Make it a link, which a preparation must not write through."""
    path.symlink_to(path.rename(Path("elsewhere").absolute()))


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: os.truncate(path, 100), put_elsewhere])
@pytest.mark.parametrize(("name", "tokens"), [("train_000.bin", 700), ("train_000.bin.tmp", 1_000_000)])
def test_unfinished_work_that_is_damaged_is_done_again(run, small_steps, monkeypatch, damage, name, tokens):
    monkeypatch.setattr(pieces, "SHARD_TOKENS", tokens)
    write_jsonl(Path("a.jsonl"), make_texts(150))
    write, calls = pieces.ShardWriter.write, []

    def write_some(self, ids):
        calls.append(len(ids))
        if len(calls) == 80:
            raise KeyboardInterrupt
        write(self, ids)

    monkeypatch.setattr(pieces.ShardWriter, "write", write_some)
    assert run("--input", "a.jsonl", *BYTES)[0] == 130
    damage(Path(".out.building", name))
    code, _, err = run("--input", "a.jsonl", *BYTES)
    assert (code, "resuming" in err) == (0, False)
    assert all_documents_of(Path("out")) == sorted(make_texts(150))


@pytest.fixture(params=["empty folder", "link", "volume", "volume that cannot be told from a folder"])
def place(request, tmp_path, monkeypatch):
    """A folder for a corpus that cannot be moved, and the path by which it is given."""
    real = tmp_path / "out"
    real.mkdir()
    if request.param == "link":
        real.rename(tmp_path / "elsewhere")
        real.symlink_to(tmp_path / "elsewhere")
    elif request.param == "volume":
        (real / "lost+found").mkdir()
    if request.param.startswith("volume"):
        rename = os.rename

        def busy(source, target):
            if real in (Path(source), Path(target)):
                raise OSError(errno.EBUSY, "Device or resource busy", str(source))
            rename(source, target)

        for module, name in ((os, "rename"), (os, "replace"), (Path, "rename"), (Path, "replace")):
            monkeypatch.setattr(module, name, busy)
    return real


def corpus_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lost+found"}


def test_an_existing_folder_is_filled_in_place(run, place, small_steps):
    inode = place.stat().st_ino
    write_jsonl(Path("a.jsonl"), make_texts(150))
    argv = ["--input", "a.jsonl", *BYTES]
    assert run(*argv)[0] == 0
    assert place.stat().st_ino == inode
    assert "intact" in run(*argv)[2]
    write_jsonl(Path("a.jsonl"), make_texts(100))
    assert run(*argv, "--overwrite")[0] == 0
    Dataset("out").verify()
    assert all_documents_of(place) == sorted(make_texts(100))
    expected = {shard["file"] for split in Dataset("out").meta["splits"].values() for shard in split["shards"]}
    assert {*corpus_in(place)} == {*expected, "meta.json", "tokenizer.model", "inputs.jsonl"}
    assert_nothing_left(Path(), but=("out",))


@pytest.mark.parametrize("place", ["volume"], indirect=True)
@pytest.mark.parametrize("moved", [0, 1, 2, 5, 9])
def test_a_folder_is_filled_in_place_though_interrupted(run, place, small_steps, monkeypatch, moved):
    """Killed in the middle: there is no incomplete corpus, and the next command completes it."""
    write_jsonl(Path("a.jsonl"), make_texts(150))
    assert run("--input", "a.jsonl", *BYTES)[0] == 0
    write_jsonl(Path("a.jsonl"), make_texts(100, seed=1))
    replace, calls = os.replace, []

    def killed(source, target):
        if Path(source).parent.name == ".ready":
            calls.append(source)
            if len(calls) > moved:
                raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        assert run("--input", "a.jsonl", *BYTES, "--overwrite")[0] == 130
    assert not (place / "meta.json").exists()
    refused(run("--input", "nowhere.txt", *BYTES), "no such file")
    code, _, err = run("--input", "a.jsonl", *BYTES)
    assert (code, "intact" in err, "encoding" in err) == (0, True, False)
    assert all_documents_of(place) == sorted(make_texts(100, seed=1))
    assert not any(path.name.startswith(".") for path in place.iterdir())


@pytest.mark.skipif(os.name != "posix", reason="permissions")
def test_a_folder_below_another_users(run, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", make_texts(150))
    for folder in [tmp_path / "theirs" / "out", *tmp_path.parents[:3], tmp_path]:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o777)
    (tmp_path / "theirs").chmod(0o555)
    code = (  # imports first, since the packages may be readable only by root, who may write everywhere
        "import mmap, os, sys; sys.path.insert(0, sys.argv.pop(1)); from data import prepare\n"
        "if os.getuid() == 0: os.setuid(65534)\n"
        "sys.exit(prepare.main())"
    )
    for flags in (["a.jsonl"], ["a.jsonl", "--overwrite"], ["-", "--format", "jsonl", "--overwrite"]):
        with open(tmp_path / "a.jsonl") as text:
            result = python(
                "-c", code, ROOT, "--input", *flags, *BYTES, "--out", "theirs/out", cwd=tmp_path, stdin=text
            )
        assert result.returncode == 0, result.stderr
        assert all_documents_of(tmp_path / "theirs" / "out") == sorted(make_texts(150))
    (tmp_path / "theirs" / "out").chmod(0o555)
    other = python("-c", code, ROOT, "--input", "a.jsonl", *BYTES, "--out", "theirs/new", cwd=tmp_path)
    assert other.returncode == 2
    assert "encoding" not in other.stderr


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_killed_preparation_continues(run):
    write_jsonl(Path("a.jsonl"), make_texts(1500))
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); from data import pieces, prepare; pieces.SAVE_EVERY_S = 0; "
        "pieces.BATCH_CHARS = 2000; pieces.SHARD_TOKENS = 9000; sys.exit(prepare.main())"
    )
    argv = [sys.executable, "-c", code, str(SCRIPT.parents[1]), "--input", "a.jsonl", *BYTES, "--out", "out"]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 30
        while not Path(".out.building/train_003.bin").exists() and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert not Path("out").exists()
    again = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert "resuming the interrupted preparation" in again.stderr
    assert all_documents_of(Path("out")) == sorted(make_texts(1500))
    Dataset("out").verify()
    assert_nothing_left(Path(), but=("out",))


class Stream:
    """A streamed data set that breaks off after this many rows in total."""

    def __init__(self, rows: list[dict], breaks: list[int], read: list[int]):
        self.rows, self.breaks, self.read, self.at = rows, breaks, read, 0

    def __iter__(self):
        while self.at < len(self.rows):
            if self.breaks and self.at == self.breaks[0]:
                self.breaks.pop(0)
                raise ConnectionError("cut off")
            self.read.append(self.at)
            self.at += 1
            yield self.rows[self.at - 1]


class StreamWithState(Stream):
    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


@pytest.mark.parametrize("kind", [Stream, StreamWithState])
@pytest.mark.parametrize("limit", [0, 100])
def test_an_interrupted_hub_download_continues(run, monkeypatch, kind, limit):
    monkeypatch.setattr(hub, "STATE_EVERY", 10)
    texts, read = [f"{text} to the end" for text in make_texts(130)], []  # a word that also appears in the last line
    rows = [{"text": text} for text in texts]
    rows.insert(33, {"text": None})
    breaks = [0, 47, 83]
    load = types.SimpleNamespace(load_dataset=lambda *_, **__: kind(rows, breaks, read))
    monkeypatch.setitem(sys.modules, "datasets", load)
    argv = ["--hf", "a/b", *BYTES, "--bad-rows", "skip", *(["--limit", limit] if limit else [])]
    refused(run(*argv), "--hf a/b: ConnectionError: cut off\n")
    assert_nothing_left(Path())
    for kept in (47, 83):
        code, _, err = run(*argv)
        assert code == 2
        assert err.endswith(f"cut off; {kept} rows are saved: run the same command again to resume\n")
    code, _, err = run(*argv)
    assert code == 0
    assert "resuming after 83 rows" in err
    assert all_documents_of(Path("out")) == sorted(texts[: limit or None])
    assert Dataset("out").meta["skipped"] == {"null": 1}
    if kind is StreamWithState:
        assert len(read) < len(rows) + 20  # not from the start every time
    assert_nothing_left(Path(), but=("out",))


def test_a_hub_download_is_kept_for_its_data_set_alone(run, monkeypatch):
    calls = []

    def load_dataset(name, config, split, streaming):
        calls.append((name, split))
        return Stream([{"text": f"{name} {split} {i}"} for i in range(200)], [150] if name == "a/b" else [], [])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert run("--hf", "a/b", *BYTES)[0] == 2
    code, _, err = run("--hf", "a/c", "--hf-split", "validation", *BYTES)
    assert (code, "resuming" in err) == (0, False)
    assert calls == [("a/b", "train"), ("a/c", "validation")]
    assert all_documents_of(Path("out")) == sorted(f"a/c validation {i}" for i in range(200))
    assert Dataset("out").meta["source"] == "Hugging Face dataset a/c, column text, split validation"
    refused(run("--hf", "a/c", *BYTES), "split validation")


# --- the corpus of a run ----------------------------------------------------------------------------------------------


def test_find_or_prepare(run, tmp_path, monkeypatch):
    Path("a.txt").write_text("words and more words\n" * 10)
    assert run("--input", "a.txt", *BYTES)[0] == 0
    assert Dataset(prepare.find_or_prepare("out")).hash == Dataset(prepare.find_or_prepare(str(tmp_path / "out"))).hash
    monkeypatch.chdir("out")
    assert Dataset(prepare.find_or_prepare(".")).meta["name"] == "t"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert prepare.find_or_prepare("~/out") == tmp_path / "out"
    for name, message in [
        (
            "other/out",
            rf"other/out: no prepared corpus there, which is {Path.cwd()}/other/out from here; .*--data PATH",
        ),
        ("/other/out", "/other/out: no prepared corpus there; .*--data PATH"),
        ("nonsense", "nonsense: no such corpus; built-in: pystdlib"),
        ("../a.txt", r"a\.txt: no prepared corpus there, .*--input \.\./a\.txt --name NAME"),
    ]:
        with pytest.raises(InputError, match=message):
            prepare.find_or_prepare(name)


def test_a_name_that_means_two_corpora_is_refused(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "DATA", tmp_path / "data")
    Path("a.txt").write_text("words and more words\n" * 10)
    assert run("--input", "a.txt", *BYTES)[0] == 0
    assert prepare.find_or_prepare("out") == Path("out")
    shutil.copytree("out", tmp_path / "data" / "out")
    with pytest.raises(InputError, match=rf"--data out could be {tmp_path}/out or {tmp_path}/data/out"):
        prepare.find_or_prepare("out")
    assert prepare.find_or_prepare("./data/out") == Path("data/out")
    monkeypatch.chdir("data")  # if both are the same
    assert prepare.find_or_prepare("out").samefile(tmp_path / "data" / "out")
    monkeypatch.chdir("..")
    Path("out").rename("shakespeare")
    capsys.readouterr()
    assert prepare.find_or_prepare("shakespeare") == Path("shakespeare")
    assert f"--data shakespeare is the folder {tmp_path}/shakespeare, not the built-in" in capsys.readouterr().err


@pytest.mark.parametrize("shadow", ["data.py", "data/__init__.py", "sources.py"])
def test_other_modules_of_the_name_do_not_matter(tmp_path, shadow):
    path = tmp_path / "path" / shadow
    path.parent.mkdir(parents=True)
    path.write_text("raise RuntimeError('the wrong one')\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "path")}
    root = SCRIPT.parents[1]
    commands = [[SCRIPT, "--input", "nowhere.txt", "--name", "t"]]
    commands += [[root / "train.py", "--data", "nowhere"]] if shadow == "data.py" else []
    for command in commands:
        result = subprocess.run(
            [sys.executable, *map(str, command)],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
        assert "nowhere" in result.stderr
    # eval.py imports modules in the same way: the folder of a script comes before PYTHONPATH.
    (tmp_path / "script.py").write_text(f"import sys; sys.path[0] = {str(root)!r}; import data; print(data.__file__)")
    found = subprocess.run(
        [sys.executable, tmp_path / "script.py"], env=environment, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == str(root / "data" / "__init__.py")


def python(*arguments: object, path: Path = Path("/nowhere"), **options) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(path)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, **options)


@pytest.mark.parametrize(
    "script",
    [
        "data/prepare.py",
        *(
            f"{path.parent.name}/{path.name}"
            for name in ("bench", "experiments")
            for path in sorted((ROOT / name).glob("*.py"))
        ),
    ],
)
def test_a_folder_next_to_a_script_is_not_imported(tmp_path, script):
    """A corpus unpacked into data/ may contain folders named like modules; so may other folders with scripts."""
    script = Path(script)
    here = tmp_path / script.parent
    here.mkdir()
    for name in {script, script.with_name("study.py"), script.with_name("__init__.py")}:
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tmp_path / name)
    for name in ("argparse", "email", "json", "pathlib", "random", "statistics", "numpy", "torch", "sentencepiece"):
        (here / name).mkdir()
        (here / name / "__init__.py").write_text("raise SystemExit('imported the wrong one')")
    installed = tmp_path / "installed"  # stand-ins for modules that take long to import
    installed.mkdir()
    for name in ("torch", "sentencepiece"):
        (installed / f"{name}.py").write_text("raise SystemExit('imported the right one')")
    if script.parent.name == "data":
        shutil.copytree(ROOT / "minidisp", tmp_path / "minidisp")
    result = python(tmp_path / script, path=installed)
    assert "wrong" not in result.stderr
    if script.name in ("prepare.py", "study.py", "train.py", "verdict.py", "same_weights.py"):
        assert "right" in result.stderr


@pytest.mark.parametrize("name", ["files", "sources"])
def test_a_folder_named_like_a_module_of_ours(tmp_path, name):
    shutil.copytree(
        ROOT / "data", tmp_path / "data", ignore=lambda folder, names: [n for n in names if n[-3:] != ".py"]
    )
    shutil.copytree(ROOT / "minidisp", tmp_path / "minidisp")
    folder = tmp_path / "data" / name
    folder.mkdir()
    assert python(tmp_path / "data/prepare.py", "--help").returncode == 0  # a corpus may have this name
    (folder / "__init__.py").write_text("raise SystemExit('the wrong one')")
    result = python(tmp_path / "data/prepare.py", "--help")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert f"{folder} would be imported in place of {name}.py" in result.stderr
    shutil.rmtree(folder)
    (tmp_path / "data" / f"{name}.abi3.so").write_bytes(b"")
    result = python(tmp_path / "data/prepare.py", "--help")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert f"{name}.abi3.so would be imported in place of {name}.py" in result.stderr


@pytest.mark.skipif(sys.version_info < (3, 11), reason="no -P")
@pytest.mark.parametrize("script", ["train.py", pytest.param("eval.py", marks=pytest.mark.slow), "data/prepare.py"])
def test_python_may_leave_the_folder_of_a_script_out_of_its_path(tmp_path, script):
    (tmp_path / "data.py").write_text("raise SystemExit('the wrong one')")
    result = python("-P", ROOT / script, "--no-such-flag", path=tmp_path, cwd=tmp_path)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert "--no-such-flag" in result.stderr


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info < (3, 11), reason="no -P")
@pytest.mark.parametrize("script", ["bench/recipe.py", "experiments/size.py", "experiments/verdict.py"])
def test_help_of_studies_and_benchmarks_has_their_name(tmp_path, script):
    (tmp_path / "study.py").write_text("raise SystemExit('the wrong one')")
    result = python("-P", ROOT / script, "--help", path=tmp_path, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"usage: {script} ")


def test_the_splits_are_all_there(run):
    """A text of any script is prepared with the default tokenizer, whatever its size."""
    for text in ("\u4e00\u4e8c\u4e09\u3002" * 40, "ACGT" * 3000, "one line\n" * 30, "\U0001f642" * 100):
        Path("a.txt").write_text(text, encoding="utf-8")
        code, _, err = run("--input", "a.txt", "--name", "t", "--overwrite")
        assert code == 0
        assert "the vocabulary is smaller" in err
        assert text_of() == text
        assert all(Dataset("out").split(name).tokens > 1 for name in SPLITS)
