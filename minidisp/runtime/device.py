"""The device that a run computes on."""

import torch

from minidisp import InputError


def pick_device(name: str, local_rank: int | None = None) -> torch.device:
    """The torch device for "auto", "cpu", "cuda" or "mps". Raises InputError if this machine has none of that kind.

    local_rank: number of this process among those on this machine, if several train together: each has a GPU of its own,
    which becomes the current one.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, available in there.items() if available)
    if not there[name]:
        raise InputError(f"--device {name}: torch {torch.__version__} finds no such device here; leave the flag out")
    if local_rank is not None and name == "mps":
        raise InputError("mps takes one process: start it without torchrun, or with --device cpu")
    if local_rank is not None and name == "cuda":
        if local_rank >= (gpus := torch.cuda.device_count()):
            raise InputError(f"torchrun started more processes than the {gpus} GPUs here: --nproc-per-node {gpus}")
        torch.cuda.set_device(local_rank)
    return torch.device(name)
