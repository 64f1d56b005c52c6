"""Optimisers and learning-rate schedules, registered by name in two dictionaries, OPTIMIZERS and SCHEDULES.

The choices of the flags, their checks and their messages come from these. To add one, write its function and put it
into the dictionary. `config` is the Config of a run; config.py imports this file, so it is not imported here.
"""

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minidisp import InputError
from minidisp.ops import processor_has

# --- optimisers -------------------------------------------------------------------------------------------------------


class Untraced(torch.optim.Optimizer):
    """PyTorch's own methods without the wrappers that prevent torch.compile from tracing them.

    Optimisers are never traced here, and the wrappers import the compiler, which would cost over a second at every
    start.
    """

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)


class AdamW(Untraced, torch.optim.AdamW):
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


def adamw(model: nn.Module, config) -> list[torch.optim.Optimizer]:
    """AdamW (arXiv 1711.05101) for everything, with decoupled weight decay on matrices only."""
    return [_adamw(model, model.parameters(), config)]


def muon(model: nn.Module, config) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices and AdamW for the rest (Keller Jordan; arXiv 2502.16982 for the size of its step).

    Each head of queries, keys and values counts as a matrix (results/2026-12-01_muon.md). Both optimisers have the same
    learning rate, since Muon's update is scaled to the root mean square of AdamW's.
    """
    matrices = [p for name, p in model.named_parameters() if name.startswith("h.") and p.ndim == 2]
    taken = {id(p) for p in matrices}
    optimizer = Muon(
        matrices,
        rows={block.attn.c_attn.weight: block.attn.head_dim for block in model.h},
        lr=config.lr,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        adjust_lr_fn="match_rms_adamw",
    )
    return [_adamw(model, (p for p in model.parameters() if id(p) not in taken), config), optimizer]


def _adamw(model: nn.Module, parameters: Iterable[nn.Parameter], config) -> AdamW:
    """lr_scale: the factor by which the trainer multiplies a group's learning rate; 1 if the group has none."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    if config.embedding_lr != 1.0:
        groups[0]["params"] = [p for p in groups[0]["params"] if p is not model.wte.weight]
        groups.append(
            {"params": [model.wte.weight], "weight_decay": config.weight_decay, "lr_scale": config.embedding_lr}
        )
    fused = parameters[0].device.type in ("cpu", "cuda", "mps")
    return AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=fused)


