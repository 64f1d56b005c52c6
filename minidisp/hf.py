"""Hugging Face models, both ways: GPT-2 and Qwen3 weights in safetensors, each with its own tokenizer.

    model = minidisp.hf.load_model("folder")             # or owner/name on the hub
    model, tokenizer = minidisp.hf.load("folder")
    python -m minidisp.hf export runs/NAME folder        # for AutoModelForCausalLM and AutoTokenizer, without remote code

A folder holds config.json, model.safetensors (or shards and model.safetensors.index.json), tokenizer.json and
tokenizer_config.json. Nothing in it is executed; what our model cannot represent is refused by name.
"""

import argparse
import contextlib
import dataclasses
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minidisp import InputError
from minidisp.config import read_json
from minidisp.model import GPT, GPTConfig
from minidisp.runtime import checkpoint
from minidisp.runtime.cli import Parser, exit_code
from minidisp.tokenizer import ByteTokenizer, HuggingFaceTokenizer, Tokenizer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FILES = ["config.json", "tokenizer.json", "tokenizer_config.json", INDEX, "*.safetensors"]
LARGEST = 1 << 20  # no number in a config.json of a model of either family is larger
DTYPES = ("F64", "F32", "F16", "BF16")

# Names of the same things. Where one of our matrices holds several of theirs, they lie below each other.
PREFIX = {"gpt2": "transformer.", "qwen3": "model."}
QWEN3 = {
    "wte": ["embed_tokens"],
    "ln_f": ["norm"],
    "ln_1": ["input_layernorm"],
    "ln_2": ["post_attention_layernorm"],
    "attn.c_attn": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attn.q_norm": ["self_attn.q_norm"],
    "attn.k_norm": ["self_attn.k_norm"],
    "attn.c_proj": ["self_attn.o_proj"],
    "mlp.c_fc": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.c_proj": ["mlp.down_proj"],
}
NO_WEIGHTS = re.compile(
    r"h\.\d+\.attn\.(bias|masked_bias)|.*rotary_emb\.inv_freq"
)  # constants that old files hold, too
GELU = {"gelu": "erf", "gelu_new": "tanh", "gelu_fast": "tanh", "gelu_pytorch_tanh": "tanh"}


# --- from a folder ----------------------------------------------------------------------------------------------------


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
    config = read_config(folder)
    if block_size > config.block_size:
        raise InputError(f"{folder} has a context of {config.block_size} tokens: lower --block-size {block_size} to it")
    with contextlib.ExitStack() as stack:
        stored = _open_tensors(folder, config, stack)
        if config.n_layer > len(stored):  # before a model of that many layers is built
            raise InputError(
                f"{folder}: config.json has {config.n_layer} layers, the weights are {len(stored)} tensors"
            )
        with torch.device("meta"):
            layout = list(_layout(GPT(config)))
        _check_tensors(folder, config, layout, stored)
        with _NoInit():
            model = GPT(dataclasses.replace(config, block_size=block_size or config.block_size)).eval()
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, parts, transposed in layout:
                tensors = [stored[part].read() for part, _ in parts]
                tensor = torch.cat([tensor.t() if transposed else tensor for tensor in tensors])
                parameters[name].copy_(tensor[: len(parameters[name])])  # a shorter context has fewer positions
    return model.to(device)


