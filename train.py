"""Train a small language model, with or without the dispersion loss: flags, data, model, loop, summary, in this order.

    python train.py --dispersion 0.1                  # the default corpus and model; minutes on two cores
    python train.py --data shakespeare --seed 1       # see python train.py --help
    python train.py --resume --out runs/NAME          # go on where a run stopped
    torchrun --nproc-per-node 8 train.py              # the same run on eight devices

Leaves a run folder: config.json, metrics.jsonl, ckpt_last.pt, ckpt_best.pt, tokenizer.model, summary.json, figures/.
Exit codes: 0 done; 2 bad usage or input; 3 training diverged; 130 or 143 after SIGINT or SIGTERM, with a checkpoint;
1 another process of a distributed run was lost.
"""

import dataclasses
import gc
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute
from tqdm import tqdm

import minidisp
from minidisp import InputError, hf, ops, read_bytes, report
from minidisp.config import MOST, Config, from_dict, parse, to_dict
from minidisp.data import Batches, Dataset, eval_windows, sha256_of
from minidisp.dispersion import DispersionLoss, mean_cosine
from minidisp.metrics import Condensation, bits_per_byte, perplexity
from minidisp.model import GPT, GPTConfig
from minidisp.optim import build_optimizers, learning_rate, step_where
from minidisp.runtime import checkpoint

ROOT = Path(__file__).resolve().parent
CONDENSATION_SEQUENCES = 100  # as in the paper; of up to 512 tokens

# A step whose loss or gradient is not finite changes no weight. So many of them in a row, or in total, end the run.
MAX_SKIPPED_IN_A_ROW = 10
MAX_SKIPPED_IN_A_ROW_FLOAT16 = 30  # whose gradient scale starts at 2^16 and comes down by half per skipped step
MAX_SKIPPED = 20  # and one per hundred steps

PATIENCE = timedelta(minutes=10)  # of a process with another one that does not answer


class Diverged(RuntimeError):
    """Too many steps gave numbers that are not finite."""


def main(config: Config, world: "World | None" = None) -> dict:
    """Train as the config says and return the summary (also in summary.json; empty in all but the main process).

    Raises InputError on input that cannot be used, Diverged when the numbers stop being finite, and SystemExit with
    128 + the signal's number when a signal ended the run, after saving a checkpoint.
    """
    with ExitStack() as at_exit:  # however the run ends, the folder is unlocked and signals act as before
        return train(config, world or ALONE, at_exit)


