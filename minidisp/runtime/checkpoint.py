"""Checkpoints: written atomically, and read without executing any code in them.

A run folder has one writer at a time, which holds the lock on its metrics.jsonl. A checkpoint is a zip file written by
torch.save: a pickle that describes the structure, and the raw data of every tensor.
"""

import contextlib
import copy
import io
import math
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import torch

from minidisp import InputError, printable
from minidisp.config import Config, from_dict
from minidisp.model import GPT
from minidisp.optim import sharded_like
from minidisp.runtime.device import refuse_larger_than_memory
from minidisp.runtime.files import write_atomic
from minidisp.tokenizer import load as load_tokenizer

LAST, BEST, AVERAGE = "ckpt_last.pt", "ckpt_best.pt", "ckpt_ema.pt"
MOST_PICKLE = 1 << 24  # bytes; each can become an object of 72 bytes, and a tensor takes about 150
NUMBERED = "ckpt_[0-9]*.pt"


# --- writing --------------------------------------------------------------------------------------------------------


def save(run: Path, state: dict, step: int, keep: int) -> None:
    """Write `state` to ckpt_last.pt; with keep > 0 also to ckpt_<step>.pt, keeping the newest `keep` of those."""
    write(run / LAST, state)
    if keep:
        write(run / f"ckpt_{step:08d}.pt", state)
        for old in numbered(run)[:-keep]:
            old.unlink()


def write(path: Path, state: dict) -> None:
    """Write a checkpoint atomically. Raises InputError with the key of a value that `read` would reject."""
    _refuse_unreadable(state, "the checkpoint's state")
    write_atomic(path, lambda file: torch.save(state, file))


def _refuse_unreadable(value: object, where: str) -> None:
    kind = type(value)
    if kind in (dict, OrderedDict):
        for key, part in value.items():
            _refuse_unreadable(key, f"a key of {where}")
            _refuse_unreadable(part, f"{where}[{key!r}]")
    elif kind in (list, tuple):
        for index, part in enumerate(value):
            _refuse_unreadable(part, f"{where}[{index}]")
    elif kind is torch.Tensor:
        if value.dtype not in _STORAGES.values() or value.layout != torch.strided or value.is_meta:
            kind = f"{value.dtype}, {value.layout}, on {value.device}"
            raise InputError(f"{where} is a tensor of {kind}, which a checkpoint cannot store")
    elif kind not in (str, int, float, bool, type(None)):
        raise InputError(
            f"{where} is a {kind.__module__}.{kind.__qualname__}, which a checkpoint cannot store: convert it to a "
            "number, a string, a tensor, a list or a dict; nothing was written"
        )


def gathered(value, keep: bool = True):
    """A value as a checkpoint stores it: sharded tensors gathered on the CPU, and every tensor contiguous, with a
    storage no larger than itself. Recurses into dictionaries, lists and tuples; other values are returned unchanged.

    Every process must call it in the same order. With keep=False, a process takes part in gathering and gets None.
    """
    return _gathered(value, keep, {})


def _gathered(value, keep: bool, seen: dict):
    if isinstance(value, dict):
        return {key: _gathered(part, keep, seen) for key, part in value.items()}
    if isinstance(value, list) or type(value) is tuple:
        return (tuple if type(value) is tuple else list)(_gathered(part, keep, seen) for part in value)
    if hasattr(value, "full_tensor"):
        if id(value) not in seen:
            full = value.detach().full_tensor()
            seen[id(value)] = _compact(full.cpu()) if keep else None
        return seen[id(value)]
    return _compact(value.detach()) if isinstance(value, torch.Tensor) else value


