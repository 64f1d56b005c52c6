"""One frozen dataclass holds every setting of a run; it becomes the command line, config.json, and comes back.

A field declared with `flag(default, help)` is the flag of the same name in kebab-case. Presets are plain
dictionaries of fields, applied before the other flags.
"""

import argparse
import dataclasses
import difflib
import json
import math
import types
from pathlib import Path
from typing import Literal, NoReturn, get_args, get_origin

from minidisp import InputError, ops
from minidisp.dispersion import VARIANTS, select_layers
from minidisp.model import GPTConfig, flag

# Sizes below gpt2 are minidisp's own, chosen for a laptop; the others are the published models. Only what differs
# from the defaults stands here.
_GPT2 = {"block_size": 1024, "batch_size": 16, "grad_accum": 32, "lr": 6e-4, "beta2": 0.95, "warmup_steps": 700, "max_steps": 20_000,
         "eval_every": 1000, "eval_tokens": 1_048_576, "save_every": 1000}  # fmt: skip
PRESETS: dict[str, dict] = {
    "tiny": {},
    "mini": {"n_layer": 6, "n_head": 6, "n_embd": 384, "batch_size": 32, "max_steps": 3000, "lr": 1e-3, "warmup_steps": 100},
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768, **_GPT2},
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024, **_GPT2, "lr": 3e-4},
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280, **_GPT2, "lr": 2.5e-4},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600, **_GPT2, "lr": 2e-4},
    "qwen3-0.6b": {"arch": "qwen3", "n_layer": 28, "n_head": 16, "n_kv_head": 8, "n_embd": 1024, "head_dim": 128,
                   "mlp_dim": 3072, "rope_theta": 1e6, **_GPT2, "block_size": 4096, "batch_size": 4, "lr": 3e-4},
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config(GPTConfig):
    """Everything that a training run depends on. Raises InputError naming the flag on values that make no sense."""

    # run
    preset: Literal[tuple(PRESETS)] = flag("tiny", "model size and the settings that go with it")
    out: str = flag("", "run folder; default runs/<data>-<preset>-d<dispersion>-s<seed>")
    seed: int = flag(0, "seed of the initialisation, the data order and dropout")
    resume: bool = flag(False, "go on with the run in --out, exactly as if it had never stopped")
    overwrite: bool = flag(False, "replace the run in --out")
    # data
    data: str = flag("pystdlib", "corpus: a name under data/ or a folder; built-in names are prepared on first use")
    init_from: str = flag("", "start from the weights of this run folder or checkpoint (mid-training)")
    # dispersion
    dispersion: float = flag(0.0, "weight lambda of the dispersion loss; 0 = off, the paper uses 0.1")
    dispersion_variant: Literal[tuple(VARIANTS)] = flag("angular_spread", "which dispersion loss")
    dispersion_layers: str = flag("all", "all, last, early_half, late_half, or numbers from 1 such as 1,3,5")
    dispersion_tau: float = flag(1.0, "temperature; angle / pi for angular_spread, squared distance for the others")
    dispersion_clamp: float = flag(0.25, "cosines are held in [-1 + clamp, 1 - clamp], gradient straight through")
    dispersion_tokens: int = flag(0, "tokens per sequence drawn for the loss; 0 = all, the authors use 256")
    dispersion_impl: Literal[ops.IMPLEMENTATIONS] = flag("auto", "fused: the compiled extension; streamed: PyTorch, little memory; "
                                                         "reference: plain; auto: fused where it is, else streamed")  # fmt: skip
    # optimisation
    max_steps: int = flag(400, "optimiser steps")
    batch_size: int = flag(8, "sequences per micro-step")
    grad_accum: int = flag(1, "micro-steps per optimiser step")
    optimizer: Literal["adamw", "muon"] = flag(
        "adamw", "muon: torch.optim.Muon for the blocks' matrices, AdamW for the rest"
    )
    lr: float = flag(3e-3, "peak learning rate")
    min_lr: float | None = flag(None, "learning rate at the end; default lr / 10")
    warmup_steps: int = flag(40, "steps of linear warm-up")
    schedule: Literal["cosine", "wsd", "constant"] = flag(
        "cosine", "after warm-up; wsd: constant, last fifth linear down"
    )
    weight_decay: float = flag(0.1, "decoupled weight decay, on matrices only")
    beta1: float = flag(0.9, "AdamW's first decay rate (and Muon's momentum is 0.95)")
    beta2: float = flag(0.99, "AdamW's second decay rate; the larger presets use 0.95")
    grad_clip: float = flag(1.0, "gradient norm is clipped to this; 0 = no clipping")
    # system
    device: Literal["auto", "cpu", "cuda", "mps"] = flag("auto", "auto: cuda, else mps, else cpu")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag(
        "auto", "of matrix products; auto: bfloat16 on cuda"
    )
    compile: Literal["auto", "on", "off"] = flag("auto", "torch.compile the model; auto: on cuda")
    threads: int = flag(0, "CPU threads; 0 = torch's choice")
    # logging
    eval_every: int = flag(100, "steps between evaluations; there is always one at step 0 and one at the end")
    eval_tokens: int = flag(8_192, "validation tokens per evaluation, the same ones every time; 0 = all")
    log_every: int = flag(10, "steps between lines of metrics.jsonl")
    save_every: int = flag(200, "steps between checkpoints; there is always one at the end")
    keep: int = flag(0, "numbered checkpoints to keep beside ckpt_last.pt and ckpt_best.pt")

    def __post_init__(self):
        super().__post_init__()
        for name, low in _AT_LEAST.items():
            if getattr(self, name) < low:
                raise InputError(f"--{_kebab(name)} is {getattr(self, name)}, but must be at least {low}")
        for name, (low, high) in _BETWEEN.items():
            if not low < getattr(self, name) < high:  # NaN fails, too
                raise InputError(f"--{_kebab(name)} is {getattr(self, name)}, but must be above {low} and below {high}")
        if self.min_lr is not None and not 0 <= self.min_lr <= self.lr:
            raise InputError(f"--min-lr {self.min_lr} must lie between 0 and --lr {self.lr}: change one of them")
        if self.seed >= 2**32:
            raise InputError(f"--seed is {self.seed}, but must be below 2^32 = {2**32}")
        if self.resume and self.overwrite:
            raise InputError("--resume goes on with a run and --overwrite replaces it: give one of them")
        if self.resume and self.init_from:
            raise InputError("--resume goes on with a run's own weights: leave out --init-from")
        if self.dispersion:
            if self.dispersion_tokens == 1:
                raise InputError("--dispersion-tokens is 1, but one token makes no pair: give 0 (all) or at least 2")
            try:
                select_layers(self.dispersion_layers, self.n_layer)
            except ValueError as error:
                raise InputError(f"--dispersion-layers: {error}") from None

    @property
    def final_lr(self) -> float:
        return self.lr / 10 if self.min_lr is None else self.min_lr

    @property
    def run_dir(self) -> Path:
        if self.out:
            return Path(self.out)
        return Path("runs") / f"{Path(self.data).name}-{self.preset}-d{self.dispersion:g}-s{self.seed}"

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.grad_accum * self.block_size


