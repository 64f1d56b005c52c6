"""Untrusted files: reading any content gives an object, or one line that names the file.

Over ten thousand damaged or hostile files, a tenth of them unless the slow tests run, the same ones every time;
`python -m pytest tests/test_fuzz.py --fuzz 100` takes a hundred times as many, with a different seed each time.
"""

import copy
import dataclasses
import json
import math
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import eval as eval_command
import train
from minidisp import InputError, report, tokenizer
from minidisp.config import from_dict, parse, to_dict
from minidisp.data import Dataset
from minidisp.model import GPT
from minidisp.runtime import checkpoint
from minidisp.runtime.run_folder import changed_settings, rewind_metrics
from minidisp.shards import HEADER, MAGIC, SPLITS
from tests.conftest import small_config, small_flags
from tests.test_data import write_corpus

CASES = {
    "shard bytes": 1500,
    "meta bytes": 900,
    "meta values": 1500,
    "config bytes": 500,
    "config values": 1500,
    "metrics bytes": 900,
    "metrics values": 1200,
    "tokenizer bytes": 1500,
    "checkpoint bytes": 1200,
    "checkpoint values": 900,
    "checkpoint tensors": 400,
    "pickles": 1200,
}


def test_there_are_ten_thousand_cases():
    assert sum(CASES.values()) >= 10_000


share = pytest.mark.parametrize("share", [0.1, pytest.param(1, marks=pytest.mark.slow)])


