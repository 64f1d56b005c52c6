"""Text generation with a model: the key-value cache, attention masks, and sampling."""

import functools
import math
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from minidisp import InputError
from minidisp.ops.attention import Kept, compute_dtype

MIN_TEMPERATURE = 1e-6  # smallest sampling temperature other than 0


class Context:
    """Positions, cached keys and values, and attention mask of a forward pass. This class: plain causal attention.

    The network takes from it everything that depends on the surrounding tokens. Another kind of attention, such as a
    sliding window or ALiBi, only needs `distances`, and then works in training, cached generation, packed examples and
    scoring alike (docs/hacking.md).
    """

    length = 0  # tokens before those of this forward pass
    fits_in_context = True  # whether length + T is limited to the model's context

    def positions(self, T: int, relative: bool) -> slice | Tensor:
        """Positions of T new tokens: a slice, or (B, T) int64. relative: only differences matter, as in rotary ones."""
        return slice(self.length, self.length + T)

    def distances(self, T: int, device: torch.device) -> Tensor:
        """Distance from query t back to key s in tokens, negative if masked, (B or 1, 1, T, length + T) int64."""
        at = torch.arange(self.length + T, device=device)
        return (at[self.length :, None] - at)[None, None]

    def mask(self, T: int, device: torch.device) -> Tensor | None:
        """Whether query t attends to key s, bool, with the shape of distances. None: plain causal attention."""
        return None

    def append(self, layer: int, kv: Tensor) -> Tensor:
        """Keys, then values, of block `layer`, (B, 2 n_kv_head, length + T, D): earlier tokens', followed by kv."""
        return kv

    def kept(self, layer: int, mask: Tensor | None) -> Kept | None:
        """The cache and mask for causal_attention; None if there are none, which allows the fused operator."""
        return None if mask is None else (functools.partial(self.append, layer), mask)

    def advance(self, T: int) -> None:
        """Called after a forward pass of T tokens."""


