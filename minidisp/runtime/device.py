"""The device that a run computes on, with its dtype and memory, and the environment recorded in config.json."""

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch

import minidisp
from minidisp import InputError
from minidisp.config import Config, kebab, to_dict
from minidisp.data import SPLITS, Corpora, Dataset
from minidisp.ops import attention, build, processor_has, registered
from minidisp.runtime.processes import World

try:
    import resource
except ImportError:  # Windows
    resource = None

ROOT = Path(__file__).resolve().parents[2]


def set_up(config: Config, world: World) -> tuple[torch.device, torch.dtype, torch.autocast | nullcontext]:
    """Set up a run's device; returns it, the compute dtype, and the autocast context for that dtype.

    The context can be entered repeatedly. Also sets torch's thread count and matmul precision. Raises InputError if the
    processes of a run were started with different settings or code.
    """
    if world.size > 1:
        settings = {f"--{kebab(name)}": value for name, value in to_dict(config).items()}
        world.agree({**settings, "torch": torch.__version__, "the code of minidisp": code_hash()})
    if config.threads:
        torch.set_num_threads(config.threads)
    device = pick_device(config.device, world.local_rank)
    if device.type == "cpu":
        keep_freed_memory()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    dtype = pick_dtype(config.dtype, device)
    return device, dtype, nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


def keep_freed_memory() -> None:
    """Tune malloc to keep the memory that a step frees for the next step.

    glibc returns large blocks to the system, which then clears every page again: that took 5 to 15 % of a bfloat16 step
    on a CPU. Other C libraries lack this setting and are left unchanged.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def pick_device(name: str, local_rank: int | None = None) -> torch.device:
    """The torch device for "auto", "cpu", "cuda" or "mps". Raises InputError if this machine has no such device.

    local_rank: the rank of this process on this machine, if several processes train together. Each uses its own GPU,
    which becomes the current device.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, found in available.items() if found)
    if not available[name]:
        raise InputError(f"--device {name}: torch {torch.__version__} finds no such device here; omit the flag")
    if local_rank is not None and name == "mps":
        raise InputError("mps supports one process only: start it without torchrun, or pass --device cpu")
    if local_rank is not None and name == "cuda":
        if local_rank >= (gpus := torch.cuda.device_count()):
            raise InputError(f"torchrun started more processes than the {gpus} GPUs here: pass --nproc-per-node {gpus}")
        torch.cuda.set_device(local_rank)
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The compute dtype of that name; for "auto", bfloat16 on CUDA (float16 on older GPUs) and float32 elsewhere."""
    if name != "auto":
        return getattr(torch, name)
    if device.type != "cuda":
        return torch.float32
    # Older GPUs emulate bfloat16, which torch reports as supported unless asked otherwise.
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def compiles(wanted: str, device: torch.device) -> bool:
    """Whether to torch.compile the model: "on", "off", or "auto", which compiles on a GPU if a compiler is found.

    Raises InputError for "on" without a compiler; "auto" then trains without compiling and reports it on stderr.
    """
    if wanted == "off" or (wanted == "auto" and device.type != "cuda"):
        return False
    lacking = None
    variable = "CXX" if device.type == "cpu" else "CC"  # Triton compiles C
    if not build.compiler(variable, ("c++", "g++", "clang++", "gcc", "cl")):
        lacking = f"no C++ compiler ({os.environ.get(variable) or 'c++'}) is in PATH"
    elif device.type == "cuda" and importlib.util.find_spec("triton") is None:
        lacking = "the package triton is not installed"
    if lacking and wanted == "on":
        raise InputError(f"--compile on: {lacking}: install it, or omit the flag")
    if lacking:
        print(f"not compiled: {lacking}", file=sys.stderr)
    return not lacking


# The n_embd from which a step on a CPU is faster in bfloat16 than in float32. With AMX it is 1.3 times as fast at 64,
# 1.8 at 128, 2.4 at 192; with AVX512-BF16 alone it was no faster at 128.
BFLOAT16_PAYS = {"amx_bf16": 64, "avx512_bf16": 192}


def bfloat16_pays(n_embd: int) -> bool:
    """Whether this processor (x86) has instructions for bfloat16, and the model is wide enough for them.

    The trainer does not choose it automatically: a run should give the same numbers on every CPU, up to rounding.
    """
    return any(n_embd >= least and processor_has(name) for name, least in BFLOAT16_PAYS.items())


def describe_use(
    config: Config, device: torch.device, dtype: torch.dtype, compiled: bool, world: World, dataset: Dataset | Corpora
) -> str:
    """The device, dtype, attention, compilation and processes of a run, as printed in its first lines."""
    words = f"{device_name(device)}, {str(dtype).removeprefix('torch.')}"
    if config.dtype == "auto" and device.type == "cpu" and bfloat16_pays(config.n_embd):
        words += " (faster here: --dtype bfloat16)"
    if dataset.template and config.packing != "joined":
        words += ", attention by torch (with a mask that keeps examples apart)"
    elif attention.choose(dtype, device.type, config.head_dim, config.dropout)[0] == "fused":
        lacking = registered("cpu")
        words += f", attention by torch: {lacking}" if lacking else ", attention fused"
    words += f", compile {'on' if compiled else 'off'}"
    if world.launched:
        words += f", {world.size} processes" + (", sharded" if config.shard else "")
    return words


def device_name(device: torch.device) -> str:
    """The name of the GPU, or the number of CPU threads."""
    return (
        torch.cuda.get_device_name() if device.type == "cuda" else f"{device.type}, {torch.get_num_threads()} threads"
    )


def to_device(tokens: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copy int64 tokens to the device; on CUDA through pinned memory, so that the copy overlaps with computation."""
    tensor = torch.from_numpy(tokens)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def fetched(values: dict) -> dict:
    """The values, with scalar tensors turned into floats. Synchronises with the device once."""
    tensors = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
    numbers = torch.stack([value.float() for value in tensors.values()]).tolist() if tensors else []
    return {**values, **dict(zip(tensors, numbers, strict=True))}