_AT_LEAST = {
    "block_size": 2, "seed": 0, "dispersion_tokens": 0, "max_steps": 0, "batch_size": 1, "grad_accum": 1, "warmup_steps": 0, "threads": 0,
    "eval_every": 1, "eval_tokens": 0, "log_every": 1, "save_every": 1, "keep": 0,
}  # fmt: skip
_BETWEEN = {
    "dispersion": (-math.inf, math.inf), "dispersion_tau": (0, math.inf), "dispersion_clamp": (0, 1),
    "lr": (0, math.inf), "weight_decay": (-1e-9, math.inf), "beta1": (-1e-9, 1), "beta2": (-1e-9, 1),
    "grad_clip": (-1e-9, math.inf),
}  # fmt: skip


def _kebab(name: str) -> str:
    return name.replace("_", "-")


def flags() -> list[dataclasses.Field]:
    """The fields of Config that have a flag, the run's before the model's."""
    fields = [f for f in dataclasses.fields(Config) if "help" in f.metadata]
    n_model = len([f for f in dataclasses.fields(GPTConfig) if "help" in f.metadata])
    return fields[n_model:] + fields[:n_model]


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are InputErrors of one line, with the nearest flag for a misspelt one."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: "):
            word = message.split(": ", 1)[1].split()[0]
            known = [option for action in self._actions for option in action.option_strings]
            near = difflib.get_close_matches(word.split("=")[0], known, n=1)
            message = f"unknown argument {word}" + (f", did you mean {near[0]}?" if near else "")
        raise InputError(f"{message} (python {self.prog} --help lists the flags)")