def train(config: Config, world: "World", at_exit: ExitStack) -> dict:
    # --- system -----------------------------------------------------------------------------------------------------
    if config.threads:
        torch.set_num_threads(config.threads)
    device = pick_device(config.device, world)
    dtype = pick_dtype(config.dtype, device)
    autocast = nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    run = config.run_dir
    say = warn if world.main else lambda text: None
    sequences = config.batch_size * config.grad_accum  # per optimiser step
    share = sequences // world.size  # of them, this process's
    if share * world.size != sequences:
        raise InputError(f"batch_size x grad_accum is {sequences} sequences per step, which {world.size} processes cannot "
                         "share evenly: change one of them")  # fmt: skip
    sharded = config.shard and world.launched
    if sharded and dtype == torch.float16:
        raise InputError("--shard --dtype float16: the gradient scale is not sharded; take bfloat16 or float32")
    if world.main:
        refuse_occupied(run, config)
    loggers = report.loggers(config.tensorboard, config.wandb) if world.main else []

    # --- data -------------------------------------------------------------------------------------------------------
    dataset = Dataset(world.main_first("corpus", lambda: find_corpus(config.data)))
    config = dataclasses.replace(config, vocab_size=dataset.tokenizer.vocab_size)
    source = None
    if config.init_from and not config.resume:
        source, config = world.main_first("start", lambda: start_from(config, dataset))
    batches = Batches(dataset.split("train"), config.block_size, config.seed)
    validation = Validation(dataset, config)

    # --- model and optimisers ---------------------------------------------------------------------------------------
    # The teacher comes first: its random initialisation must not change what the run draws after seeding.
    teacher = Teacher(config, dataset, device) if config.distill else None
    state, state_path, changed = None, None, []
    if config.resume:
        if world.main:
            metrics_file = at_exit.enter_context(checkpoint.open_log(run / "metrics.jsonl", warn))
        world.barrier()
        if found := checkpoint.read_to_resume(run, say):
            state, state_path = found
            changed = check_same_run(state, config, dataset, teacher, state_path)
        else:
            refuse_lost_checkpoints(run, config, say)
    refuse_too_large(config, device, world.size if sharded else 1)
    torch.manual_seed(config.seed)
    model = GPT(config)
    if state:
        checkpoint.load_weights(model, state, state_path)
    elif source:
        model.load_state_dict(source.state_dict())
        del source
    model.to(device)
    if sharded:
        shard(model, device, world)
    gc.disable()  # AdamW loads torch's compiler: looking for garbage in what it brings would take half a second
    optimizers = build_optimizers(model, config)
    gc.enable()
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    dispersion = DispersionLoss(
        config.dispersion_variant,
        config.dispersion_layers,
        config.dispersion_tokens,
        config.dispersion_tau,
        config.dispersion_clamp,
        seed=config.seed,
        # Resolved before the first step, since it may build the extension, and not at all where nothing is dispersed.
        impl=world.main_first("extension", lambda: ops.resolve(config.dispersion_impl, device.type))
        if config.dispersion
        else "reference",
    )
    noise = EmbeddingNoise(model.wte, config) if config.noisy_embedding else None
    use_compile = config.compile == "on" or (config.compile == "auto" and device.type == "cuda")
    trained = torch.compile(model) if use_compile else model
    if world.launched and not sharded:
        # This also gives all processes the weights of the main one.
        trained = nn.parallel.DistributedDataParallel(trained, gradient_as_bucket_view=True)
        trained.require_forward_param_sync = False  # of buffers, which never change

    # --- the run folder ---------------------------------------------------------------------------------------------
    step, seconds, best_val_loss, last_eval = 0, 0.0, math.inf, None
    saved_step = None  # of the newest checkpoint
    micro_batch = config.batch_size  # sequences at a time: fewer where the memory does not suffice
    guard = Guard(device, MAX_SKIPPED_IN_A_ROW_FLOAT16 if scaler.is_enabled() else MAX_SKIPPED_IN_A_ROW)
    if not world.main:  # each has dropout of its own; the main one goes on with what the initialisation left
        torch.manual_seed(random_seed(config.seed, RANK, world.rank, state["step"] if state else 0))
    if state:
        step = saved_step = state["step"]
        seconds, best_val_loss = state["seconds"], state["best_val_loss"]
        micro_batch = restore(state, state_path, config, optimizers, scaler, guard, device, world)
        processes = 1 + len(state.get("rng_of_others", []))
        if config.dropout and processes != world.size:
            changed.append(f"processes {world.size} instead of {processes} (each has its own dropout)")
        del state
    environment = describe_environment(dataset, device, world)
    world.barrier()  # all have read what they need: from here on, files change
    if world.main:
        if not config.resume:
            run.mkdir(parents=True, exist_ok=True)
            metrics_file = at_exit.enter_context(checkpoint.open_log(run / "metrics.jsonl", warn))
            refuse_occupied(run, config)  # once more, now that nobody else can begin a run there
            remove_run(run)
        checkpoint.remove_unfinished(run)
        last_eval = rewind_metrics(metrics_file, step if saved_step is not None else -1)
        for logger in loggers:
            logger.open(run, to_dict(config), step)
        checkpoint.write_json(run / "config.json", {**to_dict(config), "environment": environment})
        vocabulary = (dataset.folder / "tokenizer.model").read_bytes()
        checkpoint.write_atomic(run / "tokenizer.model", lambda file: file.write(vocabulary))
    evaluated = world.most(-1 if last_eval is None else last_eval)
    last_eval = None if evaluated < 0 else evaluated
    objective = "cross-entropy"
    if config.dispersion:
        objective += f" + {config.dispersion:g} x {config.dispersion_variant} ({config.dispersion_layers} layers), "
        objective += ops.explain(device.type) if dispersion.impl != "reference" else "plain PyTorch"
    if teacher:
        objective += f" + {config.distill_weight:g} x distillation from {config.distill}, temperature {config.distill_temperature:g}"
    if noise:
        objective += f"; noise of up to {config.noisy_embedding:g} / sqrt(T C) on the token embeddings"
    if config.active_forgetting:
        objective += "; token embeddings" + (", which are the output layer, too," if config.tied else "")
        objective += f" reset every {config.active_forgetting:,} steps"
    number_format = str(dtype).removeprefix("torch.")
    if config.dtype == "auto" and device.type == "cpu" and has_bfloat16() and config.n_embd >= BFLOAT16_PAYS:
        number_format += " (faster here: --dtype bfloat16)"
    print(
        f"minidisp {minidisp.__version__}  {run}\n"
        f"data    {dataset.meta['name']}: {dataset.split('train').tokens:,} training tokens, vocabulary {config.vocab_size:,}\n"
        f"model   {config.arch} {config.n_layer} layers x {config.n_embd}, context {config.block_size}: "
        f"{model.num_params():,} parameters\n"
        f"steps   {config.max_steps:,} of {config.tokens_per_step:,} tokens, {config.optimizer}, {config.schedule} schedule\n"
        f"loss    {objective}\n"
        f"device  {environment['device']}, {number_format}, compile {'on' if use_compile else 'off'}"
        + (f", {world.size} processes{', sharded' if sharded else ''}\n" if world.launched else "\n"),
        flush=True,
    )
    if config.resume:
        print(f"resumed at step {step}" + (f", from here on with {', '.join(changed)}" if changed else ""), flush=True)

    # --- the loop ---------------------------------------------------------------------------------------------------
    caught = catch_signals(at_exit, world)

    def forward_backward(logging: bool) -> dict:
        """Add up the gradients of the step's sequences; returns the means of what is logged, as tensors.

        Of several processes, each takes its share of them. A loss is a mean over sequences, so the mean over the
        processes is what one would have found: of the gradients, taken once per step, and of what is logged.
        """
        totals = {"loss": 0.0, "ce": 0.0, "dispersion": 0.0, "mean_cosine": 0.0}
        if teacher:
            totals["distillation"] = 0.0
        start = step * sequences + world.rank * share
        for first in range(start, start + share, micro_batch):
            count = min(micro_batch, start + share - first)
            parts = share / count  # of the batch, of which this is one: grad_accum, unless the memory was short
            if world.launched:
                average_gradients(trained, model, first + count == start + share)
            x, y = batches.batch(first, count)
            x, y = to_device(x, device), to_device(y, device)
            if noise:
                noise.draw(first, count)
            with autocast:
                _, ce, hidden_states = trained(x, y, return_hidden_states=True)
            loss = ce
            if config.dispersion:
                disp = dispersion(hidden_states, step)
                loss = ce + config.dispersion * disp
                totals["dispersion"] += disp.detach() / parts
            if teacher:
                with autocast:
                    kl = teacher.divergence(x, hidden_states[-1], model.lm_head.weight)
                loss = loss + config.distill_weight * kl
                totals["distillation"] += kl.detach() / parts
            if logging:
                with torch.no_grad():
                    cosines = torch.stack([mean_cosine(z, eps=0.0) for z in hidden_states[1:]])
                totals["mean_cosine"] += cosines.mean() / parts
            del hidden_states  # so that the backward pass can free each layer's behind it
            scaler.scale(loss / parts).backward()
            totals["loss"] += loss.detach() / parts
            totals["ce"] += ce.detach() / parts
        return world.mean(totals)

    def diverged(what: str) -> Diverged:
        set_rng_state(rng, device)
        with autocast:
            culprit = first_bad_tensor(
                model, dispersion, noise, teacher, batches, guard.last_skipped, micro_batch, config, device
            )
        kept = f"{run / checkpoint.LAST} is good, step {saved_step}" if saved_step is not None else "nothing was saved"
        return Diverged(f"{what}: {culprit}; lower --lr or raise --warmup-steps; {kept}")

    def log(line: dict) -> None:
        if not world.main:
            return
        checkpoint.append_line(metrics_file, checkpoint.to_json(line))
        for logger in loggers:
            logger.log(line)

    def save() -> None:
        nonlocal saved_step
        rngs = world.gather(get_rng_state(device))
        state = {
            "model": weights(),
            "optimizers": [checkpoint.whole(optimizer.state_dict(), world.main) for optimizer in optimizers],
            "scaler": scaler.state_dict(),
            "config": to_dict(config),
            "data_hash": dataset.hash,
            "tokenizer_hash": dataset.tokenizer.hash,
            "micro_batch": micro_batch,
            "skipped": guard.state(),
            "teacher_hash": teacher.hash if teacher else None,
            "step": step,
            "seconds": seconds,
            "best_val_loss": best_val_loss,
        }
        if world.main:
            state["rng"], *state["rng_of_others"] = rngs
            os.fsync(metrics_file.fileno())  # a checkpoint never knows of more steps than metrics.jsonl
            checkpoint.save(run, state, step, config.keep)
        saved_step = step

    def weights() -> dict:
        # The parameters themselves, if sharded: one that is used twice is gathered and written once.
        return checkpoint.whole(model.state_dict(keep_vars=True), world.main) if sharded else model.state_dict()

    def evaluate() -> None:
        nonlocal best_val_loss, last_eval
        scores = None
        while scores is None:
            try:
                with autocast:
                    scores = validation.evaluate(model, device)
            except (RuntimeError, MemoryError) as error:
                validation.batch_size = half_of(validation.batch_size, error, f"evaluating at step {step}", world)
        if sharded:
            model.reshard()  # the root keeps its weights whole after a forward pass, for the backward pass
        if not math.isfinite(scores["val_loss"]):
            raise diverged(f"the validation loss is {scores['val_loss']} at step {step}")
        log({"step": step, "tokens": step * config.tokens_per_step, "seconds": seconds, **scores})
        cosines = scores["mean_cosine_by_layer"]
        row = (step, scores["val_loss"], scores["perplexity"], scores["bits_per_byte"], cosines[0],
               scores["last_half_mean"], cosines[-1], scores["spearman"])  # fmt: skip
        if last_eval is None or step == first_step:
            tqdm.write(
                "  step  val loss  perplexity  bits/byte  | mean cosine: embedding  last half  last layer | spearman"
            )
        tqdm.write("{:6d}  {:8.4f}  {:10.2f}  {:9.4f}  | {:22.3f}  {:9.3f}  {:10.3f} | {:8.2f}".format(*row))
        last_eval = step
        if world.most(step > 0 and scores["val_loss"] < best_val_loss):
            best_val_loss = scores["val_loss"]
            best = {"model": weights(), "config": to_dict(config), "step": step, "val_loss": best_val_loss}
            if world.main:
                checkpoint.write_atomic(run / checkpoint.BEST, lambda file: torch.save(best, file))

    def asked_to_stop() -> int:
        """The number of the signal that came to any of the processes; 0 if none did."""
        return world.most(max(caught, default=0))

    first_step, save_due, rng = step, False, get_rng_state(device)
    hidden = None if world.main else True  # None: unless there is a terminal
    progress = at_exit.enter_context(
        tqdm(total=config.max_steps, initial=step, unit="step", dynamic_ncols=True, disable=hidden)
    )
    if last_eval is None:
        evaluate()  # before the first step: condensation is there at initialisation
    model.train()
    logged_at, logged_step = time.perf_counter(), step
    stop_signal = asked_to_stop()
    while step < config.max_steps and not stop_signal:
        lr = learning_rate(step, config)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
        if forgets_before(step, config):
            forget(model.wte.weight, optimizers, config.seed, step)
        logging = (step + 1) % config.log_every == 0 or step == 0
        rng = get_rng_state(device)
        try:
            totals = forward_backward(logging)
        except (RuntimeError, MemoryError) as error:
            micro_batch = half_of(micro_batch, error, f"step {step + 1}", world)
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            set_rng_state(rng, device)
            continue  # the same step from its start, on the same sequences
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        # With max_norm infinite nothing is clipped, and the norm is still measured.
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
        if sharded:
            grad_norm = grad_norm.full_tensor()
        finite = torch.isfinite(totals["loss"]) & torch.isfinite(grad_norm)
        step_where(finite, optimizers)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        scaler.update()
        guard.count(finite, step)
        step += 1
        progress.update()

        evaluating = step % config.eval_every == 0 or step == config.max_steps
        stop_signal = asked_to_stop()
        save_due = save_due or step % config.save_every == 0 or step == config.max_steps or bool(stop_signal)
        if logging or evaluating or save_due or device.type == "cpu":  # elsewhere, looking means waiting for the device
            guard.report(step)
        if logging:
            line = {name: float(value) for name, value in totals.items()}
            elapsed = time.perf_counter() - logged_at
            speed = (step - logged_step) * config.tokens_per_step / elapsed
            seconds += elapsed
            log({"step": step, "tokens": step * config.tokens_per_step, **line, "lr": lr, "grad_norm": float(grad_norm),
                 "skipped": guard.total, "tokens_per_second": speed, "seconds": seconds})  # fmt: skip
            skipped = f", {guard.total} skipped" if guard.total else ""
            progress.set_postfix_str(f"loss {line['ce']:.3f}, {speed:,.0f} tokens/s{skipped}", refresh=False)
            logged_at, logged_step = time.perf_counter(), step
        if guard.hopeless(step):
            raise diverged(f"{guard.total} of {step} steps had a loss or a gradient that is not finite")
        if evaluating:
            paused = time.perf_counter()
            evaluate()
            logged_at += time.perf_counter() - paused  # evaluating is no training time
        # The last good checkpoint stays until the numbers are good again.
        if save_due and (not guard.in_a_row or saved_step is None or step == config.max_steps):
            paused = time.perf_counter()
            seconds += paused - logged_at
            save()
            save_due = False
            logged_at, logged_step = time.perf_counter(), step
    progress.close()
    if step == 0:
        save()  # --max-steps 0: a model as initialised, to compare with
    for logger in loggers:
        logger.close()
    if stop_signal:
        saved = "" if saved_step == step else f" (the last good one, step {saved_step}, is what is saved)"
        if world.main:
            print(
                f"stopped at step {step}{saved} by {signal.Signals(stop_signal).name}; "
                f"go on with: python train.py --resume --out {run}",
                file=sys.stderr,
            )
        raise SystemExit(128 + stop_signal)
    if not world.main:
        return {}

    # --- summary ----------------------------------------------------------------------------------------------------
    summary = summarise(config, model, run, seconds, guard.total)
    checkpoint.write_json(run / "summary.json", summary)
    print("\n" + summary_table(summary))
    title = f"{dataset.meta['name']}, {config.n_layer} x {config.n_embd}, dispersion {config.dispersion:g}"
    for path in report.draw_run(report.read_metrics(run / "metrics.jsonl"), title, run / "figures"):
        print(f"figure  {path}")
    print(f'next    python eval.py {run} --sample "..."')
    return summary