class Muon(Untraced, torch.optim.Muon):
    """PyTorch's Muon (same state, same update) with Nesterov's momentum and adjust_lr_fn "match_rms_adamw".

    Matrices of equal shape are orthogonalised in one batch; small ones gain most. Sharded matrices are gathered first.

    rows: matrices that are stacks of smaller ones -> the number of rows of these, which are orthogonalised separately.
    """

    AT_ONCE = 1 << 24  # elements per batch; more costs memory and saves no time

    def __init__(
        self, parameters: Iterable[nn.Parameter], rows: dict[nn.Parameter, int] | None = None, **settings: Any
    ):
        super().__init__(parameters, **settings)
        if not self.defaults["nesterov"] or self.defaults["adjust_lr_fn"] != "match_rms_adamw":
            raise ValueError("only nesterov=True and adjust_lr_fn='match_rms_adamw' are implemented")
        self.rows = rows or {}

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "rows": self.rows}  # a copy needs it; torch's method names what it keeps

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            alike: dict[tuple[torch.Size, int], list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    alike.setdefault((p.shape, self.rows.get(p, len(p))), []).append(p)
            for (shape, rows), parameters in alike.items():
                size = max(1, self.AT_ONCE // shape.numel())
                for start in range(0, len(parameters), size):
                    self._step_together(parameters[start : start + size], rows, group)

    def _step_together(self, parameters: list[nn.Parameter], rows: int, group: dict) -> None:
        shape, device = parameters[0].shape, parameters[0].device
        averaged = self.averaged(parameters, group)
        if hasattr(averaged[0], "full_tensor"):  # sharded
            averaged = [update.full_tensor() for update in averaged]
        updates = torch.empty(len(parameters), *shape, dtype=newton_schulz_dtype(device.type), device=device)
        torch._foreach_copy_(updates.unbind(), averaged)
        directions = self.directions(updates.view(-1, rows, shape[1]), parameters, group).reshape(updates.shape)
        directions = [sharded_like(p, direction) for p, direction in zip(parameters, directions, strict=True)]
        self.decay(parameters, directions, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, directions, alpha=-group["lr"] * 0.2 * math.sqrt(max(rows, shape[1])))

    # Variants of Muon override one of these.

    def averaged(self, parameters: list[nn.Parameter], group: dict) -> list[Tensor]:
        """The gradients averaged over the steps, with Nesterov's momentum."""
        grads, momentum = [p.grad for p in parameters], group["momentum"]
        for p in parameters:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p.grad)
        momenta = [self.state[p]["momentum_buffer"] for p in parameters]
        torch._foreach_lerp_(momenta, grads, 1 - momentum)
        return list(torch._foreach_lerp(grads, momenta, momentum))

    def directions(self, updates: Tensor, parameters: list[nn.Parameter], group: dict) -> Tensor:
        """The orthogonalised updates (N, rows, columns) of these parameters, float32."""
        return newton_schulz(updates, [group["ns_coefficients"]] * group["ns_steps"], group["eps"]).float()

    def decay(self, parameters: list[nn.Parameter], directions: list[Tensor], factor: float) -> None:
        """Weight decay: multiply the parameters by this factor."""
        torch._foreach_mul_(parameters, factor)


def sharded_like(parameter: Tensor, value: Tensor) -> Tensor:
    """This process's shard of a value that all processes have, or the value itself if the parameter is not sharded."""
    if not hasattr(parameter, "placements"):
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


@functools.cache
def newton_schulz_dtype(device_type: str) -> torch.dtype:
    """bfloat16, as in torch.optim.Muon; float32, 10 to 20 times as fast, on CPUs without bfloat16 instructions."""
    if device_type != "cpu":
        return torch.bfloat16
    return torch.bfloat16 if processor_has("amx_bf16") or processor_has("avx512_bf16") else torch.float32


def newton_schulz(x: Tensor, coefficients: Sequence[tuple[float, float, float]], eps: float) -> Tensor:
    """Matrices (N, rows, columns) with singular values near 1 and the singular vectors of x.

    x <- a x + (b A + c A^2) x with A = x x^T, from x / its norm, for the a, b, c of every step, which make small values
    grow fast (Keller Jordan's Muon).
    """
    if x.shape[1] > x.shape[2]:  # A is smaller this way
        return newton_schulz(x.mT, coefficients, eps).mT
    x = x / torch.stack(torch._foreach_norm(x.unbind())).clamp(min=eps).view(-1, 1, 1)
    for a, b, c in coefficients:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


# name: (model, config) -> optimisers that step together; every parameter belongs to exactly one
OPTIMIZERS = {"adamw": adamw, "muon": muon}


def build_optimizers(model: nn.Module, config) -> list[torch.optim.Optimizer]:
    """The optimisers of a run. The trainer sets their learning rate before every step, times a group's lr_scale."""
    return OPTIMIZERS[config.optimizer](model, config)


class Average:
    """An exponential moving average of a model's weights, with a decay that ramps up: min(decay, (1 + t) / (10 + t)).

    This quickly forgets the random initial weights. weights: float32 tensors in the order of model.parameters().
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self._parameters = [p.detach() for p in model.parameters()]
        self.weights = [p.clone() for p in self._parameters]

    def update(self, step: int) -> None:
        """step: the number of optimiser steps so far."""
        torch._foreach_lerp_(self.weights, self._parameters, 1 - min(self.decay, (1 + step) / (10 + step)))

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Use the average as the model's weights inside the `with` block."""
        kept = [p.clone() for p in self._parameters]
        self._set(self.weights)
        try:
            yield
        finally:
            self._set(kept)

    def _set(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self._parameters, values, strict=True):  # _foreach_copy_ cannot copy sharded ones
            parameter.copy_(value)


# --- schedules --------------------------------------------------------------------------------------------------------

WSD_DECAY = 0.2  # share of the steps in the decay phase of warmup-stable-decay


def cosine(step: int, config) -> float:
    """Cosine decay to final_lr (arXiv 1608.03983)."""
    share = 0.5 * (1 + math.cos(math.pi * _progress(step, config.warmup_steps, config)))
    return config.final_lr + share * (config.lr - config.final_lr)


def wsd(step: int, config) -> float:
    """Constant lr, then linear decay to final_lr over the last fifth of the steps (warmup-stable-decay, arXiv
    2404.06395).
    """
    start = max(config.warmup_steps, round((1 - WSD_DECAY) * config.max_steps))
    share = 1 - _progress(step, start, config)
    return config.final_lr + share * (config.lr - config.final_lr)


def linear(step: int, config) -> float:
    """Linear decay to final_lr (with final_lr = 0: arXiv 2502.15938)."""
    share = 1 - _progress(step, config.warmup_steps, config)
    return config.final_lr + share * (config.lr - config.final_lr)


def constant(step: int, config) -> float:
    """Constant lr."""
    return config.lr


def _progress(step: int, start: int, config) -> float:
    """Progress from step `start` to the end, from 0 to 1."""
    return min(1.0, max(0.0, (step - start) / max(1, config.max_steps - start)))


# name: (step, config) -> the learning rate after warm-up
SCHEDULES = {"cosine": cosine, "linear": linear, "wsd": wsd, "constant": constant}


def learning_rate(step: int, config) -> float:
    """The learning rate of optimiser step 0, 1, ..., max_steps - 1: linear warm-up to lr, then the schedule."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    return SCHEDULES[config.schedule](step, config)


# --- the schedule of a term's weight ----------------------------------------------------------------------------------


def linear_weight(progress: float, fraction: float) -> float:
    """Linear decay from 1 to 0 at this fraction of the run."""
    return max(0.0, 1 - progress / fraction)


def delayed_weight(progress: float, fraction: float) -> float:
    """0 until this fraction of the run, then 1."""
    return float(progress >= fraction)


# name: (progress of the run from 0 to 1, the fraction after the colon) -> the factor on the weight
WEIGHT_SCHEDULES = {"linear": linear_weight, "delayed": delayed_weight}


def weight_schedule(schedule: str, max_steps: int) -> Callable[[int], float] | None:
    """The factor on a term's weight, by optimiser step 0, 1, ..., for "constant" (None), "linear:0.5" or "delayed:0.5".

    Raises InputError if the schedule is unknown, or its fraction is not in (0, 1].
    """
    if schedule == "constant":
        return None
    name, _, text = schedule.partition(":")
    try:
        fraction = float(text)
    except ValueError:
        fraction = math.nan
    if name not in WEIGHT_SCHEDULES or not 0 < fraction <= 1:
        known = ", ".join(f"{known}:F" for known in WEIGHT_SCHEDULES)
        raise InputError(
            f"{schedule!a:.60} is not a schedule: pass constant, {known}, with F a fraction of the run in (0, 1]"
        )
    return lambda step: WEIGHT_SCHEDULES[name](step / max_steps, fraction)


# --- updates that may be skipped --------------------------------------------------------------------------------------


def step_where(finite: Tensor, optimizers: list[torch.optim.Optimizer]) -> None:
    """Step all optimizers if `finite`, a bool scalar, is true; otherwise leave all weights and states unchanged.

    On CUDA the decision is made on the device, without synchronising. Fused AdamW supports this itself; the changes of
    any other optimiser are undone, which temporarily needs a second copy of its weights and states.
    """
    if finite.device.type != "cuda":
        if finite:
            for optimizer in optimizers:
                optimizer.step()
        return
    step_where_on_device(finite, optimizers)


def step_where_on_device(finite: Tensor, optimizers: list[torch.optim.Optimizer]) -> None:
    """step_where without reading `finite`."""
    for optimizer in optimizers:
        if optimizer.defaults.get("fused"):
            optimizer.found_inf = (~finite).float()
            optimizer.step()
            continue
        changed = [p.detach() for group in optimizer.param_groups for p in group["params"]] + _states(optimizer)
        before = [tensor.clone() for tensor in changed]
        optimizer.step()
        for tensor, old in zip(changed, before, strict=True):
            tensor.copy_(torch.where(finite, tensor, old))
        known = {id(tensor) for tensor in changed}
        for tensor in _states(optimizer):
            if id(tensor) not in known:  # created by this step
                tensor.copy_(torch.where(finite, tensor, 0.0))


def _states(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
