"""Checkpoints and JSON files: written atomically, and read exactly or rejected."""

import errno
import io
import json
import math
import os
import shutil
import struct
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

import eval as eval_command
import train
from minidisp import InputError, report
from minidisp.optim import Muon
from minidisp.report import figures
from minidisp.runtime import checkpoint, files
from minidisp.tokenizer import ByteTokenizer
from tests.conftest import small_config, small_flags


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "file"
    files.write_atomic(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"half of the new")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        files.write_atomic(path, fail)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_json_has_no_nan(tmp_path):
    files.write_json(tmp_path / "x.json", {"a": [1.5, math.nan, {"b": (math.inf, None)}], "c": True})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [1.5, None, {"b": [None, None]}], "c": True}


def test_saving_keeps_the_newest(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, {"step": step, "model": {}, "config": {}}, step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt_00000002.pt", "ckpt_00000003.pt", "ckpt_last.pt"]
    assert checkpoint.read(tmp_path / "ckpt_last.pt")["step"] == 3


@pytest.mark.parametrize("state", [{"step": 1}, [1, 2], torch.zeros(2)])
def test_a_foreign_torch_file_is_refused(tmp_path, state):
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(InputError, match=r"x\.pt"):
        checkpoint.read(tmp_path / "x.pt")


@pytest.mark.parametrize("config", [{"n_layer": "many"}, {"surprise": 1}, 3])
def test_a_checkpoint_with_a_wrong_config_is_refused(tmp_path, config):
    torch.save({"model": {}, "config": config, "step": 0}, tmp_path / "x.pt")
    with pytest.raises(InputError, match=r"x\.pt"):
        checkpoint.load(tmp_path / "x.pt")


def test_weights_that_do_not_fit_are_refused(run, tmp_path):
    state = checkpoint.read(run / checkpoint.LAST)
    state["model"]["wte.weight"] = torch.zeros(3, 3)
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(InputError, match=r"x\.pt does not fit"):
        checkpoint.load(tmp_path / "x.pt")


def test_folders_without_a_checkpoint_are_named(tmp_path):
    with pytest.raises(InputError, match="holds no checkpoint"):
        checkpoint.find(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        checkpoint.find(tmp_path / "missing")


# --- what a checkpoint may not hold -----------------------------------------------------------------------------------


def minimal(**more) -> dict:
    return {"model": {"w": torch.arange(6.0).view(2, 3)}, "config": {}, "step": 1, **more}


def saved(path: Path, **more) -> Path:
    torch.save(minimal(**more), path)
    return path


def test_our_reader_reads_torch_checkpoints(tmp_path):
    dtypes = [
        torch.float32,
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    ]
    tensors = [torch.tensor([[0, 1, 2], [3, 4, 5]]).to(dtype) for dtype in dtypes]
    tree = {
        "t": [*tensors, torch.zeros(0, 3), torch.tensor(2.5), torch.zeros(1, 1, 1)],
        "k": (1, -(10**40), 1e-300, math.inf, None, True, "\u20ac"),
    }
    tied = torch.ones(3)
    model = OrderedDict(a=tied, b=tied.view(3), c=torch.arange(10.0)[2:5])
    model._metadata = {"": {"version": 1}}  # as state_dict() has it
    state = checkpoint.read(saved(tmp_path / "x.pt", tree=tree, model=model))
    theirs = torch.load(tmp_path / "x.pt", weights_only=True)
    assert state["tree"]["k"] == tree["k"]
    for mine, other, original in zip(state["tree"]["t"], theirs["tree"]["t"], tree["t"], strict=True):
        assert mine.dtype == other.dtype == original.dtype
        assert mine.shape == other.shape
        assert torch.equal(mine, other)
        assert torch.equal(mine, original)
    assert state["model"]["a"] is state["model"]["b"]  # tied weights stay tied
    assert torch.equal(state["model"]["c"], torch.tensor([2.0, 3.0, 4.0]))


@pytest.mark.parametrize(
    ("strange", "reason"),
    [
        (lambda: torch.zeros(17).as_strided((3, 3), (0, 0), 8), "not contiguous"),
        (lambda: torch.zeros(3, 3).T, "not contiguous"),
        (lambda: torch.zeros(18)[::2], "not contiguous"),
        (lambda: torch.zeros(1).expand(1 << 40), "larger than its storage"),
        (lambda: [torch.zeros(9)] and list(torch.zeros(10).unfold(0, 9, 1).unbind()), "overlap"),
        (lambda: [t := torch.zeros(9), t.view(3, 3)], "overlap"),
        (lambda: torch._neg_view(torch.ones(3)), "not in the form that torch.save writes"),
        (lambda: torch.nn.Parameter(torch.zeros(3)), "asks for torch._utils._rebuild_parameter"),
        (lambda: torch.zeros(3).to_sparse(), "asks for"),
        (lambda: np.float64(1), "asks for"),
    ],
)
def test_unusual_tensors_are_rejected(tmp_path, strange, reason):
    path = saved(tmp_path / "x.pt", extra=strange())
    with pytest.raises(InputError, match=rf"x\.pt is not .*{reason}"):
        checkpoint.read(path)


def test_ambiguous_files_are_rejected_or_read_as_inspected(tmp_path):
    """A file that is valid in two formats is rejected, or the part that was inspected is the part that is loaded."""
    path, content = tmp_path / "x.pt", saved(tmp_path / "honest.pt").read_bytes()
    legacy = io.BytesIO()
    torch.save(minimal(model={"w": torch.zeros(1000)}), legacy, _use_new_zipfile_serialization=False)
    other = saved(tmp_path / "other.pt", step=2).read_bytes()
    for before in (legacy.getvalue(), b"#!/bin/sh\n", other, b"PK\3\4" + bytes(60)):
        path.write_bytes(before + content)
        with pytest.raises(InputError, match=r"x\.pt is not .*start"):
            checkpoint.read(path)
    # One end record with the offset of the other directory: readers disagree which of the two it means.
    end = content.rindex(b"PK\5\6")
    first = content.index(b"PK\1\2")
    twice = content[:first] + content[first:end] * 2 + content[end:]
    path.write_bytes(twice)
    with pytest.raises(InputError, match=r"x\.pt is not .*its first entry is not at the start"):
        checkpoint.read(path)


def test_tensors_on_one_storage_are_never_more_than_the_file(run, tmp_path, capsys):
    """A small file that describes a large model: every layer is the same few numbers."""
    state = torch.load(run / checkpoint.LAST, weights_only=True)
    layers = 400
    for name in [name for name in state["model"] if name.startswith("h.0.")]:
        for layer in range(layers):
            state["model"][name.replace("h.0.", f"h.{layer}.")] = state["model"][name]
    state["config"]["n_layer"] = layers
    folder = tmp_path / "bomb"
    shutil.copytree(run, folder)
    for name in (checkpoint.LAST, checkpoint.BEST):
        torch.save(state, folder / name)
    described = sum(tensor.nbytes for tensor in state["model"].values())
    assert described > 20 * (folder / checkpoint.BEST).stat().st_size
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "n_layer": layers}))
    flags = ["--data", config["data"], "--out", str(tmp_path / "new")]
    for code in (
        lambda: eval_command.cli([str(folder)]),
        lambda: train.cli([*small_flags(), *flags, "--distill", str(folder)]),
        lambda: train.cli([*small_flags(n_layer=layers), *flags, "--init-from", str(folder)]),
        lambda: train.cli(["--resume", "--out", str(folder)]),
    ):
        assert code() == 2
        error = capsys.readouterr().err
        assert "does not fit the model that its config describes" in error
        assert error.count("\n") == 1


