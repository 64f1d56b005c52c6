"""From a Hugging Face folder or hub name: a model with its weights, and a tokenizer.

Nothing in a folder is executed. What our model cannot represent is refused, with the name of the entry or tensor.
"""

import contextlib
import dataclasses
import json
import re
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minidisp import InputError, read_bytes
from minidisp.config import read_json
from minidisp.hf.families import FAMILIES, INDEX, TOKEN_IDS, WEIGHTS, Settings, read_config, weights
from minidisp.model import GPT, GPTConfig
from minidisp.tokenizer import HuggingFaceTokenizer, Tokenizer

FILES = ["config.json", "tokenizer.json", INDEX, "*.safetensors", *HuggingFaceTokenizer.FILES]
DTYPES = ("F64", "F32", "F16", "BF16")
# Models of the first days of the hub, which have no owner in their names.
NO_OWNER = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2")
NO_WEIGHTS = re.compile(
    r"h\.\d+\.attn\.(bias|masked_bias)|.*rotary_emb\.inv_freq"
)  # constants that old files hold, too


def load(source: str | Path, device: str | torch.device = "cpu", block_size: int = 0) -> tuple[GPT, Tokenizer]:
    """(model, tokenizer) of a Hugging Face folder or hub name; see load_model and load_tokenizer."""
    folder = find_folder(source)
    return load_model(folder, device, block_size), load_tokenizer(folder)


def load_model(source: str | Path, device: str | torch.device = "cpu", block_size: int = 0) -> GPT:
    """A GPT-2 or Qwen3 model in eval mode and float32, from a folder or a hub name owner/name.

    block_size: a shorter context than the model's own, in tokens; 0 = its own. The file's dropout is left out: it is a
    matter of training. Raises InputError naming the file where something is missing, damaged, of another kind, or has
    an option that our model does not.
    """
    folder = find_folder(source)
    family, config = read_config(folder)
    if block_size > config.block_size:
        raise InputError(f"{folder} has a context of {config.block_size} tokens: lower --block-size {block_size} to it")
    names = FAMILIES[family].names
    with contextlib.ExitStack() as stack:
        stored = _open_tensors(folder, FAMILIES[family].prefix, stack)
        if config.n_layer > len(stored):  # before a model of that many layers is built
            raise InputError(
                f"{folder}: config.json has {config.n_layer} layers, the weights are {len(stored)} tensors"
            )
        _check_tensors(folder, config, family, stored)
        with _NoInit():
            model = GPT(dataclasses.replace(config, block_size=block_size or config.block_size)).eval()
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for weight in weights(config):
                tensors = [stored[part].read() for part, _ in names.parts(weight)]
                tensor = torch.cat([tensor.t() if names.is_transposed(weight) else tensor for tensor in tensors])
                parameter = parameters.pop(weight.name)
                parameter.copy_(tensor[: len(parameter)])  # a shorter context has fewer positions
        if parameters:
            raise InputError(f"{folder} has no weights for {next(iter(parameters))}, which this minidisp's model has")
    return model.to(device)


class _NoInit(TorchFunctionMode):
    """Inside, a new model's weights are not drawn: they are about to be read, and drawing them takes longer."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def load_tokenizer(source: str | Path) -> HuggingFaceTokenizer:
    """The tokenizer of a folder or hub name, with as many ids as the model has embeddings.

    The settings beside it (HuggingFaceTokenizer.FILES: padding token, chat template, how to generate) come along, so
    that an export gives them back. Added tokens for which the embedding has no row are text; a warning says so.
    Raises InputError naming the file if it is missing, damaged, or would change the text.
    """
    folder = find_folder(source)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(
            f"{path} is missing: save the tokenizer with AutoTokenizer.from_pretrained(...).save_pretrained"
        )
    tokenizer_json, rows, files = read_json(path), 0, _settings_files(folder)
    eos_token = json.loads(files.get("tokenizer_config.json", "{}")).get("eos_token")
    eos_token = eos_token.get("content") if isinstance(eos_token, dict) else eos_token
    if (folder / "config.json").is_file():
        settings = Settings(folder / "config.json")
        rows = settings.integer("vocab_size", 0, low=0)
        if eos_token is None:
            eos_token = _token_of(tokenizer_json, settings.eos_id())
    if not isinstance(eos_token, str):
        raise InputError(f"{folder}: neither tokenizer_config.json nor config.json names an end-of-sequence token")
    try:
        tokenizer = HuggingFaceTokenizer(HuggingFaceTokenizer.pack(tokenizer_json, eos_token, rows, files))
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    if tokenizer.without_row:
        warnings.warn(
            f"{path}: the model's embedding has {rows:,} rows and none for {', '.join(tokenizer.without_row)[:80]}, "
            f"so in a text these are spelled with other tokens",
            stacklevel=2,
        )
    return tokenizer


def _settings_files(folder: Path) -> dict[str, str]:
    """The texts of the settings beside a tokenizer; of config.json, the ids of special tokens."""
    files = {}
    for path in (path for pattern in HuggingFaceTokenizer.FILES for path in sorted(folder.glob(pattern))):
        if path.suffix == ".json":
            read_json(path)  # raises the error promised above
        try:
            files[path.relative_to(folder).as_posix()] = read_bytes(path).decode()
        except UnicodeDecodeError:
            raise InputError(f"{path} is damaged: it is not UTF-8") from None
    if (folder / "config.json").is_file():
        ids = {name: value for name, value in read_json(folder / "config.json").items() if name in TOKEN_IDS}
        files |= {"config.json": json.dumps(ids)} if ids else {}
    return files


def is_folder(source: str | Path) -> bool:
    """Whether this names a Hugging Face model: a folder with such a config.json, or a name on the hub."""
    path = Path(source)
    if path.exists():
        return (path / "config.json").is_file() and "model_type" in read_json(path / "config.json")
    return _is_hub_name(str(source))


def _is_hub_name(name: str) -> bool:
    """owner/name, unless there is a folder `owner` here: then it is a mistyped path. Or an old name without one."""
    owner, _, model = name.partition("/")
    part = r"[A-Za-z0-9][\w.-]*"
    return name in NO_OWNER or (
        bool(re.fullmatch(part, owner) and re.fullmatch(part, model)) and not Path(owner).exists()
    )


def find_folder(source: str | Path) -> Path:
    """The folder itself, or where the hub's client keeps its copy of owner/name, downloaded once."""
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists() or not _is_hub_name(str(source)):
        raise InputError(
            f"{source} is no folder: give a Hugging Face model's folder, or its name on the hub, owner/name"
        )
    try:
        import huggingface_hub
    except ImportError:
        raise InputError(
            f"{source} is no folder here, and the hub needs the package huggingface_hub: pip install huggingface_hub"
        ) from None
    try:
        return Path(huggingface_hub.snapshot_download(str(source), allow_patterns=FILES))
    except Exception as error:  # of the network, of the client, of the disk
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{source} is no folder here, and the hub does not give it: {reason}") from None


