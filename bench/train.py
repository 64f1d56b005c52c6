"""Speed of a training step and of its parts, compared with the same step of a nanoGPT checkout.

    python bench/train.py [--threads 1] [--models 4x128,6x384,gpt2] [--against ../nanoGPT] [--compile off|on|both]
    python bench/train.py --dtype bfloat16                     # on a CPU with bfloat16 instructions
    python bench/train.py --recipe fast                        # the model and the optimisers of the fast recipe
    python bench/train.py --device cuda --models gpt2-1024 --compile on --against ../nanoGPT

A step is that of the trainer: a batch, forward, the dispersion loss (optional), backward, clipping, AdamW. nanoGPT's
model.py, imported from --against, takes the same step with the same weights, batches, text, vocabulary and optimiser
settings, including fused AdamW; "as shipped" uses its own choice of AdamW, which is not fused on a CPU.

All forms must first agree on the loss and the gradient norm at the same weights. Their timings are interleaved, round
by round in one process, since machines are shared and clock rates vary: "speed" is the median over the rounds of
nanoGPT's time (without --against, minidisp's) divided by this form's. On a busy CPU, --threads 1 --clock cpu counts the
CPU time of this process instead of wall-clock time. FLOP/s count 6 per token and weight in matrix products, including
the output layer, and 6 T C per token and layer for causal attention. Recomputation counts once, and the dispersion loss
is not counted. The peak is measured with a product of square matrices in the same rounds. Memory is the peak of a child
process over three steps, beyond that of importing torch (CPU), or the allocator's (CUDA). malloc is not tuned, for any
form, unlike in the trainer (keep_freed_memory in minidisp/runtime/device.py). "First step" is the time from the command
line of train.py to the end of its first step, including the evaluation at step 0, compile off. "Share of the loss" is
what the dispersion loss adds to a step, as a share of that step: the median over the rounds. Prints a table, then one
JSON line.
"""

import os
import sys

# Before other imports: a folder beside this file, such as a corpus named email, must not be imported as a module.
HERE = os.path.dirname(os.path.realpath(__file__))
sys.path[:] = [os.path.dirname(HERE), *(path for path in sys.path if os.path.realpath(path) != HERE)]

import argparse
import contextlib
import copy
import dataclasses
import importlib.util
import io
import json
import math
import platform
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import torch

from minidisp.config import RECIPES, Config, command_line, from_dict
from minidisp.data import Batches, Dataset
from minidisp.dispersion import DispersionLoss
from minidisp.model import GPT
from minidisp.objective import Forward, build_objective
from minidisp.ops import registered
from minidisp.optim import build_optimizers
from minidisp.runtime.device import cpu_model, resident_peak_kib

ROOT = Path(__file__).resolve().parent.parent
GPT2 = {"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": 50304}
MODELS = {
    "4x64": {"n_layer": 4, "n_head": 4, "n_embd": 64, "block_size": 64, "batch_size": 12, "vocab_size": 257},
    "8x64": {"n_layer": 8, "n_head": 4, "n_embd": 64, "block_size": 128, "batch_size": 16, "vocab_size": 257},
    "4x128": {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "batch_size": 12, "vocab_size": 257},
    "tiny": {"n_layer": 8, "n_head": 6, "n_embd": 192, "block_size": 256, "batch_size": 8, "vocab_size": 4096},
    "6x384": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "batch_size": 16, "vocab_size": 257},
    "gpt2": {**GPT2, "block_size": 256, "batch_size": 4},
    "gpt2-1024": {**GPT2, "block_size": 1024, "batch_size": 16},
}
PARTS = ("data", "forward", "dispersion", "backward", "optimiser")
DISPERSION = 0.1
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Clock:
    """Milliseconds between marks, by part of the step; on CUDA between events, which avoids synchronising."""

    def __init__(self, args):
        self.cuda, self.now = args.device == "cuda", CLOCKS[args.clock]
        self.marks: list[tuple[str, object]] = []

    def mark(self, part: str) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        self.marks.append((part, event if self.cuda else self.now()))

    def read(self) -> dict[str, float]:
        """The sum of each part since the last reading."""
        if self.cuda:
            torch.cuda.synchronize()
        parts = dict.fromkeys(PARTS, 0.0)
        for (_, start), (part, end) in zip(self.marks, self.marks[1:], strict=False):
            if part in parts:
                parts[part] += start.elapsed_time(end) if self.cuda else 1000 * (end - start)
        self.marks.clear()
        return parts


