"""Causal language models of other families, run by transformers, for evaluation on held-out text."""

import contextlib
import math
import types
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from minidisp import InputError
from minidisp.config import read_json
from minidisp.hf.families import FAMILIES
from minidisp.hf.importer import find_folder, open_tensors
from minidisp.model import Output
from minidisp.runtime.device import refuse_larger_than_memory

LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")  # in the config.json of various families


def is_other(source: str | Path) -> bool:
    """Whether the model in a Hugging Face folder, or of a hub name, belongs to a family that minidisp does not
    implement.
    """
    path = find_folder(source) / "config.json"
    return path.is_file() and str(read_json(path).get("model_type")) not in FAMILIES


class OtherModel(nn.Module):
    """A transformers model with the interface that evaluation needs: config.block_size, losses and hidden states."""

    def __init__(self, model: nn.Module, block_size: int):
        super().__init__()
        self.model = model
        self.config = types.SimpleNamespace(block_size=block_size)

    @property
    def wte(self) -> nn.Module:
        """The token embeddings."""
        return self.model.get_input_embeddings()

    def num_params(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        return_hidden_states: bool = False,
        loss_reduction: str = "none",
    ) -> Output:
        """See GPT.forward; the loss is that of every token."""
        out = self.model(idx, output_hidden_states=return_hidden_states, use_cache=False)
        loss = None
        if targets is not None:
            logits = out.logits[:, -targets.shape[1] :].flatten(0, 1).float()
            loss = nn.functional.cross_entropy(logits, targets.flatten(), reduction="none")
            loss = loss.view_as(targets)
        return Output(out.logits if targets is None else None, loss, out.hidden_states)


def _asks_for_code(value: object) -> bool:
    """Whether a config.json refers to Python files, or to a kernel on the hub (owner/name), at any depth."""
    if isinstance(value, list):
        return any(map(_asks_for_code, value))
    if not isinstance(value, dict):
        return False
    named = ("/" in str(what) for name, what in value.items() if name.endswith("implementation"))
    return "auto_map" in value or any(named) or any(map(_asks_for_code, value.values()))


@contextlib.contextmanager
def _loading(kind: str) -> Iterator[None]:
    """Turns an error of transformers into one line: it raises whatever its parts raise."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{kind}, and transformers cannot load it: {reason[:200]}") from None


def _refuse_larger_than_weights(folder: Path, config: dict, kind: str) -> None:
    """Raise InputError if config.json describes a much larger model than the weights, or one that exceeds the memory.

    transformers would initialise missing weights randomly. Tied matrices are stored once but may be counted twice,
    hence the factor of 2.
    """
    import transformers

    with contextlib.ExitStack() as stack:
        stored = open_tensors(folder, "", stack)
        parameters = sum(math.prod(tensor.shape) for tensor in stored.values())
    for name in LAYERS:  # checked first, as building many layers is slow
        if type(config.get(name)) is int and config[name] > len(stored):
            raise InputError(f"{kind}, and its config.json has {config[name]:,} layers for {len(stored):,} tensors")
    with _loading(kind):
        described = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(described, trust_remote_code=False)
    if (size := sum(p.numel() for p in model.parameters())) > 2 * parameters:
        raise InputError(f"{kind} with {size:,} parameters, but the weights are {parameters:,} numbers")
    refuse_larger_than_memory(kind, 4 * size, torch.device("cpu"))


def load_other(source: str | Path, device: str | torch.device = "cpu", block_size: int = 0) -> OtherModel:
    """A causal language model in eval mode and float32, from safetensors, without running code of the folder.

    block_size: context in tokens; 0 = its own. Raises InputError if transformers is missing or cannot load it.
    """
    folder = find_folder(source)
    config = read_json(folder / "config.json")
    kind = f"{folder}: its model_type is {config.get('model_type')!a:.60}"
    try:
        import transformers
    except ImportError:
        raise InputError(
            f"{kind}, which needs the package transformers: pip install transformers, or choose one of "
            f"{', '.join(FAMILIES)}"
        ) from None
    if _asks_for_code(config) or (folder / "adapter_config.json").exists():
        raise InputError(f"{kind}, which needs code or weights from elsewhere: these are never loaded")
    _refuse_larger_than_weights(folder, config, kind)
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with _loading(kind):
            model = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, local_files_only=True
            )
    finally:
        transformers.logging.set_verbosity(verbosity)
    own = getattr(model.config, "max_position_embeddings", None)
    if block_size and own and block_size > own:
        raise InputError(f"{folder} has a context of {own} tokens: pass --block-size {own} or less, not {block_size}")
    if not (block_size or own):
        raise InputError(f"{kind}, and its config.json has no context length: pass --block-size")
    return OtherModel(model.to(device).eval(), block_size or own)
