"""Checkpoints: written whole or not at all, loaded without running anything that is in them."""

import json
import math
import os
import pickle
import zipfile
from pathlib import Path

import torch

from minidisp import InputError, tokenizer
from minidisp.config import Config, from_dict
from minidisp.model import GPT

LAST, BEST = "ckpt_last.pt", "ckpt_best.pt"


def write_atomic(path: Path, write) -> None:
    """Call write(temporary file, open for bytes), flush it to disk, and only then give it its name."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, values) -> None:
    """Write an object or list as indented JSON; NaN and infinities become null."""
    write_atomic(path, lambda file: file.write((to_json(values, indent=2) + "\n").encode()))


def to_json(values, indent: int | None = None) -> str:
    """The values as JSON, which knows no NaN and no infinity: they become null."""
    return json.dumps(_finite(values), indent=indent, allow_nan=False)


def _finite(values):
    if isinstance(values, dict):
        return {key: _finite(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [_finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def save(run: Path, state: dict, step: int, keep: int) -> None:
    """Write `state` to ckpt_last.pt; with keep > 0 also to ckpt_<step>.pt, of which the newest `keep` stay."""
    write_atomic(run / LAST, lambda file: torch.save(state, file))
    if keep:
        write_atomic(run / f"ckpt_{step:08d}.pt", lambda file: torch.save(state, file))
        for old in sorted(run.glob("ckpt_[0-9]*.pt"))[:-keep]:
            old.unlink()


def read(path: Path, device: str | torch.device = "cpu") -> dict:
    """The dictionary that a checkpoint holds. Raises InputError naming the file if it is none of minidisp's.

    Only tensors, numbers, strings and containers are read (`weights_only=True`): a file cannot run code.
    """
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except (RuntimeError, pickle.UnpicklingError, EOFError, zipfile.BadZipFile, KeyError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{path} is not a minidisp checkpoint, or it is damaged: {reason}") from None
    if not isinstance(state, dict) or not {"model", "config", "step"} <= state.keys():
        raise InputError(f"{path} is not a minidisp checkpoint: it lacks the entries model, config and step")
    return state


def find(run: str | Path) -> Path:
    """The checkpoint file of a run folder (the one with the lowest validation loss), or the file itself."""
    run = Path(run)
    if run.is_dir():
        for name in (BEST, LAST):
            if (run / name).is_file():
                return run / name
        raise InputError(f"{run} holds no checkpoint ({BEST} or {LAST}): is it a run folder, and did it train?")
    if not run.exists():
        raise InputError(f"{run} does not exist: give a run folder or a checkpoint file")
    return run


def load_weights(model: GPT, state: dict, path: Path) -> None:
    """Copy a checkpoint's weights into the model. Raises InputError if names or shapes differ."""
    try:
        model.load_state_dict(state["model"])
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} does not fit the model that its config describes: {reason[:300]}") from None


def load_run(run: str | Path, device: str | torch.device = "cpu") -> tuple[GPT, object, Config]:
    """Model in eval mode, tokenizer and Config of a run folder or a checkpoint file in one.

    Raises InputError naming the file if something is missing or does not fit.
    """
    path = find(run)
    state = read(path, device)
    try:
        config = from_dict(state["config"])
    except (InputError, AttributeError, TypeError) as error:
        raise InputError(f"{path}: {error}") from None
    model = GPT(config).to(device)
    load_weights(model, state, path)
    vocabulary = tokenizer.load(path.parent / "tokenizer.model")
    if vocabulary.vocab_size != config.vocab_size:
        raise InputError(
            f"{path.parent / 'tokenizer.model'} has {vocabulary.vocab_size} tokens, but the model {config.vocab_size}"
        )
    return model.eval(), vocabulary, config


def load(run: str | Path, device: str | torch.device = "cpu") -> tuple[GPT, object]:
    """(model, tokenizer) of a run folder or a checkpoint file; the model is in eval mode.

    Raises InputError naming the file if something is missing or does not fit.
    """
    model, vocabulary, _ = load_run(run, device)
    return model, vocabulary