class Form:
    """One way of taking a training step."""

    def __init__(self, name, parameters, forward, optimizers, batches, config: Config, args, objective=None):
        self.name, self.parameters, self.forward, self.optimizers = name, list(parameters), forward, optimizers
        self.batches, self.config, self.device, self.objective = batches, config, args.device, objective
        self.dtype = getattr(torch, args.dtype)
        self.step_number = 0
        self.clock = Clock(args)

    def losses(self) -> torch.Tensor:
        """Data, forward, dispersion, backward; returns the cross-entropy."""
        config = self.config
        x, y = (
            torch.from_numpy(a) for a in self.batches.batch(self.step_number * config.batch_size, config.batch_size)
        )
        if self.device == "cuda":
            x, y = (a.pin_memory().to("cuda", non_blocking=True) for a in (x, y))
        self.clock.mark("data")
        with torch.autocast(self.device, dtype=self.dtype, enabled=self.dtype != torch.float32):
            ce, hidden_states = self.forward(x, y)
            self.clock.mark("forward")
            forward = Forward(x, y, ce, hidden_states, self.step_number)
            loss = self.objective(forward)["loss"] if self.objective else ce
        del forward, hidden_states
        self.clock.mark("dispersion")
        loss.backward()
        self.clock.mark("backward")
        return ce.detach()

    def step(self) -> None:
        self.clock.mark("begin")
        self.losses()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.config.grad_clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.clock.mark("optimiser")
        self.step_number += 1