# --- more than one process --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class World:
    """The processes that train together, and which one this is; by default, one that is alone.

    Every process must come to the same calls of mean, most, barrier, gather and main_first, in the same order.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among those on this machine: which GPU
    store: Any = None  # torchrun's, which lives on when processes die; None without torchrun

    @classmethod
    def join(cls, at_exit: ExitStack) -> "World":
        """The world that torchrun started this process in. What others than the main process print is not shown."""
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            return cls()
        import torch.distributed as dist

        # When torchrun starts the processes again, it is with the same store: the addresses of dead ones are still there.
        store, rank, size = next(dist.rendezvous("env://", timeout=PATIENCE))
        store = dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        # Both backends, if there are GPUs: NCCL for what lies on them, gloo for what the processes agree on meanwhile.
        dist.init_process_group(store=store, rank=rank, world_size=size, timeout=PATIENCE)
        at_exit.callback(dist.destroy_process_group)
        world = cls(rank, size, int(os.environ["LOCAL_RANK"]), store)
        if not world.main:
            nowhere = at_exit.enter_context(open(os.devnull, "w"))  # noqa: SIM115, closed at exit
            at_exit.enter_context(redirect_stdout(nowhere))
        return world

    @property
    def main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    @property
    def launched(self) -> bool:
        """Whether torchrun started it."""
        return self.store is not None

    def mean(self, totals: dict) -> dict:
        """The means over the processes of those values that are tensors (scalars): all others are the same everywhere."""
        if self.size == 1:
            return totals
        import torch.distributed as dist

        names = [name for name, value in totals.items() if isinstance(value, Tensor)]
        values = torch.stack([totals[name].float() for name in names])
        dist.all_reduce(values)
        return {**totals, **dict(zip(names, (values / self.size).unbind(), strict=True))}

    def most(self, number: int) -> int:
        """The largest of the processes' numbers. They meet on the CPU: no device is waited for."""
        if self.size == 1:
            return number
        import torch.distributed as dist

        largest = torch.tensor(int(number))
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def barrier(self) -> None:
        """Wait until all processes are here."""
        self.most(0)

    def gather(self, value: object) -> list:
        """The processes' values, by rank, in the main process; elsewhere an empty list."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values = [None] * self.size if self.main else None
        dist.gather_object(value, values)
        return values or []

    def main_first(self, what: str, work: Callable[[], Any]) -> Any:
        """work() in the main process, then in the others, which find done what it leaves on the disk; however long it takes."""
        if not self.launched:
            return work()
        if not self.main:
            self.store.wait([what], timedelta(days=7))
        done = work()
        if self.main:
            self.store.set(what, "done")
        return done

    def first_to_speak(self) -> bool:
        """Whether no process has ended with a message yet: what comes after the first one only follows from it."""
        return not self.launched or self.store.add("messages", 1) == 1


ALONE = World()


def shard(model: GPT, device: torch.device, world: World) -> None:
    """Split the weights, and with them gradients and optimiser states, over the processes (FSDP2): block by block, and the rest."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (world.size,))
    for block in model.h:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def average_gradients(trained: nn.Module, model: GPT, now: bool) -> None:
    """Whether the next backward pass ends with the mean of the gradients over the processes, or only adds its own."""
    if isinstance(trained, nn.parallel.DistributedDataParallel):
        trained.require_backward_grad_sync = now
    else:
        model.set_requires_gradient_sync(now)