def parse(argv: list[str] | None = None, prog: str = "train.py") -> Config:
    """The Config of a command line. Raises InputError on unknown, malformed or contradictory flags."""
    parser = Parser(
        prog=prog,
        description="Train a small language model, with or without the dispersion loss (arXiv 2602.00217).",
        epilog="examples:  python train.py --dispersion 0.1\n"
        "           python train.py --data shakespeare --n-layer 4 --n-embd 128 --n-head 4 --block-size 64\n"
        "           python train.py --config runs/pystdlib-tiny-d0.1-s0/config.json --seed 1 --out runs/again",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", metavar="FILE", help="start from a saved config.json; other flags win over it")
    for field in flags():
        kind, default = field.type, "" if field.default in ("", None) else f" (default {field.default})"
        options: dict = {"help": field.metadata["help"].replace("%", "%%") + default}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif get_origin(kind) is Literal:
            options["choices"] = get_args(kind)
        else:
            options["type"] = _base_type(kind)
            options["metavar"] = {int: "N", float: "X", str: "TEXT"}[options["type"]]
        parser.add_argument(f"--{_kebab(field.name)}", **options)
    given = vars(parser.parse_args(argv))
    base = {}
    if "config" in given:
        base = _read_saved(Path(given.pop("config")))
    elif given.get("resume"):
        run_dir = from_dict({**PRESETS[given.get("preset", "tiny")], **given}).run_dir
        base = {**_read_saved(run_dir / "config.json"), "out": str(run_dir)}
    elif "preset" not in given:
        given["preset"] = "tiny"
    return from_dict({**base, **PRESETS.get(given.get("preset"), {}), **given})


def _read_saved(path: Path) -> dict:
    """The recipe in a saved config.json, without where that run lay, how it was started, and what it ran on."""
    values = read_json(path)
    return {name: value for name, value in values.items() if name not in ("out", "resume", "overwrite", "environment")}


def _base_type(kind) -> type:
    """float for `float | None`, else the type itself."""
    return next(t for t in get_args(kind) if t is not types.NoneType) if isinstance(kind, types.UnionType) else kind


def from_dict(values: dict) -> Config:
    """A Config from a dictionary of its fields. Raises InputError on an unknown name or a value of the wrong type."""
    fields = {f.name: f for f in dataclasses.fields(Config)}
    checked = {}
    for name, value in values.items():
        if name not in fields:
            raise InputError(f"unknown setting {name!r}: no such field in this version of minidisp")
        kind = fields[name].type
        if get_origin(kind) is Literal:
            valid = value in get_args(kind)
        elif value is None:
            valid = isinstance(kind, types.UnionType)
        else:
            base = _base_type(kind)
            if base is float and type(value) is int:
                value = float(value)
            valid = type(value) is base
        if not valid:
            raise InputError(f"setting {name!r} has the value {value!r}, which is not {_expected(kind)}")
        checked[name] = value
    return Config(**checked)


def _expected(kind) -> str:
    return (
        f"one of {', '.join(get_args(kind))}" if get_origin(kind) is Literal else f"of type {_base_type(kind).__name__}"
    )


def to_dict(config: Config) -> dict:
    """The fields as a dictionary that JSON can hold and `from_dict` reads back."""
    return dataclasses.asdict(config)


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises InputError naming the file if it is missing or holds something else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not a JSON file: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} holds a JSON {type(values).__name__}, but must hold an object")
    return values