def test_a_context_far_beyond_the_weights_takes_no_memory(tmp_path):
    """Its rotary tables would be 2 GiB, and only the part that is read is computed; too many layers are rejected."""
    from minidisp.config import from_dict, to_dict
    from minidisp.model import GPT

    config = from_dict(
        {"arch": "qwen3", "n_layer": 1, "n_head": 1, "n_embd": 8, "head_dim": 256, "block_size": 64, "vocab_size": 257}
    )
    state = {"model": GPT(config).state_dict(), "config": {**to_dict(config), "block_size": 1 << 20}, "step": 1}
    torch.save(state, tmp_path / "x.pt")
    ByteTokenizer().save(tmp_path / "tokenizer.model")
    model, _ = checkpoint.load(tmp_path / "x.pt")
    assert sum(buffer.nbytes for buffer in model.buffers()) < 1 << 26
    state["config"]["n_layer"] = 1000
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(InputError, match=r"x\.pt does not fit the model that its config describes, 1000 layers"):
        checkpoint.load(tmp_path / "x.pt")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_what_an_optimiser_resumes_from_is_its_own(corpus, run, tmp_path, optimizer):
    """No state shares memory with another one or with the dictionary that was read, since steps modify it."""
    config = small_config(corpus, tmp_path / "new", optimizer=optimizer)
    with train.ExitStack() as at_exit:
        trainer = train.Trainer(config, train.ALONE, at_exit)
    for optimizer in trainer.optimizers:
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            p.grad = torch.ones_like(p)
        optimizer.step()
        saved = optimizer.state_dict()
        (pairs := {}).update({(n, v.shape): v for s in saved["state"].values() for n, v in s.items()})
        for values in saved["state"].values():  # one tensor for all states of a shape
            values.update({name: pairs[name, value.shape] for name, value in values.items()})
        checkpoint.load_optimizer(optimizer, saved, tmp_path / "x.pt")
        states = [v for s in optimizer.state.values() for v in s.values()]
        assert len({v.data_ptr() for v in states}) == len(states)
        assert all(v.is_contiguous() for v in states)
        assert not {v.data_ptr() for v in states} & {v.data_ptr() for v in pairs.values()}
        assert not isinstance(optimizer, Muon) or "momentum_buffer" in {n for s in optimizer.state.values() for n in s}