def _token_of(tokenizer_json: dict, i: int | None) -> str | None:
    """The token with this id, among the added ones, where an end-of-sequence token is."""
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


def _open_tensors(folder: Path, prefix: str, stack: contextlib.ExitStack) -> dict[str, _Stored]:
    """The tensors in a folder's safetensors files by their names in transformers; the data is not read yet."""
    try:
        import safetensors
    except ImportError:
        raise InputError("Hugging Face weights need the package safetensors: pip install safetensors") from None
    stored: dict[str, _Stored] = {}
    for path in _weight_files(folder):
        try:
            file = stack.enter_context(safetensors.safe_open(path, framework="pt"))
            found = [_Stored(path, file, name) for name in file.keys()]  # noqa: SIM118, it is no dictionary
        except (OSError, safetensors.SafetensorError) as error:
            reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
            raise InputError(f"{path} is not a safetensors file, or it is damaged: {reason}") from None
        for tensor in found:
            name = tensor.name.removeprefix(prefix)  # a model saved without its output layer has none
            if NO_WEIGHTS.fullmatch(name):
                continue
            name = name if name == "lm_head.weight" else prefix + name
            if name in stored:
                raise InputError(f"{path}: the tensor {tensor.name} is in {stored[name].path.name} already")
            stored[name] = tensor
    return stored


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if (folder / WEIGHTS).is_file() or not index.is_file():
        if not (folder / WEIGHTS).is_file():
            raise InputError(f"{folder} has no {WEIGHTS} and no {INDEX}: only safetensors are read, no pickled weights")
        return [folder / WEIGHTS]
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise InputError(f"{index}: weight_map is missing, or is not a map from tensors to files")
    for name in shards.values():
        if not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise InputError(f"{index}: the shard {name!r} is not the name of a .safetensors file in this folder")
    return [folder / name for name in sorted({*shards.values()})]


def _check_tensors(folder: Path, config: GPTConfig, family: str, stored: dict[str, _Stored]) -> None:
    """Raise InputError unless the files hold exactly the tensors that the config calls for."""
    names, wanted = FAMILIES[family].names, {}
    for weight in weights(config):
        for name, rows in names.parts(weight):
            shape = (rows,) if weight.columns is None else (rows, weight.columns)
            wanted[name] = shape[::-1] if names.is_transposed(weight) else shape
    embedding, head = next(iter(wanted)), stored.get("lm_head.weight")
    if config.tied and head and embedding not in stored:  # one matrix, under the other of its names
        stored[embedding] = stored.pop("lm_head.weight")
    for name, shape in wanted.items():
        if name not in stored:
            raise InputError(f"{folder}: the weights have no tensor {name}, which its config.json calls for")
        tensor = stored[name]
        if tensor.shape != shape:
            raise InputError(f"{tensor.path}: {tensor.name} has the shape {tensor.shape}, but config.json says {shape}")
    for name, tensor in stored.items():
        if tensor.dtype not in DTYPES:
            raise InputError(
                f"{tensor.path}: {tensor.name} has the dtype {tensor.dtype}, not one of {', '.join(DTYPES)}"
            )
        if name not in wanted and not (config.tied and tensor is head):
            raise InputError(f"{tensor.path}: {tensor.name} is a tensor that minidisp's {family} model does not have")
    if config.tied and head and not torch.equal(head.read(), stored[embedding].read()):
        raise InputError(
            f"{head.path}: lm_head.weight is not {embedding}, though config.json ties them: "
            f"set tie_word_embeddings to false"
        )
