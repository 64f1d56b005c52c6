"""Train a small language model, with or without the dispersion loss: flags, data, model, loop, summary, in this order.

    python train.py --dispersion 0.1                  # the default corpus and model; minutes on two cores
    python train.py --data shakespeare --seed 1       # see python train.py --help
    python train.py --resume --out runs/NAME          # go on where a run stopped

Leaves a run folder: config.json, metrics.jsonl, ckpt_last.pt, ckpt_best.pt, tokenizer.model, summary.json, figures/.
Exit codes: 0 done; 2 bad usage or input; 3 training diverged; 130 or 143 after SIGINT or SIGTERM, with a checkpoint.
"""

import dataclasses
import gc
import json
import math
import platform
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import minidisp
from minidisp import InputError, checkpoint, ops, report
from minidisp.config import Config, parse, to_dict
from minidisp.data import Batches, Dataset, eval_windows
from minidisp.dispersion import DispersionLoss, mean_cosine
from minidisp.metrics import Condensation, bits_per_byte, perplexity
from minidisp.model import GPT, GPTConfig
from minidisp.optim import build_optimizers, learning_rate

ROOT = Path(__file__).resolve().parent
CONDENSATION_SEQUENCES = 100  # as in the paper; of up to 512 tokens


class Diverged(RuntimeError):
    """The loss is no longer a number."""


