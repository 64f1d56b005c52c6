"""Train a small language model, with or without the dispersion loss: config, data, model, objective, loop, summary.

    python train.py --dispersion 0.1                  # the default corpus and model; minutes on two cores
    python train.py --resume --out runs/NAME          # continue from the last checkpoint; see python train.py --help

Writes a run folder: config.json, metrics.jsonl, ckpt_last.pt, ckpt_best.pt, tokenizer.model, summary.json, figures/.
Exit codes: 0 done; 1 another process died; 2 bad usage or input; 3 diverged; 130 and 143 after SIGINT and SIGTERM.
The parts you will want to edit are here and in the files beside minidisp/model.py: see docs/hacking.md.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # python -P leaves it out
if __name__ == "__main__":  # Ctrl-C while torch is imported
    __import__("minidisp").end_on_interrupt()

import dataclasses
import math
import signal
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from data.prepare import open_corpora
from minidisp import loss, report
from minidisp.config import Config, parse, to_dict
from minidisp.countermeasures import RANK, EmbeddingNoise, Teacher, derived_seed, forget, forgets_before
from minidisp.data import micro_batches, shares, training_batches
from minidisp.dispersion import DispersionLoss, mean_cosine
from minidisp.model import GPT
from minidisp.objective import Forward, build_objective
from minidisp.ops import build
from minidisp.optim import Average, build_optimizers, learning_rate, step_where
from minidisp.runtime import checkpoint, files
from minidisp.runtime.command import catch_signals, leave, run_command, stop
from minidisp.runtime.device import compiles, describe_use, fetched, get_rng_state, set_rng_state, set_up, to_device
from minidisp.runtime.guard import Diverged, Guard, Interval, first_bad_tensor, half_of, is_finite, refuse_too_large
from minidisp.runtime.init_from import start_from
from minidisp.runtime.processes import ALONE, World, data_parallel, set_gradient_sync, shard
from minidisp.runtime.run_folder import RunFolder, changed_dropout
from minidisp.validation import Validation


def main(config: Config, world: World = ALONE) -> dict:
    """Train as configured and return the summary (also in summary.json; empty in all but the main process).

    Raises InputError on invalid input, Diverged if training diverges, and SystemExit with 128 + the signal's number if
    a signal stopped the run, after saving a checkpoint.
    """
    with ExitStack() as at_exit:  # however the run ends, the folder is unlocked and signal handlers are restored
        trainer = Trainer(config, world, at_exit)
        trainer.introduce()
        trainer.train(catch_signals(at_exit, world))
        return trainer.summarise() if world.main else {}


class MicroBatch(NamedTuple):
    """The sequences of one forward and backward pass."""

    first: int  # index of the first sequence in the run
    parts: float  # this process's sequences per step / sequences in this micro-batch
    weight: Tensor  # unmasked targets per sequence, relative to the whole step; 1 if no target is masked
    idx: Tensor  # (B, T) int64
    targets: Tensor  # (B, T) int64, -1 where masked
    segments: Tensor | None = None  # (B, T) int64, index of the example of each token; None: a sequence is one text


class Trainer:
    """One training run: its parts, in the order of construction, then the loop, a step, evaluation, checkpoints."""

    def __init__(self, config: Config, world: World, at_exit: ExitStack):
        # --- system ---------------------------------------------------------------------------------------------------
        self.world = world
        self.device, self.dtype, self.autocast = device, dtype, _ = set_up(config, world)
        self.sequences = config.batch_size * config.grad_accum  # per optimiser step
        world.share_of(self.sequences)  # refuses an uneven split before anything is read
        self.sharded = config.shard and world.launched
        self.run = RunFolder(config, world, at_exit, report.loggers(config.tensorboard, config.wandb))

        # --- data -----------------------------------------------------------------------------------------------------
        at_exit.enter_context(build.ahead(device.type))  # on first use: compiles while the corpus is prepared
        self.dataset = dataset = world.main_first("corpus", lambda: open_corpora(config.corpora))
        config = dataclasses.replace(config, vocab_size=dataset.tokenizer.vocab_size)
        source = None
        if config.init_from and not config.resume:
            source, config = world.main_first("start", lambda: start_from(config, dataset))
        self.config = config
        self.batches = training_batches(dataset, config.block_size, config.seed, config.packing)
        self.validation = Validation(dataset, config, device, world)

        # --- model and optimisers -------------------------------------------------------------------------------------
        # The teacher comes before seeding, so that its random initialisation does not change the run's random numbers.
        self.teacher = Teacher(config, dataset, device) if config.distill else None
        found = self.run.read_checkpoint(config, dataset, self.teacher.hash if self.teacher else None)
        state, state_path, self.changed = found or (None, None, [])
        if config.init_from and config.resume and not state:  # stopped before its first checkpoint
            source, _ = world.main_first("start", lambda: start_from(config, dataset))
        refuse_too_large(config, device, world.size if self.sharded else 1)
        torch.manual_seed(config.seed)
        self.model = model = GPT(config)
        if state:
            checkpoint.load_weights(model, state, state_path)
        elif source:
            model.load_state_dict(source.state_dict())
        model.to(device)
        model.choose_loss()
        self.compiled = compiles(config.compile, device)
        if self.sharded:
            shard(model, device, dtype, world, self.compiled)
        self.optimizers = build_optimizers(model, config)
        self.average = Average(model, config.ema) if config.ema else None
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.trained = torch.compile(model) if self.compiled and not self.sharded else model
        if world.launched and not self.sharded:
            self.trained = data_parallel(self.trained)

        # --- objective ------------------------------------------------------------------------------------------------
        impl = config.dispersion_impl if config.dispersion else "reference"
        dispersion = DispersionLoss(
            config.dispersion_variant, config.dispersion_layers, config.dispersion_tokens, config.dispersion_tau,
            config.dispersion_clamp, seed=config.seed, impl=impl,
        )  # fmt: skip
        # This may build the extension; do it before the first step.
        how = world.main_first("extension", lambda: dispersion.prepare(device.type)) if config.dispersion else ""
        self.objective = build_objective(config, model, dispersion, self.teacher, how)
        self.noise = EmbeddingNoise(model.wte, config) if config.noisy_embedding else None

        # --- state of the run -----------------------------------------------------------------------------------------
        self.step, self.seconds, self.best_val_loss = 0, 0.0, math.inf
        self.saved_step: int | None = None  # step of the latest checkpoint
        self.micro_batch = config.batch_size  # sequences per micro-batch; halved on out-of-memory
        self.guard = Guard(device, float16=self.scaler.is_enabled())
        self.interval = Interval(device)
        if not world.main:  # own dropout per process; the main one keeps the generator state after initialisation
            torch.manual_seed(derived_seed(config.seed, RANK, world.rank, state["step"] if state else 0))
        if state:
            self.load_state(state, state_path)
        self.last_eval = self.run.begin(config, dataset, device, self.saved_step)

    def introduce(self) -> None:
        """Print the first lines of a run: data, model, steps, loss, device."""
        where = describe_use(self.config, self.device, self.dtype, self.compiled, self.world, self.dataset)
        run = self.dataset, self.batches, self.config, self.model.num_params(), self.objective.terms
        print(report.introduction(*run, where, self.step, self.changed), flush=True)

    # --- the loop -----------------------------------------------------------------------------------------------------

    def train(self, signals: list[signal.Signals]) -> None:
        """Take the remaining steps. The signal handler appends to `signals`, which stops the run after the step."""
        config, world = self.config, self.world
        self.progress = progress = report.Progress(config.max_steps, self.step, self.seconds, hidden=not world.main)
        self.rng = get_rng_state(self.device)
        reached = self.step == config.max_steps != self.last_eval  # --max-steps 0, or stopped before evaluating
        if reached or self.last_eval is None:
            with progress.paused():
                self.evaluate()  # also before the first step: condensation exists at initialisation
        self.model.train()
        save_due, stop_signal = False, world.max(max(signals, default=0))
        while self.step < config.max_steps and not stop_signal:
            logging = (self.step + 1) % config.log_every == 0 or self.step == 0
            values = self.take_step(logging)
            progress.advance()

            last = self.step == config.max_steps
            evaluating = last or self.step % config.eval_every == 0
            stop_signal = world.max(max(signals, default=0))
            save_due = save_due or last or self.step % config.save_every == 0 or stop_signal > 0
            if logging or evaluating or save_due or self.device.type == "cpu":  # synchronises with any other device
                self.guard.fetch(self.step)
                progress.estimate(self.device)
            if logging:
                self.log(values)
            if self.guard.hopeless(self.step):
                raise self.diverged(f"{self.guard.total} of {self.step} steps had a NaN or Inf loss or gradient")
            if evaluating:
                with progress.paused():
                    self.evaluate()
            if save_due and self.is_good():  # otherwise keep the last good checkpoint and try again after the next step
                with progress.paused():
                    self.save()
                save_due = False
        progress.close()
        if reached or self.step == 0:
            self.save()  # also the model at initialisation, for comparisons
        self.run.close_loggers()
        if stop_signal:
            stop(stop_signal, self.run.path, self.step, self.saved_step, world)

    def take_step(self, logging: bool) -> dict[str, Tensor | float]:
        """One optimiser step; returns its values for metrics.jsonl."""
        config, step, lr = self.config, self.step, learning_rate(self.step, self.config)
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = lr * group.get("lr_scale", 1.0)
        if forgets_before(step, config):
            forget(self.model.wte.weight, self.optimizers, config.seed, step)
        self.rng = get_rng_state(self.device)
        while True:
            try:
                values = self.forward_backward(logging)
                break
            except (RuntimeError, MemoryError) as error:  # on out-of-memory, repeat with smaller micro-batches
                self.micro_batch = half_of(self.micro_batch, error, f"step {step + 1}", self.world, config.dropout)
                self.model.zero_grad(set_to_none=True)
                set_rng_state(self.rng, self.device)
        grad_norm = self.update(values)
        if self.average:
            self.average.update(step + 1)
        self.step += 1
        return {**values, **self.objective.scheduled_weights(step), "lr": lr, "grad_norm": grad_norm}

    def micro_batches(self, step: int, world: World) -> list[MicroBatch]:
        """The micro-batches of this process in a step, on the device."""
        share = world.share_of(self.sequences)
        start = step * self.sequences + world.rank * share
        read = [
            (first, count, [to_device(tokens, self.device) for tokens in self.batches.batch(first, count)])
            for first, count in micro_batches(start, start + share, self.micro_batch)
        ]
        counted = [(targets != loss.IGNORE).sum() for _, _, (_, targets, *_) in read]
        total = world.sum(sum(counted)).clamp(min=1)
        # Sums of integers, so that the weight is exactly 1 if no target is masked.
        return [
            MicroBatch(first, share / count, number * self.sequences / (total * count), *tensors)
            for (first, count, tensors), number in zip(read, counted, strict=True)
        ]

    def forward(self, model: nn.Module, batch: MicroBatch, step: int) -> Forward:
        """A forward pass; the mean of `ce` over micro-batches and processes is the mean over all unmasked targets."""
        if self.noise:
            self.noise.draw(batch.first, len(batch.idx))
        _, ce, hidden_states = model(batch.idx, batch.targets, return_hidden_states=True, segments=batch.segments)
        ce = torch.where(batch.weight > 0, ce * batch.weight, 0.0)  # the mean over zero targets is NaN
        return Forward(batch.idx, batch.targets, ce, hidden_states, step, batch.segments, batch.weight)

    def forward_backward(self, logging: bool) -> dict[str, Tensor]:
        """Accumulate the gradients of the step; returns the means of the logged values, as tensors.

        A term is a mean over sequences, so its mean over the processes equals the value of a single process.
        """
        means = defaultdict(float)
        batches = self.micro_batches(self.step, self.world)
        for batch in batches:
            if self.world.launched:
                set_gradient_sync(self.trained, self.model, batch is batches[-1])
            with self.autocast:
                forward = self.forward(self.trained, batch, self.step)
                values = self.objective(forward)
            if logging:
                with torch.no_grad():
                    cosines = [mean_cosine(z, eps=0.0) for z in forward.hidden_states[1:]]
                    values["mean_cosine"] = torch.stack(cosines).mean()
            del forward  # so that the backward pass can free each layer's hidden states as it goes
            self.scaler.scale(values["loss"] / batch.parts).backward()
            for name, value in values.items():
                means[name] += value.detach() / batch.parts
        return self.world.mean(means)

    def update(self, values: dict[str, Tensor]) -> Tensor:
        """Clip the gradients and step the optimisers, unless one is NaN or Inf; returns the norm before clipping."""
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        # An infinite max_norm clips nothing, but still computes the norm.
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip or math.inf)
        if self.sharded:
            grad_norm = grad_norm.full_tensor()
        finite = torch.isfinite(values["loss"]) & torch.isfinite(grad_norm)
        step_where(finite, self.optimizers)
        self.model.zero_grad(set_to_none=True)
        self.scaler.update()
        self.guard.count(finite, self.step)
        self.interval.add(finite, values["ce"], grad_norm)
        return grad_norm

    def log(self, values: dict) -> None:
        """Write a line of metrics.jsonl and show loss and throughput."""
        tokens_per_step = self.config.tokens_per_step
        values = fetched({**values, **self.interval.take(), "skipped": self.guard.total})
        speed = self.progress.steps_per_second() * tokens_per_step
        times = {"tokens_per_second": speed, "seconds": self.progress.seconds}
        values |= shares(self.dataset.weights, (self.step - 1) * self.sequences, self.sequences)
        self.run.log({"step": self.step, "tokens": self.step * tokens_per_step, **values, **times})
        self.progress.show(values["ce_mean"], speed, self.guard.total)

    # --- evaluation, checkpoints, summary -----------------------------------------------------------------------------

    def evaluate(self) -> None:
        """Score the model on the validation set, and save it as ckpt_best.pt if it is the best so far."""
        with self.autocast:
            scores = self.validation.scores(self.model, self.step, self.average)
        if not math.isfinite(scores["val_loss"]):
            raise self.diverged(f"the validation loss is {scores['val_loss']} at step {self.step}")
        times = {"tokens": self.step * self.config.tokens_per_step, "seconds": self.progress.seconds}
        self.run.log({"step": self.step, **times, **scores})
        self.progress.show_evaluation(scores)
        self.last_eval = self.step
        if self.world.max(self.step > 0 and scores["val_loss"] < self.best_val_loss):
            self.best_val_loss = scores["val_loss"]
            self.run.save_weights(checkpoint.BEST, self.weights(), self.step, val_loss=self.best_val_loss)

    def is_good(self) -> bool:
        """Whether to replace the last checkpoint: the last step was not skipped, and nothing is NaN or Inf."""
        if self.guard.in_a_row and self.saved_step is not None and self.step < self.config.max_steps:
            return False
        if self.step == self.last_eval:
            return True
        with self.progress.paused(), self.autocast:
            good = self.validation.is_finite(self.model)
        good = all(is_finite(p) for p in self.model.parameters()) and good
        return not self.world.max(not good)

    def state(self) -> dict:
        """Everything that --resume needs; see load_state. Called in every process, as each has its own RNG state."""
        rngs = self.world.gather(get_rng_state(self.device))
        return {
            "model": self.weights(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(),
            "average": self.average.weights if self.average else None,
            "config": to_dict(self.config),
            "data_hash": self.dataset.hash,
            "tokenizer_hash": self.dataset.tokenizer.hash,
            "micro_batch": self.micro_batch,
            "skipped": self.guard.state(),
            "interval": self.interval.state(),
            "teacher_hash": self.teacher.hash if self.teacher else None,
            "step": self.step,
            "seconds": self.progress.seconds,
            "best_val_loss": self.best_val_loss,
            "rng": rngs[0] if rngs else None,
            "rng_of_others": rngs[1:],
        }

    def load_state(self, state: dict, path: Path) -> None:
        """Restore the result of state(), read from path; the weights are already loaded."""
        with checkpoint.reading(path):
            checkpoint.load_optimizers(self.optimizers, state["optimizers"], path)
            checkpoint.load_scaler(self.scaler, state["scaler"])
            self.guard.load_state(state["skipped"])
            self.interval.load_state(state.get("interval", self.interval.state()))  # older checkpoints have none
            if self.average:
                checkpoint.load_tensors(self.average.weights, state["average"])
            self.step = self.saved_step = state["step"]
            self.seconds, self.best_val_loss = state["seconds"], state["best_val_loss"]
            if state["config"].get("batch_size") == self.config.batch_size >= state["micro_batch"] > 0:
                self.micro_batch = state["micro_batch"]
            rngs = [state["rng"], *state.get("rng_of_others", [])]
            if self.world.rank < len(rngs):  # a process that is new in this run keeps its fresh state
                set_rng_state(rngs[self.world.rank], self.device)
        self.changed += changed_dropout(state, self.config, self.micro_batch, self.world.size)

    def weights(self) -> dict[str, Tensor]:
        """The weights to save. If sharded, the parameters themselves, so that a tied matrix is saved only once."""
        return self.model.state_dict(keep_vars=self.sharded)

    def save(self) -> None:
        if self.average:  # before ckpt_last.pt: once that is complete, a resumed run would not write the average again
            with self.average.in_place():
                self.run.save_weights(checkpoint.AVERAGE, self.weights(), self.step)
        self.run.save(self.state())
        self.saved_step = self.step

    def diverged(self, what: str) -> Diverged:
        """The error of a diverged run; repeats the last skipped step to find the first tensor with NaN or Inf."""
        set_rng_state(self.rng, self.device)
        step = self.guard.last_skipped if self.guard.total else max(0, self.step - 1)
        batches = self.micro_batches(step, ALONE)
        forwards = ((1 / batch.parts, self.forward(self.model, batch, step)) for batch in batches)
        with self.autocast:
            culprit = first_bad_tensor(self.model, self.objective, forwards)
        path, saved = self.run.path / checkpoint.LAST, self.saved_step
        kept = "nothing was saved" if saved is None else f"{path} is good, step {saved}"
        return Diverged(f"{what}: {culprit}; lower --lr (try {self.config.lr / 10:g}) or raise --warmup-steps; {kept}")

    def summarise(self) -> dict:
        """Write summary.json and the figures of a finished run, and print its table."""
        config, path = self.config, self.run.path
        tokens, size = config.max_steps * config.tokens_per_step, self.model.num_params()
        summary = report.summarise(path, size, tokens, self.progress.seconds, self.guard.total)
        files.write_json(path / "summary.json", summary)
        print("\n" + report.summary_table(summary))
        title = f"{self.dataset.meta['name']}, {config.n_layer} x {config.n_embd}, dispersion {config.dispersion:g}"
        for figure in report.draw_run(report.read_metrics(path / "metrics.jsonl"), title, path / "figures"):
            print(f"figure  {figure}")
        print(report.next_command(path, self.dataset.tokenizer.decode(self.validation.x[0].tolist())))
        return summary


def cli(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    # When a process dies, torchrun repeats the original command, so under torchrun --resume may also start a run.
    return run_command(lambda world: main(parse(argv, "train.py", world.launched), world))


if __name__ == "__main__":
    leave(cli())
