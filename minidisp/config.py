"""One frozen dataclass holds every setting of a run; it comes from flags or config.json.

A field declared with `flag(default, help)` becomes the flag of the same name in kebab-case. GROUPS assigns it to a
section of --help, and its `resume` argument says whether --resume may change it. Presets are plain dictionaries of
fields, applied before the other flags.
"""

import argparse
import dataclasses
import hashlib
import math
import os
import re
import types
from fractions import Fraction
from pathlib import Path
from typing import Literal, get_args, get_origin

from minidisp import InputError, is_plain, parse_json, read_bytes
from minidisp.dispersion import VARIANTS, select_layers
from minidisp.flags import MOST, flag, kebab, shown
from minidisp.model import GPTConfig
from minidisp.ops.dispersion import IMPLEMENTATIONS
from minidisp.optim import OPTIMIZERS, SCHEDULES, weight_schedule
from minidisp.runtime.cli import Parser

MOST_CHARACTERS = 4096  # of any text setting
MOST_SEQUENCES = 1_000_000  # in a cycle of a mixture of corpora
MOST_PATH = 1000  # characters of a run folder's path, so that files in it stay below the system's limit of 4,096 bytes
MOST_BYTES = 200  # of the default name of a run folder; file systems allow 255
MOST_THREADS = 1024  # with more, torch may fail to start its threads, which aborts the process

# Sizes below gpt2 are minidisp's own, chosen for a laptop; the others are the published models. Only the values
# that differ from the defaults are listed.
_GPT2 = {
    "block_size": 1024,
    "batch_size": 16,
    "grad_accum": 32,
    "lr": 6e-4,
    "beta2": 0.95,
    "warmup_steps": 700,
    "max_steps": 20_000,
    "eval_every": 1000,
    "eval_tokens": 1_048_576,
    "save_every": 1000,
}
PRESETS: dict[str, dict] = {
    "tiny": {},
    "mini": {"n_layer": 6, "n_head": 6, "n_embd": 384, "batch_size": 32, "max_steps": 3000, "lr": 1e-3},
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768, **_GPT2},
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024, **_GPT2, "lr": 3e-4},
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280, **_GPT2, "lr": 2.5e-4},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600, **_GPT2, "lr": 2e-4},
    "qwen3-0.6b": {"arch": "qwen3", "n_layer": 28, "n_head": 16, "n_kv_head": 8, "n_embd": 1024, "head_dim": 128,
                   "mlp_dim": 3072, "rope_theta": 1e6, **_GPT2, "block_size": 4096, "batch_size": 4, "lr": 3e-4},
}  # fmt: skip

# The learning rates of recipes and presets are for training from scratch. They also suit runs that start from small
# models of minidisp (docs/finetuning.md); from a published model, a tenth limits forgetting. Without a preset, whose
# learning rate fits its size, it is also scaled by 1 / width.
HUGGING_FACE_LR = 0.1

# How to train, independent of model size: fields applied after the preset's and before the other flags. "fast" gives
# the lowest loss per unit of time (docs/speedrun.md); "gpt2" is the paper's setting and the baseline of comparisons.
# New runs use fast, unless --recipe, the preset or the initial model implies gpt2. A saved configuration without a
# recipe means gpt2.
RECIPES: dict[str, dict] = {
    "gpt2": {},
    "fast": {
        "arch": "qwen3",
        "mlp": "relu2",
        "zero_init": True,
        "tied": False,
        "optimizer": "muon",
        "momentum": 0.9,
        "lr": 6e-3,
        "embedding_lr": 5.0,
        "min_lr": 0.0,
        "warmup_steps": 10,
        "schedule": "linear",
    },
}


