"""The folder of a run: who may write to it, what a run starts or resumes from, and what is written there.

It holds config.json, metrics.jsonl (one JSON object per logged step and per evaluation), ckpt_last.pt, ckpt_best.pt,
ckpt_ema.pt (with --ema), tokenizer.model, summary.json and figures/. Only the main process writes to it.
"""

import dataclasses
import math
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import torch

from minidisp import InputError, read_bytes
from minidisp.config import Config, from_dict, is_within, read_json, to_dict
from minidisp.data import Dataset
from minidisp.runtime import checkpoint, files
from minidisp.runtime.command import warn
from minidisp.runtime.device import describe_environment
from minidisp.runtime.metrics_log import metrics_lines, read_metrics
from minidisp.runtime.processes import World
from minidisp.template import FILE as TEMPLATE

# The files of a run folder in addition to config.json and checkpoints.
FIGURES = tuple(f"figures/{name}.png" for name in ("loss", "cosine", "heatmap"))
OWN_FILES = ("metrics.jsonl", "summary.json", "tokenizer.model", TEMPLATE, *FIGURES)
OWN_FOLDERS = ("figures", "tensorboard", "wandb")
REPLACED = "config.json.tmp"  # where config.json is while a run is replaced; writing the new one removes it


class RunFolder:
    """The folder of one run, from the check that it may be used to the last file. Raises InputError if it may not.

    loggers: also receive each line of metrics.jsonl; see report.loggers.
    """

    def __init__(self, config: Config, world: World, at_exit: ExitStack, loggers: Sequence = ()):
        self.path, self._config, self._world, self._at_exit = config.run_dir, config, world, at_exit
        self._say = warn if world.main else lambda text: None
        self._metrics: BinaryIO | None = None
        self._logged = -1  # step of the last line of metrics.jsonl
        self._later_best = False  # ckpt_best.pt is from a step that --resume repeats
        self._loggers = loggers if world.main else ()
        if world.main:
            refuse_occupied(self.path, config)

    def read_checkpoint(
        self, config: Config, dataset: Dataset, teacher_hash: str | None
    ) -> tuple[dict, Path, list[str]] | None:
        """The checkpoint that --resume continues from: its state, its path, and the settings that changed, in words;
        None if there is none yet.

        Locks the folder. Raises InputError if the run does not match, if its checkpoints are missing or damaged, or if
        the processes do not have the same data.
        """
        self._world.agree({"--data": dataset.hash, "tokenizer": dataset.tokenizer.hash, "--distill": teacher_hash})
        if not config.resume:
            return None
        if self._world.main:
            self._open_metrics()
        self._world.barrier()
        found = checkpoint.read_to_resume(self.path, self._say)
        logged = read_metrics(self.path / "metrics.jsonl")
        last = max((line["step"] for line in logged), default=0)
        if found:
            state, path = found
            changed = changed_settings(state, config, dataset, teacher_hash, path)
            if self._world.main:
                self._check_shards(dataset)
            self._world.agree({"checkpoint": f"{path.name}, step {state['step']}"})
            before = state.get("logged", 0)  # flushed to disk before the checkpoint was written; not in old checkpoints
            if type(before) is not int or last < before:
                raise InputError(
                    f"--resume: {path} was saved after step {before!a:.20} was logged, but "
                    f"{self.path / 'metrics.jsonl'} ends at step {last}: they are from different runs, or lines are "
                    "missing; restore the file, or start over with --overwrite"
                )
            if self._best_is_later(state["step"], logged):
                self._later_best, state["best_val_loss"] = True, math.inf
            if any(state["config"].get(name) != to_dict(config)[name] for name in ("eval_tokens", "data")):
                state["best_val_loss"] = math.inf  # that of other validation windows
            return state, path, changed
        saved = read_json(self.path / "config.json")
        if last > saved.get("save_every", config.save_every):
            raise InputError(
                f"--resume: {self.path} reached step {last}, but has no usable checkpoint; start over with --overwrite"
            )
        self._say(f"{self.path} was stopped before its first checkpoint: it starts again at step 0")
        return None

    def _check_shards(self, dataset: Dataset) -> None:
        """Verify the corpus if its files were modified after the run's start. Raises InputError if a shard differs."""
        if environment_of(self.path).get("data_files") != dataset.files_state:
            self._say(f"checking the shards of {dataset.folder}: their times have changed since this run started")
            dataset.verify()

    def _best_is_later(self, step: int, logged: list[dict]) -> bool:
        """Whether ckpt_best.pt is from an evaluation after that step, which will be repeated and may give another
        loss."""
        if not any("val_loss" in line and line["step"] > step for line in logged):
            return False
        try:
            return checkpoint.read(self.path / checkpoint.BEST)["step"] > step
        except InputError:  # missing or damaged
            return False

    def begin(self, config: Config, dataset: Dataset, device: torch.device, saved_step: int | None) -> int | None:
        """Write the first files of a run, or remove what was logged after its checkpoint, at saved_step.

        Returns the step of the last evaluation that is kept, if any; the same in all processes.
        """
        self._config = config  # completed by the data and --init-from
        environment = describe_environment(dataset, device, self._world.size)
        self._world.barrier()  # all processes have read what they need: from here on, files change
        last_eval = None
        if self._world.main:
            if not config.resume:
                self.path.mkdir(parents=True, exist_ok=True)
                self._open_metrics()
                refuse_occupied(self.path, config)  # again, now that the folder is locked
            # These may fail, so they are opened before anything is removed.
            self._open_loggers(config, saved_step, outside=True)
            files.remove_unfinished(self.path)
            if config.resume:
                self._logged, last_eval = rewind_metrics(self._metrics, -1 if saved_step is None else saved_step)
            else:
                remove_run(self.path, self._metrics, but="wandb_id" if config.wandb else "")
            if self._later_best:
                (self.path / checkpoint.BEST).unlink()
            if saved_step is None or saved_step < config.max_steps:  # results of a shorter run
                for name in ("summary.json", "measured.json"):
                    (self.path / name).unlink(missing_ok=True)
            self._open_loggers(config, saved_step, outside=False)
            files.write_json(self.path / "config.json", {**to_dict(config), "environment": environment})
            tokenizer = (dataset.folder / "tokenizer.model").read_bytes()
            files.write_atomic(self.path / "tokenizer.model", lambda file: file.write(tokenizer))
            if dataset.template:
                files.write_json(self.path / TEMPLATE, dataset.template.to_meta())
        newest = self._world.max(-1 if last_eval is None else last_eval)
        return None if newest < 0 else newest

    def _open_loggers(self, config: Config, saved_step: int | None, outside: bool) -> None:
        for logger in self._loggers:
            if logger.outside == outside:
                logger.open(self.path, to_dict(config), saved_step or 0)

    def _open_metrics(self) -> None:
        self._metrics = self._at_exit.enter_context(files.open_log(self.path / "metrics.jsonl", warn))

    def log(self, line: dict) -> None:
        """Append a line to metrics.jsonl and pass it to the other loggers."""
        if self._world.main:
            self._refuse_replaced()
            files.append_line(self._metrics, files.to_json(line))
            self._logged = line["step"]
            for logger in self._loggers:
                logger.log(line)

    def save(self, state: dict) -> None:
        """Write ckpt_last.pt, and with --keep a numbered checkpoint. Every process calls it: each has part of the
        state."""
        state = checkpoint.gathered(state, self._world.main)
        if self._world.main:
            self._refuse_replaced()
            os.fsync(self._metrics.fileno())  # metrics.jsonl must never be behind a checkpoint
            checkpoint.save(self.path, {**state, "logged": self._logged}, state["step"], self._config.keep)

    def save_weights(self, name: str, weights: dict, step: int, **scores: float) -> None:
        """Write ckpt_best.pt or ckpt_ema.pt, which hold weights only. Every process calls it."""
        weights = checkpoint.gathered(weights, self._world.main)
        if self._world.main:
            self._refuse_replaced()
            state = {"model": weights, "config": to_dict(self._config), "step": step, **scores}
            checkpoint.write(self.path / name, state)

    def _refuse_replaced(self) -> None:
        """Raise InputError if the folder was removed or replaced during training: it may belong to another run by
        now."""
        if not files.is_still(self._metrics):
            raise InputError(f"{self.path} was removed or replaced during training: nothing more is written to it")

    def close_loggers(self) -> None:
        for logger in self._loggers:
            logger.close()