class _NoInit(TorchFunctionMode):
    """Inside, a new model's weights are not drawn: they are about to be read, and drawing them takes longer than that."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def load_tokenizer(source: str | Path) -> HuggingFaceTokenizer:
    """The tokenizer of a folder or hub name, with as many ids as the model has embeddings.

    Raises InputError naming the file if it is missing, damaged, or would change the text.
    """
    folder = find_folder(source)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(
            f"{path} is missing: save the tokenizer with AutoTokenizer.from_pretrained(...).save_pretrained"
        )
    tokenizer_json, rows, eos_token = read_json(path), 0, None
    if (folder / "tokenizer_config.json").is_file():
        eos_token = read_json(folder / "tokenizer_config.json").get("eos_token")
        eos_token = eos_token.get("content") if isinstance(eos_token, dict) else eos_token
    if (folder / "config.json").is_file():
        settings = _Settings(folder / "config.json")
        rows = settings.integer("vocab_size", 0, low=0)
        if eos_token is None:
            eos_token = _token_of(tokenizer_json, settings.eos_id())
    if not isinstance(eos_token, str):
        raise InputError(f"{folder}: neither tokenizer_config.json nor config.json names an end-of-sequence token")
    try:
        return HuggingFaceTokenizer(HuggingFaceTokenizer.pack(tokenizer_json, eos_token, rows))
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None


def is_folder(source: str | Path) -> bool:
    """Whether this names a Hugging Face model: a folder with such a config.json, or owner/name where no file is."""
    path = Path(source)
    if path.exists():
        return (path / "config.json").is_file() and "model_type" in read_json(path / "config.json")
    return _is_hub_name(str(source))


def _is_hub_name(name: str) -> bool:
    """owner/name, unless there is a folder `owner` here: then it is a path that was mistyped."""
    owner, _, model = name.partition("/")
    part = r"[A-Za-z0-9][\w.-]*"
    return bool(re.fullmatch(part, owner) and re.fullmatch(part, model)) and not Path(owner).exists()


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
            f"{source} is no folder here, and the hub needs the package huggingface_hub: pip install 'minidisp[hf]'"
        ) from None
    try:
        return Path(huggingface_hub.snapshot_download(str(source), allow_patterns=FILES))
    except Exception as error:  # of the network, of the client, of the disk
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{source} is no folder here, and the hub does not give it: {reason}") from None


class _Settings:
    """The entries of a config.json from elsewhere: the wrong type or an absurd number is an InputError with its name."""

    def __init__(self, path: Path):
        self.path, self.values = path, read_json(path)

    def refuse(self, name: str, why: str):
        raise InputError(f"{self.path}: {name} is {str(self.values.get(name))[:60]}, {why}")

    def get(self, name: str, kind: type, default):
        value = self.values.get(name)
        value = default if value is None else value
        if kind is float and type(value) is int and abs(value) < 1 << 53:
            value = float(value)
        if value is not None and type(value) is not kind:
            self.refuse(name, f"but must be of type {kind.__name__}")
        return value

    def integer(self, name: str, default: int | None, low: int = 1) -> int:
        value = self.get(name, int, default)
        if value is None or not low <= value <= LARGEST:
            self.refuse(name, f"but must be from {low} to {LARGEST:,}")
        return value

    def real(self, name: str, default: float) -> float:
        value = self.get(name, float, default)
        if not 0 < value < float("inf"):
            self.refuse(name, "but must be above 0")
        return value

    def must_be(self, name: str, *allowed) -> None:
        """The first one is what it is by default."""
        value = self.values.get(name)
        if value is not None and value not in allowed:
            self.refuse(name, f"which minidisp's model does not have (only {', '.join(map(str, allowed))})")

    def eos_id(self) -> int | None:
        value = self.values.get("eos_token_id")
        value = value[0] if isinstance(value, list) and value else value
        return value if type(value) is int else None


def _token_of(tokenizer_json: dict, i: int | None) -> str | None:
    """The token with this id, among the added ones, where an end-of-sequence token is."""
    added = tokenizer_json.get("added_tokens")
    added = added if isinstance(added, list) else []
    return next((t.get("content") for t in added if isinstance(t, dict) and i is not None and t.get("id") == i), None)


def read_config(folder: Path) -> GPTConfig:
    """Our config of the model that a folder's config.json describes; InputError on what ours cannot represent."""
    settings = _Settings(folder / "config.json")
    arch = settings.values.get("model_type")
    if str(arch) not in PREFIX:
        settings.refuse("model_type", f"but minidisp reads {' and '.join(PREFIX)} only")
    for name in ("auto_map", "quantization_config"):
        settings.must_be(name, None)
    fields = _gpt2_fields(settings) if arch == "gpt2" else _qwen3_fields(settings)
    try:
        return GPTConfig(arch=arch, **fields)
    except InputError as error:
        raise InputError(f"{settings.path}: {error}") from None