@dataclasses.dataclass(frozen=True)
class Config(GPTConfig):
    """Everything that a training run depends on. Raises InputError, naming the flag, on invalid values."""

    # run
    preset: Literal[tuple(PRESETS)] = flag("tiny", "model size and the settings that go with it", resume="silent")
    recipe: Literal[tuple(RECIPES)] = flag(
        "gpt2",
        "training recipe; fast: lowest loss per unit of time; gpt2: the paper's setting, the baseline (see below)",
    )
    out: str = flag(
        "",
        "run folder; default runs/<data>-<preset>-d<dispersion>-s<seed>, followed by other non-default settings",
        resume="silent",
    )
    seed: int = flag(0, "seed of the initialisation, the data order and dropout", low=0, high=2**32 - 1)
    resume: bool = flag(False, "continue the run in --out from its last checkpoint, bit-exactly", resume="silent")
    overwrite: bool = flag(False, "replace the run in --out", resume="silent")
    # data
    data: str | tuple[str, ...] = flag(
        "pystdlib",
        "corpus: a name under data/ or a folder; built-in names are prepared on first use. Several are mixed, "
        "optionally weighted: chat:3 books:1 takes three sequences of chat for each one of books",
        resume="silent",
    )
    packing: Literal["separate", "joined", "none"] = flag(
        "separate",
        "packing of examples into windows; separate: several per window, attention confined to each example; "
        "joined: several per window, each attends to those before it; none: one example per window",
    )
    init_from: str = flag(
        "",
        "initialise the weights from this run, checkpoint or Hugging Face model (a folder, or owner/name on the hub), "
        "for fine-tuning and mid-training",
        resume="silent",
    )
    # dispersion
    dispersion: float = flag(
        0.0, "weight lambda of the dispersion loss; 0 = off, the paper uses 0.1", resume="reported"
    )
    dispersion_schedule: str = flag(
        "constant",
        "schedule of --dispersion: constant; linear:F, linear decay to 0 at fraction F of the run; or delayed:F, 0 "
        "until fraction F",
        resume="reported",
    )
    dispersion_variant: Literal[tuple(VARIANTS)] = flag(
        "angular_spread", "variant of the dispersion loss", resume="reported"
    )
    dispersion_layers: str = flag(
        "all",
        "layers the loss applies to: all, last, early_half, late_half, or a list of layers counted from 1, such as "
        "1,3,5",
        resume="reported",
    )
    dispersion_tau: float = flag(
        1.0,
        "temperature, in units of angle / pi for angular_spread, of squared distance for the others",
        low=1e-6,
        high=1e6,
        resume="reported",
    )
    dispersion_clamp: float = flag(
        0.25,
        "cosines are clamped to [-1 + clamp, 1 - clamp], with a straight-through gradient",
        above=0,
        below=1,
        resume="reported",
    )
    dispersion_tokens: int = flag(
        0, "tokens sampled per sequence for the loss; 0 = all, the authors use 256", low=0, resume="reported"
    )
    dispersion_impl: Literal[IMPLEMENTATIONS] = flag(
        "auto",
        "implementation of the loss; fused: the compiled extension; streamed: PyTorch, low memory; reference: plain "
        "PyTorch; auto: fused if available, else streamed",
        resume="silent",
    )
    # other mitigation methods
    noisy_embedding: float = flag(
        0.0,
        "NEFTune alpha: uniform noise of at most alpha / sqrt(T C) on the token embeddings during training; 0 = off, "
        "the paper uses 1 for GPT-2 and 5 for Qwen3",
        low=0,
        resume="reported",
    )
    active_forgetting: int = flag(
        0,
        "re-initialise the token embeddings (and a tied output layer) and their optimiser state every N steps; no "
        "reset in the last N steps; 0 = off, the paper uses 1000",
        low=0,
        resume="reported",
    )
    distill: str = flag(
        "",
        "knowledge distillation from this teacher: a run folder or checkpoint with the same tokenizer",
        resume="silent",
    )
    distill_weight: float = flag(
        1.0, "weight of temperature^2 x KL(teacher || student), added to the cross-entropy", above=0, resume="reported"
    )
    distill_temperature: float = flag(
        2.0,
        "softmax temperature of teacher and student in the distillation loss",
        low=1e-3,
        high=1e6,
        resume="reported",
    )
    # optimisation
    max_steps: int = flag(400, "optimiser steps", low=0, resume="reported")
    batch_size: int = flag(8, "sequences per micro-step", low=1, resume="silent")
    grad_accum: int = flag(1, "micro-steps per optimiser step", low=1, resume="silent")
    optimizer: Literal[tuple(OPTIMIZERS)] = flag(
        "adamw",
        "muon: Muon for the blocks' matrices (queries, keys and values separately for each head), AdamW for the rest",
    )
    lr: float = flag(3e-3, "peak learning rate", above=0, resume="reported")
    min_lr: float | None = flag(None, "learning rate at the end; default lr / 10", low=0, resume="reported")
    embedding_lr: float = flag(
        1.0, "learning rate of the token embeddings (and a tied output layer) as a multiple of lr", above=0
    )
    warmup_steps: int = flag(100, "steps of linear warm-up", low=0, resume="reported")
    schedule: Literal[tuple(SCHEDULES)] = flag(
        "cosine",
        "learning rate schedule after warm-up; linear: linear decay to min_lr; wsd: constant, then linear decay over "
        "the last fifth",
        resume="reported",
    )
    weight_decay: float = flag(0.1, "decoupled weight decay, applied to matrices only", low=0, resume="reported")
    beta1: float = flag(0.9, "AdamW beta1", low=0, below=1, resume="reported")
    momentum: float = flag(
        0.95, "Muon momentum; 0.9 suits runs of a few hundred steps", low=0, below=1, resume="reported"
    )
    beta2: float = flag(0.99, "AdamW beta2; the larger presets use 0.95", low=0, below=1, resume="reported")
    ema: float = flag(
        0.0,
        "decay of an exponential moving average (EMA) of the weights, for example 0.99; it is evaluated too, and saved "
        "as ckpt_ema.pt; 0 = off",
        low=0,
        below=1,
    )
    grad_clip: float = flag(1.0, "clip the gradient norm to this value; 0 = no clipping", low=0, resume="reported")
    # system
    device: Literal["auto", "cpu", "cuda", "mps"] = flag("auto", "auto: cuda, else mps, else cpu", resume="silent")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag(
        "auto", "compute dtype; auto: bfloat16 on cuda, else float32", resume="reported"
    )
    compile: Literal["auto", "on", "off"] = flag("auto", "torch.compile the model; auto: on cuda", resume="silent")
    threads: int = flag(0, "CPU threads; 0 = PyTorch's default", low=0, high=MOST_THREADS, resume="silent")
    shard: bool = flag(
        False, "under torchrun, shard weights and optimiser state across the processes (FSDP2)", resume="silent"
    )
    # logging
    eval_every: int = flag(
        100, "steps between evaluations; the first and last step are always evaluated", low=1, resume="silent"
    )
    eval_tokens: int = flag(
        8_192, "validation tokens per evaluation, always the same ones; 0 = all", low=0, resume="reported"
    )
    log_every: int = flag(10, "steps between lines of metrics.jsonl", low=1, resume="silent")
    save_every: int = flag(200, "steps between checkpoints; one is always saved at the end", low=1, resume="silent")
    keep: int = flag(
        0, "numbered checkpoints to keep in addition to ckpt_last.pt and ckpt_best.pt", low=0, resume="silent"
    )
    tensorboard: bool = flag(False, "also log to TensorBoard, in the run folder", resume="silent")
    wandb: bool = flag(
        False, "also log to Weights & Biases; WANDB_MODE=offline keeps the logs in the run folder", resume="silent"
    )

    def __post_init__(self):
        if not isinstance(self.data, str):
            object.__setattr__(self, "data", self.data[0] if len(self.data) == 1 else tuple(self.data))
        super().__post_init__()
        texts = [*vars(self).items(), *(("data", name) for name in self.data if not isinstance(self.data, str))]
        for name, value in texts:
            if isinstance(value, str) and (len(value) > MOST_CHARACTERS or not is_plain(value)):
                raise InputError(
                    f"--{kebab(name)} is {value!a:.60}: it is too long, is not UTF-8, or contains control characters"
                )
        parse_corpora(self.data)
        if len(self.out) > MOST_PATH or any(len(part.encode()) > 255 for part in Path(self.out).parts):
            raise InputError(
                f"--out {self.out[:40]!a}... is too long: pass a path of at most {MOST_PATH} characters, with at most "
                "255 bytes per folder name"
            )
        if self.block_size < 2:  # the mean cosine needs at least one pair of tokens
            raise InputError(f"--block-size is {self.block_size}, but training needs at least 2")
        if self.min_lr is not None and self.min_lr > self.lr:
            raise InputError(f"--min-lr {self.min_lr} is above --lr {self.lr}: change one of them")
        # Muon scales the learning rate up, and the product must fit in float32.
        if self.optimizer == "muon" and self.lr > 1e30:
            raise InputError(f"--lr is {self.lr}, but must be at most 1e30 with --optimizer muon")
        if self.resume and self.overwrite:
            raise InputError("--resume continues a run and --overwrite replaces it: pass only one of them")
        if 2 * self.active_forgetting > self.max_steps:
            raise InputError(
                f"--active-forgetting {self.active_forgetting} would never reset anything in {self.max_steps} steps, "
                "since a reset must be followed by as many steps: pass at most "
                f"{self.max_steps // 2}, or raise --max-steps"
            )
        if self.distill:
            if is_within(self.distill, self.run_dir):
                raise InputError(
                    f"--distill {self.distill} is this run itself: choose another teacher or another --out"
                )
        else:
            for name in ("distill_weight", "distill_temperature"):
                if getattr(self, name) != getattr(Config, name):
                    raise InputError(f"--{kebab(name)} has no effect without a teacher: add --distill RUN")
        if self.dispersion and self.dispersion_tokens == 1:
            raise InputError("--dispersion-tokens is 1, but the loss needs pairs of tokens: pass 0 (all) or at least 2")
        if self.dispersion and self.n_embd < 2 and self.dispersion_variant not in ("l2_repel", "perplexity_entropy"):
            raise InputError(
                f"--dispersion-variant {self.dispersion_variant} needs angles, which do not exist for --n-embd 1: "
                "pass at least 2"
            )
        for name, check in (
            ("dispersion_layers", lambda: select_layers(self.dispersion_layers, self.n_layer)),
            ("dispersion_schedule", lambda: weight_schedule(self.dispersion_schedule, self.max_steps)),
        ):
            try:
                check()
            except InputError as error:
                raise InputError(f"--{kebab(name)}: {error}") from None

    @property
    def corpora(self) -> list[tuple[str, int]]:
        """The corpora of --data with their weights, as integers in lowest terms."""
        return parse_corpora(self.data)

    @property
    def final_lr(self) -> float:
        return self.lr / 10 if self.min_lr is None else self.min_lr

    @property
    def run_dir(self) -> Path:
        return Path(self.out) if self.out else default_run_dir(to_dict(self))

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.grad_accum * self.block_size