def is_lost(error: BaseException) -> bool:
    """Whether a process failed because it could not reach another one. NCCL has an exception for it, gloo only words."""
    import torch.distributed as dist

    signs = (
        "Connection closed by peer",
        "Connection reset by peer",
        "Broken pipe",
        "Timed out",
        "timed out",
        "Connection refused",
    )
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in signs)


# --- parts of the above ---------------------------------------------------------------------------------------------


class Validation:
    """The fixed validation set of a run: the same windows in every evaluation and for every seed."""

    def __init__(self, dataset: Dataset, config: Config):
        self.x, self.y = eval_windows(dataset.split("val"), config.block_size, config.eval_tokens)
        self.bytes = sum(len(dataset.tokenizer.token_bytes[token]) for token in self.y.flat)
        self.batch_size = config.batch_size

    @torch.no_grad()
    def evaluate(self, model: GPT, device: torch.device) -> dict:
        """val_loss in nats per token, perplexity, bits_per_byte, and the condensation scores of the same windows.

        Only val_loss, if it is not finite.
        """
        was_training = model.training
        model.eval()
        nats, condensation = 0.0, Condensation()
        try:
            for i in range(0, len(self.x), self.batch_size):
                x = to_device(self.x[i : i + self.batch_size], device)
                y = to_device(self.y[i : i + self.batch_size], device)
                _, loss, hidden_states = model(x, y, return_hidden_states=True)
                nats += loss.item() * y.numel()
                if not math.isfinite(nats):
                    return {"val_loss": nats}
                room = CONDENSATION_SEQUENCES - condensation.sequences
                if room > 0:
                    condensation.update([z[:room, :512] for z in hidden_states])
        finally:
            model.train(was_training)
        loss, scores = nats / self.y.size, condensation.result()
        # The histogram is what the heat map and its history are drawn from; four digits are plenty for a colour.
        histogram = [[round(density, 4) for density in layer] for layer in scores["histogram_by_layer"]]
        wanted = ("mean_cosine_by_layer", "off_diagonal_mean_by_layer", "spearman", "kendall", "last_half_mean")
        return {
            "val_loss": loss,
            "perplexity": perplexity(nats, self.y.size),
            "bits_per_byte": bits_per_byte(nats, self.bytes),
            **{name: scores[name] for name in wanted},
            "histogram_by_layer": histogram,
        }


def generator(device: torch.device, *key: int) -> torch.Generator:
    """A generator whose numbers depend on the device's kind and the key alone, and not on torch's global one."""
    return torch.Generator(device).manual_seed(random_seed(*key))


def random_seed(*key: int) -> int:
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


NOISE, FORGETTING, RANK = 1, 2, 3  # second part of the keys, after the run's seed