# --- the state of generators and of the gradient scale ----------------------------------------------------------------


def test_the_state_of_a_generator_is_checked_beyond_what_torch_checks():
    generator = torch.Generator()
    generator.manual_seed(5)
    for draws in range(1300):  # two passes through its table
        state = generator.get_state()
        assert checkpoint.is_generator_state(state), draws
        torch.rand(1, generator=generator)
    torch.randn(7, generator=generator)
    assert checkpoint.is_generator_state(generator.get_state())

    def with_fields(left: int, seeded: int, next_one: int) -> torch.Tensor:
        content = bytearray(state.numpy().tobytes())
        struct.pack_into("=iiQ", content, 8, left, seeded, next_one)
        return torch.frombuffer(content, dtype=torch.uint8)

    assert checkpoint.is_generator_state(with_fields(5, 1, 620))
    for fields in [
        (624, 1, 624),
        (1, 1, 1),
        (2, 1, 624),
        (624, 1, 0),
        (0, 1, 625),
        (-1, 1, 626),
        (5, 0, 620),
        (5, 1, 2**60),
        (625, 1, 0),
    ]:
        assert not checkpoint.is_generator_state(with_fields(*fields)), fields
    for other in (None, [1], state[:-1], state.float(), state.view(2, -1)[0], torch.zeros(5056, dtype=torch.uint8)):
        assert not checkpoint.is_generator_state(other)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("seconds", 1e300, "seconds"),
        ("seconds", -1.0, "seconds"),
        ("best_val_loss", math.nan, "best_val_loss"),
        ("rng", {"cpu": torch.zeros(5056, dtype=torch.uint8)}, "random number"),
        ("rng_of_others", [{"cpu": 1}], "random number"),
        ("rng_of_others", {"cpu": 1}, "random number"),
        ("scaler", {"scale": "x", "_growth_tracker": 0}, "gradient scale"),
        ("scaler", {"scale": 1e300, "_growth_tracker": 0}, "gradient scale"),
        ("scaler", {"scale": 2.0, "_growth_tracker": 1 << 70}, "gradient scale"),
        ("scaler", {"scale": 2.0}, "_growth_tracker"),
        ("logged", "x", "logged"),
        ("logged", 10**9, "logged"),
    ],
)
def test_values_of_the_wrong_type_are_reported_in_one_line(
    corpus, run, tmp_path, capsys, monkeypatch, key, value, reason
):
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / checkpoint.LAST
    torch.save({**checkpoint.read(path), key: value}, path)
    if key == "scaler":  # used with float16 only
        monkeypatch.setattr(train.torch.amp, "GradScaler", lambda *_, enabled: torch.amp.grad_scaler.GradScaler("cpu"))
    assert train.cli(["--resume", "--out", str(tmp_path / "run"), "--max-steps", "14"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(path) in error
    assert reason in error


# --- saving -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        np.float32(1),
        np.zeros(2),
        Path("x"),
        Counter("ab"),
        {1, 2},
        b"bytes",
        torch.float32,
        torch.zeros(2).to_sparse(),
        torch.zeros(2, dtype=torch.complex64),
        torch.Size([2]),
        1j,
        torch.zeros(2, device="meta"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_could_not_be_read_back_is_not_written(tmp_path, value):
    checkpoint.save(tmp_path, minimal(), 1, keep=0)
    before = (tmp_path / checkpoint.LAST).read_bytes()
    with pytest.raises(InputError, match=r"state\['optimizers'\]\[1\]\['note'\] is a"):
        checkpoint.save(tmp_path, minimal(optimizers=[{}, {"note": value}]), 2, keep=0)
    with pytest.raises(InputError, match=r"a key of the checkpoint's state is a numpy\.int64"):
        checkpoint.save(tmp_path, minimal() | {np.int64(3): 1}, 2, keep=0)
    assert (tmp_path / checkpoint.LAST).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.LAST]


def test_a_state_with_a_numpy_number_ends_a_training_with_its_key(corpus, tmp_path, capsys, monkeypatch):
    state = train.Trainer.state
    monkeypatch.setattr(train.Trainer, "state", lambda self: {**state(self), "best": {"at": np.int64(3)}})
    assert train.cli([*small_flags(max_steps=1), "--data", str(corpus), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "['best']['at'] is a numpy.int64" in error
    assert error.count("\n") == 1


def test_views_and_transposed_tensors_are_saved_contiguously(tmp_path):
    big = torch.arange(1000.0)
    views = [big[10:16], big[:6].view(2, 3).T, torch.ones(1).expand(3), torch.nn.Parameter(big[:2])]
    state = minimal(views=views, pair=(*views, big[8:16]))  # big[8:16] overlaps with the first
    checkpoint.save(tmp_path, checkpoint.gathered(state), 1, keep=0)
    assert (tmp_path / checkpoint.LAST).stat().st_size < 4000
    found = checkpoint.read(tmp_path / checkpoint.LAST)
    assert type(found["pair"]) is tuple
    for mine, view in zip([*found["views"], *found["pair"]], [*state["views"], *state["pair"]], strict=True):
        assert torch.equal(mine, view)


# --- links and folders that cannot be flushed -------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_that_cannot_flush_folders_is_fine(tmp_path, monkeypatch, number):
    fsync, flushed = os.fsync, []

    def no_folders(descriptor):
        flushed.append(Path(f"/proc/self/fd/{descriptor}").is_dir())
        if flushed[-1]:
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", no_folders)
    files.write_json(tmp_path / "x.json", {"a": 1})
    assert (tmp_path / "x.json").read_text() == '{\n  "a": 1\n}\n'
    assert flushed == [False, True]


@pytest.mark.parametrize(("of_folder", "number"), [(True, errno.EIO), (True, errno.ENOSPC), (False, errno.EINVAL)])
def test_other_failures_to_flush_are_errors(tmp_path, monkeypatch, of_folder, number):
    fsync = os.fsync

    def fail(descriptor):
        if Path(f"/proc/self/fd/{descriptor}").is_dir() == of_folder:
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=os.strerror(number)):
        files.write_json(tmp_path / "x.json", {"a": 1})


def test_links_are_replaced_and_never_followed(tmp_path):
    for name in ("r.json", "r.json.tmp"):
        victim = tmp_path / f"victim of {name}"
        victim.write_text("precious")
        (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / name).symlink_to(victim)
        files.write_json(tmp_path / "r.json", [1])
        assert victim.read_text() == "precious"
        assert not (tmp_path / "r.json").is_symlink()
    (tmp_path / "r.json.tmp").symlink_to(tmp_path / "nowhere")
    files.write_json(tmp_path / "r.json", [2])
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("flag", ["--resume", "--overwrite"])
@pytest.mark.parametrize("name", ["metrics.jsonl", "figures", "tensorboard", "wandb"])
@pytest.mark.parametrize("there", [True, False])
def test_a_link_among_the_files_of_a_run_is_refused(corpus, run, tmp_path, capsys, flag, name, there):
    folder, outside = tmp_path / "run", tmp_path / "outside"
    shutil.copytree(run, folder)
    outside.mkdir()
    target = outside / "target"
    if there and name == "metrics.jsonl":
        shutil.copy(folder / name, target)
    elif there:
        target.mkdir()
        for inner in ("loss.png", "loss.png.tmp", "events.out.tfevents.1"):
            (target / inner).write_text("precious")
    shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(target)
    before = {p: p.read_bytes() for p in outside.rglob("*") if p.is_file()}
    assert (
        train.cli(
            [*small_flags(max_steps=13), "--data", str(corpus), "--dispersion", "0.1", "--out", str(folder), flag]
        )
        == 2
    )
    error = capsys.readouterr().err
    assert f"{folder / name} is a link" in error
    assert error.count("\n") == 1
    assert {p: p.read_bytes() for p in outside.rglob("*") if p.is_file()} == before
    assert (folder / checkpoint.LAST).read_bytes() == (run / checkpoint.LAST).read_bytes()


def test_links_next_to_the_files_of_a_run_are_replaced(corpus, run, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "draw_run", figures.draw_run)  # figures are among them
    folder, victim = tmp_path / "run", tmp_path / "victim"
    shutil.copytree(run, folder)
    victim.write_text("precious")
    for name in (
        "figures/loss.png.tmp",
        "figures/cosine.png",
        "summary.json",
        "summary.json.tmp",
        "ckpt_last.pt.tmp",
        "tokenizer.model.tmp",
    ):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(victim)
    config = small_config(corpus, folder, dispersion=0.1, resume=True, max_steps=13)
    train.main(config)
    assert victim.read_text() == "precious"
    assert not any(path.is_symlink() for path in folder.rglob("*"))


def test_a_hard_link_elsewhere_keeps_its_content(tmp_path):
    """As in hard-link backups: a run appends to its metrics and truncates them in place."""
    path, backup = tmp_path / "metrics.jsonl", tmp_path / "backup"
    path.write_text("one\n")
    os.link(path, backup)
    with files.open_log(path, print) as file:
        files.append_line(file, "two")
        assert files.is_still(file)
        with pytest.raises(InputError, match="in use"):
            files.open_log(path, print)
    assert (path.read_text(), backup.read_text()) == ("one\ntwo\n", "one\n")


def test_a_pipe_instead_of_metrics_is_rejected(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(InputError, match="not a regular file"):
        files.open_log(tmp_path / "metrics.jsonl", print)


def test_a_zip_with_overlapping_entries_is_rejected(tmp_path):
    """Overlapping entries would describe more data than the file contains."""
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}.")
        archive.writestr("a/data/0", bytes(1000))
        for index in range(50):
            info = zipfile.ZipInfo(f"a/data/{index + 1}")
            info.file_size = info.compress_size = 1000
            info.CRC, info.header_offset = archive.getinfo("a/data/0").CRC, archive.getinfo("a/data/0").header_offset
            archive.filelist.append(info)
            archive.NameToInfo[info.filename] = info
        archive._didModify = True
    with pytest.raises(InputError, match="larger than the file"):
        checkpoint.read(path)