# The default of every field that some preset sets; a preset that leaves a field out gets this default.
_UNSIZED = {
    f.name: f.default for f in dataclasses.fields(Config) if any(f.name in preset for preset in PRESETS.values())
}


def parse_corpora(data: str | tuple[str, ...]) -> list[tuple[str, int]]:
    """--data as (corpus, weight) pairs: NAME:WEIGHT, where the weight is 1 if left out. Raises InputError."""
    pairs = []
    for item in [data] if isinstance(data, str) else data:
        name, _, weight = item.rpartition(":")
        if not name or not re.fullmatch(r"[-+.\d]+", weight) or os.path.exists(item):
            name, weight = item, "1"
        if not re.fullmatch(r"\d{1,6}(\.\d{1,3})?", weight) or not float(weight):
            raise InputError(f"--data {item}: the weight must be above 0 and below a million, for example 3 or 0.5")
        pairs.append((name, Fraction(weight)))
    names = [name for name, _ in pairs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"--data: {twice} is given twice: pass it once, with a weight, for example {twice}:2")
    scale = math.lcm(*(weight.denominator for _, weight in pairs))
    weights = [int(weight * scale) for _, weight in pairs]
    weights = [weight // math.gcd(*weights) for weight in weights]
    if sum(weights) > MOST_SEQUENCES:
        raise InputError(
            f"--data: the weights add up to {sum(weights):,} in lowest terms: use simpler ones, for example 3 and 1"
        )
    return list(zip(names, weights, strict=True))


def corpora_name(data: str | tuple[str, ...]) -> str:
    """The corpora in the name of a run folder, such as chat-3+books-1."""
    # abspath, as "." has no name
    pairs = [(Path(os.path.abspath(name)).name, weight) for name, weight in parse_corpora(data)]
    return pairs[0][0] if len(pairs) == 1 else "+".join(f"{name}-{weight}" for name, weight in pairs)


def command_line(fields: dict) -> list[str]:
    """Fields of Config as the words of a command line that `parse` reads back."""
    line = []
    for name, value in fields.items():
        if isinstance(value, bool):
            line.append(f"--{kebab(name)}" if value else f"--no-{kebab(name)}")
        else:
            words = [str(part) for part in value] if isinstance(value, list | tuple) else [str(value)]
            line += [f"--{kebab(name)}={words[0]}"] if words[0].startswith("-") else [f"--{kebab(name)}", *words]
    return line


# The sections of --help, each with its first field.
GROUPS = {
    "run": "preset",
    "data": "data",
    "model": "arch",
    "dispersion": "dispersion",
    "other mitigation methods": "noisy_embedding",
    "optimisation": "max_steps",
    "system": "device",
    "logging": "eval_every",
}

# Names of these settings in other frameworks; an unknown flag with such a name gets a suggestion.
ELSEWHERE = {
    "learning_rate": "lr", "max_lr": "lr", "min_learning_rate": "min_lr", "lr_scheduler": "schedule",
    "lr_scheduler_type": "schedule", "warmup_iters": "warmup_steps", "warmup": "warmup_steps", "steps": "max_steps",
    "max_iters": "max_steps", "iterations": "max_steps", "num_steps": "max_steps", "epochs": "max_steps",
    "num_train_epochs": "max_steps", "gradient_accumulation_steps": "grad_accum", "accumulate": "grad_accum",
    "micro_batch_size": "batch_size", "device_batch_size": "batch_size", "per_device_train_batch_size": "batch_size",
    "max_grad_norm": "grad_clip", "clip": "grad_clip", "adam_beta1": "beta1", "adam_beta2": "beta2",
    "context_length": "block_size", "seq_len": "block_size", "sequence_length": "block_size",
    "max_seq_len": "block_size", "n_layers": "n_layer", "num_layers": "n_layer", "depth": "n_layer",
    "n_heads": "n_head", "num_heads": "n_head", "n_kv_heads": "n_kv_head", "d_model": "n_embd",
    "hidden_size": "n_embd", "width": "n_embd", "d_ff": "mlp_dim", "intermediate_size": "mlp_dim", "out_dir": "out",
    "output_dir": "out", "output": "out", "run": "out", "name": "out", "dataset": "data", "corpus": "data",
    "eval_interval": "eval_every", "eval_iters": "eval_tokens", "log_interval": "log_every",
    "save_interval": "save_every", "always_save_checkpoint": "save_every", "wandb_log": "wandb",
    "lambda": "dispersion", "dispersion_lambda": "dispersion", "dispersion_weight": "dispersion",
    "tau": "dispersion_tau", "variant": "dispersion_variant", "layers": "dispersion_layers",
    "neftune_noise_alpha": "noisy_embedding", "teacher": "distill", "precision": "dtype", "num_threads": "threads",
    "fsdp": "shard", "model": "preset", "size": "preset", "checkpoint": "init_from", "resume_from": "resume",
    "resume_from_checkpoint": "resume",
}  # fmt: skip


def flags() -> list[dataclasses.Field]:
    """The fields of Config that have a flag, in the order of --help: the model's follow the data's."""
    fields = [f for f in dataclasses.fields(Config) if "help" in f.metadata]
    n_model = len([f for f in dataclasses.fields(GPTConfig) if "help" in f.metadata])
    model, own = fields[:n_model], fields[n_model:]
    start = [f.name for f in own].index(GROUPS["dispersion"])
    return own[:start] + model + own[start:]


def parse(
    argv: list[str] | None = None,
    prog: str = "train.py",
    begin_if_missing: bool = False,
) -> Config:
    """The Config of a command line. Raises InputError on unknown, malformed or contradictory flags.

    begin_if_missing: if there is no run to resume, start a new one.
    A run with --init-from adopts the architecture of that model; a flag that contradicts it is an error.
    """
    given = vars(_parser(prog).parse_args(argv))
    for name in {"config", "out", "init_from", "distill"} & given.keys():
        given[name] = os.path.expanduser(given[name])  # in case no shell expanded ~
    if "data" in given:
        given["data"] = [os.path.expanduser(name) for name in given["data"]]
        given["data"] = given["data"] if len(given["data"]) > 1 else given["data"][0]
    if given.get("resume") and given.get("init_from"):
        raise InputError("--resume continues from the run's own weights: leave out --init-from")
    if "config" in given:
        base = _read_saved(Path(given.pop("config")))
        if given.get("resume"):
            return _resumed(base, given)
    elif given.get("resume"):
        run_dir = _run_to_resume(given)
        if (run_dir / "config.json").exists():
            return _resumed({**_read_saved(run_dir / "config.json"), "out": str(run_dir)}, given)
        if not begin_if_missing:
            raise InputError(
                f"--resume: there is no run in {run_dir} (no config.json found): pass its folder with --out, or leave "
                "out --resume"
            )
        base, given["resume"] = {}, False
    else:
        base = {}
    return _new_run(base, given)


def _new_run(base: dict, given: dict) -> Config:
    """The Config of a new run: the saved settings `base`, if any, then preset, recipe and the given flags."""
    _refuse_another_recipe(base, given)
    source, start = None, given.get("init_from", base.get("init_from"))
    if start:
        from minidisp.runtime.init_from import architecture_of  # late, as it imports this module

        source = architecture_of(start)
    # A preset determines every field that any preset sets; the recipe is applied on top.
    preset = {**_UNSIZED, **PRESETS[given.get("preset", Config.preset)]} if "preset" in given or not base else {}
    typed_as = dict.fromkeys(preset if "preset" in given else (), "preset")
    recipe = {}
    if "recipe" in given:
        recipe = RECIPES[given["recipe"]]
        typed_as |= dict.fromkeys(recipe, "recipe")
    elif not base or preset:
        implied = (
            base.get("recipe", "gpt2")
            if base
            else default_recipe(given.get("preset", Config.preset), source and source[0])
        )
        recipe = {**RECIPES[implied], "recipe": implied}
    typed_as |= {name: name for name in given}
    wanted = {**base, **preset, **recipe, **given}
    if not source:
        return from_dict(wanted)
    config = from_dict({**wanted, **_taken_over(start, *source, wanted, typed_as)})
    if "lr" in base.keys() | given.keys():
        return config
    wider = 1.0 if "preset" in given else max(1.0, config.n_embd / GPTConfig.n_embd)
    from_hugging_face = source[1]
    lr = float(f"{(HUGGING_FACE_LR if from_hugging_face else 1.0) * config.lr / wider:.2g}")
    # `out` keeps the folder name, which does not include this learning rate.
    return dataclasses.replace(config, lr=lr, out=str(config.run_dir))


def _resumed(base: dict, given: dict) -> Config:
    """The Config of a resumed run: its saved settings and the given flags; preset and recipe are only labels here."""
    _refuse_another_recipe(base, given)
    saved = base.get("preset", "tiny")
    if given.get("preset", saved) != saved:
        raise InputError(f"--resume: the run has the preset {saved}: leave out --preset {given['preset']}")
    return from_dict({**base, **given})


def _refuse_another_recipe(base: dict, given: dict) -> None:
    if base and given.get("recipe", base.get("recipe", "gpt2")) != base.get("recipe", "gpt2"):
        raise InputError(
            f"--recipe {given['recipe']} cannot replace the recipe of a saved run: start a new run with explicit "
            "flags, without its config"
        )


def default_recipe(preset: str, source: GPTConfig | None = None) -> str:
    """The recipe of a run if --recipe is not given: fast, or gpt2 for the sizes of published models and for initial
    weights whose architecture differs from fast's.
    """
    fast = RECIPES["fast"]
    if source:
        return "fast" if all(getattr(source, name) == fast[name] for name in ("arch", "mlp", "tied")) else "gpt2"
    return "fast" if preset in ("tiny", "mini") else "gpt2"


def _run_to_resume(given: dict) -> Path:
    """The folder of the run that a command without --config resumes: the default folder of its flags or, if there is no
    run, the default folder without the flags that --resume may change.
    """
    if given.get("out") or given.get("overwrite"):
        return from_dict({name: given[name] for name in ("out", "resume", "overwrite") if name in given}).run_dir
    may_change = {f.name for f in flags() if f.metadata["resume"] != "refused"} - {"data", "preset", "dispersion"}
    folders = [default_run_dir(given), default_run_dir({k: v for k, v in given.items() if k not in may_change})]
    return next((folder for folder in folders if (folder / "config.json").exists()), folders[0])


def default_run_dir(fields: dict) -> Path:
    """runs/<data>-<preset>-d<dispersion>-s<seed>, followed by the settings that differ from those of the preset and its
    recipe.

    fields: settings by name; a missing one has the preset's and recipe's value. Settings that do not change the
    training, or only its length, are left out.
    """
    preset = fields.get("preset", Config.preset)
    recipe = fields.get("recipe", default_recipe(preset))
    usual = {f.name: f.default for f in flags()} | PRESETS[preset] | RECIPES[recipe]
    usual |= {"recipe": default_recipe(preset)}
    named = ("data", "preset", "dispersion", "seed")
    data, dispersion, seed = (fields.get(name, getattr(Config, name)) for name in ("data", "dispersion", "seed"))
    name = f"{corpora_name(data)}-{preset}-d{dispersion:g}-s{seed}"
    for field in flags():
        value = fields.get(field.name, usual[field.name])
        matters = field.metadata["resume"] != "silent" or field.name in ("init_from", "distill")
        if matters and field.name not in (*named, "max_steps", "eval_tokens") and value != usual[field.name]:
            name += f"-{field.name}_{Path(value).name if isinstance(value, str) else value}"
    # How a step is divided into micro-steps does not matter, but how many sequences it has does.
    found = {**usual, **fields}
    if (sequences := found["batch_size"] * found["grad_accum"]) != usual["batch_size"] * usual["grad_accum"]:
        name += f"-sequences_{sequences}"
    if len(name.encode()) > MOST_BYTES:
        name = f"{name[:100]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return Path("runs") / name


def _parser(prog: str) -> Parser:
    """The flags of train.py, in sections. The defaults shown are those of a run without any flag."""
    parser = Parser(
        prog=prog,
        usage=f"python {prog} [--flag value ...]",
        description="Train a small language model, with or without the dispersion loss (arXiv 2602.00217).",
        epilog="examples:\n"
        "  python train.py --dispersion 0.1\n"
        "  python train.py --recipe gpt2 --seed 1\n"
        "  python train.py --data shakespeare --n-layer 4 --n-embd 128 --n-head 4 --block-size 64\n"
        "  python train.py --resume --out runs/NAME\n"
        "  python train.py --config runs/NAME/config.json --seed 1 --out runs/again\n\n" + _tables(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        elsewhere={kebab(theirs): kebab(ours) for theirs, ours in ELSEWHERE.items()},
    )
    group_at = {first: group for group, first in GROUPS.items()}
    usual = {"recipe": default_recipe(Config.preset)}
    usual |= RECIPES[usual["recipe"]]
    for field in flags():
        if field.name in group_at:
            add = parser.add_argument_group(group_at[field.name]).add_argument
        kind, value = field.type, usual.get(field.name, field.default)
        default = "" if value in ("", None, False) and value is field.default else f" (default {value})"
        options: dict = {"help": field.metadata["help"].replace("%", "%%")}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
            default = " (default on)" if value else ""
        elif get_origin(kind) is Literal:
            options["choices"] = get_args(kind)
        else:
            options["type"] = _base_type(kind)
            options["metavar"] = {int: "N", float: "X", str: "TEXT"}[options["type"]]
        if field.name == "data":
            options |= {"nargs": "+", "metavar": "NAME[:WEIGHT]"}
        options["help"] += default
        add(f"--{kebab(field.name)}", **options)
        if field.name == "out":
            add("--config", metavar="FILE", help="start from a saved config.json; other flags override it")
    return parser


def _tables() -> str:
    """The tables of presets and recipes at the end of --help."""
    headers = ("preset", "layers x width", "context", "tokens/step", "steps", "lr")
    rows = []
    for name, fields in PRESETS.items():
        get = {**_UNSIZED, **fields, **RECIPES[default_recipe(name)]}.__getitem__
        tokens = get("batch_size") * get("grad_accum") * get("block_size")
        size = f"{get('n_layer')} x {get('n_embd')}"
        rows.append((name, size, f"{get('block_size'):,}", f"{tokens:,}", f"{get('max_steps'):,}", f"{get('lr'):g}"))
    lines = ["{:12s}  {:>14s}  {:>7s}  {:>11s}  {:>6s}  {:>6s}".format(*row) for row in (headers, *rows)]
    gpt2 = "the paper's setting: GPT-2 blocks, AdamW, cosine schedule, and lr and warm-up of the preset"
    settings = {name: ", ".join(f"{key} {value}" for key, value in RECIPES[name].items()) or gpt2 for name in RECIPES}
    lines += ["", "recipe", *(f"{name:12s}  {text}" for name, text in settings.items()), ""]
    lines.append("tiny and mini use --recipe fast by default; the others, which are published models, --recipe gpt2.")
    return "\n".join(lines)


def is_within(source: str, run: Path) -> bool:
    """Whether a source of weights is this run folder or a file in it."""
    path = os.path.realpath(source)  # also resolves a loop of symbolic links
    return os.path.realpath(run) in (path, os.path.dirname(path))


def architecture_fields() -> dict[str, dataclasses.Field]:
    """The fields of GPTConfig, by name, that no resumed run can change; dropout is not among them."""
    return {f.name: f for f in dataclasses.fields(GPTConfig) if f.metadata.get("resume", "refused") == "refused"}


def _taken_over(start: str, source: GPTConfig, may_be_shorter: bool, wanted: dict, typed_as: dict[str, str]) -> dict:
    """The architecture of the model given as --init-from, as fields. Raises InputError where a flag contradicts it.

    Dropout is not part of it. Where the context may be shorter, it is the requested one, or else at most the default.
    typed_as: for each field set on the command line, the flag that set it.
    """
    values = {name: value for name, value in to_dict(source).items() if name in architecture_fields()}
    if may_be_shorter:
        values["block_size"] = wanted.get("block_size", min(source.block_size, GPTConfig.block_size))
    for name, value in values.items():
        if name in typed_as and wanted[name] not in (value, getattr(source, name)):
            raise InputError(
                f"--init-from {start} has {name} {getattr(source, name)}, not {wanted[name]}: leave out "
                f"--{kebab(typed_as[name])}"
            )
    return values


def _read_saved(path: Path) -> dict:
    """The settings in a saved config.json, without --out, --resume, --overwrite and the environment."""
    values = read_json(path)
    recipe = {name: value for name, value in values.items() if name not in ("resume", "overwrite", "environment")}
    try:
        from_dict(recipe)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    recipe.pop("out", None)
    return recipe


def _base_type(kind) -> type:
    """float for `float | None`, else the type itself."""
    return next(t for t in get_args(kind) if t is not types.NoneType) if isinstance(kind, types.UnionType) else kind


def from_dict(values: dict) -> Config:
    """A Config from a dictionary of its fields. Raises InputError on an unknown name or a value of the wrong type."""
    fields = {f.name: f for f in dataclasses.fields(Config)}
    checked = {}
    for name, value in values.items():
        if name not in fields:
            raise InputError(f"unknown setting {shown(name)}: no such field in this version of minidisp")
        kind = fields[name].type
        if get_origin(kind) is Literal:
            valid = value in get_args(kind)
        elif value is None:
            valid = isinstance(kind, types.UnionType)
        else:
            base = _base_type(kind)
            if base is float and type(value) is int and abs(value) <= MOST:
                value = float(value)
            valid = type(value) is base
        if name == "data" and isinstance(value, list | tuple):
            valid = bool(value) and all(isinstance(part, str) for part in value)
        if not valid:
            raise InputError(f"setting {name!r} has the value {shown(value)}, which is not {_expected(kind)}")
        checked[name] = value
    return Config(**checked)


def _expected(kind) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    return f"of type {_base_type(kind).__name__}"


def to_dict(config: GPTConfig) -> dict:
    """The fields as a dictionary that JSON can hold and `from_dict` reads back.

    A field with its derived default is stored as 0, so that it follows a later change of n_embd.
    """
    usual = {name: 0 for name, value in config.usual().items() if getattr(config, name) == value}
    usual |= {"bias": True} if config.arch != "gpt2" else {}
    values = {**dataclasses.asdict(config), **usual}
    if isinstance(values.get("data"), tuple):
        values["data"] = [*values["data"]]
    return {**values, "norm_eps": float(values["norm_eps"])}


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises InputError, naming the file, if it is missing or is not a JSON object."""
    values = parse_json(read_bytes(path), path)
    if not isinstance(values, dict):
        raise InputError(f"{path} contains a JSON {type(values).__name__}, but must contain an object")
    return values