def environment_of(run: Path) -> dict:
    """What a run ran on, from its config.json (see describe_environment); {} if it is not recorded."""
    saved = run / "config.json"
    environment = read_json(saved).get("environment") if saved.is_file() else None
    return environment if isinstance(environment, dict) else {}


def refuse_occupied(run: Path, config: Config) -> None:
    """Raise InputError if the folder holds a run that would be lost, has none to resume, or contains links."""
    if run.exists() and not run.is_dir():
        raise InputError(f"{run} is not a folder: give another --out")
    if (run / "meta.json").exists() or any(run.glob("*.safetensors")):
        raise InputError(f"{run} is a prepared corpus or a Hugging Face model: give another --out")
    if link := next((run / name for name in OWN_FOLDERS if (run / name).is_symlink()), None):
        raise InputError(f"{link} is a link: a run writes only into folders of its own; remove the link")
    occupied = (run / "config.json").exists() or (run / REPLACED).exists() or any(run.glob("ckpt_*.pt"))
    if not occupied and (foreign := next((name for name in OWN_FILES if _has(run / name)), None)):
        raise InputError(f"{run} is not a run folder, but has a {foreign}, which would be lost: give another --out")
    if config.init_from and not config.resume and is_within(config.init_from, run):
        raise InputError(
            f"--init-from {config.init_from} is this run itself, which would be replaced: give another --out"
        )
    if config.resume and not occupied:
        raise InputError(f"--resume: {run} holds no run; omit --resume, or pass the run's folder with --out")
    if occupied and not config.overwrite and not (run / "config.json").exists():
        raise InputError(
            f"{run} has no config.json: it was being replaced when the process was stopped, or a file was removed; add "
            "--overwrite to start over, or give another --out"
        )
    if occupied and not config.resume and not config.overwrite:
        raise InputError(
            f"{run} already holds a run: add --resume to continue it, --overwrite to replace it, or another --out"
        )