class EmbeddingNoise:
    """NEFTune (arXiv 2310.05914): uniform noise on the token embeddings in training mode, at most alpha / sqrt(T C).

    It hangs on the embedding as a forward hook, so the model need not know. The noise of a sequence depends on the seed
    and the sequence's index in the run alone: resuming needs no state, and dropout draws what it would without noise.
    """

    def __init__(self, wte: nn.Embedding, config: Config):
        self.weight, self.seed = wte.weight, config.seed
        self.shape = (config.block_size, config.n_embd)
        self.bound = config.noisy_embedding / math.sqrt(config.block_size * config.n_embd)
        self.noise: Tensor | None = None
        wte.register_forward_hook(self)

    def draw(self, first: int, count: int) -> None:
        """Set the noise for sequences first..first+count-1 of the run, (count, T, C)."""
        device = self.weight.device
        self.noise = torch.empty(count, *self.shape, device=device)
        for row, k in zip(self.noise, range(first, first + count), strict=True):
            row.uniform_(-self.bound, self.bound, generator=generator(device, self.seed, NOISE, k))

    def __call__(self, module: nn.Module, inputs: tuple, embeddings: Tensor) -> Tensor:
        return embeddings + self.noise if module.training else embeddings


def forgets_before(step: int, config: Config) -> bool:
    """Whether the token embeddings are reset before this step: every K steps, while at least K are left to learn them."""
    K = config.active_forgetting
    return K > 0 and step > 0 and step % K == 0 and step + K <= config.max_steps


@torch.no_grad()
def forget(weight: Tensor, optimizers: list[torch.optim.Optimizer], seed: int, step: int) -> None:
    """Active forgetting (arXiv 2307.01163): draw the token embeddings anew, N(0, 0.02), and clear their optimiser state.

    Tied to them, the output layer is the same matrix and begins anew, too. Position embeddings stay. What is drawn depends
    on (seed, step) alone.
    """
    fresh = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    fresh.normal_(std=0.02, generator=generator(weight.device, seed, FORGETTING, step))
    weight.copy_(checkpoint.sharded_like(weight, fresh))
    for optimizer in optimizers:
        optimizer.state.pop(weight, None)  # moments and step count: the next update begins them again