def main(config: Config) -> dict:
    """Train as the config says and return the summary (also in summary.json).

    Raises InputError on input that cannot be used, Diverged when the loss stops being finite, and SystemExit with
    128 + the signal's number when a signal ended the run, after saving a checkpoint.
    """
    # --- system -----------------------------------------------------------------------------------------------------
    if config.threads:
        torch.set_num_threads(config.threads)
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    autocast = nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    run = config.run_dir
    refuse_occupied(run, config)

    # --- data -------------------------------------------------------------------------------------------------------
    dataset = Dataset(find_corpus(config.data))
    config = dataclasses.replace(config, vocab_size=dataset.tokenizer.vocab_size)
    batches = Batches(dataset.split("train"), config.block_size, config.seed)
    validation = Validation(dataset, config)

    # --- model and optimisers ---------------------------------------------------------------------------------------
    state = checkpoint.read(run / checkpoint.LAST) if config.resume else None
    torch.manual_seed(config.seed)
    model = GPT(config)
    if state:
        check_same_run(state, config, dataset, run / checkpoint.LAST)
        checkpoint.load_weights(model, state, run / checkpoint.LAST)
    elif config.init_from:
        start_from(model, config, dataset)
    model.to(device)
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
        impl=ops.resolve(config.dispersion_impl, device.type) if config.dispersion else "reference",
    )
    use_compile = config.compile == "on" or (config.compile == "auto" and device.type == "cuda")
    trained = torch.compile(model) if use_compile else model

    # --- the run folder ---------------------------------------------------------------------------------------------
    step, seconds, best_val_loss, last_eval = 0, 0.0, math.inf, None
    run.mkdir(parents=True, exist_ok=True)
    if state:
        step, seconds, best_val_loss = state["step"], state["seconds"], state["best_val_loss"]
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        scaler.load_state_dict(state["scaler"])
        set_rng_state(state["rng"], device)
        last_eval = rewind_metrics(run / "metrics.jsonl", step)
        del state
    elif config.overwrite:
        remove_run(run)
    environment = describe_environment(dataset, device)
    checkpoint.write_json(run / "config.json", {**to_dict(config), "environment": environment})
    shutil.copyfile(dataset.folder / "tokenizer.model", run / "tokenizer.model")
    objective = "cross-entropy"
    if config.dispersion:
        objective += f" + {config.dispersion:g} x {config.dispersion_variant} ({config.dispersion_layers} layers), "
        objective += ops.explain(device.type) if dispersion.impl != "reference" else "plain PyTorch"
    print(
        f"minidisp {minidisp.__version__}  {run}\n"
        f"data    {dataset.meta['name']}: {dataset.split('train').tokens:,} training tokens, vocabulary {config.vocab_size:,}\n"
        f"model   {config.arch} {config.n_layer} layers x {config.n_embd}, context {config.block_size}: "
        f"{model.num_params():,} parameters\n"
        f"steps   {config.max_steps:,} of {config.tokens_per_step:,} tokens, {config.optimizer}, {config.schedule} schedule\n"
        f"loss    {objective}\n"
        f"device  {environment['device']}, {str(dtype).removeprefix('torch.')}, compile {'on' if use_compile else 'off'}\n",
        flush=True,
    )

    # --- the loop ---------------------------------------------------------------------------------------------------
    stop_signal = catch_signals()
    metrics_file = open(run / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115, closed at the end of the run

    def log(line: dict) -> None:
        metrics_file.write(checkpoint.to_json(line) + "\n")
        metrics_file.flush()

    def save() -> None:
        state = {
            "model": model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "scaler": scaler.state_dict(),
            "config": to_dict(config),
            "data_hash": dataset.hash,
            "step": step,
            "seconds": seconds,
            "best_val_loss": best_val_loss,
            "rng": get_rng_state(device),
        }
        checkpoint.save(run, state, step, config.keep)

    def evaluate() -> None:
        nonlocal best_val_loss, last_eval
        with autocast:
            scores = validation.evaluate(model, device)
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
        if step and scores["val_loss"] < best_val_loss:
            best_val_loss = scores["val_loss"]
            best = {"model": model.state_dict(), "config": to_dict(config), "step": step, "val_loss": best_val_loss}
            checkpoint.write_atomic(run / checkpoint.BEST, lambda file: torch.save(best, file))

    first_step = step
    progress = tqdm(total=config.max_steps, initial=step, unit="step", dynamic_ncols=True, disable=None)
    if last_eval is None:
        evaluate()  # before the first step: condensation is there at initialisation
    model.train()
    logged_at, logged_step = time.perf_counter(), step
    while step < config.max_steps and not stop_signal:
        lr = learning_rate(step, config)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
        logging = (step + 1) % config.log_every == 0 or step == 0
        totals = {"loss": 0.0, "ce": 0.0, "dispersion": 0.0, "mean_cosine": 0.0}  # means over the micro-steps
        for micro_step in range(config.grad_accum):
            x, y = batches.batch((step * config.grad_accum + micro_step) * config.batch_size, config.batch_size)
            x, y = to_device(x, device), to_device(y, device)
            with autocast:
                _, ce, hidden_states = trained(x, y, return_hidden_states=True)
            loss = ce
            if config.dispersion:
                disp = dispersion(hidden_states, step)
                loss = ce + config.dispersion * disp
                totals["dispersion"] += disp.detach() / config.grad_accum
            scaler.scale(loss / config.grad_accum).backward()
            totals["loss"] += loss.detach() / config.grad_accum
            totals["ce"] += ce.detach() / config.grad_accum
            if logging:
                with torch.no_grad():
                    cosines = torch.stack([mean_cosine(z, eps=0.0) for z in hidden_states[1:]])
                totals["mean_cosine"] += cosines.mean() / config.grad_accum
            del hidden_states  # or they would still be there during the next forward pass
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        # With max_norm infinite nothing is clipped, and the norm is still measured.
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
        for optimizer in optimizers:
            scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        scaler.update()
        step += 1
        progress.update()

        if logging:
            line = {name: float(value) for name, value in totals.items()}  # waits for the device
            elapsed = time.perf_counter() - logged_at
            speed = (step - logged_step) * config.tokens_per_step / elapsed
            seconds += elapsed
            refuse_divergence(line["loss"], step, run)
            log({"step": step, "tokens": step * config.tokens_per_step, **line, "lr": lr, "grad_norm": float(grad_norm),
                 "tokens_per_second": speed, "seconds": seconds})  # fmt: skip
            progress.set_postfix_str(f"loss {line['ce']:.3f}, {speed:,.0f} tokens/s", refresh=False)
            logged_at, logged_step = time.perf_counter(), step
        if step % config.eval_every == 0 or step == config.max_steps:
            paused = time.perf_counter()
            evaluate()
            logged_at += time.perf_counter() - paused  # evaluating is no training time
        if step % config.save_every == 0 or step == config.max_steps or stop_signal:
            paused = time.perf_counter()
            seconds += paused - logged_at
            refuse_divergence(float(totals["loss"]), step, run)  # the checkpoint before stays
            save()
            logged_at, logged_step = time.perf_counter(), step
    progress.close()
    if step == 0:
        save()  # --max-steps 0: a model as initialised, to compare with
    metrics_file.close()
    if stop_signal:
        print(
            f"stopped at step {step} by {stop_signal[0].name}; go on with: python train.py --resume --out {run}",
            file=sys.stderr,
        )
        raise SystemExit(128 + stop_signal[0])

    # --- summary ----------------------------------------------------------------------------------------------------
    summary = summarise(config, model, run, seconds)
    checkpoint.write_json(run / "summary.json", summary)
    print("\n" + summary_table(summary))
    title = f"{dataset.meta['name']}, {config.n_layer} x {config.n_embd}, dispersion {config.dispersion:g}"
    for path in report.draw_run(report.read_metrics(run / "metrics.jsonl"), title, run / "figures"):
        print(f"figure  {path}")
    print(f'next    python eval.py {run} --sample "..."')
    return summary


# --- parts of the above ---------------------------------------------------------------------------------------------


class Validation:
    """The fixed validation set of a run: the same windows in every evaluation and for every seed."""

    def __init__(self, dataset: Dataset, config: Config):
        self.x, self.y = eval_windows(dataset.split("val"), config.block_size, config.eval_tokens)
        self.bytes = sum(len(dataset.tokenizer.token_bytes[token]) for token in self.y.flat)
        self.batch_size = config.batch_size

    @torch.no_grad()
    def evaluate(self, model: GPT, device: torch.device) -> dict:
        """val_loss in nats per token, perplexity, bits_per_byte, and the condensation scores of the same windows."""
        was_training = model.training
        model.eval()
        nats, condensation = 0.0, Condensation()
        for i in range(0, len(self.x), self.batch_size):
            x = to_device(self.x[i : i + self.batch_size], device)
            y = to_device(self.y[i : i + self.batch_size], device)
            _, loss, hidden_states = model(x, y, return_hidden_states=True)
            nats += loss.item() * y.numel()
            room = CONDENSATION_SEQUENCES - condensation.sequences
            if room > 0:
                condensation.update([z[:room, :512] for z in hidden_states])
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


def refuse_divergence(loss: float, step: int, run: Path) -> None:
    """Raise Diverged if the loss is NaN or infinite."""
    if not math.isfinite(loss):
        raise Diverged(
            f"the loss is {loss} at step {step}: lower --lr, or raise --warmup-steps; what was saved is in {run}"
        )


def pick_device(name: str) -> torch.device:
    """The torch device for "auto", "cpu", "cuda" or "mps". Raises InputError if this machine has none of that kind."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, available in there.items() if available)
    if not there[name]:
        raise InputError(f"--device {name}: torch {torch.__version__} finds no such device here; leave the flag out")
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products: what is named, or bfloat16 (float16 on older cards) on CUDA and float32 elsewhere."""
    if name != "auto":
        return getattr(torch, name)
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


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


def refuse_occupied(run: Path, config: Config) -> None:
    """Raise InputError if the run folder holds a run that would be lost, or lacks one to go on with."""
    occupied = (run / "config.json").exists()
    if config.resume and not (run / checkpoint.LAST).is_file():
        raise InputError(
            f"--resume: {run} holds no {checkpoint.LAST} to go on with; leave --resume out, or name the run with --out"
        )
    if occupied and not config.resume and not config.overwrite:
        raise InputError(
            f"{run} holds a run already: add --resume to go on, --overwrite to replace it, or another --out"
        )
    if run.exists() and not run.is_dir():
        raise InputError(f"{run} is not a folder: give another --out")


def remove_run(run: Path) -> None:
    """Remove the files of an earlier run, and nothing else that may lie in the folder."""
    for name in ("config.json", "metrics.jsonl", "summary.json", "tokenizer.model"):
        (run / name).unlink(missing_ok=True)
    for old in (*run.glob("ckpt_*.pt"), *run.glob("figures/*.png")):
        old.unlink()


def check_same_run(state: dict, config: Config, dataset: Dataset, path: Path) -> None:
    """Raise InputError if a checkpoint to resume belongs to another architecture or other data."""
    for field in dataclasses.fields(GPTConfig):
        saved, wanted = state["config"].get(field.name), getattr(config, field.name)
        if saved != wanted:
            raise InputError(
                f"--resume: {field.name} is {saved} in {path}, but {wanted} is asked for; leave it as it was"
            )
    if state["data_hash"] != dataset.hash:
        raise InputError(
            f"--resume: {path} was trained on other data or another tokenizer than {dataset.folder} holds now"
        )


def start_from(model: GPT, config: Config, dataset: Dataset) -> None:
    """Copy the weights of the run named by --init-from; its architecture and tokenizer must be the same."""
    source, vocabulary, saved = checkpoint.load_run(config.init_from)
    for field in dataclasses.fields(GPTConfig):
        if field.name != "dropout" and getattr(saved, field.name) != getattr(config, field.name):
            raise InputError(
                f"--init-from {config.init_from} has {field.name} {getattr(saved, field.name)}, not "
                f"{getattr(config, field.name)}: give the same model flags"
            )
    if vocabulary.hash != dataset.tokenizer.hash:
        raise InputError(
            f"--init-from {config.init_from} has another tokenizer than {dataset.folder}: prepare the data with it"
        )
    model.load_state_dict(source.state_dict())


def rewind_metrics(path: Path, step: int) -> int | None:
    """Drop the lines behind `step`, which will be run again; returns the step of the last evaluation kept, or None."""
    lines = [line for line in report.read_metrics(path) if line["step"] <= step] if path.exists() else []
    text = "".join(json.dumps(line) + "\n" for line in lines)
    checkpoint.write_atomic(path, lambda file: file.write(text.encode()))
    return max((line["step"] for line in lines if "val_loss" in line), default=None)


def get_rng_state(device: torch.device) -> dict:
    """State of torch's global generators, which only dropout draws from during training."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if device.type == "cuda" else None}


def set_rng_state(state: dict, device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])


def catch_signals() -> list[signal.Signals]:
    """A list that the first SIGINT or SIGTERM is put into, for the loop to see; a second one acts as usual."""
    caught: list[signal.Signals] = []

    def handle(number, frame):
        caught.append(signal.Signals(number))
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        tqdm.write(f"{caught[-1].name}: finishing this step, then saving; once more to leave at once")

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
    return caught


def describe_environment(dataset: Dataset, device: torch.device) -> dict:
    """What a run ran on: versions, commit, hardware, data. Kept in config.json."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return {
        "minidisp": minidisp.__version__,
        "commit": git.stdout.strip() or None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{device.type}, {torch.get_num_threads()} threads",
        "data_hash": dataset.hash,
    }