def fuzz(request, name: str, strategy: st.SearchStrategy, check: Callable) -> None:
    """Call check(case) for a share of as many cases as CASES[name] says, times --fuzz."""
    times, done = request.config.getoption("--fuzz"), 0
    cases = math.ceil(CASES[name] * request.getfixturevalue("share") * times)

    @settings(
        max_examples=cases,
        derandomize=times == 1,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def run(case):
        nonlocal done
        done += 1
        check(case)

    run()
    assert done >= cases


def outcome(path: Path, read: Callable) -> object:
    """The result of read(), or None after a one-line InputError that names the file (or one in that folder)."""
    try:
        return read()
    except InputError as error:
        message = str(error)
        assert str(path) in message, message
        assert message.isprintable(), ascii(message)
        assert len(message) < 600, message
        return None


def put(path: Path, content: bytes) -> None:
    """Write a new file: some file systems flush overwritten files to disk, which takes longer than all else here."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


# --- how files are damaged -------------------------------------------------------------------------------------------

POSITION = st.integers(0, 1 << 20)  # modulo the length of the file
EDITS = st.lists(
    st.one_of(
        st.tuples(st.just("set"), POSITION, st.integers(0, 255)),
        st.tuples(st.just("flip"), POSITION, st.integers(0, 7)),
        st.tuples(st.just("cut"), POSITION, st.integers(1, 64)),
        st.tuples(st.just("insert"), POSITION, st.binary(max_size=8)),
        st.tuples(
            st.just("insert"), POSITION, st.sampled_from([b"\0" * 8, b"\xff" * 8, b"[" * 5000, b"9" * 5000, b"\n"])
        ),
        st.tuples(st.just("copy"), POSITION, POSITION),
        st.tuples(st.just("end"), POSITION, st.none()),
    ),
    min_size=1,
    max_size=4,
)


def edited(content: bytes, edits: list[tuple]) -> bytes:
    data = bytearray(content)
    for kind, position, value in edits:
        at = position % (len(data) or 1)
        if kind == "insert" or not data:
            data[at:at] = value if isinstance(value, bytes) else b"x"
        elif kind == "set":
            data[at] = value
        elif kind == "flip":
            data[at] ^= 1 << value
        elif kind == "cut":
            del data[at : at + value]
        elif kind == "copy":
            data[at:at] = data[value % len(data) :][:50]
        else:
            del data[at:]
    return bytes(data)


DEEP = json.loads("[" * 200 + "]" * 200)
ODD = st.one_of(
    st.sampled_from(
        [
            None,
            True,
            False,
            0,
            1,
            -1,
            2,
            7,
            255,
            2**16,
            2**31,
            2**32,
            2**60,
            2**64,
            10**9,
            -(10**30),
            10**400,
            0.0,
            -0.5,
            1e-300,
            1e300,
            math.nan,
            math.inf,
            -math.inf,
            "",
            ".",
            "..",
            "../train_000.bin",
            "/etc/passwd",
            "a\0b",
            "a\nb",
            "\ud800",
            "\u202e",
            "\x1b[2J",
            "CON",
            "x" * 5000,
            "train_000.bin",
            "meta.json",
            "adamw",
            "all",
            "1,2",
            [],
            {},
            [[]],
            [1, 2],
            [None, "x"],
            {"a": 1},
            DEEP,
        ]
    ),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.integers(), max_size=3),
)
CHANGES = st.lists(st.tuples(st.sampled_from(["set", "remove", "add"]), POSITION, ODD), min_size=1, max_size=3)


def places(tree: object) -> list[tuple]:
    """Every (container, key) in a tree of dictionaries and lists."""
    found = []
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        found.append((tree, key))
        if isinstance(value, dict | list):
            found += places(value)
    return found


def changed(tree: object, changes: list[tuple]) -> object:
    tree = copy.deepcopy(tree)
    for kind, position, value in changes:
        found = places(tree)
        if not found:
            break
        container, key = found[position % len(found)]
        value = copy.deepcopy(value) if isinstance(value, dict | list) else value  # the next change may modify it
        if kind == "set":
            container[key] = value
        elif kind == "remove":
            del container[key]
        elif isinstance(container, dict):
            container[value if isinstance(value, str) else "more"] = value
        else:
            container.append(value)
    return tree


def as_json(tree: object, twice: bool) -> bytes:
    text = json.dumps(tree)  # NaN and Infinity included
    if twice and isinstance(tree, dict) and tree:
        key = next(iter(tree))
        text = "{" + f"{json.dumps(key)}: 1, " + text[1:]
    return text.encode("utf-8", "surrogatepass")


JSON_CASE = st.tuples(CHANGES, st.integers(0, 9).map(lambda n: n == 0))


# --- corpora --------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_corpus(tmp_path) -> Path:
    write_corpus(tmp_path, tokens=60)
    return tmp_path


def use_corpus(folder: Path) -> None:
    dataset = Dataset(folder)
    for name in SPLITS:
        split = dataset.split(name)
        tokens = split.slice(0, split.tokens)
        assert 0 <= tokens.min() <= tokens.max() < dataset.tokenizer.vocab_size
        assert dataset.tokenizer.decode(tokens[:5]) is not None
    print(dataset.meta["name"], dataset.meta["source"])


@share
def test_shards(share, request, small_corpus):
    path = small_corpus / "train_000.bin"
    whole = path.read_bytes()
    header = st.builds(
        lambda version, size, tokens: HEADER.pack(MAGIC, version, size, tokens),
        st.sampled_from([0, 1, 2, 2**32 - 1]),
        st.sampled_from([0, 1, 2, 4, 8]),
        st.integers(0, 2**64 - 1) | st.integers(0, 60),
    )

    def check(case):
        edits, header = case
        content = edited(whole, edits)
        put(path, header + content[64:] if header else content)
        outcome(small_corpus, lambda: use_corpus(small_corpus))

    fuzz(request, "shard bytes", st.tuples(EDITS, st.none() | header), check)


@share
def test_meta(share, request, small_corpus):
    path = small_corpus / "meta.json"
    whole = path.read_bytes()

    def check_bytes(edits):
        put(path, edited(whole, edits))
        outcome(small_corpus, lambda: use_corpus(small_corpus))

    def check_values(case):
        put(path, as_json(changed(json.loads(whole), case[0]), case[1]))
        outcome(small_corpus, lambda: use_corpus(small_corpus))
        assert not case[1] or outcome(path, lambda: Dataset(small_corpus)) is None

    fuzz(request, "meta bytes", EDITS, check_bytes)
    fuzz(request, "meta values", JSON_CASE, check_values)


@pytest.mark.parametrize("token", [257, 300, 65_535])
def test_a_token_beyond_the_vocabulary_is_named_where_it_is_used(corpus, tmp_path, capsys, token):
    folder = tmp_path / "corpus"
    shutil.copytree(corpus, folder)
    shard = folder / "train_000.bin"
    tokens = np.fromfile(shard, dtype="<u2", offset=HEADER.size)
    tokens[1000:] = token
    shard.write_bytes(shard.read_bytes()[: HEADER.size] + tokens.tobytes())
    assert train.cli([*small_flags(), "--data", str(folder), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert f"{shard}: token " in error
    assert f"is {token:,}, but the vocabulary has 257" in error
    assert error.count("\n") == 1


# --- settings and metrics -------------------------------------------------------------------------------------------


@share
def test_config(share, request, tmp_path):
    path = tmp_path / "config.json"
    saved = {**to_dict(parse(["--dispersion", "0.1", "--n-layer", "2"])), "environment": {"torch": "2.13"}}
    whole = json.dumps(saved, indent=2).encode()

    def use():
        config = parse(["--config", str(path)])
        assert from_dict(json.loads(json.dumps(to_dict(config), allow_nan=False))) == config
        assert config.parameter_count > 0
        print(config.run_dir)

    def check_bytes(edits):
        put(path, edited(whole, edits))
        outcome(path, use)

    def check_values(case):
        put(path, as_json(changed(saved, case[0]), case[1]))
        outcome(path, use)

    fuzz(request, "config bytes", EDITS, check_bytes)
    fuzz(request, "config values", JSON_CASE, check_values)


@share
def test_metrics(share, request, run, tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = (run / "metrics.jsonl").read_bytes()
    tree = [json.loads(line) for line in whole.splitlines()]
    tree = [*tree[:3], *tree[-2:]]
    for line in tree:
        if "histogram_by_layer" in line:
            line["histogram_by_layer"] = [layer[:4] for layer in line["histogram_by_layer"]]
    small = "".join(json.dumps(line) + "\n" for line in tree).encode()

    def use():
        metrics = report.read_metrics(path)
        evals = [line for line in metrics if "val_loss" in line]
        if evals:
            numbers = report.summarise(tmp_path, 1, 1, 1.0, 0)
            assert math.isfinite(numbers["best"]["val_loss"])
            np.array([line["mean_cosine_by_layer"] for line in evals[:1]], dtype=float)
            np.array([line["histogram_by_layer"] for line in evals[:1]], dtype=float)
        with open(path, "ab+", buffering=0) as file:
            rewind_metrics(file, 6)
        assert path.read_bytes() in (b"", path.read_bytes()[: path.stat().st_size])
        assert all(line["step"] <= 6 for line in report.read_metrics(path))

    def check_bytes(edits):
        put(path, edited(small, edits))
        outcome(path, use)

    def check_values(changes):
        put(path, b"".join(as_json(line, False) + b"\n" for line in changed(tree, changes)))
        outcome(path, use)

    fuzz(request, "metrics bytes", EDITS, check_bytes)
    fuzz(request, "metrics values", CHANGES, check_values)


# --- tokenizers -----------------------------------------------------------------------------------------------------


@share
def test_tokenizer(share, request, bpe_corpus, tmp_path):
    path = tmp_path / "tokenizer.model"
    files = [(bpe_corpus / "tokenizer.model").read_bytes(), tokenizer.BYTE_FILE]

    def check(case):
        which, edits, tail = case
        whole = files[which]
        # Half of the edits in the settings at the end, which the many pieces would otherwise hide.
        content = whole[:-400] + edited(whole[-400:], edits) if tail else edited(whole, edits)
        put(path, content)
        loaded = outcome(path, lambda: tokenizer.load(path))
        if loaded is not None:
            assert loaded.decode(loaded.encode("def f(x):\n\tÅ")) == "def f(x):\n\tÅ"
            assert max(loaded.encode("abc abc")) < loaded.vocab_size == len(loaded.token_bytes)

    fuzz(request, "tokenizer bytes", st.tuples(st.integers(0, 9).map(lambda n: n == 9), EDITS, st.booleans()), check)


# --- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_run(corpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "draw_run", lambda *_: [])
        train.main(small_config(corpus, folder, n_layer=1, n_embd=8, block_size=8, batch_size=2, max_steps=2))
    return folder


@pytest.fixture
def use_checkpoint(small_run, corpus, tmp_path):
    """Do what --resume and eval.py do with ckpt_last.pt in tmp_path."""
    path, dataset = tmp_path / checkpoint.LAST, Dataset(corpus)
    shutil.copy(small_run / "tokenizer.model", tmp_path)
    saved = from_dict(checkpoint.read(small_run / checkpoint.LAST)["config"])
    config = dataclasses.replace(saved, resume=True)
    with ExitStack() as at_exit:
        trainer = train.Trainer(
            dataclasses.replace(saved, out=str(tmp_path / "another"), overwrite=True), train.ALONE, at_exit
        )
    rng = torch.get_rng_state()

    def resume():
        state, found = checkpoint.read_to_resume(tmp_path, print)
        changed_settings(state, config, dataset, None, found)
        model = GPT(config)
        checkpoint.load_weights(model, state, found)
        trainer.scaler = torch.amp.GradScaler("cpu", enabled=True)
        trainer.load_state(state, found)
        for optimizer in trainer.optimizers:
            for p in (p for group in optimizer.param_groups for p in group["params"]):
                p.grad = torch.zeros_like(p)
            optimizer.step()

    def use():
        outcome(path, resume)
        torch.set_rng_state(rng)
        loaded = outcome(tmp_path, lambda: checkpoint.load(tmp_path))
        if loaded:
            loaded[0](torch.zeros(1, 3, dtype=torch.int64))

    return path, use


@share
def test_checkpoint_bytes(share, request, small_run, use_checkpoint):
    path, use = use_checkpoint
    whole = (small_run / checkpoint.LAST).read_bytes()
    pickled = whole.index(b"data.pkl"), whole.index(b"data/0")
    directory = whole.index(b"PK\1\2")

    def check(case):
        edits, where = case
        start, stop = {"all": (0, len(whole)), "pickle": pickled, "directory": (directory, len(whole))}[where]
        content = whole[:start] + edited(whole[start:stop], edits) + whole[stop:]
        put(path, content)
        use()

    fuzz(request, "checkpoint bytes", st.tuples(EDITS, st.sampled_from(["all", "pickle", "directory"])), check)


class Trap:
    """The code that a pickle would run."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def tensors() -> st.SearchStrategy:
    huge = torch.zeros(1).expand(1 << 40)
    return st.sampled_from(
        [
            torch.zeros(()),
            torch.zeros(0),
            torch.zeros(3),
            torch.full((8,), math.nan),
            torch.zeros(8, dtype=torch.int64),
            torch.zeros(257, 8).bool(),
            torch.zeros(257, 8).to(torch.complex64),
            torch.zeros(257, 8).half(),
            torch.zeros(257, 8).to_sparse(),
            torch.zeros(8, 257).T,
            torch.zeros(257, 1).expand(257, 8),
            huge,
            torch.empty(257, 8, device="meta"),
            torch.zeros(5056, dtype=torch.uint8),
            torch.nn.Parameter(torch.zeros(257, 8)),
            torch.zeros(1, 8).int(),
        ]
    )


@share
def test_checkpoint_values(share, request, small_run, use_checkpoint, tmp_path):
    path, use = use_checkpoint
    state = checkpoint.read(small_run / checkpoint.LAST)
    state["model"] = dict(state["model"])
    trap = Trap(tmp_path / "sprung")
    odd = ODD | tensors() | st.just(trap) | st.just((1, "x")) | st.just({1: 2})
    changes = st.lists(st.tuples(st.sampled_from(["set", "remove", "add"]), POSITION, odd), min_size=1, max_size=3)

    def check(case):
        changes, broad = case
        if broad:  # the entries of the state itself and of the config, which the many tensors would otherwise hide
            tree = {**state, "config": changed(state["config"], changes[1:])}
            top = changes[0]
            key = list(tree)[top[1] % len(tree)]
            tree = (
                {**tree, key: top[2]}
                if top[0] == "set"
                else {k: v for k, v in tree.items() if top[0] == "add" or k != key}
            )
        else:
            tree = changed(state, changes)
        path.unlink(missing_ok=True)
        torch.save(tree, path)
        use()
        assert not trap.folder.exists()

    fuzz(request, "checkpoint values", st.tuples(changes, st.booleans()), check)


@share
def test_checkpoint_tensors(share, request, small_run, use_checkpoint):
    """Tensors of the right shapes on wrong storages: strides, offsets, one storage for several tensors, metadata.

    The optimiser then steps on these tensors, so that writing outside of one would crash this process.
    """
    path, use = use_checkpoint
    whole = checkpoint.read(small_run / checkpoint.LAST)
    slots = [place for place in places(whole) if isinstance(place[0][place[1]], torch.Tensor)]
    size = st.integers(0, 3)
    kinds = st.sampled_from(["zero", "transposed", "spread", "shifted", "shared", "negated", "one", "whole"])

    def strange(tensor: torch.Tensor, kind: str, n: int, pool: dict) -> torch.Tensor:
        count, shape = tensor.numel(), tensor.shape
        if kind == "zero":  # every element is the last of the storage
            return torch.zeros(max(1, count + n), dtype=tensor.dtype).as_strided(
                shape, (0,) * len(shape), max(0, count + n - 1)
            )
        if kind == "transposed" and len(shape) == 2:
            return torch.zeros(shape[::-1], dtype=tensor.dtype).T
        if kind == "spread":
            return torch.zeros([2 * n for n in shape], dtype=tensor.dtype)[(slice(None, None, 2),) * len(shape)]
        if kind == "shifted":
            return torch.zeros(count + n, dtype=tensor.dtype)[n:].view(shape)
        if kind == "shared":  # with others of that dtype, at overlapping places
            storage = pool.setdefault(tensor.dtype, torch.zeros(5000, dtype=tensor.dtype))
            return storage[n : n + count].view(shape) if count + n <= len(storage) else tensor
        if kind == "negated" and tensor.is_floating_point():
            return torch._neg_view(tensor.clone())
        if kind == "one":
            return torch.zeros((), dtype=tensor.dtype).expand(shape)
        return tensor.clone()

    def check(case):
        tree, pool = copy.deepcopy(whole), {}
        there = [place for place in places(tree) if isinstance(place[0][place[1]], torch.Tensor)]
        for position, kind, n in case:
            container, key = there[position % len(there)]
            container[key] = strange(container[key], kind, n, pool)
        path.unlink(missing_ok=True)
        torch.save(tree, path)
        use()

    fuzz(
        request,
        "checkpoint tensors",
        st.lists(st.tuples(POSITION, kinds, size), min_size=1, max_size=len(slots)),
        check,
    )


@share
def test_pickles(share, request, use_checkpoint, tmp_path):
    """Programs of pickle opcodes, including those used in attacks."""
    path, use = use_checkpoint
    sprung = tmp_path / "sprung"
    command = f"mkdir {sprung}".encode()
    parts = st.sampled_from(
        [
            b"cos\nsystem\n",
            b"cposix\nsystem\n",
            b"cbuiltins\neval\n",
            b"cbuiltins\ngetattr\n",
            b"ctorch\nload\n",
            b"ctorch.serialization\nload\n",
            b"ccollections\nOrderedDict\n",
            b"ctorch._utils\n_rebuild_tensor_v2\n",
            b"ctorch\nFloatStorage\n",
            b"ctorch\nsave\n",
            b"c__main__\n__dict__\n",
            b"cminidisp.checkpoint\n_TENSOR\n",
            b"X" + struct.pack("<I", len(command)) + command,
            b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x08tQ",
            b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu"
            b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7ftQ",
            b"K\0",
            b"K\x08",
            b"\x8a\x08\0\0\0\0\0\0\0\x10",
            b"G\x7f\xf0\0\0\0\0\0\0",
            b"(",
            b"t",
            b"\x85",
            b"\x86",
            b"\x87",
            b")",
            b"]",
            b"}",
            b"R",
            b"b",
            b"\x81",
            b"\x92",
            b"o",
            b"ios\nsystem\n",
            b"s",
            b"u",
            b"a",
            b"e",
            b"0",
            b"1",
            b"2",
            b"Q",
            b"Px\n",
            b"N",
            b"\x88",
            b"\x89",
            b"h\0",
            b"q\0",
            b"\x94",
            b"r\xff\xff\xff\x7f",
            b"j\xff\xff\xff\x7f",
            b"\x82\x01",
            b"\x93",
            b"X\x02\0\0\0os",
            b"X\x06\0\0\0system",
            b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f",
            b"\x8d\xff\xff\xff\xff\0\0\0\0",
            b"\x95\0\0\0\0\0\1\0\0",
            b"X\x05\0\0\0model",
            b"X\x06\0\0\0config",
            b"X\x04\0\0\0step",
            b"\x80\x04",
            b"\x8f",
            b"\x90",
            b"\x91",
            b"I9" + b"9" * 5000 + b"\n",
            b".",
        ]
    )

    def check(case):
        program, good_head = case
        head = b"\x80\x02}q\0(X\x05\0\0\0model}X\x06\0\0\0config}X\x04\0\0\0stepK\0" if good_head else b"\x80\x02"
        path.unlink(missing_ok=True)
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", head + b"".join(program) + (b"u." if good_head else b"."))
            archive.writestr("archive/data/0", bytes(32))
            archive.writestr("archive/version", b"3\n")
            archive.writestr("archive/byteorder", b"little")
        use()
        assert not sprung.exists()

    fuzz(request, "pickles", st.tuples(st.lists(parts, max_size=12), st.booleans()), check)


def zip_of(path: Path, changes: dict[str, bytes], source: Path, compression: int = zipfile.ZIP_STORED) -> None:
    """Copy a checkpoint with some of its records replaced."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w", compression) as new:
        for name in old.namelist():
            short = name.split("/", 1)[1]
            new.writestr(name, changes.get(short, old.read(name)))


def test_content_not_allowed_in_a_checkpoint(small_run, tmp_path):
    source, path = small_run / checkpoint.LAST, tmp_path / "x.pt"
    zip_of(path, {}, source)
    assert checkpoint.read(path)["step"] == 2  # the unmodified copy is fine
    with zipfile.ZipFile(source) as archive:
        program = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
        size = archive.getinfo(next(name for name in archive.namelist() if name.endswith("data/0"))).file_size
    refused = {
        "is larger than|does not have the stated size": {
            "data.pkl": program.replace(b"K\x08\x85", b"J\0\0\0\x7f\x85", 1)
        },
        "asks for os.system": {"data.pkl": b"\x80\x02cos\nsystem\nX\x02\0\0\0ls\x85R."},
        "does not have the stated size": {"data/0": bytes(size + 4)},
        "is too long": {"data.pkl": b"\x80\x02" + b"}" * (1 << 24)},
    }
    for reason, changes in refused.items():
        zip_of(path, changes, source)
        with pytest.raises(InputError, match=rf"x\.pt is not .*({reason})"):
            checkpoint.read(path)
    zip_of(path, {"data/0": bytes(size)}, source, zipfile.ZIP_DEFLATED)
    with pytest.raises(InputError, match=r"x\.pt is not .*compressed"):
        checkpoint.read(path)
    content = bytearray(source.read_bytes())
    content[content.index(b"data/0") + 200] ^= 4  # in a weight: torch.load would not notice
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"x\.pt is not .*checksum"):
        checkpoint.read(path)
    path.unlink()
    os.mkfifo(path)  # would block
    with pytest.raises(InputError, match=r"x\.pt is not a file"):
        checkpoint.read(path)


ABSURD = [
    {"n_layer": 10**9},
    {"n_layer": 10**400},
    {"n_embd": 2**20, "n_head": 2**10},
    {"n_layer": 10_000},
    {"n_layer": 60, "n_embd": 2**14},
    {"arch": "qwen3", "block_size": 2**24, "head_dim": 128},
    {"mlp_dim": 2**24, "n_embd": 2**16},
]
BEYOND_THE_FILE = [{"n_layer": 1000}, {"vocab_size": 2**31 - 1}, {"mlp_dim": 2**24}, {"block_size": 2**20}]


@pytest.mark.parametrize("sizes", ABSURD + BEYOND_THE_FILE)
def test_absurd_sizes_are_refused_before_they_take_memory(small_run, corpus, tmp_path, capsys, sizes):
    state = checkpoint.read(small_run / checkpoint.LAST)
    state["config"] |= sizes
    torch.save(state, tmp_path / "x.pt")
    shutil.copy(small_run / "tokenizer.model", tmp_path)
    with pytest.raises(InputError, match=r"x\.pt"):
        checkpoint.load(tmp_path / "x.pt")
    if sizes in ABSURD:
        config = {**state["config"], "data": str(corpus)}
        (tmp_path / "config.json").write_bytes(as_json(config, False))
        code = train.cli(["--config", str(tmp_path / "config.json"), "--out", str(tmp_path / "run")])
        error = capsys.readouterr().err
        assert (code, error.count("\n")) == (2, 1), error


# --- the commands ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "ckpt_last.pt", "ckpt_best.pt", "tokenizer.model"])
@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 100, b"{" * 3000, b"PK\3\4" + b"\xff" * 60, pickle.dumps({"model": 1}), b'{"step": NaN}\n', b"[1]\n"],
)
def test_the_commands_name_a_bad_file_in_one_line(small_run, tmp_path, capsys, monkeypatch, name, content):
    run = tmp_path / "run"
    shutil.copytree(small_run, run)
    (run / name).write_bytes(content)
    codes = train.cli(["--resume", "--out", str(run)]), capsys.readouterr().err
    if name in ("config.json", "metrics.jsonl", "ckpt_last.pt"):
        assert codes[0] == 2
        assert f"{run / name}" in codes[1]
        assert codes[1].count("\n") == 1
    else:  # the best model and the tokenizer are rewritten
        assert codes == (0, "")
    shutil.copytree(small_run, run, dirs_exist_ok=True)
    (run / name).write_bytes(content)
    if name in ("ckpt_best.pt", "tokenizer.model"):
        assert eval_command.cli([str(run)]) == 2
        error = capsys.readouterr().err
        assert f"{run / name}" in error
        assert error.count("\n") == 1