def _gpt2_fields(settings: _Settings) -> dict:
    settings.must_be("scale_attn_weights", True)
    settings.must_be("scale_attn_by_inverse_layer_idx", False)
    settings.must_be("add_cross_attention", False)
    settings.must_be("activation_function", *GELU)
    n_embd = settings.integer("n_embd", 768)
    return {
        "n_layer": settings.integer("n_layer", 12),
        "n_head": settings.integer("n_head", 12),
        "n_embd": n_embd,
        "mlp_dim": settings.integer("n_inner", 4 * n_embd),
        "block_size": settings.integer("n_positions", 1024),
        "vocab_size": settings.integer("vocab_size", 50257),
        "gelu": GELU[settings.get("activation_function", str, "gelu_new")],
        "norm_eps": settings.real("layer_norm_epsilon", 1e-5),
        "tied": settings.get("tie_word_embeddings", bool, True),
    }


def _qwen3_fields(settings: _Settings) -> dict:
    settings.must_be("hidden_act", "silu")
    # transformers 5 writes rope_parameters, earlier ones rope_theta and rope_scaling.
    rope = settings.get("rope_parameters", dict, {}) | settings.get("rope_scaling", dict, {})
    kinds = {str(rope.get(key, "default")) for key in ("rope_type", "type")}
    if kinds != {"default"} or not {*rope} <= {"rope_type", "type", "rope_theta"}:
        name = "rope_scaling" if settings.values.get("rope_scaling") else "rope_parameters"
        settings.refuse(name, "but only plain rotary positions are in minidisp's model")
    if "rope_theta" in rope:
        settings.values = {**settings.values, "rope_theta": rope["rope_theta"]}
    block_size = settings.integer("max_position_embeddings", 32768)
    layers = settings.get("layer_types", list, [])
    window = settings.integer("sliding_window", LARGEST) if settings.get("use_sliding_window", bool, False) else LARGEST
    if window < block_size and (not layers or {*map(str, layers)} != {"full_attention"}):
        settings.refuse("sliding_window", "but minidisp's model attends to the whole context")
    n_head = settings.integer("num_attention_heads", 32)
    return {
        "n_layer": settings.integer("num_hidden_layers", 32),
        "n_head": n_head,
        "n_kv_head": settings.integer("num_key_value_heads", n_head),
        "n_embd": settings.integer("hidden_size", 4096),
        "head_dim": settings.integer("head_dim", 128),
        "mlp_dim": settings.integer("intermediate_size", 22016),
        "block_size": block_size,
        "vocab_size": settings.integer("vocab_size", 151936),
        "rope_theta": settings.real("rope_theta", 10000.0),
        "norm_eps": settings.real("rms_norm_eps", 1e-6),
        "attention_bias": settings.get("attention_bias", bool, False),
        "tied": settings.get("tie_word_embeddings", bool, False),
    }


class _Stored:
    """A tensor in an open safetensors file."""

    def __init__(self, path: Path, file, name: str):
        self.path, self.file, self.name = path, file, name
        header = file.get_slice(name)
        self.shape, self.dtype = tuple(header.get_shape()), header.get_dtype()

    def read(self) -> Tensor:
        return self.file.get_tensor(self.name)


def _open_tensors(folder: Path, config: GPTConfig, stack: contextlib.ExitStack) -> dict[str, _Stored]:
    """The tensors in a folder's safetensors files by the name that transformers has for them; the data is not read yet."""
    try:
        import safetensors
    except ImportError:
        raise InputError("Hugging Face weights need the package safetensors: pip install 'minidisp[hf]'") from None
    stored: dict[str, _Stored] = {}
    for path in _weight_files(folder):
        try:
            file = stack.enter_context(safetensors.safe_open(path, framework="pt"))
            found = [_Stored(path, file, name) for name in file.keys()]  # noqa: SIM118, it is no dictionary
        except (OSError, safetensors.SafetensorError) as error:
            reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
            raise InputError(f"{path} is not a safetensors file, or it is damaged: {reason}") from None
        for tensor in found:
            prefix = PREFIX[config.arch]
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


