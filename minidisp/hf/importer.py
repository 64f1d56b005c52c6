"""Import of a model and its tokenizer from a Hugging Face folder or hub name.

No code from a folder is executed. Anything that our model cannot represent is rejected, with the name of the entry or
tensor.
"""

import contextlib
import dataclasses
import json
import re
import warnings
from pathlib import Path

import torch
from torch import Tensor

from minidisp import InputError, read_bytes
from minidisp.config import read_json
from minidisp.hf.families import FAMILIES, INDEX, TOKEN_IDS, WEIGHTS, Settings, read_config, weights
from minidisp.model import GPT, GPTConfig, NoInit
from minidisp.runtime.device import refuse_larger_than_memory
from minidisp.tokenizer import HuggingFaceTokenizer, Tokenizer

FILES = ["config.json", "tokenizer.json", INDEX, "*.safetensors", *HuggingFaceTokenizer.FILES]
DTYPES = ("F64", "F32", "F16", "BF16")
# Early models on the hub have no owner in their names.
NO_OWNER = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2")
NO_WEIGHTS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)|.*rotary_emb\.inv_freq")  # constants in old files


def load(source: str | Path, device: str | torch.device = "cpu", block_size: int = 0) -> tuple[GPT, Tokenizer]:
    """(model, tokenizer) of a Hugging Face folder or hub name; see load_model and load_tokenizer."""
    folder = find_folder(source)
    return load_model(folder, device, block_size), load_tokenizer(folder)


def load_model(source: str | Path, device: str | torch.device = "cpu", block_size: int = 0) -> GPT:
    """A GPT-2, Qwen3 or Apertus model in eval mode and float32, from a folder or a hub name owner/name.

    block_size: context in tokens, at most the model's own; 0 = its own. The dropout in the file is ignored, as it only
    matters in training. Raises InputError, naming the file, if something is missing, damaged, of another kind, or has
    an option that our model does not support.
    """
    folder = find_folder(source)
    family, config = read_config(folder)
    if block_size > config.block_size:
        raise InputError(
            f"{folder} has a context of {config.block_size} tokens: pass --block-size {config.block_size} or less, "
            f"not {block_size}"
        )
    names = FAMILIES[family].names
    with contextlib.ExitStack() as stack:
        stored = open_tensors(folder, FAMILIES[family].prefix, stack)
        if config.n_layer > len(stored):  # checked before building a model with that many layers
            raise InputError(
                f"{folder}: config.json has {config.n_layer} layers, but there are only {len(stored)} tensors"
            )
        _check_tensors(folder, config, family, stored)
        refuse_larger_than_memory(f"the model in {folder}", 4 * config.parameter_count, torch.device("cpu"))
        with NoInit():
            model = GPT(dataclasses.replace(config, block_size=block_size or config.block_size)).eval()
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for weight in weights(config):
                tensors = [stored[part].read() for part, _ in names.parts(weight)]
                tensor = torch.cat([tensor.t() if names.is_transposed(weight) else tensor for tensor in tensors])
                parameter = parameters.pop(weight.name)
                parameter.copy_(tensor[: len(parameter)])  # a shorter context has fewer position embeddings
        if parameters:
            raise InputError(f"{folder} has no weights for the model's parameter {next(iter(parameters))}")
    return model.to(device)


def load_tokenizer(source: str | Path) -> HuggingFaceTokenizer:
    """The tokenizer of a folder or hub name, with as many ids as the model has embeddings.

    Its settings (HuggingFaceTokenizer.FILES: padding token, chat template, generation parameters) are kept for export.
    Added tokens for which the embedding has no row are treated as text, with a warning. Raises InputError, naming the
    file, if it is missing, damaged, or would change the text.
    """
    folder = find_folder(source)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"{path} is missing: create it with AutoTokenizer.from_pretrained(...).save_pretrained(...)")
    tokenizer_json, rows, files = read_json(path), 0, _settings_files(folder)
    eos_token = json.loads(files.get("tokenizer_config.json", "{}")).get("eos_token")
    eos_token = eos_token.get("content") if isinstance(eos_token, dict) else eos_token
    if (folder / "config.json").is_file():
        settings = Settings(folder / "config.json")
        rows = settings.integer("vocab_size", 0, low=0)
        if eos_token is None:
            eos_token = _token_of(tokenizer_json, settings.eos_id())
    if not isinstance(eos_token, str):
        raise InputError(f"{folder}: neither tokenizer_config.json nor config.json has an end-of-sequence token")
    try:
        tokenizer = HuggingFaceTokenizer(HuggingFaceTokenizer.pack(tokenizer_json, eos_token, rows, files))
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    if tokenizer.without_row:
        warnings.warn(
            f"{path}: the model's embedding has {rows:,} rows and none for {', '.join(tokenizer.without_row)[:80]}, "
            "which are therefore encoded as plain text",
            stacklevel=2,
        )
    return tokenizer


def _settings_files(folder: Path) -> dict[str, str]:
    """The contents of a tokenizer's settings files; of config.json, only the ids of special tokens."""
    files = {}
    for path in (path for pattern in HuggingFaceTokenizer.FILES for path in sorted(folder.glob(pattern))):
        if path.suffix == ".json":
            read_json(path)  # raises InputError if it is damaged
        try:
            files[path.relative_to(folder).as_posix()] = read_bytes(path).decode()
        except UnicodeDecodeError:
            raise InputError(f"{path} is damaged: it is not UTF-8") from None
    if (folder / "config.json").is_file():
        ids = {name: value for name, value in read_json(folder / "config.json").items() if name in TOKEN_IDS}
        files |= {"config.json": json.dumps(ids)} if ids else {}
    return files