def _compact(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy of it if its strides are not contiguous or its storage holds more than its own numbers."""
    if tensor.layout != torch.strided or tensor.device.type == "meta":
        return tensor  # _refuse_unreadable will reject it with its key
    if tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    return torch.clone(tensor, memory_format=torch.contiguous_format)


def numbered(run: Path) -> list[Path]:
    """The numbered checkpoints of a run folder, oldest first."""
    return sorted(run.glob(NUMBERED), key=lambda path: (len(path.name), path.name))


# --- reading --------------------------------------------------------------------------------------------------------


def read(path: Path) -> dict:
    """The dictionary stored in a checkpoint, on the CPU.

    Raises InputError naming the file if it is damaged or not a minidisp checkpoint. Only tensors, numbers, strings,
    lists, tuples and dictionaries are read, so a file cannot execute code. Checksums are verified, no tensor is larger
    than its bytes in the file, and every tensor is contiguous.
    """
    path = Path(path)
    try:
        if not path.exists():
            raise InputError(f"{path} does not exist")
        if not path.is_file():
            raise InputError(f"{path} is not a file")
        refuse_larger_than_memory(f"{path}", path.stat().st_size, torch.device("cpu"))
        with open(path, "rb") as file:
            state = _unpickled(file)
    except InputError:
        raise
    except Exception as error:  # a hostile file can make the parser raise any exception
        if isinstance(error, OSError) and error.strerror:
            raise InputError(f"cannot read {path}: {error.strerror}") from None
        reason = " ".join((str(error) or type(error).__name__).split())
        raise InputError(f"{path} is not a minidisp checkpoint, or it is damaged: {printable(reason, 200)}") from None
    required = {"model": dict, "config": dict, "step": int}
    if not _has(state, required) or not 0 <= state["step"] < 1 << 31:
        raise InputError(f"{path} is not a minidisp checkpoint: it lacks {', '.join(required)} of the right types")
    for name, tensor in state["model"].items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            raise InputError(f"{path} is not a minidisp checkpoint: its model has an entry that is no float tensor")
    return state


def _has(values: object, required: dict[str, type]) -> bool:
    """Whether values is a dictionary with (at least) these keys, of exactly these types."""
    if not isinstance(values, dict):
        return False
    return all(isinstance(values.get(name), kind) and values[name] is not True for name, kind in required.items())


def _unpickled(file: BinaryIO) -> object:
    """The object in a torch.save file. Can raise any exception if the file is damaged or needs more than this reader.

    torch.load is not used: it may load a different part of the file from the one that was inspected (a pickle with a
    zip file appended, two directories in one zip file), verifies no checksums, trusts shapes and strides, and unpacks
    compressed entries.
    """
    if file.read(4) != b"PK\3\4":
        raise ValueError("it does not start with a zip header")
    with zipfile.ZipFile(file) as archive:
        records = {record.filename: record for record in archive.infolist()}
        if len(records) < len(archive.infolist()):
            raise ValueError("it has two entries of the same name")
        if min((record.header_offset for record in records.values()), default=0):
            raise ValueError("its first entry is not at the start of the file")
        if any(record.compress_type != zipfile.ZIP_STORED for record in records.values()):
            raise ValueError("it is compressed")
        if sum(record.file_size for record in records.values()) > file.seek(0, io.SEEK_END):
            raise ValueError("its entries are larger than the file")
        prefix = next(iter(records), "").split("/")[0]
        byteorder = f"{prefix}/byteorder"
        if byteorder in records and archive.read(byteorder) != sys.byteorder.encode():
            raise ValueError("it was saved on a machine with a different byte order")
        if archive.getinfo(f"{prefix}/data.pkl").file_size > MOST_PICKLE:
            raise ValueError("its data.pkl is too long")
        return _Reader(archive, prefix).load()


class _Storage:
    """The data of one storage, and the tensors that view it, by (offset, shape)."""

    def __init__(self, numbers: torch.Tensor):
        self.numbers, self.parts, self.left = numbers, {}, len(numbers)


class _Reader(pickle._Unpickler):  # in Python: the one in C allocates gigabytes if the file says so
    """Reads the pickle of a checkpoint: only opcodes that torch.save writes, and only dictionaries and tensors built
    from the bytes in the archive. Nothing else can be imported or called."""

    def __init__(self, archive: zipfile.ZipFile, prefix: str):
        super().__init__(io.BytesIO(archive.read(f"{prefix}/data.pkl")))
        self._archive, self._prefix, self._storages = archive, prefix, {}

    def find_class(self, module: str, name: str) -> object:
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, reference: object) -> _Storage:
        _, dtype, key, _, elements = reference
        if key not in self._storages:
            self._storages[key] = _Storage(self._numbers(key, dtype, elements))
        storage = self._storages[key]
        if storage.numbers.dtype != dtype or len(storage.numbers) != elements:
            raise ValueError("two tensors disagree about the storage that they share")
        return storage

    def _numbers(self, key: str, dtype: torch.dtype, elements: int) -> torch.Tensor:
        """The data of a storage. Reading an entry to its end verifies its checksum."""
        record = self._archive.getinfo(f"{self._prefix}/data/{key}")
        if record.file_size != dtype.itemsize * elements:
            raise ValueError("a storage does not have the stated size")
        stored = torch.uint8 if dtype == torch.bool else dtype
        numbers = torch.empty(elements, dtype=stored)
        content = memoryview(numbers.view(torch.uint8).numpy())
        try:
            with self._archive.open(record) as file:
                for start in range(0, max(1, len(content)), 1 << 22):
                    part = content[start : start + (1 << 22)]
                    part[:] = file.read(len(part))
        except zipfile.BadZipFile:
            raise ValueError(f"the checksum of {record.filename} is wrong") from None
        return numbers != 0 if dtype == torch.bool else numbers

    def load_setitem(self) -> None:
        key, value = self.stack[-2:]
        del self.stack[-2:]
        self._dictionary()[key] = value

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self._dictionary().update(zip(items[::2], items[1::2], strict=True))

    def _dictionary(self) -> dict:
        if type(self.stack[-1]) is not dict:
            raise pickle.UnpicklingError("it sets an item of an object that is not a dictionary")
        return self.stack[-1]

    def load_build(self) -> None:
        """Ignore the attribute that modules attach to their state_dict (`_metadata`)."""
        self.stack.pop()

    def refuse(self) -> None:
        raise pickle.UnpicklingError("it has an opcode that torch.save does not write")

    dispatch = dict.fromkeys(range(256), refuse) | {
        ord(code): pickle._Unpickler.dispatch[ord(code)]
        for code in (
            pickle.PROTO, pickle.STOP, pickle.MARK, pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT,
            pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.LONG4, pickle.BINFLOAT, pickle.BINUNICODE,
            pickle.EMPTY_DICT, pickle.EMPTY_LIST, pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2,
            pickle.TUPLE3, pickle.APPEND, pickle.APPENDS, pickle.BINGET, pickle.LONG_BINGET, pickle.BINPUT,
            pickle.LONG_BINPUT, pickle.GLOBAL, pickle.BINPERSID, pickle.REDUCE,
        )
    }  # fmt: skip
    dispatch |= {ord(pickle.SETITEM): load_setitem, ord(pickle.SETITEMS): load_setitems, ord(pickle.BUILD): load_build}


def _tensor(storage: _Storage, offset: int, shape: tuple, stride: tuple, *more) -> torch.Tensor:
    """Replaces torch._utils._rebuild_tensor_v2. Two names of one tensor, as with tied weights, give the same object;
    other tensors must not overlap, so that the result is never larger than the file. The arguments after stride are
    requires_grad and hooks, which are ignored, and metadata, which is rejected because it changes the values."""
    if type(storage) is not _Storage or len(more) > 2 or any(type(n) is not int or n < 0 for n in (offset, *shape)):
        raise ValueError("a tensor is not in the form that torch.save writes")
    count, expected = math.prod(shape), 1
    if offset + count > len(storage.numbers):
        raise ValueError("a tensor is larger than its storage")
    for n, step in zip(reversed(shape), reversed(stride), strict=True):
        if count and n != 1 and step != expected:
            raise ValueError("a tensor is not contiguous")
        expected *= n
    if (offset, shape) not in storage.parts:
        storage.left -= count
        if storage.left < 0:
            raise ValueError("its tensors overlap")
        storage.parts[offset, shape] = storage.numbers[offset : offset + count].view(shape)
    return storage.parts[offset, shape]


_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def is_generator_state(value: object) -> bool:
    """Whether torch.set_rng_state can take this: a Mersenne Twister whose position is within its table of 624 numbers.

    torch checks `left` and `next` separately, and reads beyond the table if they are inconsistent. The layout is that
    of CPUGeneratorImplState (ATen/CPUGeneratorImpl.cpp): seed, left, seeded, next, table, normal samples, and whether
    there is one.
    """
    if not isinstance(value, torch.Tensor) or value.dtype != torch.uint8:
        return False
    content = value.numpy().tobytes()
    if len(content) != _GENERATOR.size:
        return False
    _, left, seeded, next_one, has_float_sample = _GENERATOR.unpack(content)
    within = (left, next_one) == (1, 0) or (left + next_one == 625 and 1 <= left <= 624)
    return within and seeded == 1 and has_float_sample in (0, 1)


_GENERATOR = struct.Struct(f"=QiiQ{624 * 8 + 4 * 8 + 4}xB3x")


def read_to_resume(run: Path, warn: Callable[[str], object]) -> tuple[dict, Path] | None:
    """The newest intact checkpoint of a run that training can resume from, and its path; None if none was ever saved.

    This is ckpt_last.pt. If that is damaged, `warn` is called, and the newest intact numbered checkpoint is used:
    training repeats exactly, so only time is lost. Raises InputError naming the damaged file if there is no other.
    """
    damaged = None
    for path in (run / LAST, *reversed(numbered(run))):
        if not path.exists():
            continue
        try:
            state = read(path)
            if not _has(state, _TO_RESUME):
                raise InputError(f"{path} holds weights only: training cannot be resumed from it")
            if not 0 <= state["seconds"] < 1e10 or not state["best_val_loss"] >= 0:
                raise InputError(f"{path} is damaged: invalid seconds or best_val_loss")
            others = state.get("rng_of_others", [])
            generators = [state["rng"], *others] if isinstance(others, list) else []
            if not generators or not all(
                type(one) is dict and is_generator_state(one.get("cpu")) for one in generators
            ):
                raise InputError(f"{path} is damaged: invalid state of a random number generator")
        except InputError as error:
            damaged = damaged or error
            continue
        if damaged:
            warn(f"{damaged}; resuming from {path.name}, step {state['step']}")
        return state, path
    if damaged is None:
        return None
    hint = f"; the weights in {BEST} can start a new run: --init-from {run}" if (run / BEST).is_file() else ""
    raise InputError(f"{damaged}; no other checkpoint can be resumed{hint}")


_TO_RESUME = {
    "optimizers": list,
    "scaler": dict,
    "data_hash": str,
    "tokenizer_hash": str,
    "seconds": float,
    "best_val_loss": float,
    "rng": dict,
    "micro_batch": int,
    "skipped": dict,
}


def load_tensors(tensors: list[torch.Tensor], saved: list[torch.Tensor]) -> None:
    """Copy a checkpoint's tensors into those of a run, which must have the same shapes. Call it inside `reading`."""
    for tensor, value in zip(tensors, saved, strict=True):
        if tensor.shape != value.shape:
            raise ValueError("the weight average does not fit the model")
        tensor.copy_(sharded_like(tensor, value))


def load_scaler(scaler: torch.amp.GradScaler, saved: dict) -> None:
    """Restore the gradient scale of a float16 run if the checkpoint has one. Call it inside `reading`."""
    fresh = scaler.state_dict()  # empty if gradients are not scaled
    if not fresh or not saved:
        return
    scale, tracker = saved["scale"], saved["_growth_tracker"]
    if type(scale) is not float or not 0 < scale <= torch.finfo(torch.float32).max:
        raise ValueError("invalid gradient scale")
    if type(tracker) is not int or not 0 <= tracker <= fresh["growth_interval"]:
        raise ValueError("invalid count of steps with this gradient scale")
    scaler.load_state_dict({**fresh, "scale": scale, "_growth_tracker": tracker})


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Wraps code that reads values of a checkpoint: missing values and wrong types raise InputError naming the file."""
    try:
        yield
    except InputError:
        raise
    except KeyError as error:
        raise InputError(f"{path} is damaged, or was saved by a different version: it lacks {error}") from None
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is damaged: {' '.join(str(error).split())[:200]}") from None


def load_optimizers(optimizers: list[torch.optim.Optimizer], saved: list, path: Path) -> None:
    """Load the states of a checkpoint into the optimisers of a run; see load_optimizer."""
    if len(saved) != len(optimizers):
        raise InputError(f"{path} does not fit: it has the states of {len(saved)} optimizers, not {len(optimizers)}")
    for optimizer, state in zip(optimizers, saved, strict=True):
        load_optimizer(optimizer, state, path)


def load_optimizer(optimizer: torch.optim.Optimizer, saved: object, path: Path) -> None:
    """Load an optimiser state from a checkpoint, as copies. The optimiser's settings stay those of the run.

    Raises InputError naming the file if the state is not that of this kind of optimiser on these parameters.
    """
    fresh = optimizer.state_dict()
    members = [group["params"] for group in fresh["param_groups"]]
    parameters = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
    kept_by = {p.ndim: _kept_by(optimizer, p) for p in parameters.values()}
    try:
        state = saved["state"]
        groups = [group["params"] for group in saved["param_groups"]]
        # Types are checked first, since comparing a tensor with a list raises an error.
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
    copied = {}
    for index, values in state.items():
        p = parameters[index]
        copied[index] = {
            name: sharded_like(p, value.clone()) if value.shape == p.shape else value.clone()
            for name, value in values.items()
        }
    optimizer.load_state_dict({"state": copied, "param_groups": fresh["param_groups"]})


SMALL = (2, 3, 5, 7)  # placeholders for the sizes of a real parameter


def _kept_by(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> dict[str, tuple[int, ...]]:
    """The tensors that an optimiser keeps for such a parameter, and their shapes, in terms of SMALL.

    Found by stepping a copy of the optimiser on a small parameter, so that a new optimiser needs no description.
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


def refuse_misfit(state: dict, config: Config, path: Path) -> None:
    """Raise InputError, before the model is allocated, if the config describes a model of another size than the
    weights. A tensor with several names counts once; a tied output layer may have been saved twice."""
    tensors = {id(t): t for name, t in state["model"].items() if not (config.tied and name == "lm_head.weight")}
    fits = config.n_layer <= len(tensors)  # checked first: counting the parameters of many layers takes long
    if not fits or sum(tensor.numel() for tensor in tensors.values()) != config.parameter_count:
        raise InputError(
            f"{path} does not fit the model that its config describes, {config.n_layer} layers"
            + (f" with {config.parameter_count:,} parameters in all" if fits else "")
        )


def load_weights(model: GPT, state: dict, path: Path) -> None:
    """Copy a checkpoint's weights into the model. Raises InputError if names or shapes differ."""
    try:
        model.load_state_dict(state["model"])
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} does not fit the model that its config describes: {reason[:300]}") from None


def load_run(run: str | Path, device: str | torch.device = "cpu") -> tuple[GPT, object, Config]:
    """Model in eval mode, tokenizer and Config of a run folder, or of a checkpoint file in one.

    Raises InputError naming the file if something is missing or does not fit.
    """
    path = find(run)
    state = read(path)
    try:
        config = from_dict(state["config"])
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    refuse_misfit(state, config, path)
    model = GPT(config)
    load_weights(model, state, path)
    tokenizer = load_tokenizer(path.parent / "tokenizer.model")
    if tokenizer.vocab_size != config.vocab_size:
        raise InputError(
            f"{path.parent / 'tokenizer.model'} has {tokenizer.vocab_size} tokens, but the model {config.vocab_size}"
        )
    return model.to(device).eval(), tokenizer, config  # without the optimiser states in `state`


def load(run: str | Path, device: str | torch.device = "cpu") -> tuple[GPT, object]:
    """(model, tokenizer) of a run folder or a checkpoint file; the model is in eval mode.

    Raises InputError naming the file if something is missing or does not fit.
    """
    model, tokenizer, _ = load_run(run, device)
    return model, tokenizer