def _layout(model: GPT) -> Iterator[tuple[str, list[tuple[str, tuple[int, ...]]], bool]]:
    """For every parameter of ours: its name, the tensors of theirs that it is made of with their shapes, and whether
    those are transposed, as the matrices in GPT-2's blocks are."""
    config = model.config
    for name, parameter in model.named_parameters():
        module, _, kind = name.rpartition(".")
        transposed = config.arch == "gpt2" and module.startswith("h.") and parameter.ndim == 2
        if config.arch == "gpt2" or module == "lm_head":
            theirs = [module]
        elif module.startswith("h."):
            _, layer, module = module.split(".", 2)
            theirs = [f"layers.{layer}.{part}" for part in QWEN3[module]]
        else:
            theirs = QWEN3[module]
        head_rows = [heads * config.head_dim for heads in (config.n_head, config.n_kv_head, config.n_kv_head)]
        rows = {1: [len(parameter)], 2: [len(parameter) // 2] * 2, 3: head_rows}[len(theirs)]
        prefix = "" if module == "lm_head" else PREFIX[config.arch]
        shapes = [(n, *parameter.shape[1:]) for n in rows]
        parts = [
            (f"{prefix}{part}.{kind}", shape[::-1] if transposed else shape)
            for part, shape in zip(theirs, shapes, strict=True)
        ]
        yield name, parts, transposed


def _check_tensors(folder: Path, config: GPTConfig, layout: list, stored: dict[str, _Stored]) -> None:
    """Raise InputError unless the files hold exactly the tensors that the config calls for."""
    wanted = {part: shape for _, parts, _ in layout for part, shape in parts}
    embedding, head = next(iter(wanted)), stored.get("lm_head.weight")
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
            raise InputError(
                f"{tensor.path}: {tensor.name} is a tensor that minidisp's {config.arch} model does not have"
            )
    if config.tied and head and not torch.equal(head.read(), stored[embedding].read()):
        raise InputError(
            f"{head.path}: lm_head.weight is not {embedding}, though config.json ties them: set tie_word_embeddings to false"
        )


# --- to a folder ------------------------------------------------------------------------------------------------------


def export(run: str | Path, folder: str | Path) -> Path:
    """Write a run's model and tokenizer as a folder for transformers; returns it.

    run: a run folder or a checkpoint file. Weights are float32. The tokenizer gives the same ids for every text and the
    same text back; special tokens in a text are text, as in training (split_special_tokens).
    Raises InputError, with nothing left behind, if the folder is there already or the format cannot represent the model.
    """
    try:
        import safetensors.torch
    except ImportError:
        raise InputError("Hugging Face weights need the package safetensors: pip install 'minidisp[hf]'") from None
    model, vocabulary, _ = checkpoint.load_run(run)
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is there already: choose another folder")
    config, (tokenizer_json, eos_token) = to_config(model.config, vocabulary), to_tokenizer(vocabulary)
    building = folder.with_name(f".{folder.name}.building")
    shutil.rmtree(building, ignore_errors=True)  # of an export that was killed
    building.mkdir(parents=True)
    try:
        checkpoint.write_json(building / "config.json", config)
        checkpoint.write_json(building / "tokenizer.json", tokenizer_json)
        tokenizer_config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": eos_token,
            "eos_token": eos_token,
            "model_max_length": model.config.block_size,
            "clean_up_tokenization_spaces": False,
            "split_special_tokens": True,
        }
        checkpoint.write_json(building / "tokenizer_config.json", tokenizer_config)
        safetensors.torch.save_file(to_tensors(model), building / WEIGHTS, metadata={"format": "pt"})
        shutil.copymode(building / "config.json", building / WEIGHTS)  # or only its owner could read it
        if folder.exists():
            folder.rmdir()  # it is empty
        building.rename(folder)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    return folder


def to_tensors(model: GPT) -> dict[str, Tensor]:
    """The weights by the names of transformers, float32 on the CPU; GPT-2 has biases there, which are 0 if ours has none."""
    parameters, tensors = dict(model.named_parameters()), {}
    with torch.device("meta"):
        layout = list(_layout(GPT(dataclasses.replace(model.config, bias=True))))
    for name, parts, transposed in layout:
        sizes = [shape[-1] if transposed else shape[0] for _, shape in parts]
        whole = parameters[name].detach().float().cpu() if name in parameters else torch.zeros(sum(sizes))
        for (part, _), tensor in zip(parts, whole.split(sizes), strict=True):
            tensors[part] = (tensor.t() if transposed else tensor).contiguous()
    return tensors


def to_config(config: GPTConfig, vocabulary: Tokenizer) -> dict:
    """What config.json says. Raises InputError naming the option that the format does not have."""
    if config.mlp != "arch":
        raise InputError(f"--mlp {config.mlp}: the GPT-2 and Qwen3 models of transformers have no such MLP")
    common = {
        "model_type": config.arch,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tied,
        "bos_token_id": vocabulary.eos_id,  # documents follow one another, each behind the end of the one before
        "eos_token_id": vocabulary.eos_id,
        "dtype": "float32",
    }
    if config.arch == "gpt2":
        if config.n_kv_head != config.n_head:
            raise InputError(f"--n-kv-head {config.n_kv_head}: GPT-2 models of transformers share no heads")
        if config.n_head * config.head_dim != config.n_embd:
            raise InputError(f"--head-dim {config.head_dim}: it is n_embd / n_head in GPT-2 models of transformers")
        return common | {
            "architectures": ["GPT2LMHeadModel"],
            "n_layer": config.n_layer,
            "n_head": config.n_head,
            "n_embd": config.n_embd,
            "n_inner": config.mlp_dim,
            "n_positions": config.block_size,
            "activation_function": "gelu_new" if config.gelu == "tanh" else "gelu",
            "layer_norm_epsilon": config.norm_eps,
            **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), config.dropout),
        }
    return common | {
        "architectures": ["Qwen3ForCausalLM"],
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "head_dim": config.head_dim,
        "hidden_size": config.n_embd,
        "intermediate_size": config.mlp_dim,
        "max_position_embeddings": config.block_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "attention_bias": config.attention_bias,
        "rope_theta": config.rope_theta,  # for transformers 4
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
    }


