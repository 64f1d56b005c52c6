"""Checkpoints and JSON files: whole or not at all."""

import json
import math

import pytest
import torch

from minidisp import InputError
from minidisp.runtime import checkpoint, files


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