def forms(names: list[str], config: Config, batches: Batches, args) -> dict[str, Form]:
    """The named forms with the same weights; forms of the same model share it to save memory."""
    torch.manual_seed(0)
    model = GPT(config).to(args.device)
    chosen = {}
    if any(not name.startswith("nanoGPT") for name in names):
        compiled = torch.compile(model, dynamic=False)
        optimizers = build_optimizers(model, config)
        dispersion = DispersionLoss()
        if any("dispersion" in name for name in names):
            dispersion.prepare(args.device)
        for name in names:
            if name.startswith("nanoGPT"):
                continue
            weight = DISPERSION if "dispersion" in name else 0.0
            objective = build_objective(dataclasses.replace(config, dispersion=weight), model, dispersion, None, "")
            forward = compiled if "compiled" in name else model
            if "recompute" in name:  # the same modules and weights, with its own config
                forward = copy.copy(model)
                forward.config = dataclasses.replace(config, recompute=True)
            with_states = lambda x, y, f=forward: f(x, y, return_hidden_states=True)[1:]  # noqa: E731
            chosen[name] = Form(name, model.parameters(), with_states, optimizers, batches, config, args, objective)
    if any(name.startswith("nanoGPT") for name in names):
        peer = import_peer(Path(args.against), config).to(args.device)
        state = {key if key.startswith("lm_head") else f"transformer.{key}": w for key, w in model.state_dict().items()}
        peer.load_state_dict(state)
        compiled = torch.compile(peer, dynamic=False)
        groups = [
            {"params": [p for p in peer.parameters() if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in peer.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ]
        fused = torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)
        for name in names:
            if not name.startswith("nanoGPT"):
                continue
            optimizer = fused
            if "as shipped" in name:
                with contextlib.redirect_stdout(io.StringIO()):
                    optimizer = peer.configure_optimizers(
                        config.weight_decay, config.lr, (config.beta1, config.beta2), args.device
                    )
            forward = compiled if "compiled" in name else peer
            loss_only = lambda x, y, f=forward: (f(x, y)[1], None)  # noqa: E731
            chosen[name] = Form(name, peer.parameters(), loss_only, [optimizer], batches, config, args)
    return {name: chosen[name] for name in names}


def import_peer(folder: Path, config: Config) -> torch.nn.Module:
    """The GPT of a nanoGPT checkout, at our size."""
    path = folder / "model.py"
    if not path.is_file():
        raise SystemExit(f"bench/train.py: --against {folder} has no model.py: pass the folder of a nanoGPT checkout")
    spec = importlib.util.spec_from_file_location("peer_model", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["peer_model"] = module  # dataclasses look up their module there
    spec.loader.exec_module(module)
    same = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias")
    with contextlib.redirect_stdout(io.StringIO()):
        return module.GPT(module.GPTConfig(**{name: getattr(config, name) for name in same}))


def verify(chosen: dict[str, Form]) -> dict[str, float]:
    """The loss of each form at the initial weights. Exits if the losses or the gradient norms do not agree."""
    losses, norms = {}, {}
    for name, form in chosen.items():
        losses[name] = form.losses().item()
        norms[name] = math.sqrt(sum(p.grad.double().square().sum().item() for p in form.parameters))
        for p in form.parameters:
            p.grad = None
        form.clock.marks.clear()
    first = next(iter(chosen))
    tolerance = 1e-5 if chosen[first].dtype == torch.float32 and chosen[first].device == "cpu" else 1e-2
    for name in chosen:
        checks = [(losses, "loss")] + ([] if "dispersion" in name else [(norms, "gradient norm")])
        for values, what in checks:
            if not abs(values[name] - values[first]) <= tolerance * abs(values[first]):
                raise SystemExit(
                    f"{name} is wrong: its {what} is {values[name]:.7g}, that of {first} {values[first]:.7g}"
                )
    return losses


def print_peak(name: str, config: Config, batches: Batches, args) -> None:
    """In a child process: the peak memory of one form over three steps, in MiB."""
    if args.device == "cpu":
        before = resident_peak_kib()
    form = forms([name], config, batches, args)[name]
    for _ in range(3):
        form.step()
    print(
        torch.cuda.max_memory_allocated() / 2**20 if args.device == "cuda" else (resident_peak_kib() - before) / 2**10
    )


def peak_memory(names: list[str], model: str, folder: Path, args) -> dict[str, float]:
    """Peak memory of the forms in MiB, each in a child process; in parallel on a GPU, where others do not count."""
    children = {}
    for name in names:
        children[name] = start_peak(name, model, folder, args)
        if args.device == "cpu":
            children[name].wait()
    said = {name: child.communicate()[0] for name, child in children.items()}
    if failed := [name for name, child in children.items() if child.returncode]:
        raise SystemExit(f"measuring the memory of {failed[0]} failed")
    return {name: float(text.split()[-1]) for name, text in said.items()}


def start_peak(name: str, model: str, folder: Path, args) -> subprocess.Popen:
    command = [
        sys.executable,
        __file__,
        "--peak-of",
        name,
        "--models",
        model,
        "--data",
        str(folder),
        "--device",
        args.device,
        "--dtype",
        args.dtype,
        "--recipe",
        args.recipe,
    ]
    command += ["--threads", str(args.threads), *(["--against", args.against] if args.against else [])]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def first_step_s(config: Config, folder: Path, args) -> float:
    """Seconds from starting train.py to the first step in its metrics.jsonl."""
    with tempfile.TemporaryDirectory() as run:
        command = [
            sys.executable,
            str(ROOT / "train.py"),
            "--recipe",
            args.recipe,
            "--data",
            str(folder),
            "--out",
            run,
            "--max-steps",
            "1000",
        ]
        sizes = ("n_layer", "n_head", "n_embd", "block_size", "batch_size")
        command += command_line({name: getattr(config, name) for name in sizes})
        command += ["--compile", "off", "--device", args.device, "--dtype", args.dtype, "--threads", str(args.threads)]
        metrics = Path(run) / "metrics.jsonl"
        start = time.monotonic()
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as child:
            try:
                while child.poll() is None:
                    if metrics.exists() and '"grad_norm"' in metrics.read_text():
                        return time.monotonic() - start
                    time.sleep(0.01)
                raise SystemExit(f"train.py failed: {child.stderr.read().decode()}")
            finally:
                child.kill()


def flops_per_step(config: Config) -> float:
    C, T = config.n_embd, config.block_size
    weights = config.n_layer * (4 * C * C + 2 * C * config.mlp_dim) + C * config.vocab_size
    return (6 * weights + 6 * config.n_layer * T * C) * config.batch_size * T


def reference_of(name: str, args) -> str:
    """The form with which a form is compared."""
    return ("nanoGPT" if args.against else "minidisp") + (" compiled" if " compiled" in name else "")


def measure(model: str, folder: Path, args) -> dict:
    config = make_config(model, args.recipe)
    batches = Batches(Dataset(folder).split("train"), config.block_size, seed=0)
    now = CLOCKS[args.clock]
    synchronize = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    torch.compiler.reset()
    names = []
    for suffix in {"off": [""], "on": [" compiled"], "both": ["", " compiled"]}[args.compile]:
        names += [
            f"minidisp{suffix}",
            f"minidisp{suffix} + dispersion",
            *(["minidisp recompute"] if not suffix else []),
        ]
        if args.against:
            names += [f"nanoGPT{suffix}"] + ([f"nanoGPT{suffix} as shipped"] if args.device == "cpu" else [])
    names = [name for name in names if args.forms is None or name in args.forms.split(",")]
    references = {reference_of(name, args) for name in names}
    if missing := sorted(references - {*names}):
        raise SystemExit(f"bench/train.py: --forms must include {missing[0]}, with which the others are compared")
    chosen = forms(names, config, batches, args)
    losses = verify(chosen)

    n, dtype = 1024 if args.device == "cpu" else 8192, getattr(torch, args.dtype)
    left, right = torch.randn(2, n, n, device=args.device, dtype=dtype)
    product = torch.empty(n, n, device=args.device, dtype=dtype)
    turn_steps = {}
    for name, form in chosen.items():  # warm up, and find how many steps take a quarter of a second
        form.step()
        synchronize()
        start = now()
        form.step()
        synchronize()
        turn_steps[name] = max(1, round(0.25 / (now() - start)))
        form.clock.read()

    step_ms: dict[str, list[float]] = {name: [] for name in names}
    parts_ms: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    gemm_ms = []
    end = time.monotonic() + args.seconds
    while time.monotonic() < end or len(gemm_ms) < 3:
        for name, form in chosen.items():
            if turn_steps[name] > 1:
                form.step()  # brings its weights back into the cache
            form.clock.read()
            start = now()
            for _ in range(turn_steps[name]):
                form.step()
            synchronize()
            step_ms[name].append(1000 * (now() - start) / turn_steps[name])
            parts_ms[name].append({part: ms / turn_steps[name] for part, ms in form.clock.read().items()})
        synchronize()
        start = now()
        for _ in range(10):
            torch.mm(left, right, out=product)
        synchronize()
        gemm_ms.append(1000 * (now() - start) / 10)
    del chosen, form

    flops, peak_flops = flops_per_step(config), 2 * n**3 / statistics.median(gemm_ms) * 1000
    result = {
        "model": model,
        "rounds": len(gemm_ms),
        "flops_per_step": flops,
        "matrix_product_flops": peak_flops,
        "losses": losses,
    }
    result["first_step_s"] = first_step_s(config, folder, args) if config.vocab_size == 257 else None
    memory = peak_memory(names, model, folder, args) if args.memory else {}
    result["forms"] = {}
    for name in names:
        reference = reference_of(name, args)
        ms, quintiles = statistics.median(step_ms[name]), statistics.quantiles(step_ms[name], n=5)
        result["forms"][name] = {
            "step_ms": ms,
            "p20_ms": quintiles[0],
            "p80_ms": quintiles[-1],
            "parts_ms": {part: statistics.median(parts[part] for parts in parts_ms[name]) for part in PARTS},
            "tokens_per_second": 1000 * config.tokens_per_step / ms,
            "flops": 1000 * flops / ms,
            "share_of_peak": 1000 * flops / ms / peak_flops,
            "speed": statistics.median(a / b for a, b in zip(step_ms[reference], step_ms[name], strict=True)),
            "peak_mem_mib": memory.get(name),
        }
        without = name.removesuffix(" + dispersion")
        if name != without and without in step_ms:
            shares = [1 - a / b for a, b in zip(step_ms[without], step_ms[name], strict=True)]
            result["forms"][name]["share_of_the_loss"] = statistics.median(shares)
    return result


def instruction_set() -> str:
    """The instruction set that the extension's operators use."""
    return registered("cpu") or torch.ops.minidisp.instruction_set()


def make_config(model: str, recipe: str = "gpt2") -> Config:
    return from_dict({**RECIPES[recipe], **MODELS[model], "lr": 1e-4, "weight_decay": 0.1, "beta2": 0.95})


def prepare_text(folder: Path) -> None:
    """The project's own files as a corpus of bytes: text without a download."""
    command = [
        sys.executable,
        "data/prepare.py",
        "--input",
        "minidisp/*.py",
        "*.py",
        "data/*.py",
        "tests/*.py",
        "--one-document",
    ]
    command += ["--tokenizer", "byte", "--name", "bench", "--out", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)


def print_row(result: dict) -> None:
    for name, form in result["forms"].items():
        parts = " | ".join(f"{form['parts_ms'][part] / form['step_ms']:.1%}" for part in PARTS)
        memory = f"{form['peak_mem_mib']:,.0f}" if form["peak_mem_mib"] is not None else "-"
        print(
            f"| {result['model']} | {name} | {form['step_ms']:.1f} | {form['tokens_per_second']:,.0f} | "
            f"{form['speed']:.2f}x | {parts} | {form['flops'] / 1e9:,.0f} | {form['share_of_peak']:.0%} | {memory} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="bench/train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="4x128,6x384,gpt2", help=f"any of {', '.join(MODELS)}")
    parser.add_argument("--against", metavar="DIR", help="a nanoGPT checkout")
    parser.add_argument("--recipe", choices=tuple(RECIPES), default="gpt2", help="nanoGPT's is gpt2")
    parser.add_argument("--compile", choices=("off", "on", "both"), default="off")
    parser.add_argument("--forms", metavar="NAMES", help="only these forms, such as minidisp,nanoGPT")
    parser.add_argument("--data", metavar="DIR", help="a prepared corpus (default: the project's own files, as bytes)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of products (default: bfloat16 on CUDA)")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seconds", type=float, default=10.0, help="timing per model; at least three rounds")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help="wall-clock or CPU time (--threads 1)")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure the peak memory")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    unknown = sorted(set(args.models.split(",")) - set(MODELS))
    if unknown:
        parser.error(f"--models: unknown model {unknown[0]}: choose from {', '.join(MODELS)}")
    if args.clock == "cpu" and (args.threads > 1 or args.device == "cuda"):
        parser.error("--clock cpu is only meaningful with --threads 1 on a CPU")
    if args.against and args.recipe != "gpt2":
        parser.error("--against compares with nanoGPT, whose steps are those of --recipe gpt2")
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    torch.set_num_threads(args.threads)
    if args.device == "cuda":
        torch.set_float32_matmul_precision("high")
    if args.peak_of:
        config = make_config(args.models, args.recipe)
        print_peak(args.peak_of, config, Batches(Dataset(args.data).split("train"), config.block_size, seed=0), args)
        return

    where = torch.cuda.get_device_name() if args.device == "cuda" else f"{cpu_model()}, {args.threads} threads"
    if args.device == "cpu":
        where += f", instructions of the operators: {instruction_set()}"
    print(f"{where}, {args.dtype}, torch {torch.__version__}", end="")
    if args.forms is None or "dispersion" in args.forms:
        print(f"; dispersion {DISPERSION}, all layers and tokens: {DispersionLoss().prepare(args.device)}", end="")
    print("\n")
    columns = ("model", "form", "ms/step", "tokens/s", "speed", *PARTS, "GFLOP/s", "of the matrix product", "peak MiB")
    print(f"| {' | '.join(columns)} |")
    print("|---" * (8 + len(PARTS)) + "|")
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.data or Path(temporary) / "text")
        if not args.data:
            prepare_text(folder)
        for model in args.models.split(","):
            results.append(measure(model, folder, args))
            print_row(results[-1])
    for result in results:
        for name, form in result["forms"].items():
            if "share_of_the_loss" in form:
                print(f"share of the loss in a step, {result['model']}, {name}: {form['share_of_the_loss']:.1%}")
        if result["first_step_s"]:
            print(f"first step of train.py, {result['model']}: {result['first_step_s']:.1f} s after the command")
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    environment = {"torch": torch.__version__, "python": platform.python_version(), "platform": platform.platform()}
    described = {"device": where, "dtype": args.dtype, "recipe": args.recipe, "clock": args.clock, **environment}
    print(json.dumps({**described, "commit": git.stdout.strip(), "results": results}))


if __name__ == "__main__":
    main()
