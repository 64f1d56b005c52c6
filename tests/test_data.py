"""Shards, the checks on opening a corpus, and which tokens a training step sees."""

import doctest
import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import minidisp.data
from minidisp import InputError
from minidisp.data import Batches, Dataset, eval_windows, strided_windows
from minidisp.shards import FORMAT, HEADER, SPLITS, ShardWriter, files_state, open_shard
from minidisp.tokenizer import ByteTokenizer

SHARD_TOKENS = 50


def write_corpus(folder: Path, tokens: int = 333, vocab_size: int = 257) -> np.ndarray:
    """A corpus whose training split is the tokens returned, in shards of 50; val and test have a few more."""
    ids = np.random.default_rng(0).integers(0, vocab_size, tokens)
    splits = {}
    for name in SPLITS:
        with ShardWriter(folder, name, vocab_size, SHARD_TOKENS) as writer:
            for start in range(0, tokens, 7):
                writer.write(ids[start : start + 7].tolist())
            if name != "train":
                writer.write([1, 2, 3])
        total = sum(shard["tokens"] for shard in writer.shards)
        splits[name] = {"documents": 1, "tokens": total, "bytes": total, "words": 9, "shards": writer.shards}
    tokenizer = ByteTokenizer()
    tokenizer.save(folder / "tokenizer.model")
    meta = {"format": FORMAT, "name": "test", "source": "numbers", "versions": {}, "options": {}, "splits": splits}
    meta |= {"vocab_size": 257, "tokenizer_sha256": tokenizer.hash}
    (folder / "meta.json").write_text(json.dumps(meta))
    return ids


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path), tmp_path


