"""Generating text with a model: caches of keys and values, and sampling."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from minidisp.ops.attention import compute_dtype

MIN_TEMPERATURE = 1e-6  # of sampling, unless it is 0


class KVCache:
    """Keys and values of all blocks for up to `size` tokens, so that each new token costs a forward pass of one token.

    A pair of tensors (B, n_kv_head, size, D) per block, filled up to `length`.
    """

    mask = None  # a new token sees all before it

    def __init__(self, config, batch_size: int, size: int, device: torch.device, dtype: torch.dtype):
        shape = (2, batch_size, config.n_kv_head, size, config.head_dim)
        self.blocks = [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.size, self.length = size, 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, n_kv_head, T, D) behind what block `layer` has; returns all keys and values so far."""
        end = self.length + k.shape[2]
        self.blocks[layer][0, :, :, self.length : end] = k
        self.blocks[layer][1, :, :, self.length : end] = v
        return self.blocks[layer][0, :, :, :end], self.blocks[layer][1, :, :, :end]


class PrefixTree:
    """Texts that share their beginnings, in one row: a token sees those on the way from the root of its tree to itself.

    Stands where a KVCache does. parents: (B, T) int64, the index of the token before each, which is smaller, and its own
    for a root; depth: (B, T) int64, tokens before it, which is its position.
    """

    length = 0

    def __init__(self, parents: Tensor, depth: Tensor):
        B, T = parents.shape
        rows, self.depth = torch.arange(B, device=parents.device), depth
        self.mask = torch.zeros(B, 1, T, T, dtype=torch.bool, device=parents.device)
        for i in range(T):
            self.mask[:, 0, i] = self.mask[rows, 0, parents[:, i]]
            self.mask[:, 0, i, i] = True

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """There is nothing before the tree."""
        return k, v


def generate(model, idx: Tensor, *args, stop_token: int | None = None, **options) -> Tensor:
    """Sample a continuation of idx, (B, T) int64; returns (B, T + new). The arguments are those of `stream`."""
    drawn = list(stream(model, idx, *args, stop_token=stop_token, **options))
    if stop_token is not None and drawn:  # stream may have gone on after all had stopped
        stopped = ((torch.cat(drawn, dim=1) == stop_token).cumsum(dim=1) > 0).all(dim=0)  # (new,)
        del drawn[len(drawn) - int(stopped[:-1].sum()) :]
    return torch.cat((idx, *drawn), dim=1)


@torch.no_grad()
def stream(
    model,
    idx: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop_token: int | None = None,
) -> Iterator[Tensor]:
    """Draw the tokens that continue idx, one per sequence at a time; yields (B, 1) int64, at most max_new_tokens times.

    idx: (B, T) int64, T >= 1. temperature: 0 takes the most likely token. top_k: sample among the k most likely only.
    top_p: nucleus sampling (arXiv 1904.09751), among the fewest tokens that hold this much probability. seed: makes the
    sample repeatable and leaves torch's global generator alone. stop_token: end when every sequence has produced it;
    where `look_every` is more than 1, a few more tokens may follow, which `generate` cuts off.
    When the context is full, its older half is dropped. Raises ValueError on a value out of range.
    """
    if idx.ndim != 2 or idx.shape[1] < 1:
        raise ValueError(f"idx must be (B, T) with T >= 1, not {tuple(idx.shape)}")
    check_sampling(temperature, top_k, top_p)
    was_training = model.training
    model.eval()
    generator = None if seed is None else torch.Generator(idx.device).manual_seed(seed)
    block_size = model.config.block_size
    size = min(block_size, idx.shape[1] + max_new_tokens)
    cache = KVCache(model.config, len(idx), size, idx.device, compute_dtype(model.wte.weight))
    context, unread, stopped = idx, idx[:, -block_size:], torch.zeros(len(idx), dtype=torch.bool, device=idx.device)
    every = look_every(idx.device)
    try:
        for new in range(1, max_new_tokens + 1):
            if cache.length + unread.shape[1] > block_size:
                cache.length, unread = 0, context[:, -max(1, block_size // 2) :]
            x, _ = model._backbone(unread, cache=cache)
            unread = sample(model.lm_head(x[:, -1]).float(), temperature, top_k, top_p, generator)  # (B, 1)
            context = torch.cat((context, unread), dim=1)
            yield unread
            if stop_token is not None:
                stopped |= unread[:, 0] == stop_token
                if new % every == 0 and stopped.all():
                    break
    finally:  # also where nobody asks for more
        model.train(was_training)


def look_every(device: torch.device) -> int:
    """After how many tokens sampling looks at what was drawn: any device but a CPU would be waited for each time."""
    return 1 if device.type == "cpu" else 16


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise ValueError unless GPT.generate can sample so: a temperature near 0 would divide logits beyond float32."""
    if not (temperature == 0 or MIN_TEMPERATURE <= temperature < math.inf):
        raise ValueError(
            f"temperature is {temperature}, but must be 0 for the likeliest token, or from {MIN_TEMPERATURE} on"
        )
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}, but must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}, but must be above 0 and at most 1")


def sample(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    """Draw one token per row of logits (B, V), float32; returns (B, 1) int64. See GPT.generate for the rest."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    probs = logits.softmax(dim=-1)
    if top_p is not None:
        sorted_probs, order = probs.sort(dim=-1, descending=True)
        # A token stays if those before it do not reach top_p yet; so the likeliest always stays.
        before = sorted_probs.cumsum(dim=-1) - sorted_probs
        probs = torch.zeros_like(probs).scatter(-1, order, sorted_probs.masked_fill(before >= top_p, 0.0))
    return torch.multinomial(probs, 1, generator=generator)