def summarise(config: Config, model: GPT, run: Path, seconds: float) -> dict:
    """The run in a dozen numbers: where it began, where it ended, and what it cost."""
    evals = [line for line in report.read_metrics(run / "metrics.jsonl") if "val_loss" in line]
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
    tokens = config.max_steps * config.tokens_per_step
    return {
        "run": str(run),
        "parameters": model.num_params(),
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds if seconds else None,
        "first": {key: evals[0][key] for key in keys},
        "best": {key: min(evals, key=lambda line: line["val_loss"])[key] for key in keys},
        "last": {key: evals[-1][key] for key in keys},
    }


def summary_table(summary: dict) -> str:
    rows = []
    for label, key in (("validation loss (nats/token)", "val_loss"), ("perplexity", "perplexity"), ("bits per byte", "bits_per_byte"),
                       ("mean cosine, last half of layers", "last_half_mean"), ("Spearman, cosine against depth", "spearman")):  # fmt: skip
        rows.append([label, *(report.number(summary[when][key]) for when in ("first", "best", "last"))])
    headers = ["", *(f"{when} (step {summary[when]['step']:,})" for when in ("first", "best", "last"))]
    speed = f", {summary['tokens_per_second']:,.0f} tokens/s" if summary["tokens_per_second"] else ""
    return (
        report.table(headers, rows)
        + f"\n\n{summary['parameters']:,} parameters, {summary['tokens']:,} tokens in {summary['seconds']:.0f} s{speed}"
    )


def cli(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        main(parse(argv))
    except InputError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except Diverged as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 3
    except OSError as error:
        print(
            f"train.py: {error.filename or 'input/output'}: {error.strerror}; give another --out, or free some space",
            file=sys.stderr,
        )
        return 2
    except RuntimeError as error:  # torch.OutOfMemoryError is one, and on a CPU there is only the message
        if "allocate" not in str(error):
            raise
        print("train.py: out of memory: lower --batch-size, --block-size or the size of the model", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train.py: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(cli())
