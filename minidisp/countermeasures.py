"""Mitigation methods to compare with the dispersion loss: noisy embeddings, active forgetting, and knowledge
distillation.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from minidisp import InputError
from minidisp.config import Config
from minidisp.data import Dataset
from minidisp.decoding import Segments
from minidisp.loss import IGNORE
from minidisp.optim import sharded_like
from minidisp.runtime import checkpoint
from minidisp.shards import sha256_of


def generator(device: torch.device, *key: int) -> torch.Generator:
    """A generator seeded from the key alone, independent of torch's global generator; its numbers differ between device
    types.
    """
    return torch.Generator(device).manual_seed(derived_seed(*key))


def derived_seed(*key: int) -> int:
    """A seed for torch that depends on the key alone."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


# The second part of a key; the first is the run's seed.
NOISE, FORGETTING, RANK = 1, 2, 3


class EmbeddingNoise:
    """NEFTune (arXiv 2310.05914): uniform noise on the token embeddings in training mode, at most alpha / sqrt(T C).

    Implemented as a forward hook on the embedding, so the model needs no change. The noise of a sequence depends only
    on the seed and the sequence's index in the run, so resuming needs no state and the random numbers of dropout do not
    change.
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
    """Whether the token embeddings are reset before this step: every K steps, as long as at least K steps remain."""
    K = config.active_forgetting
    return K > 0 and step > 0 and step % K == 0 and step + K <= config.max_steps


@torch.no_grad()
def forget(weight: Tensor, optimizers: list[torch.optim.Optimizer], seed: int, step: int) -> None:
    """Active forgetting (arXiv 2307.01163): re-initialise the token embeddings from N(0, 0.02) and clear their
    optimiser state.

    A tied output layer is the same matrix, so it is reset as well; position embeddings are kept. The new values depend
    only on (seed, step).
    """
    fresh = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    fresh.normal_(std=0.02, generator=generator(weight.device, seed, FORGETTING, step))
    weight.copy_(sharded_like(weight, fresh))
    for optimizer in optimizers:
        optimizer.state.pop(weight, None)  # moments and step count; the next update creates them again


def tokens_at_once(device: torch.device, vocab_size: int) -> int:
    """The number of tokens whose logits (of student and teacher, in several copies) are held at the same time.

    Few on a CPU, so that they fit in its caches; elsewhere 256 MiB in float32, which needs only a few kernel launches.
    """
    return 512 if device.type == "cpu" else max(1, (1 << 26) // vocab_size)


class Teacher:
    """Knowledge distillation (arXiv 1503.02531) from the model of another run, in eval mode and without gradients.

    Raises InputError if the tokenizer of the run differs from that of the data, or its context is shorter than the
    student's.
    """

    def __init__(self, config: Config, dataset: Dataset, device: torch.device):
        self.model, tokenizer, saved = checkpoint.load_run(config.distill, device)
        self.model.requires_grad_(False)
        self.temperature = config.distill_temperature
        self.hash = sha256_of(checkpoint.find(config.distill))
        if tokenizer.hash != dataset.tokenizer.hash:
            raise InputError(
                f"--distill {config.distill} has a different tokenizer from {dataset.folder}: train a teacher on the "
                "same data"
            )
        if saved.block_size < config.block_size:
            raise InputError(
                f"--distill {config.distill} has a context of {saved.block_size} tokens: pass --block-size "
                f"{saved.block_size} or less, not {config.block_size}"
            )

    def divergence(
        self,
        idx: Tensor,
        x: Tensor,
        logits: Callable[[Tensor], Tensor],
        targets: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:
        """Mean over the tokens of temperature^2 KL(teacher || student) in nats, of softmax(logits / temperature).

        The factor temperature^2 keeps the size of the gradient independent of the temperature. idx: (B, T) tokens; x:
        the student's hidden states after the final norm, (B, T, C); logits: its output layer, from (N, C) to (N, V).
        targets, segments: see GPT.forward; the mean is over the targets that are not masked. Returns a
        float32 scalar (float64 if x is). The logits are computed chunk by chunk and recomputed in the backward pass, so
        they are never fully materialised.
        """
        with torch.no_grad():
            target, _ = self.model._backbone(idx, context=None if segments is None else Segments(segments))
        x, target, number = x.flatten(0, 1), target.flatten(0, 1), idx.numel()
        if targets is not None:
            kept = (targets.flatten() != IGNORE).nonzero()[:, 0]
            x, target, number = x[kept], target[kept], max(1, len(kept))
        size, total = tokens_at_once(x.device, self.model.config.vocab_size), x.sum() * 0.0 if not len(x) else 0.0
        for rows in zip(x.split(size), target.split(size), strict=True):
            total = total + recompute(self._chunk, *rows, logits, use_reentrant=False, preserve_rng_state=False)
        return self.temperature**2 * total / number

    def _chunk(self, x: Tensor, target: Tensor, logits: Callable[[Tensor], Tensor]) -> Tensor:
        """KL summed over some tokens; x: (N, C) of the student, target: (N, C') of the teacher."""
        student, teacher = (
            F.log_softmax(z.to(torch.promote_types(z.dtype, torch.float32)) / self.temperature, dim=-1)
            for z in (logits(x), self.model.logits(target))
        )
        return F.kl_div(student, teacher, reduction="sum", log_target=True)
