"""TensorBoard and Weights & Biases: both log the lines of metrics.jsonl, and continue when a run is resumed."""

import importlib
import re
import secrets
from pathlib import Path

from minidisp import InputError, read_bytes
from minidisp.runtime.files import write_atomic
from minidisp.runtime.metrics_log import read_metrics


def _import(module: str, package: str, extra: str, need: str):
    """An optional package. Raises InputError that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise InputError(
            f"{need} needs a package that is not installed: pip install {package}, or the extra minidisp[{extra}]"
        ) from None


def loggers(tensorboard: bool, wandb: bool) -> list:
    """The requested loggers, used as open(run, config, step), log(line of metrics.jsonl) ..., close().

    Raises InputError if a package is missing, so that no run starts without them.
    """
    return [*([TensorBoardLogger()] if tensorboard else ()), *([WandbLogger()] if wandb else ())]


class TensorBoardLogger:
    """Writes scalars to <run>/tensorboard: view them with `tensorboard --logdir runs`."""

    outside = False  # does not use the network

    def __init__(self):
        self._module = _import("torch.utils.tensorboard", "tensorboard", "tensorboard", "--tensorboard")

    def open(self, run: Path, config: dict, step: int) -> None:
        """Discard what was logged earlier after the last line of metrics.jsonl, since those steps are repeated."""
        lines = read_metrics(run / "metrics.jsonl") if config["resume"] else []
        self._writer = self._module.SummaryWriter(run / "tensorboard", purge_step=lines[-1]["step"] + 1 if lines else 0)

    def log(self, line: dict) -> None:
        for name, value in _scalars(line).items():
            self._writer.add_scalar(name, value, line["step"])
        self._writer.flush()  # visible at once, and kept after a crash

    def close(self) -> None:
        self._writer.close()


class WandbLogger:
    """Logs to the project minidisp under the run folder's name; wandb's own files go into the run folder.

    The wandb id is saved in the run folder, and --resume continues under it. wandb ignores steps that were logged
    before; a resumed run repeats them exactly, so nothing is lost.
    """

    outside = True

    def __init__(self):
        self._module = _import("wandb", "wandb", "wandb", "--wandb")

    def open(self, run: Path, config: dict, step: int) -> None:
        path = run / "wandb_id"
        name = self._id(path) if config["resume"] and path.exists() else secrets.token_hex(4)
        try:
            self._run = self._module.init(
                project="minidisp", name=run.name, id=name, resume="allow", dir=str(run), config=config
            )
        except self._module.Error as error:
            raise InputError(f"--wandb: {error}; WANDB_MODE=offline needs neither account nor network") from None
        write_atomic(path, lambda file: file.write(f"{name}\n".encode()))

    @staticmethod
    def _id(path: Path) -> str:
        """The id saved by an earlier session."""
        name = read_bytes(path).decode("ascii", errors="replace").strip()
        if not re.fullmatch(r"[\w-]{1,64}", name, re.ASCII):
            raise InputError(f"{path} does not hold a wandb run id: remove it to start a new wandb run")
        return name

    def log(self, line: dict) -> None:
        self._run.log(_scalars(line), step=line["step"])

    def close(self) -> None:
        self._run.finish()


def _scalars(line: dict) -> dict[str, float]:
    """The numbers in a line of metrics.jsonl: a list by layer becomes name/00, name/01, ...; histograms are omitted."""
    scalars = {}
    for name, value in line.items():
        if isinstance(value, list) and not isinstance(value[0], list):
            scalars.update({f"{name}/{layer:02d}": number for layer, number in enumerate(value)})
        elif name != "step" and not isinstance(value, list):
            scalars[name] = value
    return scalars
