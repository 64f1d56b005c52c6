"""Checkpoints: written whole or not at all, loaded without running anything that is in them.

A run folder has one writer at a time, which holds the lock on its metrics.jsonl. A checkpoint is a zip file of torch.save:
one pickle that describes the structure, and the numbers of every tensor as they are.
"""

import contextlib
import copy
import io
import math
import pickle
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import torch

from minidisp import InputError, tokenizer
from minidisp.config import Config, from_dict
from minidisp.model import GPT
from minidisp.runtime.files import write_atomic

LAST, BEST, AVERAGE = "ckpt_last.pt", "ckpt_best.pt", "ckpt_ema.pt"
NUMBERED = "ckpt_[0-9]*.pt"


# --- writing --------------------------------------------------------------------------------------------------------


def save(run: Path, state: dict, step: int, keep: int) -> None:
    """Write `state` to ckpt_last.pt; with keep > 0 also to ckpt_<step>.pt, of which the newest `keep` stay."""
    write_atomic(run / LAST, lambda file: torch.save(state, file))
    if keep:
        write_atomic(run / f"ckpt_{step:08d}.pt", lambda file: torch.save(state, file))
        for old in numbered(run)[:-keep]:
            old.unlink()


def gathered(value, keep: bool = True):
    """A sharded tensor in one piece, on the CPU; any other value as it is. Dictionaries and lists are walked through.

    Every process must call it in the same order. With keep=False a process helps to gather and gets None.
    """
    return _gathered(value, keep, {})


def _gathered(value, keep: bool, seen: dict):
    if isinstance(value, dict):
        return {key: _gathered(part, keep, seen) for key, part in value.items()}
    if isinstance(value, list):
        return [_gathered(part, keep, seen) for part in value]
    if not hasattr(value, "full_tensor"):
        return value
    if id(value) not in seen:
        full = value.detach().full_tensor()
        seen[id(value)] = full.cpu() if keep else None
    return seen[id(value)]


def sharded_like(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The shard that this process has of a value, if the parameter is sharded; else the value."""
    if not hasattr(parameter, "placements"):
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def numbered(run: Path) -> list[Path]:
    """The numbered checkpoints of a run folder, oldest first."""
    return sorted(run.glob(NUMBERED), key=lambda path: (len(path.name), path.name))


# --- reading --------------------------------------------------------------------------------------------------------


def read(path: Path) -> dict:
    """The dictionary that a checkpoint holds, on the CPU.

    Raises InputError naming the file if it is none of minidisp's, or damaged. Only tensors, numbers, strings and
    containers are read (`weights_only=True`): a file cannot run code. Before anything is allocated, checksums and sizes
    are compared with what is in the file.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path} does not exist")
    if not path.is_file():
        raise InputError(f"{path} is not a file")
    try:
        _inspect(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a hostile file can make the parser raise any exception
        if isinstance(error, OSError) and error.strerror:
            raise InputError(f"cannot read {path}: {error.strerror}") from None
        reason = " ".join((str(error) or type(error).__name__).split())
        raise InputError(f"{path} is not a minidisp checkpoint, or it is damaged: {ascii(reason)[1:-1]:.200}") from None
    required = {"model": dict, "config": dict, "step": int}
    if not _has(state, required) or not 0 <= state["step"] < 1 << 31:
        raise InputError(f"{path} is not a minidisp checkpoint: it lacks {', '.join(required)} of the right types")
    for name, tensor in state["model"].items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            raise InputError(f"{path} is not a minidisp checkpoint: its model has an entry that is no array of numbers")
    return state


def _has(values: object, required: dict[str, type]) -> bool:
    """Whether values is a dictionary with (at least) these keys, of exactly these types."""
    if not isinstance(values, dict):
        return False
    return all(isinstance(values.get(name), kind) and values[name] is not True for name, kind in required.items())


def _inspect(path: Path) -> None:
    """Raise an exception unless the file is whole and its pickle describes nothing but tensors that are in it.

    torch.load checks less: it reads no checksums, trusts the shapes, and unpacks compressed entries.
    """
    with zipfile.ZipFile(path) as archive:
        records = {record.filename: record for record in archive.infolist()}
        if len(records) < len(archive.infolist()):
            raise ValueError("a name occurs twice in it")
        if any(record.compress_type != zipfile.ZIP_STORED for record in records.values()):
            raise ValueError("it is compressed")
        if sum(record.file_size for record in records.values()) > path.stat().st_size:
            raise ValueError("its parts are larger than the file")
        if (damaged := archive.testzip()) is not None:
            raise ValueError(f"the checksum of {damaged} is wrong")
        prefix = next(iter(records), "").split("/")[0]
        sizes = {name: record.file_size for name, record in records.items()}
        _Outline(io.BytesIO(archive.read(f"{prefix}/data.pkl")), prefix, sizes).load()


class _Outline(pickle._Unpickler):  # the one in Python: that in C allocates gigabytes if the file asks for it
    """Reads what a checkpoint's pickle describes and checks each tensor instead of making it."""

    def __init__(self, file: BinaryIO, prefix: str, sizes: dict[str, int]):
        super().__init__(file)
        self._prefix, self._sizes = prefix, sizes

    def find_class(self, module: str, name: str) -> object:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _TENSOR
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, reference: object) -> int:
        """The number of elements of a tensor's storage."""
        _, itemsize, key, _, elements = reference
        if self._sizes[f"{self._prefix}/data/{key}"] != itemsize * elements:
            raise ValueError("a tensor has not the size that it should have")
        return elements