class KVCache(Context):
    """Keys and values of all blocks for up to `size` tokens, so that generating a token takes a forward pass of one.

    A tensor (B, 2 n_kv_head, size, D) per block, keys and then values, filled up to `length`.
    """

    def __init__(self, config, batch_size: int, size: int, device: torch.device, dtype: torch.dtype):
        shape = (batch_size, 2 * config.n_kv_head, size, config.head_dim)
        self.blocks = [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.size, self.length = size, 0

    def mask(self, T: int, device: torch.device) -> Tensor | None:
        # A single token attends to the whole cache, and with an empty cache plain causal attention applies.
        return self.distances(T, device) >= 0 if T > 1 and self.length else None

    def append(self, layer: int, kv: Tensor) -> Tensor:
        end = self.length + kv.shape[2]
        self.blocks[layer][:, :, self.length : end] = kv
        return self.blocks[layer][:, :, :end]

    def keep(self, rows: Tensor) -> None:
        """Keep only the sequences with these indices."""
        self.blocks = [block[rows] for block in self.blocks]

    def kept(self, layer: int, mask: Tensor | None) -> Kept:
        return functools.partial(self.append, layer), mask

    def advance(self, T: int) -> None:
        self.length += T


class _Masked(Context):
    """Rows in which a token attends to a subset of those before it. depth: (B, T) int64, their number: its position."""

    def __init__(self, depth: Tensor, sees: Tensor):
        self.depth, self._sees = depth, sees.unsqueeze(1)  # (B, T), (B, 1, T, T)

    def positions(self, T: int, relative: bool) -> slice | Tensor:
        return self.depth

    def distances(self, T: int, device: torch.device) -> Tensor:
        depth = self.depth.unsqueeze(1)
        return (depth.unsqueeze(3) - depth.unsqueeze(2)).masked_fill(~self._sees, -1)

    def mask(self, T: int, device: torch.device) -> Tensor:
        return self._sees


class PrefixTree(_Masked):
    """Texts with common prefixes in one row, stored as a tree: a token attends to its ancestors and itself.

    parents: (B, T) int64, index of each token's predecessor, which is smaller, or its own index for a root. depth: (B,
    T) int64, below the model's context. T is not limited by the context.
    """

    fits_in_context = False

    def __init__(self, parents: Tensor, depth: Tensor):
        B, T = parents.shape
        rows = torch.arange(B, device=parents.device)
        sees = torch.zeros(B, T, T, dtype=torch.bool, device=parents.device)
        for i in range(T):
            sees[:, i] = sees[rows, parents[:, i]]
            sees[:, i, i] = True
        super().__init__(depth, sees)


class Segments(_Masked):
    """Examples packed into a row: a token attends within its own example, whose positions start at 0.

    segments: (B, T) int64, index of the example of each token; the tokens of an example are contiguous.
    """

    def __init__(self, segments: Tensor):
        at = torch.arange(segments.shape[1], device=segments.device)
        same = segments.unsqueeze(2) == segments.unsqueeze(1)  # (B, T, T)
        super().__init__(at - same.to(torch.uint8).argmax(dim=2), same & (at.unsqueeze(1) >= at))

    def positions(self, T: int, relative: bool) -> slice | Tensor:
        return slice(0, T) if relative else self.depth  # for relative ones, the same slice for all rows is faster


def generate(model, idx: Tensor, *args, stop_token: int | Collection[int] | None = None, **options) -> Tensor:
    """Sample a continuation of idx, (B, T) int64; returns (B, T + new). The arguments are those of `stream`."""
    drawn = list(stream(model, idx, *args, stop_token=stop_token, **options))
    if stop_token is not None and drawn:  # stream may yield a few tokens after every sequence has stopped
        stops = torch.tensor(_several(stop_token), device=idx.device)
        stopped = (torch.isin(torch.cat(drawn, dim=1), stops).cumsum(dim=1) > 0).all(dim=0)  # (new,)
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
    seed: int | Sequence[int] | None = None,
    stop_token: int | Collection[int] | None = None,
) -> Iterator[Tensor]:
    """Sample a continuation of idx, token by token; yields (B, 1) int64, at most max_new_tokens times.

    idx: (B, T) int64, T >= 1. temperature: 0 is greedy decoding. top_k: sample among the k most likely tokens only.
    top_p: nucleus sampling (arXiv 1904.09751), from the smallest set of tokens with this total probability. seed: makes
    the sample reproducible without affecting torch's global generator; with one seed per sequence, each sample equals
    that of the sequence alone. stop_token: one or several tokens that end a sequence, which then repeats its stop
    token; iteration ends when all sequences have ended, or up to `look_every` - 1 tokens later (`generate` cuts these).
    When the context is full, its older half is dropped. Raises ValueError if a value is out of range, and InputError if
    the logits are NaN or Inf.
    """
    if idx.ndim != 2 or idx.shape[1] < 1:
        raise ValueError(f"idx must be (B, T) with T >= 1, not {tuple(idx.shape)}")
    check_sampling(temperature, top_k, top_p)
    was_training = model.training
    model.eval()
    generators = _generators(seed, len(idx), idx.device)
    stops = None if stop_token is None else torch.tensor(_several(stop_token), device=idx.device)
    block_size = model.config.block_size
    size = min(block_size, idx.shape[1] + max_new_tokens)
    cache = KVCache(model.config, len(idx), size, idx.device, compute_dtype(model.wte.weight))
    context, unread, stopped = idx, idx[:, -block_size:], torch.zeros(len(idx), dtype=torch.bool, device=idx.device)
    drawn, running = idx[:, -1:].clone(), torch.arange(len(idx), device=idx.device)  # rows that are still computed
    every, finite = look_every(idx.device), torch.tensor(True, device=idx.device)
    try:
        for new in range(1, max_new_tokens + 1):
            if cache.length + unread.shape[1] > block_size:
                cache.length, unread = 0, context[:, -max(1, block_size // 2) :]
            x, _ = model._backbone(unread, context=cache)
            logits = model.logits(x[:, -1]).float()  # (rows, V)
            finite &= (logits < math.inf).all()
            if new % every == 0 and not finite:
                raise InputError("the model's logits are NaN or Inf: its weights are damaged, or training diverged")
            unread = sample(logits, temperature, top_k, top_p, generators)  # (rows, 1)
            if stops is not None:
                unread = torch.where(stopped.unsqueeze(1), context[:, -1:], unread)
            context = torch.cat((context, unread), dim=1)
            drawn = drawn.index_copy(0, running, unread)
            yield drawn
            if stops is not None:
                stopped |= torch.isin(unread[:, 0], stops)
                if new % every == 0 and (n := int(stopped.sum())):
                    if n == len(stopped):
                        break
                    # Drop ended rows, unless all rows share one generator and so depend on the number of rows.
                    if 2 * n >= len(stopped) and (isinstance(generators, list) or temperature == 0):
                        rest = (~stopped).nonzero()[:, 0]
                        cache.keep(rest)
                        context, unread, running, stopped = context[rest], unread[rest], running[rest], stopped[rest]
                        if isinstance(generators, list):
                            generators = [generators[i] for i in rest.tolist()]
    finally:  # also if the caller stops iterating
        model.train(was_training)


def _several(stop_token: int | Collection[int]) -> list[int]:
    return [stop_token] if isinstance(stop_token, int) else list(stop_token)


Generators = torch.Generator | list[torch.Generator] | None  # one for all sequences, or one for each


def _generators(seed: int | Sequence[int] | None, n: int, device: torch.device) -> Generators:
    if seed is None or isinstance(seed, int):
        return None if seed is None else torch.Generator(device).manual_seed(seed)
    if len(seed) != n:
        raise ValueError(f"{len(seed)} seeds for {n} sequences")
    return [torch.Generator(device).manual_seed(one) for one in seed]


def look_every(device: torch.device) -> int:
    """The number of tokens between checks of the sampled tokens, as each check synchronises with the device."""
    return 1 if device.type == "cpu" else 16


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise ValueError unless the sampling parameters are valid; a tiny temperature would overflow the logits."""
    if not (temperature == 0 or MIN_TEMPERATURE <= temperature < math.inf):
        raise ValueError(f"temperature is {temperature}, but must be 0 (greedy decoding) or at least {MIN_TEMPERATURE}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}, but must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}, but must be above 0 and at most 1")


def sample(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: Generators) -> Tensor:
    """Sample one token per row of logits (B, V), float32; returns (B, 1) int64. See `stream` for the rest."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    probs = logits.softmax(dim=-1)
    if top_p is not None:
        sorted_probs, order = probs.sort(dim=-1, descending=True)
        # Keep a token if those before it have less than top_p in total. Always keep the most likely one, in case top_p
        # underflows to 0 in float32.
        excluded = sorted_probs.cumsum(dim=-1) - sorted_probs >= top_p
        excluded[:, 0] = False
        probs = torch.zeros_like(probs).scatter(-1, order, sorted_probs.masked_fill(excluded, 0.0))
    # torch.multinomial, with the same result but a generator per row: if q has the exponential distribution, the index
    # of the largest p / q has the distribution p.
    generators = generator if isinstance(generator, list) else [generator]
    q = torch.empty_like(probs)
    for rows, one in zip(q.chunk(len(generators)), generators, strict=True):
        rows.exponential_(generator=one)
    return (probs / q).argmax(dim=-1, keepdim=True)