def to_tokenizer(vocabulary: Tokenizer) -> tuple[dict, str]:
    """(tokenizer.json, end-of-sequence token) for the package tokenizers: a BPE with byte fallback and nothing around it.

    The pieces have spaces as they are, so that U+2581 is no space and falls back to its three bytes, as it does here.
    Raises InputError if the tokenizer is a SentencePiece model of another kind.
    """
    if isinstance(vocabulary, HuggingFaceTokenizer):
        return vocabulary.as_used, vocabulary.eos_token
    if isinstance(vocabulary, ByteTokenizer):
        pieces, merges = [*(f"<0x{byte:02X}>" for byte in range(256)), "</s>"], []
    else:
        try:
            pieces, merges = vocabulary.as_merges()
        except ValueError as error:
            raise InputError(f"tokenizer.model cannot be exported: {error}") from None
    flags = {"special": True, **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)}
    silent = [i for i, token in enumerate(vocabulary.token_bytes) if not token]  # end of sequence, <unk>
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
             "fuse_unk": False, "byte_fallback": True, "ignore_merges": False}  # fmt: skip
    tokenizer_json = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": pieces[i], **flags} for i in silent],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": model | {"vocab": {piece: i for i, piece in enumerate(pieces)}, "merges": merges},
    }
    return tokenizer_json, pieces[vocabulary.eos_id]


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: see exit_code."""
    parser = Parser(
        prog="-m minidisp.hf",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("command", choices=("export",), help="export: write a run as a folder for transformers")
    parser.add_argument("run", metavar="RUN", help="run folder (its best checkpoint is taken), or checkpoint file")
    parser.add_argument("folder", metavar="DIR", help="folder to write; must not exist yet, or be empty")

    def command() -> None:
        args = parser.parse_args(argv)
        try:
            folder = export(args.run, args.folder)
        except OSError as error:
            raise InputError(f"{error.filename or args.folder}: {error.strerror}") from None
        print(f"{folder}: for AutoModelForCausalLM.from_pretrained and AutoTokenizer.from_pretrained")

    return exit_code("minidisp.hf", command)


if __name__ == "__main__":
    sys.exit(main())