class _Tensor:
    """Stands for torch's function that makes a tensor, and cannot be changed by what is unpickled."""

    __slots__ = ()

    def __call__(self, elements: int, offset: int, shape: tuple, stride: tuple, *_) -> None:
        if math.prod(shape) > elements or offset < 0 or min((*shape, *stride), default=0) < 0:
            raise ValueError("a tensor is larger than what is there")
        if math.prod(shape) and offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) >= elements:
            raise ValueError("a tensor is larger than what is there")


_TENSOR = _Tensor()
_STORAGES = {"FloatStorage": 4, "DoubleStorage": 8, "HalfStorage": 2, "BFloat16Storage": 2, "LongStorage": 8, "IntStorage": 4,
             "ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1, "BoolStorage": 1}  # fmt: skip


def read_to_resume(run: Path, warn: Callable[[str], object]) -> tuple[dict, Path] | None:
    """The newest whole checkpoint of a run that training can go on from, and its path; None if none was ever saved.

    That is ckpt_last.pt. Where it is damaged, it is the newest numbered one that is not (training repeats itself exactly, so
    this loses time and nothing else), and `warn` is told. Raises InputError naming the damaged file if there is no other.
    """
    damaged = None
    for path in (run / LAST, *reversed(numbered(run))):
        if not path.exists():
            continue
        try:
            state = read(path)
            if not _has(state, _TO_RESUME) or not _has(state["rng"], {"cpu": torch.Tensor}):
                raise InputError(
                    f"{path} is not a checkpoint that training can go on from: it lacks more than the weights"
                )
            if not 0 <= state["seconds"] < math.inf or math.isnan(state["best_val_loss"]):
                raise InputError(f"{path} is damaged: its seconds or its best_val_loss")
            if not isinstance(state.get("rng_of_others", []), list):
                raise InputError(f"{path} is damaged: its random numbers of other processes")
        except InputError as error:
            damaged = damaged or error
            continue
        if damaged:
            warn(f"{damaged}; going on from {path.name}, step {state['step']}")
        return state, path
    if damaged is None:
        return None
    hint = f"; the weights in {BEST} can start a new run: --init-from {run}" if (run / BEST).is_file() else ""
    raise InputError(f"{damaged}; no other checkpoint can be resumed{hint}")


_TO_RESUME = {
    "optimizers": list, "scaler": dict, "data_hash": str, "tokenizer_hash": str, "seconds": float, "best_val_loss": float,
    "rng": dict, "micro_batch": int, "skipped": dict,
}  # fmt: skip


def load_tensors(tensors: list[torch.Tensor], saved: list[torch.Tensor]) -> None:
    """Copy tensors that a checkpoint holds into those of a run, each of the same shape; inside `reading`."""
    for tensor, value in zip(tensors, saved, strict=True):
        if tensor.shape != value.shape:
            raise ValueError("an average of other weights")
        tensor.copy_(sharded_like(tensor, value))


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """For code that reads values out of a checkpoint: one that is missing or of the wrong kind becomes an InputError
    naming the file."""
    try:
        yield
    except InputError:
        raise
    except KeyError as error:
        raise InputError(f"{path} is damaged, or was saved by other code: it lacks {error}") from None
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is damaged: {' '.join(str(error).split())[:200]}") from None


def load_optimizers(optimizers: list[torch.optim.Optimizer], saved: list, path: Path) -> None:
    """Give the optimizers of a run the states that a checkpoint holds; see load_optimizer."""
    if len(saved) != len(optimizers):
        raise InputError(f"{path} does not fit: it has the state of {len(saved)} optimizers")
    for optimizer, state in zip(optimizers, saved, strict=True):
        load_optimizer(optimizer, state, path)


def load_optimizer(optimizer: torch.optim.Optimizer, saved: object, path: Path) -> None:
    """Give an optimizer the state that a checkpoint holds, and nothing else: its settings are those of the run.

    Raises InputError naming the file if the state is not that of such an optimizer on such parameters.
    """
    fresh = optimizer.state_dict()
    members = [group["params"] for group in fresh["param_groups"]]
    parameters = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
    kept_by = {p.ndim: _kept_by(optimizer, p) for p in parameters.values()}
    try:
        state = saved["state"]
        groups = [group["params"] for group in saved["param_groups"]]
        # Types first: to compare a tensor with a list is an error of its own.
        fits = all(type(group) is list and all(type(index) is int for index in group) for group in groups)
        fits = fits and groups == members and all(type(index) is int for index in state)
        for index, values in state.items():
            shape = parameters[index].shape
            kept, sizes = kept_by[len(shape)], dict(zip(SMALL, shape, strict=False))
            fits = fits and values.keys() == kept.keys()
            for name, value in values.items():
                wanted = tuple(sizes.get(size, size) for size in kept[name])
                fits = fits and isinstance(value, torch.Tensor) and value.is_floating_point() and value.shape == wanted
    except (KeyError, TypeError, AttributeError, IndexError):
        fits = False
    if not fits:
        raise InputError(f"{path} does not fit: it is not the state of {type(optimizer).__name__} for this model")
    state = {
        index: {
            name: sharded_like(parameters[index], value) if value.shape == parameters[index].shape else value
            for name, value in values.items()
        }
        for index, values in state.items()
    }
    optimizer.load_state_dict({"state": state, "param_groups": fresh["param_groups"]})


SMALL = (2, 3, 5, 7)  # sizes that stand for those of a real parameter


def _kept_by(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> dict[str, tuple[int, ...]]:
    """The tensors that an optimizer keeps for a parameter of so many dimensions, and their shapes, with sizes of SMALL.

    It is seen in a step of a copy of it on a small parameter, so nobody has to write down what a new optimizer keeps.
    """
    small = torch.zeros(SMALL[: parameter.ndim], dtype=parameter.dtype, device=parameter.device, requires_grad=True)
    small.grad = torch.zeros_like(small)
    probe = copy.copy(optimizer)
    probe.state = defaultdict(dict)
    probe.param_groups = [{**optimizer.param_groups[0], "params": [small]}]
    probe.step()
    return {name: tuple(value.shape) for name, value in probe.state[small].items()}


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
    state = read(path)
    try:
        config = from_dict(state["config"])
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    tensors = [tensor for name, tensor in state["model"].items() if not (config.tied and name == "lm_head.weight")]
    if sum(tensor.numel() for tensor in tensors) != config.parameter_count:  # before the model takes its memory
        raise InputError(
            f"{path} does not fit the model that its config describes: {config.parameter_count:,} parameters"
        )
    model = GPT(config)
    load_weights(model, state, path)
    vocabulary = tokenizer.load(path.parent / "tokenizer.model")
    if vocabulary.vocab_size != config.vocab_size:
        raise InputError(
            f"{path.parent / 'tokenizer.model'} has {vocabulary.vocab_size} tokens, but the model {config.vocab_size}"
        )
    return model.to(device).eval(), vocabulary, config  # its weights alone: a checkpoint can hold three times as much


def load(run: str | Path, device: str | torch.device = "cpu") -> tuple[GPT, object]:
    """(model, tokenizer) of a run folder or a checkpoint file; the model is in eval mode.

    Raises InputError naming the file if something is missing or does not fit.
    """
    model, vocabulary, _ = load_run(run, device)
    return model, vocabulary
