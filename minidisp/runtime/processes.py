"""Several processes that train one run: rendezvous, agreement on settings, and sharing of gradients and weights."""

import os
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from minidisp import InputError, printable
from minidisp.model import GPT

PATIENCE = timedelta(minutes=10)  # how long a process waits for one that does not respond

# Variables that other launchers set: (number of processes, rank, rank on this machine). They do not set an address.
OTHER_LAUNCHERS = {
    "srun": ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"),
    "mpirun": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "mpiexec": ("PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID"),
}


def is_launched() -> bool:
    """Whether this process was started as one of several, by torchrun or by a launcher that sets the same variables.

    Raises InputError if only some of these variables are set, or only those of another launcher.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return True
    if os.environ.get("WORLD_SIZE", "1") != "1" or ("RANK" in os.environ and "MASTER_ADDR" in os.environ):
        for name in ("RANK", "WORLD_SIZE"):
            if not os.environ.get(name, "").isdecimal():
                raise InputError(
                    f"{name} is {os.environ.get(name, 'not set')}, but several processes need RANK, WORLD_SIZE and "
                    "MASTER_ADDR (and LOCAL_RANK with several GPUs): set them all, or use torchrun"
                )
        if int(os.environ["WORLD_SIZE"]) > 1 and not os.environ.get("MASTER_ADDR"):
            raise InputError("WORLD_SIZE is set, but MASTER_ADDR is not: set it to the host of the process with RANK 0")
        for name in ("LOCAL_RANK", "MASTER_PORT"):
            if not os.environ.get(name, "0").isdecimal():
                raise InputError(f"{name} is {os.environ[name] or 'empty'}, but must be a number, or not set")
        if int(os.environ["RANK"]) >= int(os.environ["WORLD_SIZE"]):
            raise InputError(f"RANK is {os.environ['RANK']}, but must be below WORLD_SIZE {os.environ['WORLD_SIZE']}")
        return int(os.environ["WORLD_SIZE"]) > 1
    for launcher, (size, rank, local_rank) in OTHER_LAUNCHERS.items():
        if rank in os.environ and os.environ.get(size, "1") not in ("", "1"):
            raise InputError(
                f"{launcher} started {os.environ[size]} processes, but each would train on its own: use torchrun, or "
                f"set MASTER_ADDR to the first host and run {launcher} bash -c 'RANK=${rank} WORLD_SIZE=${size} "
                f"LOCAL_RANK=${local_rank} python train.py ...'; to train in one process, unset {size}"
            )
    return False


@dataclass(frozen=True)
class World:
    """The processes that train together, and the rank of this one; by default, a single process.

    Every process must make the same calls of mean, sum, max, barrier, gather and main_first, in the same order.
    """

    rank: int = 0
    size: int = 1
    local_rank: int | None = None  # rank on this machine, which is the number of its GPU; None without a launcher
    store: Any = None  # key-value store that the processes share; None without a launcher

    @classmethod
    def join(cls, at_exit: ExitStack) -> "World":
        """The world that the environment variables describe. Only the main process prints to stdout."""
        if not is_launched():
            return cls()
        import torch.distributed as dist

        os.environ.setdefault("MASTER_PORT", "29500")
        # NCCL for tensors on GPUs, gloo for values on the CPU.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        try:
            store, rank, size = next(dist.rendezvous("env://", timeout=PATIENCE))
            # torchrun restarts lost processes with the same store, which still holds the addresses of the dead ones.
            store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
        except (RuntimeError, ValueError) as error:
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ['MASTER_PORT']}"
            reason = str(error).partition("\n")[0]
            raise InputError(f"the processes cannot meet at MASTER_ADDR:MASTER_PORT, {where}: {reason:.200}") from error
        at_exit.callback(dist.destroy_process_group)
        local = os.environ.get("LOCAL_RANK", str(rank % max(1, torch.cuda.device_count())))
        world = cls(rank, size, int(local), store)
        if not world.main:
            nowhere = at_exit.enter_context(open(os.devnull, "w"))  # noqa: SIM115, closed at exit
            at_exit.enter_context(redirect_stdout(nowhere))
        return world

    @property
    def main(self) -> bool:
        """Whether this is the process that writes files."""
        return self.rank == 0

    @property
    def launched(self) -> bool:
        """Whether a launcher started this process (perhaps as the only one)."""
        return self.store is not None

    def share_of(self, sequences: int) -> int:
        """How many of a step's sequences this process takes. Raises InputError if they cannot be shared evenly."""
        if sequences % self.size:
            raise InputError(
                f"batch_size x grad_accum is {sequences} sequences per step, which {self.size} processes cannot share "
                "evenly: change one of them"
            )
        return sequences // self.size

    def mean(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Average scalars over the processes."""
        if self.size == 1:
            return values
        import torch.distributed as dist

        stacked = torch.stack([value.float() for value in values.values()])
        dist.all_reduce(stacked)
        return dict(zip(values, (stacked / self.size).unbind(), strict=True))

    def sum(self, number: Tensor) -> Tensor:
        """The sum of the processes' numbers, a scalar on the device."""
        if self.size == 1:
            return number
        import torch.distributed as dist

        total = number.clone()
        dist.all_reduce(total)
        return total

    def max(self, number: int) -> int:
        """The maximum over the processes, exchanged on the CPU, without synchronising with a GPU."""
        if self.size == 1:
            return number
        import torch.distributed as dist

        largest = torch.tensor(int(number))
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def barrier(self) -> None:
        """Wait until all processes have made this call."""
        self.max(0)

    def gather(self, value: object) -> list:
        """The values of all processes, by rank, in the main process; an empty list in the others."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values = [None] * self.size if self.main else None
        dist.gather_object(value, values)
        return values or []

    def agree(self, values: dict[str, Any]) -> None:
        """Raise InputError in every process unless all have the same values, naming the first that differs."""
        if self.size == 1:
            return
        import torch.distributed as dist

        everyone: list[dict] = [None] * self.size
        dist.all_gather_object(everyone, values)
        main = everyone[0]
        for rank, other in enumerate(everyone):
            for name in [*main, *(other.keys() - main.keys())]:
                if main.get(name) != other.get(name):
                    raise InputError(
                        f"the processes differ in {name}: {printable(repr(main.get(name)), 80)} in process 0, "
                        f"{printable(repr(other.get(name)), 80)} in process {rank}; start all with the same "
                        "command, code and files"
                    )

    def main_first(self, what: str, work: Callable[[], Any]) -> Any:
        """Call work() in the main process, then in the others, which find its results on disk. It may take days."""
        if not self.launched:
            return work()
        if not self.main:
            self.store.wait([what], timedelta(days=7))
        done = work()
        if self.main:
            self.store.set(what, "done")
        return done

    def first_to_speak(self) -> bool:
        """Whether no process has printed an error yet: later errors are consequences of the first one."""
        import torch.distributed as dist

        try:
            return not self.launched or self.store.add("messages", 1) == 1
        except dist.DistError:  # the process that hosts the store has ended, and has printed its error
            return False


ALONE = World()


def shard(model: GPT, device: torch.device, dtype: torch.dtype, world: World, compiled: bool) -> None:
    """Split weights, gradients and optimiser states over the processes (FSDP2): each block, then the rest.

    dtype: the compute dtype. compiled: whether to compile the blocks, which share one graph; a graph of the whole model
    would break before and after each block, where FSDP gathers its weights. Raises InputError for float16, whose
    gradient scale is not sharded.
    """
    if dtype == torch.float16:
        raise InputError("--shard --dtype float16: the gradient scale is not sharded; use bfloat16 or float32")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (world.size,))
    for block in model.h:
        if compiled:
            block.forward = torch.compile(block.forward, fullgraph=True)
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def data_parallel(model: nn.Module) -> nn.Module:
    """Wrap the model in DDP: all processes start with the weights of the main one and average their gradients."""
    wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    wrapped.require_forward_param_sync = False  # only for buffers, which never change
    return wrapped


def set_gradient_sync(trained: nn.Module, model: GPT, on: bool) -> None:
    """Set whether the next backward pass averages gradients over the processes, or only accumulates them locally."""
    if isinstance(trained, nn.parallel.DistributedDataParallel):
        trained.require_backward_grad_sync = on
    else:
        model.set_requires_gradient_sync(on)


def is_lost(error: BaseException) -> bool:
    """Whether a process failed because it could not reach another one: DistError with NCCL, only words with gloo."""
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
