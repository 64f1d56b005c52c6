"""The folder of a run: who may write to it, what a run starts or resumes from, and what is written there.

config.json, metrics.jsonl (one JSON object per logged step and per evaluation), ckpt_last.pt, ckpt_best.pt, ckpt_ema.pt (with
--ema), tokenizer.model, summary.json, figures/. One process writes; of several that train together, the main one.
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
from minidisp.config import Config, from_dict, read_json, to_dict
from minidisp.data import Dataset
from minidisp.runtime import checkpoint, files
from minidisp.runtime.command import warn
from minidisp.runtime.device import describe_environment
from minidisp.runtime.metrics_log import metrics_lines, read_metrics
from minidisp.runtime.processes import World
from minidisp.template import FILE as TEMPLATE

# The files of a run folder beside config.json and checkpoints.
FIGURES = tuple(f"figures/{name}.png" for name in ("loss", "cosine", "heatmap"))
OWN_FILES = ("metrics.jsonl", "summary.json", "tokenizer.model", TEMPLATE, *FIGURES)
OWN_FOLDERS = ("figures", "tensorboard", "wandb")
REPLACED = "config.json.tmp"  # where config.json is while a run is replaced; writing the new one removes it


class RunFolder:
    """The folder of one run, from the check that it may be used to the last file. Raises InputError if it may not.

    loggers: what else is told each line of metrics.jsonl; see report.loggers.
    """

    def __init__(self, config: Config, world: World, at_exit: ExitStack, loggers: Sequence = ()):
        self.path, self._config, self._world, self._at_exit = config.run_dir, config, world, at_exit
        self._say = warn if world.main else lambda text: None
        self._metrics: BinaryIO | None = None
        self._logged = -1  # step of the last line of metrics.jsonl
        self._later_best = False  # ckpt_best.pt is of a step that --resume takes again
        self._loggers = loggers if world.main else ()
        if world.main:
            refuse_occupied(self.path, config)

    def read_checkpoint(
        self, config: Config, dataset: Dataset, teacher_hash: str | None
    ) -> tuple[dict, Path, list[str]] | None:
        """What --resume continues from: the state, its file, and in words what is changed on purpose; None if there is none yet.

        Locks the folder. Raises InputError if the run was another one, if its checkpoints are gone or damaged, or if the
        processes do not have the same data.
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
                    f"--resume: {path} was saved after step {before!a:.20} was logged, but {self.path / 'metrics.jsonl'} ends at "
                    f"step {last}: they are not of one run, or lines are lost; restore it, or start again with --overwrite"
                )
            if self._best_is_later(state["step"], logged):
                self._later_best, state["best_val_loss"] = True, math.inf
            return state, path, changed
        saved = read_json(self.path / "config.json")
        if last > saved.get("save_every", config.save_every):
            raise InputError(
                f"--resume: {self.path} got to step {last}, but its checkpoints are gone, or none was good; --overwrite starts it again"
            )
        self._say(f"{self.path} was stopped before its first checkpoint: it starts again at step 0")
        return None

    def _check_shards(self, dataset: Dataset) -> None:
        """Read the corpus if its files have been written to since the run began. InputError if a shard has changed."""
        saved = self.path / "config.json"
        environment = read_json(saved).get("environment") if saved.exists() else None
        known = environment.get("data_files") if isinstance(environment, dict) else None
        if known != dataset.files_state:
            self._say(f"checking the shards of {dataset.folder}: their times are not those of this run's start")
            dataset.verify()

    def _best_is_later(self, step: int, logged: list[dict]) -> bool:
        """Whether ckpt_best.pt is of an evaluation after that step, which will be repeated and may come out otherwise."""
        if not any("val_loss" in line and line["step"] > step for line in logged):
            return False
        try:
            return checkpoint.read(self.path / checkpoint.BEST)["step"] > step
        except InputError:  # there is none that could be used
            return False

    def begin(self, config: Config, dataset: Dataset, device: torch.device, saved_step: int | None) -> int | None:
        """Write the first files of a run, or cut off what was logged after its checkpoint, at saved_step.

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
            self._open_loggers(
                config, saved_step, outside=True
            )  # this may fail, so it comes before anything is removed
            files.remove_unfinished(self.path)
            if config.resume:
                self._logged, last_eval = rewind_metrics(self._metrics, -1 if saved_step is None else saved_step)
            else:
                remove_run(self.path, self._metrics, but="wandb_id" if config.wandb else "")
            if self._later_best:
                (self.path / checkpoint.BEST).unlink()
            self._open_loggers(config, saved_step, outside=False)
            files.write_json(self.path / "config.json", {**to_dict(config), "environment": environment})
            vocabulary = (dataset.folder / "tokenizer.model").read_bytes()
            files.write_atomic(self.path / "tokenizer.model", lambda file: file.write(vocabulary))
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
        """Append a line to metrics.jsonl and hand it to the other loggers."""
        if self._world.main:
            self._refuse_replaced()
            files.append_line(self._metrics, files.to_json(line))
            self._logged = line["step"]
            for logger in self._loggers:
                logger.log(line)

    def save(self, state: dict) -> None:
        """Write ckpt_last.pt, and with --keep a numbered one. Every process calls it, since each has a share of the state."""
        state = checkpoint.gathered(state, self._world.main)
        if self._world.main:
            self._refuse_replaced()
            os.fsync(self._metrics.fileno())  # a checkpoint never knows of more steps than metrics.jsonl
            checkpoint.save(self.path, {**state, "logged": self._logged}, state["step"], self._config.keep)

    def save_weights(self, name: str, weights: dict, step: int, **scores: float) -> None:
        """Write ckpt_best.pt or ckpt_ema.pt, which hold weights only. Every process calls it."""
        weights = checkpoint.gathered(weights, self._world.main)
        if self._world.main:
            self._refuse_replaced()
            state = {"model": weights, "config": to_dict(self._config), "step": step, **scores}
            checkpoint.write(self.path / name, state)

    def _refuse_replaced(self) -> None:
        """Raise InputError if the folder was removed or replaced while this process trained: it may be another run's by now."""
        if not files.is_still(self._metrics):
            raise InputError(
                f"{self.path} was removed or replaced while this process trained into it: nothing more is written there"
            )

    def close_loggers(self) -> None:
        for logger in self._loggers:
            logger.close()