def memory_bytes(device: torch.device) -> int | None:
    """The memory in bytes that this process may use on the device, or None if unknown. On a CPU, this is the machine's
    memory, or less if a container (cgroup) or `ulimit -v` limits it."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    limits = [*cgroup_limits(Path("/"))]
    with contextlib.suppress(AttributeError, ValueError, OSError):  # Windows; unknown to this system
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    if resource and (soft := resource.getrlimit(resource.RLIMIT_AS)[0]) != resource.RLIM_INFINITY:
        limits.append(soft)
    return min(limits, default=None)


def refuse_larger_than_memory(what: str, needed: float, device: torch.device, advice: str = "") -> None:
    """Raise InputError, naming `what`, if so many bytes do not fit in the device's memory, before allocating them."""
    available = memory_bytes(device)
    if available and needed > available:
        raise InputError(
            f"out of memory: {what} needs {needed / 2**30:,.1f} GiB, but {device.type} has {available / 2**30:,.1f} GiB"
            + advice
        )


def cgroup_limits(root: Path) -> Iterator[int]:
    """The memory limits in bytes of this process's control groups and their parents, cgroup versions 1 and 2.

    root: root of the file system. Inside a container, the group's path may be the host's; the mount point is then the
    container's own group.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            top, name = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            top, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        below = [part for part in group.split("/") if part not in ("", "..")]
        for depth in range(len(below) + 1):
            with contextlib.suppress(OSError, ValueError):  # not there, or "max"
                limit = int(top.joinpath(*below[:depth], name).read_text())
                if limit < 1 << 60:  # version 1 writes a huge number for "no limit"
                    yield limit


def get_rng_state(device: torch.device) -> dict:
    """The state of torch's global random number generators, which only dropout uses during training."""
    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if device.type == "cuda" else None,
        "mps": torch.mps.get_rng_state() if device.type == "mps" else None,
    }


def set_rng_state(state: dict, device: torch.device) -> None:
    """Set torch's global generators to what get_rng_state returned."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
    if device.type == "mps" and state.get("mps") is not None:
        torch.mps.set_rng_state(state["mps"])


def describe_environment(dataset: Dataset, device: torch.device, processes: int) -> dict:
    """The environment of a run: versions, commit, hardware, hashes of the data. Saved in config.json."""
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
        "device": device_name(device),
        "processes": processes,
        "device_memory_gib": round((memory_bytes(device) or 0) / 2**30, 1),
        "cuda": torch.version.cuda,
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": round((memory or 0) / 2**30, 1),
        "data_hash": dataset.hash,
        "data_files": dataset.files_state,
        "tokenizer_sha256": dataset.tokenizer.hash,
        "shards_sha256": {
            name: [shard["sha256"] for part in dataset.parts for shard in part.meta["splits"][name]["shards"]]
            for name in SPLITS
        },
    }


def code_hash() -> str:
    """sha256 of minidisp's Python sources."""
    digest = hashlib.sha256()
    for path in (ROOT / "train.py", *sorted(Path(minidisp.__file__).parent.rglob("*.py"))):
        if path.is_file():  # an installed minidisp has no train.py beside it
            digest.update(f"{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def git(*arguments: str) -> str | None:
    """The output of a git command in minidisp's own repository, or None without git or such a repository. A repository
    into which the code was copied or installed does not count."""
    if not shutil.which("git"):
        return None
    # Set inside git hooks, for example, where they point to another repository.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def run(*words: str) -> str | None:
        done = subprocess.run(
            ["git", *words], cwd=ROOT, env=environment, capture_output=True, text=True, errors="replace", check=False
        )
        return done.stdout.rstrip("\n") if done.returncode == 0 else None

    below_top = run("rev-parse", "--show-prefix")  # empty at the top of a repository
    is_own = below_top == "" and run("ls-files", "--error-unmatch", "train.py", "minidisp/__init__.py") is not None
    return run(*arguments) if is_own else None


def resident_peak_kib() -> int:
    """Peak resident memory of this process. Raises OSError where it is unknown: Linux has it, but not every sandbox.

    getrusage would include the peak of the parent before the fork.
    """
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if not found:
        raise OSError("/proc/self/status has no VmHWM")
    return int(found[1])


def peak_memory_mib(device: torch.device) -> float | None:
    """Peak memory so far in MiB: of the allocator on CUDA, otherwise of this process; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        return resident_peak_kib() / 2**10
    except OSError:
        return None


def cpu_model() -> str | None:
    """The processor's name, or None if unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