class Teacher:
    """Knowledge distillation (arXiv 1503.02531) from the model of another run, in eval mode and without gradients.

    Raises InputError if the run has another tokenizer than the data, or a shorter context than the student.
    """

    CHUNK = 512  # tokens whose logits exist at once, those of student and teacher

    def __init__(self, config: Config, dataset: Dataset, device: torch.device):
        self.model, vocabulary, saved = checkpoint.load_run(config.distill, device)
        self.model.requires_grad_(False)
        self.temperature = config.distill_temperature
        self.hash = sha256_of(checkpoint.find(config.distill))
        if vocabulary.hash != dataset.tokenizer.hash:
            raise InputError(
                f"--distill {config.distill} has another tokenizer than {dataset.folder}: train a teacher on the same data"
            )
        if saved.block_size < config.block_size:
            raise InputError(f"--distill {config.distill} has a context of {saved.block_size} tokens: give --block-size {saved.block_size} "
                             f"or less, not {config.block_size}")  # fmt: skip

    def divergence(self, idx: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Mean over the tokens of temperature^2 KL(teacher || student) in nats, of softmax(logits / temperature).

        The factor keeps the gradient's size when the temperature changes. idx: (B, T) tokens; x: the student's hidden
        states after the final norm, (B, T, C); weight: its output layer, (V, C). Returns a float32 scalar (float64 if x is).
        The logits are computed chunk by chunk, and again in the backward pass, so those of all tokens never exist at once.
        """
        with torch.no_grad():
            target, _ = self.model._backbone(idx)
        total = 0.0
        for rows in zip(x.flatten(0, 1).split(self.CHUNK), target.flatten(0, 1).split(self.CHUNK), strict=True):
            total = total + recompute(self._chunk, *rows, weight, use_reentrant=False, preserve_rng_state=False)
        return self.temperature**2 * total / idx.numel()

    def _chunk(self, x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        """KL summed over some tokens; x: (N, C) of the student, target: (N, C') of the teacher."""
        logits = F.linear(x, weight), self.model.lm_head(target)
        student, teacher = (
            F.log_softmax(z.to(torch.promote_types(z.dtype, torch.float32)) / self.temperature, dim=-1) for z in logits
        )
        return F.kl_div(student, teacher, reduction="sum", log_target=True)


class Guard:
    """Counts the steps whose loss or gradient is not finite, on the device: nobody waits for it until `report`.

    total, in_a_row and last_skipped (the index of the last such step) are what the last `report` has seen.
    """

    def __init__(self, device: torch.device, most_in_a_row: int):
        self._counts = torch.zeros(
            4, dtype=torch.int64, device=device
        )  # total, in a row, longest row, index of the last
        self._most_in_a_row = most_in_a_row
        self.total, self.in_a_row, self.longest, self.last_skipped = 0, 0, 0, 0

    def count(self, finite: torch.Tensor, step: int) -> None:
        """finite: a bool scalar on the device; step: the index of the step."""
        total, in_a_row, longest, last = self._counts.unbind()
        row = (in_a_row + 1) * ~finite
        self._counts = torch.stack(
            [total + ~finite, row, torch.maximum(longest, row), torch.where(finite, last, torch.full_like(last, step))]
        )

    def report(self, step: int) -> None:
        """Fetch the counts, and say what has been skipped since the last time."""
        before = self.total
        self.total, self.in_a_row, self.longest, self.last_skipped = self._counts.tolist()
        if self.total > before:
            times = "" if self.total == before + 1 else f" {self.total - before} times"
            tqdm.write(
                f"up to step {step}, a loss or gradient was not finite and the update skipped{times}: {self.total} in all"
            )

    def hopeless(self, step: int) -> bool:
        return self.longest >= self._most_in_a_row or self.total > MAX_SKIPPED + step // 100

    def state(self) -> dict:
        return dict(zip(("total", "in_a_row", "longest", "last_skipped"), self._counts.tolist(), strict=True))

    def load_state(self, state: dict) -> None:
        self._counts = torch.tensor([state[name] for name in self.state()], device=self._counts.device)
        self.total, self.in_a_row, self.longest, self.last_skipped = self._counts.tolist()


def first_bad_tensor(
    model: GPT,
    dispersion: DispersionLoss,
    noise: EmbeddingNoise | None,
    teacher: Teacher | None,
    batches: Batches,
    step: int,
    micro_batch: int,
    config: Config,
    device: torch.device,
) -> str:
    """Which tensor stops being finite first in a step, in words: found by taking the step again, without an update."""

    def bad(tensor: torch.Tensor) -> bool:
        return not torch.isfinite(checkpoint.whole(tensor)).all()

    for name, p in model.named_parameters():
        if bad(p):
            return f"the weights {name} went bad first"
    model.zero_grad(set_to_none=True)
    sequences = config.batch_size * config.grad_accum
    for first in range(step * sequences, (step + 1) * sequences, micro_batch):
        count = min(micro_batch, (step + 1) * sequences - first)
        x, y = batches.batch(first, count)
        x, y = to_device(x, device), to_device(y, device)
        if noise:
            noise.draw(first, count)
        _, ce, hidden_states = model(x, y, return_hidden_states=True)
        for layer, z in enumerate(hidden_states):
            if bad(z):
                return f"the hidden state of layer {layer} went bad first" if layer else "the embeddings went bad first"
        with torch.no_grad():
            if any(bad(model.lm_head(sequence)) for sequence in hidden_states[-1]):  # one by one: they are large
                return "the logits went bad first"
        if bad(ce):
            return "the cross-entropy went bad first"
        loss = ce
        if config.dispersion:
            disp = dispersion(hidden_states, step)
            if bad(disp):
                return "the dispersion loss went bad first"
            loss = ce + config.dispersion * disp
        if teacher:
            kl = teacher.divergence(x, hidden_states[-1], model.lm_head.weight)
            if bad(kl):
                return "the distillation loss went bad first"
            loss = loss + config.distill_weight * kl
        with torch.autocast(device.type, enabled=False):
            (loss * len(x) / sequences).backward()
    for name, p in reversed(list(model.named_parameters())):  # the way that gradients come
        if p.grad is not None and bad(p.grad):
            return f"the gradient of {name} went bad first"
    return "no tensor is bad when the step is taken again"


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA has an exception of its own for it; elsewhere, there is only the message."""
    signs = ("can't allocate memory", "not enough memory", "ALLOC_FAILED", "out of memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(sign in str(error) for sign in signs)


def half_of(batch: int, error: BaseException, where: str, world: World) -> int:
    """Half as many sequences at a time, rounded up, after running out of memory; any other error is raised again.

    Raises InputError if it was one sequence already, or where other processes wait in the middle of their step.
    """
    if not is_out_of_memory(error):
        raise error
    if world.size > 1 and batch > 1:
        raise InputError(
            f"{where}: process {world.rank} is out of memory: lower --batch-size, and raise --grad-accum as much, which "
            "keeps the batch; --shard needs less memory, too"
        ) from None
    if batch == 1:
        raise InputError(
            f"{where}: out of memory with one sequence at a time: lower --block-size or the size of the model "
            "(--n-layer, --n-embd), or the loss's share with --dispersion-tokens 256"
        ) from None
    half = (batch + 1) // 2
    tqdm.write(
        f"{where}: out of memory; again with {half} sequences at a time instead of {batch}, the same batch in all"
    )
    return half


def pick_device(name: str, world: World = ALONE) -> torch.device:
    """The torch device for "auto", "cpu", "cuda" or "mps". Raises InputError if this machine has none of that kind.

    Each process that torchrun starts has a GPU of its own, which becomes the current one.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, available in there.items() if available)
    if not there[name]:
        raise InputError(f"--device {name}: torch {torch.__version__} finds no such device here; leave the flag out")
    if world.launched and name == "mps":
        raise InputError("mps takes one process: start it without torchrun, or with --device cpu")
    if world.launched and name == "cuda":
        if world.local_rank >= (gpus := torch.cuda.device_count()):
            raise InputError(f"torchrun started more processes than the {gpus} GPUs here: --nproc-per-node {gpus}")
        torch.cuda.set_device(world.local_rank)
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products: what is named, or bfloat16 (float16 on older cards) on CUDA and float32 elsewhere."""
    if name != "auto":
        return getattr(torch, name)
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


BFLOAT16_PAYS = 192  # channels: on a CPU 0.7 times as fast as float32 with 64 of them, 1.0 with 128, 1.5 with 192


def has_bfloat16() -> bool:
    """Whether this processor has instructions for bfloat16 (x86: AVX512-BF16 or AMX). It is not chosen by itself, so that
    a run has the same numbers, but for rounding, on every CPU."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # where torch cannot tell, none
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def to_device(tokens: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copy int64 tokens to the device; on CUDA through pinned memory, so that the copy overlaps with computing."""
    tensor = torch.from_numpy(tokens)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def find_corpus(name: str) -> Path:
    """The folder of a prepared corpus; a built-in one is prepared now if it is not there yet."""
    from data import prepare

    for folder in (Path(name), ROOT / "data" / name):
        if (folder / "meta.json").is_file():
            return folder
    if name in prepare.BUILT_IN:
        print(f"preparing the corpus {name}, once:", flush=True)
        return prepare.prepare(name)
    prepared = sorted(meta.parent.name for meta in (ROOT / "data").glob("*/meta.json"))
    raise InputError(
        f"--data {name}: no such corpus; built in are {', '.join(prepare.BUILT_IN)}"
        + (f", prepared {', '.join(prepared)}" if prepared else "")
        + "; or prepare your own with python data/prepare.py --input FILES --name NAME"
    )


def warn(text: str) -> None:
    print(f"train.py: {text}", file=sys.stderr, flush=True)


def refuse_occupied(run: Path, config: Config) -> None:
    """Raise InputError if the run folder holds a run that would be lost, or lacks one to go on with."""
    if run.exists() and not run.is_dir():
        raise InputError(f"{run} is not a folder: give another --out")
    occupied = (run / "config.json").exists() or any(run.glob("ckpt_*.pt"))
    if config.resume and not occupied:
        raise InputError(f"--resume: {run} holds no run to go on with; leave --resume out, or name the run with --out")
    if occupied and not config.resume and not config.overwrite:
        raise InputError(
            f"{run} holds a run already: add --resume to go on, --overwrite to replace it, or another --out"
        )


def refuse_lost_checkpoints(run: Path, config: Config, say: Callable[[str], object]) -> None:
    """A run without a checkpoint starts again at step 0, unless its metrics tell that there was one."""
    last = max((line["step"] for line in report.read_metrics(run / "metrics.jsonl")), default=0)
    if last > config.save_every:
        raise InputError(
            f"--resume: {run} got to step {last}, but its checkpoints are gone; --overwrite starts it again"
        )
    say(f"{run} was stopped before its first checkpoint: it starts again at step 0")


def refuse_too_large(config: Config, device: torch.device, shards: int) -> None:
    """Raise InputError if the model's own numbers exceed the memory, before they fill it."""
    needed = 16 * config.parameters / shards  # weights, gradients, two moments, in float32
    there = memory_bytes(device)
    if there and needed > there:
        raise InputError(
            f"out of memory: {config.parameters:,} parameters take {needed / 2**30:,.0f} GiB with their gradients and "
            f"moments, and {device.type} has {there / 2**30:,.0f}: lower --n-layer or --n-embd"
        )


def memory_bytes(device: torch.device) -> int | None:
    """Memory of the device, or None where it cannot be told."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows; unknown to this system
        return None


def remove_run(run: Path) -> None:
    """Remove the files of an earlier run, and nothing else that may lie in the folder; what makes it one goes last."""
    for old in (*run.glob("ckpt_*.pt"), *run.glob("figures/*.png"), *run.glob("tensorboard/events.out.tfevents.*")):
        old.unlink()
    for name in ("summary.json", "tokenizer.model", "config.json"):
        (run / name).unlink(missing_ok=True)


# What --resume may change without another word, as it changes nothing or rounding only; and what it may change, saying so,
# as training goes another way from there. All else must be as it was.
FREE_TO_CHANGE = {
    "out", "resume", "overwrite", "preset", "data", "init_from", "batch_size", "grad_accum", "dispersion_impl", "device", "compile",
    "threads", "shard", "eval_every", "log_every", "save_every", "keep", "tensorboard", "wandb", "distill",
}  # fmt: skip
CHANGED_ALOUD = {
    "max_steps", "lr", "min_lr", "warmup_steps", "schedule", "weight_decay", "beta1", "beta2", "grad_clip", "dropout", "dtype",
    "dispersion", "dispersion_variant", "dispersion_layers", "dispersion_tau", "dispersion_clamp", "dispersion_tokens", "eval_tokens",
    "noisy_embedding", "active_forgetting", "distill_weight", "distill_temperature",
}  # fmt: skip


def check_same_run(state: dict, config: Config, dataset: Dataset, teacher: Teacher | None, path: Path) -> list[str]:
    """The settings that differ from a checkpoint's and change the course of training, each in words.

    Raises InputError naming the first that must not differ: the architecture, the data, the tokenizer, the teacher, the
    seed, the optimiser, and the sequences per step, which decide what has been seen.
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
            f"{config.batch_size} x {config.grad_accum} is asked for; keep the product, which decides what has been seen"
        )
    taught_by = state.get("teacher_hash")
    if not isinstance(taught_by, str | None) or taught_by != (teacher.hash if teacher else None):
        raise InputError(f"--resume: {path} was not trained with what is now in --distill {config.distill}")
    changed = []
    for field in dataclasses.fields(Config):
        before, now = getattr(saved, field.name), getattr(config, field.name)
        if before == now or field.name in FREE_TO_CHANGE:
            continue
        if field.name not in CHANGED_ALOUD:
            raise InputError(
                f"--resume: {field.name} is {before} in {path}, but {now} is asked for; leave it as it was"
            )
        stretched = (
            f" (its {config.schedule} schedule, too)"
            if field.name == "max_steps" and config.schedule != "constant"
            else ""
        )
        changed.append(f"{field.name} {now} instead of {before}{stretched}")
    return changed


def restore(
    state: dict,
    path: Path,
    config: Config,
    optimizers: list[torch.optim.Optimizer],
    scaler: torch.amp.GradScaler,
    guard: Guard,
    device: torch.device,
    world: World = ALONE,
) -> int:
    """Give everything but the weights the state of a checkpoint; returns how many sequences it took at a time.

    Raises InputError naming the file if something in it does not fit.
    """
    if len(state["optimizers"]) != len(optimizers):
        raise InputError(f"{path} does not fit: it has the state of {len(state['optimizers'])} optimizers")
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        checkpoint.load_optimizer(optimizer, saved, path)
    counts = state["skipped"].values()
    if state["skipped"].keys() != guard.state().keys() or not all(type(n) is int and 0 <= n <= MOST for n in counts):
        raise InputError(f"{path} is damaged: its count of skipped steps")
    if not 0 <= state["seconds"] < math.inf or math.isnan(state["best_val_loss"]):
        raise InputError(f"{path} is damaged: its seconds or its best_val_loss")
    guard.load_state(state["skipped"])
    try:
        scaler.load_state_dict(state["scaler"])
        if not isinstance(state.get("rng_of_others", []), list):
            raise TypeError("its random numbers of other processes")
        rngs = [state["rng"], *state.get("rng_of_others", [])]
        if world.rank < len(rngs):  # else there were fewer processes than now: this one's numbers begin here
            set_rng_state(rngs[world.rank], device)
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is damaged: {' '.join(str(error).split())[:200]}") from None
    if state["config"].get("batch_size") != config.batch_size or not 0 < state["micro_batch"] <= config.batch_size:
        return config.batch_size
    return state["micro_batch"]


def start_from(config: Config, dataset: Dataset) -> tuple[GPT, Config]:
    """The model named by --init-from, and the config with its architecture; the data must be in its tokens.

    A run must have been trained with the same model flags. A Hugging Face folder brings its own architecture, but for
    dropout and a shorter --block-size; a model flag that says otherwise is an InputError.
    """
    if not hf.is_folder(config.init_from):
        source, vocabulary, saved = checkpoint.load_run(config.init_from)
        how = "prepare the data with it: --tokenizer-from"
        differing = [f for f in _architecture() if getattr(saved, f.name) != getattr(config, f.name)]
    else:
        source, vocabulary = hf.load(config.init_from, block_size=config.block_size)
        saved, how = source.config, f"prepare the data with --tokenizer hf:{config.init_from}"
        given = [f for f in _architecture() if getattr(config, f.name) not in (f.default, getattr(saved, f.name))]
        differing = [f for f in given if f.name not in ("block_size", "vocab_size")]
    if vocabulary.hash != dataset.tokenizer.hash:
        raise InputError(f"--init-from {config.init_from} has another tokenizer than {dataset.folder}: {how}")
    for field in differing:
        raise InputError(
            f"--init-from {config.init_from} has {field.name} {getattr(saved, field.name)}, not "
            f"{getattr(config, field.name)}: give the same model flags"
        )
    return source, dataclasses.replace(config, **{f.name: getattr(saved, f.name) for f in _architecture()})


def _architecture() -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(GPTConfig) if field.name != "dropout"]