def _has(path: Path) -> bool:
    """Whether the file exists and is not empty."""
    return path.exists() and path.stat().st_size > 0


def remove_run(run: Path, metrics: BinaryIO, but: str) -> None:
    """Remove the files of an earlier run, and nothing else that may be in the folder.

    Its config.json is renamed first, so that --resume cannot continue a run that was being replaced. Until the new one
    is written, the renamed file marks the folder as a run, so that --overwrite can be repeated.

    metrics: the open metrics.jsonl. but: the name of a file that is already new, and stays.
    """
    if (run / "config.json").exists():
        os.replace(run / "config.json", run / REPLACED)
    metrics.truncate(0)
    for name in (*OWN_FILES, "measured.json", "wandb_id"):
        if name not in (but, "metrics.jsonl") and os.path.lexists(run / name):
            (run / name).unlink()
    for old in (*run.glob("ckpt_*.pt"), *run.glob("tensorboard/events.out.tfevents.*")):
        old.unlink()


def changed_settings(state: dict, config: Config, dataset: Dataset, teacher_hash: str | None, path: Path) -> list[str]:
    """The settings that differ from the checkpoint's and affect training, each in words.

    Raises InputError naming the first one that must not differ: the architecture, the data, the tokenizer, the teacher,
    the seed, the optimiser, and the sequences per step, which determine the position in the data.
    """
    try:
        saved = from_dict(state["config"])
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    if state["tokenizer_hash"] != dataset.tokenizer.hash:
        raise InputError(
            f"--resume: {path} was trained with a different tokenizer from that of --data {dataset.folder}"
        )
    if state["data_hash"] != dataset.hash:
        raise InputError(f"--resume: {path} was trained on different data from that now in --data {dataset.folder}")
    if saved.batch_size * saved.grad_accum != config.batch_size * config.grad_accum:
        raise InputError(
            f"--resume: batch_size x grad_accum is {saved.batch_size} x {saved.grad_accum} in {path}, but "
            f"{config.batch_size} x {config.grad_accum} here; keep the product, which sets the position in the data"
        )
    if state["step"] > config.max_steps:
        raise InputError(f"--resume: {path} is at step {state['step']}, which is beyond --max-steps {config.max_steps}")
    taught_by = state.get("teacher_hash")
    if not isinstance(taught_by, str | None) or taught_by != teacher_hash:
        raise InputError(f"--resume: {path} was not trained with the teacher that is now --distill {config.distill}")
    changed = []
    weights, saved_weights = ([weight for _, weight in each.corpora] for each in (config, saved))
    if weights != saved_weights:  # the corpora are the same, by their hashes
        now, before = (":".join(map(str, each)) for each in (weights, saved_weights))
        changed.append(f"weights of --data {now} instead of {before}")
    for field in dataclasses.fields(Config):
        before, now = getattr(saved, field.name), getattr(config, field.name)
        may_change = field.metadata.get("resume", "refused")  # vocab_size has no flag
        if before == now or may_change == "silent":
            continue
        if may_change == "refused":
            raise InputError(f"--resume: {field.name} is {before} in {path}, but {now} here; keep the saved value")
        stretched = field.name == "max_steps" and config.schedule != "constant"
        words = f" (this also changes the {config.schedule} schedule)" if stretched else ""
        changed.append(f"{field.name} {now} instead of {before}{words}")
    checkpoint.refuse_misfit(state, config, path)
    return changed


def changed_dropout(state: dict, config: Config, micro_batch: int, processes: int) -> list[str]:
    """The changes that affect dropout's random numbers, each in words. These depend on the sequences per forward pass.

    state: of the checkpoint. micro_batch: sequences per forward pass from here on.
    """
    if not config.dropout:
        return []
    before = (1 + len(state.get("rng_of_others", [])), state["micro_batch"], state["config"].get("compile", "auto"))
    now = (processes, micro_batch, config.compile)
    return [
        f"{what} {new} instead of {old} (dropout draws other random numbers)"
        for what, old, new in zip(("processes", "micro-batches of", "compile"), before, now, strict=True)
        if old != new
    ]


def rewind_metrics(file: BinaryIO, step: int) -> tuple[int, int | None]:
    """Remove the lines after `step`, which will be repeated, and an incomplete last line; returns the steps of the last
    line and of the last evaluation that remain (-1 and None if there is none).

    The file is truncated in place: if this is interrupted, the next --resume repeats it.
    """
    path = Path(file.name)
    last, last_eval, keep = -1, None, 0
    for line, end in metrics_lines(read_bytes(path), path):
        if line["step"] > step:
            break
        last, last_eval, keep = line["step"], line["step"] if "val_loss" in line else last_eval, end
    file.truncate(keep)
    return last, last_eval