# --- shards -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("vocab_size", "itemsize"), [(257, 2), (65_536, 2), (65_537, 4)])
def test_shard_round_trip(tmp_path, vocab_size, itemsize):
    ids = [0, 1, vocab_size - 1] * 40
    with ShardWriter(tmp_path, "val", vocab_size, 50) as writer:
        writer.write(ids)
        writer.write([])
    assert [shard["file"] for shard in writer.shards] == ["val_000.bin", "val_001.bin", "val_002.bin"]
    assert [shard["tokens"] for shard in writer.shards] == [50, 50, 20]
    shards = [open_shard(tmp_path / shard["file"]) for shard in writer.shards]
    assert np.concatenate([shard[:] for shard in shards]).tolist() == ids
    assert shards[0].dtype.itemsize == itemsize
    for shard in writer.shards:
        content = (tmp_path / shard["file"]).read_bytes()
        assert len(content) == HEADER.size + itemsize * shard["tokens"]
        assert hashlib.sha256(content).hexdigest() == shard["sha256"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [shard["file"] for shard in writer.shards]


def test_shard_header_is_as_documented(tmp_path):
    with ShardWriter(tmp_path, "train", 257, 50) as writer:
        writer.write([256, 3])
    header = b"minidisp" + b"\1\0\0\0" + b"\2\0\0\0" + b"\2" + bytes(7)
    assert (tmp_path / "train_000.bin").read_bytes() == header.ljust(64, b"\0") + b"\0\1\3\0"


def test_interrupted_writer_leaves_whole_shards_only(tmp_path):
    def write():
        with ShardWriter(tmp_path, "train", 257, 50) as writer:
            writer.write([1] * 70)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert [path.name for path in tmp_path.iterdir()] == ["train_000.bin"]
    assert len(open_shard(tmp_path / "train_000.bin")) == 50


@pytest.mark.parametrize("bad", [65_536 + 3, 257, -1])
def test_writer_refuses_ids_outside_the_vocabulary(tmp_path, bad):
    with pytest.raises(ValueError, match="vocabulary of 257"), ShardWriter(tmp_path, "train", 257, 50) as writer:
        writer.write([1, bad])


def test_bad_shards_are_refused_by_name(tmp_path):
    with ShardWriter(tmp_path, "train", 257, 50) as writer:
        writer.write([1] * 20)
    path = tmp_path / "train_000.bin"
    whole = path.read_bytes()
    bad = {
        "is not a token shard": [b"", whole[:63], b"x" + whole[1:], b"text " * 50],
        "version 2": [whole[:8] + b"\2" + whole[9:]],
        "prepare the corpus again": [whole[:12] + b"\3" + whole[13:]],
        "truncated or damaged": [whole[:-1], whole + b"\0", whole[:64], whole[:16] + bytes(8) + whole[24:64]],
        "1,000,000,020": [whole[:16] + (1_000_000_020).to_bytes(8, "little") + whole[24:]],
    }
    for message, contents in bad.items():
        for content in contents:
            path.write_bytes(content)
            with pytest.raises(InputError, match=rf"train_000\.bin.*{message}"):
                open_shard(path)
    with pytest.raises(InputError, match=r"nowhere\.bin: No such file"):
        open_shard(tmp_path / "nowhere.bin")


def test_a_shard_that_changes_under_a_reader_is_reported(tmp_path):
    write_corpus(tmp_path)
    split = Dataset(tmp_path).split("train")
    path = tmp_path / "train_002.bin"
    assert len(split.slice(100, 150)) == 50
    os.truncate(path, 100)  # reading a mapped file would kill the process with SIGBUS
    assert len(split.slice(100, 110)) == 10
    with pytest.raises(InputError, match=r"train_002\.bin was truncated"):
        split.slice(60, 150)
    replaced = tmp_path / "train_003.bin"
    content = replaced.read_bytes()
    replaced.rename(tmp_path / "old")
    with pytest.raises(InputError, match=r"train_003\.bin: No such file"):
        split.slice(150, 160)
    (tmp_path / "other").write_bytes(content)
    os.replace(tmp_path / "other", replaced)
    with pytest.raises(InputError, match=r"train_003\.bin was replaced"):
        split.slice(150, 160)


def test_files_are_opened_when_they_are_read_and_only_few_are_open(tmp_path, monkeypatch):
    write_corpus(tmp_path, tokens=5000)
    split, descriptors = Dataset(tmp_path).split("train"), Path("/proc/self/fd")
    if descriptors.exists():
        before = len([*descriptors.iterdir()])
    assert len(split.slice(0, 5000)) == 5000
    if descriptors.exists():
        assert len([*descriptors.iterdir()]) <= before + 32

    def full(*arguments):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(InputError, match=r"train_000\.bin: Too many open files; .*ulimit -n"):
        split.slice(0, 10)


def test_writing_to_a_shard_changes_the_state_of_the_files(tmp_path):
    write_corpus(tmp_path)
    before = files_state(tmp_path)
    assert before == files_state(tmp_path)
    path = tmp_path / "val_001.bin"
    content = path.read_bytes()
    path.write_bytes(content[:64] + content[:63:-1])
    os.utime(path, ns=(0, 1))
    assert files_state(tmp_path) != before
    with pytest.raises(InputError, match=r"val_001\.bin has changed"):
        Dataset(tmp_path).verify()


# --- corpora ----------------------------------------------------------------------------------------------------------


def test_slices_cross_shards(corpus):
    ids, folder = corpus
    split = Dataset(folder).split("train")
    assert (split.tokens, split.documents, split.bytes, split.words) == (333, 1, 333, 9)
    for start, stop in [(0, 333), (0, 0), (333, 333), (49, 51), (50, 100), (50, 50), (99, 301), (332, 333)]:
        tokens = split.slice(start, stop)
        assert tokens.dtype == np.int64
        assert tokens.tolist() == ids[start:stop].tolist()
    for start, stop in [(-1, 3), (0, 334), (5, 4)]:
        with pytest.raises(IndexError):
            split.slice(start, stop)


def test_dataset_matches_its_files(corpus):
    _, folder = corpus
    dataset = Dataset(str(folder))
    assert dataset.folder == folder
    assert dataset.tokenizer.vocab_size == 257
    assert dataset.meta["name"] == "test"
    assert dataset.split("val").tokens == 336
    dataset.verify()
    with pytest.raises(InputError, match="no split 'dev'"):
        dataset.split("dev")


def test_hash_identifies_the_data(tmp_path):
    hashes = []
    for name, tokens in (("a", 333), ("b", 333), ("c", 334)):
        (tmp_path / name).mkdir()
        write_corpus(tmp_path / name, tokens)
        hashes.append(Dataset(tmp_path / name).hash)
    assert hashes[0] == hashes[1] != hashes[2]


def test_verify_finds_a_changed_token(corpus):
    _, folder = corpus
    path = folder / "val_002.bin"
    content = bytearray(path.read_bytes())
    content[80] ^= 1
    path.write_bytes(content)
    dataset = Dataset(folder)  # header and size are unchanged
    with pytest.raises(InputError, match=r"val_002\.bin has changed"):
        dataset.verify()


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (["format"], 2, "format 1"),
        (["name"], 3, "corpus name"),
        (["vocab_size"], True, "corpus vocab_size"),
        (["vocab_size"], 300, "not the tokenizer"),
        (["tokenizer_sha256"], "0" * 64, "not the tokenizer"),
        (["splits"], {}, "splits are not"),
        (["splits", "val"], [], "split documents"),
        (["splits", "val", "tokens"], -1, "split tokens"),
        (["splits", "val", "tokens"], 3, "do not add up"),
        (["splits", "val", "shards"], [], "do not add up"),
        (["splits", "val", "shards", 0], "val_000.bin", "shard file"),
        (["splits", "val", "shards", 0, "file"], "../val_000.bin", "not in the same folder"),
        (["splits", "val", "shards", 0, "file"], "val_006.bin", r"val_006\.bin contains 36"),
        (["splits", "val", "shards", 0, "file"], "meta.json", "not a token shard"),
    ],
)
def test_bad_meta_is_refused(corpus, keys, value, message):
    _, folder = corpus
    meta = target = json.loads((folder / "meta.json").read_text())
    for key in keys[:-1]:
        target = target[key]
    target[keys[-1]] = value
    (folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(InputError, match=message):
        Dataset(folder)


def test_missing_or_broken_files_are_refused_by_name(corpus):
    _, folder = corpus
    for content in (b"", b"{", b"[]", b"\xff", b'{"format": 1}', b"[" * 100_000):
        (folder / "meta.json").write_bytes(content)
        with pytest.raises(InputError, match=r"meta\.json"):
            Dataset(folder)
    (folder / "meta.json").unlink()
    with pytest.raises(InputError, match="is not a prepared corpus"):
        Dataset(folder)
    with pytest.raises(InputError, match="nowhere is not a prepared corpus"):
        Dataset(folder / "nowhere")
    write_corpus(folder)
    (folder / "train_001.bin").unlink()
    with pytest.raises(InputError, match=r"train_001\.bin"):
        Dataset(folder)


# --- batches ----------------------------------------------------------------------------------------------------------


class Positions:
    """A split in which every token is its own position."""

    name = "train"

    def __init__(self, tokens):
        self.tokens = tokens

    def slice(self, start, stop):
        assert 0 <= start <= stop <= self.tokens
        return np.arange(start, stop)


def sequences(split, T, seed, first, count):
    """(starts as a list, last token to be predicted) of training sequences of Positions."""
    x, y = Batches(split, T, seed).batch(first, count)
    assert x.dtype == y.dtype == np.int64
    assert (x - x[:, :1] == np.arange(T)).all()
    assert (y == x + 1).all()
    return x[:, 0].tolist(), y.max()


def test_batches_are_tokens_of_the_split(corpus):
    ids, folder = corpus
    x, y = Batches(Dataset(folder).split("train"), 16, seed=3).batch(5, 30)
    starts, _ = sequences(Positions(333), 16, 3, 5, 30)
    assert x.shape == y.shape == (30, 16)
    for row, start in enumerate(starts):
        assert x[row].tolist() == ids[start : start + 16].tolist()
        assert y[row].tolist() == ids[start + 1 : start + 17].tolist()


@pytest.mark.parametrize("tokens", [161, 165, 176])
def test_an_epoch_visits_windows_side_by_side_once(tokens):
    T = 16
    n = (tokens - 1) // T - 1
    offsets, orders = set(), set()
    for epoch in range(30):
        starts, last = sequences(Positions(tokens), T, 7, epoch * n, n)
        ordered = sorted(starts)
        assert np.diff(ordered).tolist() == [T] * (n - 1)
        assert ordered[0] >= 0
        assert last <= tokens - 1
        offsets.add(ordered[0])
        orders.add(tuple(start - ordered[0] for start in starts))
    assert len(offsets) > 5
    assert len(orders) > 25


def test_every_offset_occurs():
    """The first and the last token of the split are also used for training."""
    tokens, T = 40, 8
    n = (tokens - 1) // T - 1
    starts, last = sequences(Positions(tokens), T, 0, 0, 400 * n)
    assert (min(starts), last) == (0, tokens - 1)


def test_batches_depend_on_seed_and_index_only():
    split = Positions(500)
    whole = Batches(split, 8, seed=1).batch(0, 200)[0]
    for count in (1, 3, 8, 50):  # different micro-batches, numbers of processes and order: the same sequences
        batches = Batches(split, 8, seed=1)
        for first in reversed(range(0, 200 - count, count)):
            assert (batches.batch(first, count)[0] == whole[first : first + count]).all()
    assert (Batches(split, 8, seed=2).batch(0, 200)[0] != whole).any()
    assert (whole[:60] != whole[61:121]).any()


def test_batches_of_a_seed_never_change():
    """A change here would change every training run: seeds would no longer reproduce old ones."""
    starts, _ = sequences(Positions(100), 8, 1337, 0, 13)  # 11 windows, then the next epoch
    assert starts == [30, 54, 78, 46, 62, 70, 22, 86, 38, 14, 6, 82, 42]


@pytest.mark.parametrize("tokens", [9, 10, 16, 17, 24])
def test_short_splits_have_one_window(tokens):
    starts, last = sequences(Positions(tokens), 8, 0, 0, 100)
    assert set(starts) == set(range(tokens - 8))
    assert last == tokens - 1


@pytest.mark.parametrize("use", [lambda split: Batches(split, 8, 0), lambda split: eval_windows(split, 8, 0)])
def test_too_short_splits_are_refused(use):
    with pytest.raises(InputError, match=r"train has 8 tokens.* takes 9: use a smaller --block-size or more text"):
        use(Positions(8))


# --- evaluation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [9, 17, 100, 101])
@pytest.mark.parametrize("n_tokens", [0, 1, 8, 31, 64, 10**9])
def test_eval_windows_are_spread_and_do_not_overlap(tokens, n_tokens):
    x, y = eval_windows(Positions(tokens), 8, n_tokens)
    most = (tokens - 1) // 8
    assert len(x) == (max(1, min(n_tokens // 8, most)) if n_tokens else most)
    assert (y == x + 1).all()
    assert y.max() <= tokens - 1
    gaps = np.diff(x[:, 0])
    assert (gaps >= 8).all()
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("n_tokens", [0, 1, 5, 8, 9, 50])
@pytest.mark.parametrize("stride", [1, 3, 4, 8])
def test_strided_windows_predict_every_token_once_with_full_context(n_tokens, stride):
    windows = list(strided_windows(n_tokens, 8, stride))
    assert [i for w in windows for i in range(w.start, w.stop)] == list(range(n_tokens))
    for i, window in enumerate(windows):
        assert 0 <= window.context_start <= window.start
        assert window.stop - window.context_start == min(8, window.stop)  # as much context as fits
        assert window.stop - window.start <= (stride if i else 8)


def test_strided_windows_side_by_side():
    assert [tuple(w) for w in strided_windows(20, 8, 8)] == [(0, 0, 8), (8, 8, 16), (12, 16, 20)]


@pytest.mark.parametrize("stride", [0, 9, -1])
def test_strides_that_skip_tokens_are_refused(stride):
    with pytest.raises(InputError, match="must be from 1 to 8"):
        list(strided_windows(20, 8, stride))


def test_examples_in_docstrings():
    assert doctest.testmod(minidisp.data).failed == 0


def test_data_does_not_import_torch():
    code = "import sys, minidisp.data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