def rewind_metrics(file: BinaryIO, step: int) -> int | None:
    """Cut off the lines behind `step`, which will be run again, and a torn one; returns the step of the last evaluation.

    In place: were the cut to be interrupted, the next one would do it.
    """
    path = Path(file.name)
    last_eval, keep = None, 0
    for line, end in report.metrics_lines(read_bytes(path), path):
        if line["step"] > step:
            break
        last_eval, keep = line["step"] if "val_loss" in line else last_eval, end
    file.truncate(keep)
    return last_eval


def get_rng_state(device: torch.device) -> dict:
    """State of torch's global generators, which only dropout draws from during training."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if device.type == "cuda" else None}


def set_rng_state(state: dict, device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])


def catch_signals(at_exit: ExitStack, world: World) -> list[signal.Signals]:
    """A list that the first SIGINT or SIGTERM is put into, for the loop to see; a second one ends the process at once."""
    caught: list[signal.Signals] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number, frame):
        caught.append(signal.Signals(number))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        # Not print: the signal may have come in the middle of another one, which cannot be entered twice.
        if world.main:
            os.write(2, f"{caught[-1].name}: finishing this step, then saving; once more to leave at once\n".encode())

    for number, handler in before.items():
        signal.signal(number, handle)
        if not world.launched:  # else torchrun's signal, when another process was lost, must not end this one unheard
            at_exit.callback(signal.signal, number, handler)
    return caught


def describe_environment(dataset: Dataset, device: torch.device, world: World) -> dict:
    """What a run ran on: versions, the state of the code, hardware, data. Kept in config.json."""
    commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain")
    memory = memory_bytes(torch.device("cpu"))
    return {
        "minidisp": minidisp.__version__,
        "commit": commit,
        "dirty": None if changes is None else bool(changes),  # whether the code differs from the commit
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{device.type}, {torch.get_num_threads()} threads",
        "processes": world.size,
        "device_memory_gib": round((memory_bytes(device) or 0) / 2**30, 1),
        "cuda": torch.version.cuda,
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": round((memory or 0) / 2**30, 1),
        "data_hash": dataset.hash,
        "tokenizer_sha256": dataset.tokenizer.hash,
        "shards_sha256": {
            name: [shard["sha256"] for shard in split["shards"]] for name, split in dataset.meta["splits"].items()
        },
    }


def git(*arguments: str) -> str | None:
    """What git says about the code, or None where there is no git or no repository."""
    if not shutil.which("git"):
        return None
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def cpu_model() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # no Linux
        return platform.processor() or None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def summarise(config: Config, model: GPT, run: Path, seconds: float, skipped: int) -> dict:
    """The run in a dozen numbers: where it began, where it ended, and what it cost."""
    tokens = config.max_steps * config.tokens_per_step
    return {
        "run": str(run),
        "parameters": model.num_params(),
        "tokens": tokens,
        "seconds": seconds,
        "skipped": skipped,
        "tokens_per_second": tokens / seconds if seconds else None,
        **evaluations([line for line in report.read_metrics(run / "metrics.jsonl") if "val_loss" in line]),
    }


def evaluations(lines: list[dict]) -> dict:
    """The scores of the first, the best and the last evaluation in metrics.jsonl."""
    keys = (
        "step",
        "val_loss",
        "perplexity",
        "bits_per_byte",
        "mean_cosine_by_layer",
        "spearman",
        "kendall",
        "last_half_mean",
    )
    chosen = {"first": lines[0], "best": min(lines, key=lambda line: line["val_loss"]), "last": lines[-1]}
    return {when: {key: line[key] for key in keys} for when, line in chosen.items()}


def summary_table(summary: dict) -> str:
    rows = []
    for label, key in (("validation loss (nats/token)", "val_loss"), ("perplexity", "perplexity"), ("bits per byte", "bits_per_byte"),
                       ("mean cosine, last half of layers", "last_half_mean"), ("Spearman, cosine against depth", "spearman")):  # fmt: skip
        rows.append([label, *(report.number(summary[when][key]) for when in ("first", "best", "last"))])
    headers = ["", *(f"{when} (step {summary[when]['step']:,})" for when in ("first", "best", "last"))]
    speed = f", {summary['tokens_per_second']:,.0f} tokens/s" if summary["tokens_per_second"] else ""
    speed += f", {summary['skipped']} updates skipped" if summary["skipped"] else ""
    return (
        report.table(headers, rows)
        + f"\n\n{summary['parameters']:,} parameters, {summary['tokens']:,} tokens in {summary['seconds']:.0f} s{speed}"
    )


def cli(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    with ExitStack() as at_exit:
        world = World.join(at_exit)
        code, message = outcome(argv, world)
        if message and world.first_to_speak():
            warn(message)
        if message and world.launched:
            at_exit.pop_all()  # the others may be gone: no taking leave of them
        return code


def outcome(argv: list[str] | None, world: World) -> tuple[int, str]:
    """Run the command line; returns the exit code, and what went wrong."""
    try:
        # The command that torchrun repeats when a process was lost is the one that it began with.
        main(parse(argv, begin_if_missing=world.launched), world)
    except InputError as error:
        return 2, str(error)
    except Diverged as error:
        return 3, str(error)
    except OSError as error:
        return 2, f"{error.filename or 'input/output'}: {error.strerror}; give another --out, or free some space"
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            return 2, "out of memory: lower --batch-size, --block-size or the size of the model"
        if world.size > 1 and is_lost(error):
            return 1, "another process was lost, and so the run ends; --resume goes on from the last checkpoint"
        raise
    except KeyboardInterrupt:
        return 130, "interrupted"
    except SystemExit as end:
        return end.code, ""
    return 0, ""


def leave(code: int) -> NoReturn:
    """End the process; where torchrun started it, without taking the interpreter down.

    DistributedDataParallel and FSDP keep gloo's threads alive beyond destroy_process_group, and one that still has a tensor
    to free when the interpreter is half gone aborts the process, after everything went well.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    leave(cli())
