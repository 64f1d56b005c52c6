"""What is measured while a model trains: the loss and the condensation of a fixed set of held-out windows."""

import math

import torch

from minidisp import InputError
from minidisp.config import Config
from minidisp.data import Dataset, eval_windows
from minidisp.loss import IGNORE
from minidisp.metrics import Condensation, bits_per_byte, perplexity
from minidisp.model import GPT
from minidisp.optim import Average
from minidisp.runtime.device import to_device
from minidisp.runtime.guard import half_of
from minidisp.runtime.processes import World

CONDENSATION_SEQUENCES = 100  # as in the paper; of up to 512 tokens


class Validation:
    """The fixed validation set of a run: the same windows in every evaluation and for every seed."""

    def __init__(self, dataset: Dataset, config: Config, device: torch.device, world: World):
        self.x, self.y = eval_windows(dataset.split("val"), config.block_size, config.eval_tokens)
        self.counted = self.y != IGNORE
        self.targets = int(self.counted.sum())
        if not self.targets:
            raise InputError(f"{dataset.folder}: no target of the validation windows is counted: raise --eval-tokens")
        self.bytes = sum(len(dataset.tokenizer.token_bytes[token]) for token in self.y[self.counted])
        self.device, self.world = device, world
        self.batch_size = config.batch_size  # windows at a time: fewer where the memory does not suffice

    def scores(self, model: GPT, step: int, average: Average | None = None) -> dict:
        """val_loss in nats per token, perplexity, bits_per_byte, and the condensation scores of the same windows.

        Loss, perplexity and bits per byte are over the counted targets alone (those that are not -1).

        With an average of the weights, also its ema_val_loss, ema_perplexity and ema_bits_per_byte. Only val_loss, if it is
        not finite. The model's mode is what it was. step: for messages.
        """
        scores = self._scores_in_memory(model, step)
        if average and len(scores) > 1:
            with average.in_place():
                averaged = self._scores_in_memory(model, step)
            scores |= {f"ema_{name}": averaged.get(name) for name in ("val_loss", "perplexity", "bits_per_byte")}
        return scores

    def _scores_in_memory(self, model: GPT, step: int) -> dict:
        """Fewer windows at a time where the memory does not suffice."""
        while True:
            try:
                return self._scores(model)
            except (RuntimeError, MemoryError) as error:
                self.batch_size = half_of(self.batch_size, error, f"evaluating at step {step}", self.world)

    @torch.no_grad()
    def _scores(self, model: GPT) -> dict:
        was_training = model.training
        model.eval()
        starts = range(0, len(self.x), self.batch_size)
        losses, condensation = [], Condensation()
        try:
            for first in starts:
                x, y = (to_device(tokens[first : first + self.batch_size], self.device) for tokens in (self.x, self.y))
                _, loss, hidden_states = model(x, y, return_hidden_states=True)
                losses.append(loss)
                room = CONDENSATION_SEQUENCES - condensation.sequences
                if room > 0:
                    condensation.update([z[:room, :512] for z in hidden_states])
        finally:
            _leave(model, was_training)
        nats = 0.0
        for first, loss in zip(starts, torch.stack(losses).tolist(), strict=True):  # only here is the device waited for
            counted = int(self.counted[first : first + self.batch_size].sum())
            nats += loss * counted if counted else 0.0  # the mean of no target is NaN
            if not math.isfinite(nats):
                return {"val_loss": nats}
        scores = condensation.result()
        # The histogram is what the heat map and its history are drawn from; four digits are plenty for a colour.
        histogram = [[round(density, 4) for density in layer] for layer in scores["histogram_by_layer"]]
        wanted = ("mean_cosine_by_layer", "off_diagonal_mean_by_layer", "spearman", "kendall", "last_half_mean")
        return {
            "val_loss": nats / self.targets,
            "perplexity": perplexity(nats, self.targets),
            "bits_per_byte": bits_per_byte(nats, self.bytes),
            **{name: scores[name] for name in wanted},
            "histogram_by_layer": histogram,
        }

    @torch.no_grad()
    def is_finite(self, model: GPT) -> bool:
        """Whether the loss of the first window with counted targets is finite."""
        was_training = model.training
        model.eval()
        first = int(self.counted.any(axis=1).argmax())
        x, y = (to_device(tokens[first : first + 1], self.device) for tokens in (self.x, self.y))
        loss = model(x, y).loss
        _leave(model, was_training)
        return math.isfinite(loss.item())


def _leave(model: GPT, was_training: bool) -> None:
    """Give a model its mode back, and split it again: if sharded, its root stays whole, for a backward pass that does not come."""
    model.train(was_training)
    if hasattr(model, "reshard"):
        model.reshard()
