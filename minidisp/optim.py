"""Optimisers and learning-rate schedules."""

import math

import torch
from torch import nn

from minidisp.config import Config

WSD_DECAY = 0.2  # share of the steps in which warmup-stable-decay goes down


def build_optimizers(model: nn.Module, config: Config) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the blocks' matrices and AdamW for the rest.

    Weight decay is decoupled and on matrices only: biases and norm weights are left alone.
    Muon (Keller Jordan; arXiv 2502.16982 for the scale of its step) uses the same learning rate as AdamW, since
    its update is scaled to the same root mean square.
    """
    named = list(model.named_parameters())
    muon = [p for name, p in named if config.optimizer == "muon" and name.startswith("h.") and p.ndim == 2]
    taken = {id(p) for p in muon}
    rest = [p for _, p in named if id(p) not in taken]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            groups,
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            fused=named[0][1].device.type in ("cpu", "cuda", "mps"),
        )
    ]
    if muon:
        optimizers.append(
            torch.optim.Muon(muon, lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")
        )
    return optimizers


def learning_rate(step: int, config: Config) -> float:
    """The learning rate of optimiser step `step` = 0, 1, ..., max_steps - 1.

    Linear warm-up to lr; then a half cosine down to final_lr (arXiv 1608.03983), or lr until the last fifth and a
    straight line down to final_lr (warmup-stable-decay, arXiv 2404.06395), or lr to the end.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return config.lr
    start = config.warmup_steps
    if config.schedule == "wsd":
        start = max(start, round((1 - WSD_DECAY) * config.max_steps))
    progress = min(1.0, max(0.0, (step - start) / max(1, config.max_steps - start)))
    share = 1 - progress if config.schedule == "wsd" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.final_lr + share * (config.lr - config.final_lr)


def step_where(finite: torch.Tensor, optimizers: list[torch.optim.Optimizer]) -> None:
    """Let all optimizers step if `finite`, a bool scalar; if not, all weights and states stay as they are.

    On CUDA the decision is taken on the device, so that nothing waits for it. A fused AdamW can do that by itself; what
    any other one has changed is put back, which takes the memory of its weights and states once more for a moment.
    """
    if finite.device.type != "cuda":
        if finite:
            for optimizer in optimizers:
                optimizer.step()
        return
    step_where_on_device(finite, optimizers)


def step_where_on_device(finite: torch.Tensor, optimizers: list[torch.optim.Optimizer]) -> None:
    """step_where without reading `finite`."""
    for optimizer in optimizers:
        if optimizer.defaults.get("fused"):
            optimizer.found_inf = (~finite).float()
            optimizer.step()
            continue
        changed = [p for group in optimizer.param_groups for p in group["params"]]
        for p in changed:
            if p.grad is not None:
                p.grad.masked_fill_(~finite, 0.0)  # states that begin with this step begin as zeros
        changed += [value for state in optimizer.state.values() for value in state.values()]
        before = [tensor.detach().clone() for tensor in changed]
        optimizer.step()
        with torch.no_grad():
            for tensor, old in zip(changed, before, strict=True):
                tensor.copy_(torch.where(finite, tensor, old))