def is_folder(source: str | Path) -> bool:
    """Whether this is a Hugging Face model: a folder with its config.json, or a name on the hub."""
    path = Path(source)
    if path.exists():
        return (path / "config.json").is_file() and "model_type" in read_json(path / "config.json")
    return _is_hub_name(str(source))


def _is_hub_name(name: str) -> bool:
    """Whether it is owner/name, or an old name without owner. If a folder `owner` exists, it is a mistyped path."""
    owner, _, model = name.partition("/")
    part = r"[A-Za-z0-9][\w.-]*"
    return name in NO_OWNER or (
        bool(re.fullmatch(part, owner) and re.fullmatch(part, model)) and not Path(owner).exists()
    )


def find_folder(source: str | Path) -> Path:
    """The folder itself, or the hub client's local copy of owner/name, which is downloaded once."""
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists() or not _is_hub_name(str(source)):
        raise InputError(f"{source} is not a folder: pass the folder of a Hugging Face model, or owner/name on the hub")
    try:
        import huggingface_hub
    except ImportError:
        raise InputError(
            f"{source} is not a folder, and downloads need the package huggingface_hub: pip install huggingface_hub"
        ) from None
    try:
        return Path(huggingface_hub.snapshot_download(str(source), allow_patterns=FILES))
    except Exception as error:  # network, client or disk errors
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{source} is not a folder, and cannot be downloaded from the hub: {reason}") from None


def _token_of(tokenizer_json: dict, i: int | None) -> str | None:
    """The added token with this id; the end-of-sequence token is one of them."""
    added = tokenizer_json.get("added_tokens")
    added = added if isinstance(added, list) else []
    return next((t.get("content") for t in added if isinstance(t, dict) and i is not None and t.get("id") == i), None)


class _Stored:
    """A tensor in an open safetensors file."""

    def __init__(self, path: Path, file, name: str):
        self.path, self.file, self.name = path, file, name
        header = file.get_slice(name)
        self.shape, self.dtype = tuple(header.get_shape()), header.get_dtype()

    def read(self) -> Tensor:
        return self.file.get_tensor(self.name)


def open_tensors(folder: Path, prefix: str, stack: contextlib.ExitStack) -> dict[str, _Stored]:
    """The tensors in a folder's safetensors files by their names in transformers; the data is not read yet."""
    try:
        import safetensors
    except ImportError:
        raise InputError("Hugging Face weights need the package safetensors: pip install safetensors") from None
    stored: dict[str, _Stored] = {}
    for path in _weight_files(folder):
        if path.exists() and not path.is_file():  # opening a pipe would block
            raise InputError(f"{path} is not a file")
        try:
            file = stack.enter_context(safetensors.safe_open(path, framework="pt"))
            found = [_Stored(path, file, name) for name in file.keys()]  # noqa: SIM118, it is no dictionary
        except (OSError, RuntimeError, safetensors.SafetensorError) as error:  # RuntimeError: mmap failed
            reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
            raise InputError(f"{path} is not a safetensors file, or it is damaged: {reason}") from None
        for tensor in found:
            name = tensor.name.removeprefix(prefix)  # a model saved without its output layer has no prefix
            if NO_WEIGHTS.fullmatch(name):
                continue
            name = name if name == "lm_head.weight" else prefix + name
            if name in stored:
                raise InputError(f"{path}: the tensor {tensor.name} is also in {stored[name].path.name}")
            stored[name] = tensor
    return stored


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if (folder / WEIGHTS).is_file() or not index.is_file():
        if not (folder / WEIGHTS).is_file():
            raise InputError(
                f"{folder} has no {WEIGHTS} and no {INDEX}: only safetensors are read, not pickled weights"
            )
        return [folder / WEIGHTS]
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise InputError(f"{index}: weight_map is missing, or does not map tensors to files")
    for name in shards.values():
        if not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise InputError(f"{index}: the shard {name!r} is not the name of a .safetensors file in this folder")
    return [folder / name for name in sorted({*shards.values()})]


def _check_tensors(folder: Path, config: GPTConfig, family: str, stored: dict[str, _Stored]) -> None:
    """Raise InputError unless the files contain exactly the tensors that the config requires."""
    names, wanted = FAMILIES[family].names, {}
    for weight in weights(config):
        for name, rows in names.parts(weight):
            shape = (rows,) if weight.columns is None else (rows, weight.columns)
            wanted[name] = shape[::-1] if names.is_transposed(weight) else shape
    embedding, head = next(iter(wanted)), stored.get("lm_head.weight")
    if config.tied and head and embedding not in stored:  # the tied matrix is stored under its other name
        stored[embedding] = stored.pop("lm_head.weight")
    for name, shape in wanted.items():
        if name not in stored:
            raise InputError(f"{folder}: the weights have no tensor {name}, which config.json requires")
        tensor = stored[name]
        if tensor.shape != shape:
            raise InputError(
                f"{tensor.path}: {tensor.name} has the shape {tensor.shape}, but config.json requires {shape}"
            )
    for name, tensor in stored.items():
        if tensor.dtype not in DTYPES:
            raise InputError(
                f"{tensor.path}: {tensor.name} has the dtype {tensor.dtype}, not one of {', '.join(DTYPES)}"
            )
        if name not in wanted and not (config.tied and tensor is head):
            raise InputError(f"{tensor.path}: minidisp's {family} model has no tensor {tensor.name}")
    if config.tied and head and not torch.equal(head.read(), stored[embedding].read()):
        raise InputError(
            f"{head.path}: lm_head.weight differs from {embedding}, but config.json ties them: "
            "set tie_word_embeddings to false"
        )
