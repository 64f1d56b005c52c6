"""Evaluation during training: the loss and the condensation metrics of a fixed set of held-out windows."""

import itertools
import math

import numpy as np
import torch

from minidisp import InputError
from minidisp.config import Config
from minidisp.data import Dataset, eval_windows
from minidisp.loss import IGNORE
from minidisp.metrics import Condensation, bits_per_byte, perplexity
from minidisp.model import GPT
from minidisp.optim import Average
from minidisp.report.progress import watched
from minidisp.runtime.device import to_device
from minidisp.runtime.guard import half_of
from minidisp.runtime.processes import World

CONDENSATION_SEQUENCES = 100  # as in the paper; of up to 512 tokens each


class Validation:
    """The fixed validation set of a run: the same windows in every evaluation and for every seed."""

    def __init__(self, dataset: Dataset, config: Config, device: torch.device, world: World):
        total, parts = sum(dataset.weights), []
        for part, weight in zip(dataset.parts, dataset.weights, strict=True):
            tokens = -(-config.eval_tokens * weight // total)
            parts.append(eval_windows(part.split("val"), config.block_size, tokens))
        self.ends = np.cumsum([len(part[0]) for part in parts]).tolist()  # where the windows of each corpus end
        self.x, self.y = (np.concatenate([part[i] for part in parts]) for i in range(2))
        self.segments = None  # each example is scored on its own, whatever --packing is
        if dataset.template:
            self.segments = np.concatenate([part[2] if len(part) > 2 else np.zeros_like(part[0]) for part in parts])
        self.counted = self.y != IGNORE
        self.targets = int(self.counted.sum())
        if not self.targets:
            raise InputError(f"{dataset.folder}: all targets of the validation windows are masked: raise --eval-tokens")
        lengths = np.array([len(token) for token in dataset.tokenizer.token_bytes])
        by_window = np.where(self.counted, lengths[self.y], 0).sum(axis=1)  # bytes
        self.bytes_by_corpus, self.targets_by_corpus = (
            [int(values[start:end].sum()) for start, end in itertools.pairwise([0, *self.ends])]
            for values in (by_window, self.counted)
        )
        self.device, self.world = device, world
        self.batch_size = min(config.batch_size, len(self.x))  # windows per forward pass; reduced on out-of-memory

    def scores(self, model: GPT, step: int, average: Average | None = None) -> dict:
        """val_loss in nats per token, perplexity, bits_per_byte, and the condensation metrics of the same windows.

        Loss, perplexity and bits per byte cover the unmasked targets (those that are not -1). With an average of the
        weights, also its ema_val_loss, ema_perplexity and ema_bits_per_byte. If val_loss is NaN or Inf, it is the only
        score. The model's train/eval mode is restored. step: for messages.
        """
        scores = self._scores_in_memory(model, step)
        if average and len(scores) > 1:
            with average.in_place():
                averaged = self._scores_in_memory(model, step)
            scores |= {f"ema_{name}": averaged.get(name) for name in ("val_loss", "perplexity", "bits_per_byte")}
        return scores

    def _scores_in_memory(self, model: GPT, step: int) -> dict:
        """_scores, retried with fewer windows per forward pass on out-of-memory."""
        while True:
            try:
                return self._scores(model)
            except (RuntimeError, MemoryError) as error:
                self.batch_size = half_of(self.batch_size, error, f"evaluating at step {step}", self.world)

    @torch.no_grad()
    def _scores(self, model: GPT) -> dict:
        was_training = model.training
        model.eval()
        batches = [
            (corpus, start, min(start + self.batch_size, end))
            for corpus, (first, end) in enumerate(itertools.pairwise([0, *self.ends]))
            for start in range(first, end, self.batch_size)
        ]
        losses, condensation = [], Condensation()
        try:
            for _, start, stop in watched(batches, "evaluation", hidden=not self.world.main):
                x, y, segments = self._windows(start, stop)
                _, loss, hidden_states = model(x, y, return_hidden_states=True, segments=segments)
                losses.append(loss)
                room = CONDENSATION_SEQUENCES - condensation.sequences
                if room > 0:
                    condensation.update([z[:room, :512] for z in hidden_states])
        finally:
            _leave(model, was_training)
        nats_by_corpus = [0.0 for _ in self.ends]
        means = torch.stack(losses).tolist()  # synchronises with the device
        for (corpus, start, stop), loss in zip(batches, means, strict=True):
            counted = int(self.counted[start:stop].sum())
            nats_by_corpus[corpus] += loss * counted if counted else 0.0  # the mean over zero targets is NaN
        nats = sum(nats_by_corpus)
        if not math.isfinite(nats):
            return {"val_loss": nats}
        scores = condensation.result()
        # The histogram is the source of the heat map and its history; four digits are enough for a colour.
        histogram = [[round(density, 4) for density in layer] for layer in scores["histogram_by_layer"]]
        wanted = ("mean_cosine_by_layer", "off_diagonal_mean_by_layer", "spearman", "kendall", "last_half_mean")
        return {
            "val_loss": nats / self.targets,
            "perplexity": perplexity(nats, self.targets),
            "bits_per_byte": bits_per_byte(nats, sum(self.bytes_by_corpus)),
            **(self._by_corpus(nats_by_corpus) if len(self.ends) > 1 else {}),
            **{name: scores[name] for name in wanted},
            "histogram_by_layer": histogram,
        }

    @torch.no_grad()
    def is_finite(self, model: GPT) -> bool:
        """Whether the loss of the first window with unmasked targets is finite."""
        was_training = model.training
        model.eval()
        first = int(self.counted.any(axis=1).argmax())
        x, y, segments = self._windows(first, first + 1)
        loss = model(x, y, segments=segments).loss
        _leave(model, was_training)
        return math.isfinite(loss.item())

    def _windows(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """x, y and segments of windows start..stop-1 on the device."""
        segments = None if self.segments is None else to_device(self.segments[start:stop], self.device)
        return to_device(self.x[start:stop], self.device), to_device(self.y[start:stop], self.device), segments

    def _by_corpus(self, nats: list[float]) -> dict[str, list[float]]:
        """The scores of each corpus of a mixture, in the order of --data."""
        return {
            "val_loss_by_corpus": [a / b for a, b in zip(nats, self.targets_by_corpus, strict=True)],
            "bits_per_byte_by_corpus": [bits_per_byte(a, b) for a, b in zip(nats, self.bytes_by_corpus, strict=True)],
        }


def _leave(model: GPT, was_training: bool) -> None:
    """Restore a model's mode. A sharded model is resharded, as FSDP keeps its root gathered for a backward pass."""
    model.train(was_training)
    if hasattr(model, "reshard"):
        model.reshard()