def refuse_occupied(run: Path, config: Config) -> None:
    """Raise InputError if the folder holds a run that would be lost, lacks one to resume, or leads elsewhere by links."""
    if run.exists() and not run.is_dir():
        raise InputError(f"{run} is not a folder: give another --out")
    if (run / "meta.json").exists() or any(run.glob("*.safetensors")):
        raise InputError(f"{run} is a prepared corpus or a Hugging Face model: give another --out")
    if link := next((run / name for name in OWN_FOLDERS if (run / name).is_symlink()), None):
        raise InputError(f"{link} is a link: a run writes only into folders of its own; remove the link")
    occupied = (run / "config.json").exists() or (run / REPLACED).exists() or any(run.glob("ckpt_*.pt"))
    if not occupied and (foreign := next((name for name in OWN_FILES if _has(run / name)), None)):
        raise InputError(f"{run} is no run, but holds {foreign}, which would be lost: give another --out")
    if config.resume and not occupied:
        raise InputError(f"--resume: {run} holds no run; leave out --resume, or name the run's folder with --out")
    if occupied and not config.overwrite and not (run / "config.json").exists():
        raise InputError(
            f"{run} has no config.json: it was being replaced when the process was stopped, or a file was removed; add "
            "--overwrite to start the run again, or give another --out"
        )
    if occupied and not config.resume and not config.overwrite:
        raise InputError(
            f"{run} already holds a run: add --resume to continue it, --overwrite to replace it, or another --out"
        )


def _has(path: Path) -> bool:
    """Whether there is something to lose."""
    return path.exists() and path.stat().st_size > 0


def remove_run(run: Path, metrics: BinaryIO, but: str) -> None:
    """Remove the files of an earlier run, and nothing else that may be in the folder.

    Its config.json goes first, so that --resume cannot continue a run that was being replaced. Under its other name it
    shows, until the new one is written, that the folder belongs to a run, so that --overwrite can be repeated.

    metrics: the open metrics.jsonl. but: the name of a file that is new already.
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

    Raises InputError naming the first one that must not differ: the architecture, the data, the tokenizer, the teacher, the
    seed, the optimiser, and the sequences per step, which determine the position in the data.
    """
    try:
        saved = from_dict(state["config"])
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    if state["tokenizer_hash"] != dataset.tokenizer.hash:
        raise InputError(f"--resume: {path} was trained with another tokenizer than that of --data {dataset.folder}")
    if state["data_hash"] != dataset.hash:
        raise InputError(f"--resume: {path} was trained on other data than --data {dataset.folder} holds now")
    if saved.batch_size * saved.grad_accum != config.batch_size * config.grad_accum:
        raise InputError(
            f"--resume: batch_size x grad_accum is {saved.batch_size} x {saved.grad_accum} in {path}, but "
            f"{config.batch_size} x {config.grad_accum} is asked for; keep the product, which determines the position in the data"
        )
    if state["step"] > config.max_steps:
        raise InputError(
            f"--resume: {path} is of step {state['step']}, which --max-steps {config.max_steps} would not reach"
        )
    taught_by = state.get("teacher_hash")
    if not isinstance(taught_by, str | None) or taught_by != teacher_hash:
        raise InputError(f"--resume: {path} was not trained with what is now in --distill {config.distill}")
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
            raise InputError(
                f"--resume: {field.name} is {before} in {path}, but {now} is asked for; leave it as it was"
            )
        stretched = field.name == "max_steps" and config.schedule != "constant"
        words = f" (its {config.schedule} schedule, too)" if stretched else ""
        changed.append(f"{field.name} {now} instead of {before}{words}")
    checkpoint.refuse_misfit(state, config, path)
    return changed


def changed_dropout(state: dict, config: Config, micro_batch: int, processes: int) -> list[str]:
    """What changes the random numbers of dropout, which depend on the sequences that go through the model together, in words.

    state: of the checkpoint. micro_batch: sequences at a time from here on.
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
    """Cut off the lines after `step`, which will be run again, and a torn one; returns the steps of the last line and of the
    last evaluation that stay (-1 and None if there is none).

    In place: if the cut is interrupted, the next --resume repeats it.
    """
    path = Path(file.name)
    last, last_eval, keep = -1, None, 0
    for line, end in metrics_lines(read_bytes(path), path):
        if line["step"] > step:
            break
        last, last_eval, keep = line["step"], line["step"] if "val_loss" in line else last_eval, end
    file.truncate(keep)
    return last, last_eval
