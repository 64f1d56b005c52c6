"""The transformers model families that minidisp can import and export: config.json and tensor names.

    gpt2       GPT2LMHeadModel       --arch gpt2
    qwen3      Qwen3ForCausalLM      --arch qwen3
    apertus    ApertusForCausalLM    --arch qwen3 --mlp relu2: Qwen3's block, the MLP without a gate (arXiv 2509.14233)

This file lists what each family can represent. Anything else is rejected with its name, on import and on export.
reference.py then recomputes the logits of every export independently, which catches unsupported changes of the model's
code.
"""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from minidisp import InputError
from minidisp.config import read_json
from minidisp.model import GPT, GPTConfig

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")  # the tokenizer's entries in config.json
LARGEST = 1 << 20  # no number in a config.json of a model of these families is larger
GELU = {"gelu_new": "tanh", "gelu": "erf", "gelu_fast": "tanh", "gelu_pytorch_tanh": "tanh"}
# our (arch, mlp) -> the family with this block
FAMILY_OF = {("gpt2", "arch"): "gpt2", ("qwen3", "arch"): "qwen3", ("qwen3", "relu2"): "apertus"}
# The fields of GPTConfig that config.json can represent, and those that only matter in training.
STORED = {
    "arch",
    "n_layer",
    "n_head",
    "n_kv_head",
    "n_embd",
    "head_dim",
    "mlp_dim",
    "block_size",
    "bias",
    "attention_bias",
    "gelu",
    "mlp",
    "tied",
    "rope_theta",
    "norm_eps",
    "vocab_size",
}
TRAINING_ONLY = {"dropout", "zero_init", "recompute"}


# --- names ------------------------------------------------------------------------------------------------------------


class Weight(NamedTuple):
    """One of our parameters: its name, and the number of rows of each of its stacked parts."""

    name: str
    rows: tuple[int, ...]
    columns: int | None  # None: it is a vector


def weights(config: GPTConfig) -> list[Weight]:
    """The parameters that a family can store, derived from the config. A model with any other parameter is rejected.

    GPT-2 always has biases there; those that ours lacks are zeros.
    """
    C, D, hidden, gpt2 = config.n_embd, config.head_dim, config.mlp_dim, config.arch == "gpt2"
    q, kv, attention_bias = config.n_head * D, config.n_kv_head * D, gpt2 or config.attention_bias
    modules = [("wte", (config.vocab_size,), C, False)]  # name, rows, columns, whether there is a bias
    modules += [("wpe", (config.block_size,), C, False)] if gpt2 else []
    block = [
        ("ln_1", (C,), None, gpt2),
        ("attn.c_attn", (q, kv, kv), C, attention_bias),
        ("attn.c_proj", (C,), q, attention_bias),
        ("ln_2", (C,), None, gpt2),
        ("mlp.c_fc", (hidden,) * (2 if config.gated else 1), C, gpt2),
        ("mlp.c_proj", (C,), hidden, gpt2),
    ]
    block += [] if gpt2 else [("attn.q_norm", (D,), None, False), ("attn.k_norm", (D,), None, False)]
    modules += [(f"h.{layer}.{name}", *rest) for layer in range(config.n_layer) for name, *rest in block]
    modules += [("ln_f", (C,), None, gpt2)]
    modules += [] if config.tied else [("lm_head", (config.vocab_size,), C, False)]
    found = []
    for name, rows, columns, bias in modules:
        found.append(Weight(f"{name}.weight", rows, columns))
        if bias:
            found.append(Weight(f"{name}.bias", rows, None))
    return found


class Names(NamedTuple):
    """A format's names for our modules, with {} for the layer number. A list names the parts of our stacked matrix."""

    modules: dict[str, str | list[str]]
    transposed: bool = False  # the matrices in the blocks, as in GPT-2

    def parts(self, weight: Weight) -> list[tuple[str, int]]:
        """The tensors that are stacked in one of our parameters: (name, rows)."""
        module, _, kind = weight.name.rpartition(".")
        layer = None
        if module.startswith("h."):
            _, layer, module = module.split(".", 2)
        names = self.modules[module]
        rows = weight.rows
        if isinstance(names, str):
            names, rows = [names], [sum(rows)]
        return [(f"{name.format(layer)}.{kind}", n) for name, n in zip(names, rows, strict=True)]

    def is_transposed(self, weight: Weight) -> bool:
        return self.transposed and weight.name.startswith("h.") and weight.columns is not None


_GPT2 = {name: f"transformer.{name}" for name in ("wte", "wpe", "ln_f")} | {"lm_head": "lm_head"}
_GPT2 |= {
    name: f"transformer.h.{{}}.{name}"
    for name in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
}
_QWEN3 = {
    "wte": "model.embed_tokens",
    "ln_1": "model.layers.{}.input_layernorm",
    "attn.c_attn": [f"model.layers.{{}}.self_attn.{part}_proj" for part in "qkv"],
    "attn.q_norm": "model.layers.{}.self_attn.q_norm",
    "attn.k_norm": "model.layers.{}.self_attn.k_norm",
    "attn.c_proj": "model.layers.{}.self_attn.o_proj",
    "ln_2": "model.layers.{}.post_attention_layernorm",
    "mlp.c_fc": ["model.layers.{}.mlp.gate_proj", "model.layers.{}.mlp.up_proj"],
    "mlp.c_proj": "model.layers.{}.mlp.down_proj",
    "ln_f": "model.norm",
    "lm_head": "lm_head",
}
_APERTUS = {
    "ln_1": "model.layers.{}.attention_layernorm",
    "ln_2": "model.layers.{}.feedforward_layernorm",
    "mlp.c_fc": "model.layers.{}.mlp.up_proj",
}


class Family(NamedTuple):
    architecture: str  # the class in transformers
    prefix: str  # of every tensor but the output layer, whose name some files lack
    names: Names


FAMILIES = {
    "gpt2": Family("GPT2LMHeadModel", "transformer.", Names(_GPT2, transposed=True)),
    "qwen3": Family("Qwen3ForCausalLM", "model.", Names(_QWEN3)),
    "apertus": Family("ApertusForCausalLM", "model.", Names(_QWEN3 | _APERTUS)),
}


def family_of(config: GPTConfig) -> str:
    """The family that can represent this model. Raises InputError, naming the flag, if there is none."""
    for field in dataclasses.fields(GPTConfig):
        flag, value = f"--{field.name.replace('_', '-')}", getattr(config, field.name)
        if field.name not in STORED | TRAINING_ONLY and value != field.default:
            raise InputError(f"{flag} {value}: none of the transformers models that minidisp can export supports it")
    if config.arch not in {arch for arch, _ in FAMILY_OF}:
        raise InputError(
            f"--arch {config.arch}: none of the transformers models that minidisp can export has such blocks"
        )
    if (config.arch, config.mlp) not in FAMILY_OF:
        others = [arch for arch, mlp in FAMILY_OF if mlp == config.mlp]
        hint = f" (with --arch {others[0]} it can be exported)" if others else ""
        raise InputError(f"--mlp {config.mlp}: the {config.arch} models of transformers have no such MLP{hint}")
    if config.gelu not in GELU.values():
        raise InputError(f"--gelu {config.gelu}: the {config.arch} models of transformers have no such activation")
    return FAMILY_OF[config.arch, config.mlp]


# --- config.json ------------------------------------------------------------------------------------------------------


class Settings:
    """The entries of an untrusted config.json: a wrong type or an absurd number raises InputError with its name."""

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
        """Raise InputError unless the entry is missing or one of these values; the first is the default."""
        value = self.values.get(name)
        if value is not None and value not in allowed:
            self.refuse(name, f"which minidisp's model does not have (only {', '.join(map(str, allowed))})")

    def eos_id(self) -> int | None:
        value = self.values.get("eos_token_id")
        value = value[0] if isinstance(value, list) and value else value
        return value if type(value) is int else None


def read_config(folder: Path) -> tuple[str, GPTConfig]:
    """The family of the model described by a folder's config.json, and the corresponding GPTConfig.

    Raises InputError, naming file and entry, if our model cannot represent it.
    """
    settings = Settings(folder / "config.json")
    family = settings.values.get("model_type")
    if str(family) not in FAMILIES:
        settings.refuse("model_type", f"but minidisp reads {', '.join(FAMILIES)} only")
    for name in ("auto_map", "quantization_config"):
        settings.must_be(name, None)
    fields = _gpt2_fields(settings) if family == "gpt2" else _qwen3_fields(settings, family)
    try:
        return family, GPTConfig(**fields)
    except InputError as error:
        raise InputError(f"{settings.path}: {error}") from None


def _gpt2_fields(settings: Settings) -> dict:
    settings.must_be("scale_attn_weights", True)
    settings.must_be("scale_attn_by_inverse_layer_idx", False)
    settings.must_be("add_cross_attention", False)
    settings.must_be("activation_function", *GELU)
    n_embd = settings.integer("n_embd", 768)
    return {
        "arch": "gpt2",
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


def _qwen3_fields(settings: Settings, family: str) -> dict:
    apertus = family == "apertus"
    settings.must_be("hidden_act", "relu2" if apertus else "silu")
    if apertus and settings.values.get("hidden_act") is None:
        settings.refuse("hidden_act", "so it is xIELU, which minidisp's model does not have (only relu2)")
    # transformers 5 writes rope_parameters, earlier versions rope_theta and rope_scaling.
    rope = settings.get("rope_parameters", dict, {}) | settings.get("rope_scaling", dict, {})
    kinds = {str(rope.get(key, "default")) for key in ("rope_type", "type")}
    if kinds != {"default"} or not {*rope} <= {"rope_type", "type", "rope_theta"} or (apertus and not rope):
        name = "rope_scaling" if settings.values.get("rope_scaling") else "rope_parameters"
        settings.refuse(name, "but only plain rotary positions are in minidisp's model")
    if "rope_theta" in rope:
        settings.values = {**settings.values, "rope_theta": rope["rope_theta"]}
    block_size = settings.integer("max_position_embeddings", 65536 if apertus else 32768)
    layers = settings.get("layer_types", list, [])
    window = settings.integer("sliding_window", LARGEST) if settings.get("use_sliding_window", bool, False) else LARGEST
    if window < block_size and (not layers or {*map(str, layers)} != {"full_attention"}):
        settings.refuse("sliding_window", "but minidisp's model attends to the whole context")
    n_head, n_embd = settings.integer("num_attention_heads", 32), settings.integer("hidden_size", 4096)
    return {
        "arch": "qwen3",
        "mlp": "relu2" if apertus else "arch",
        "n_layer": settings.integer("num_hidden_layers", 32),
        "n_head": n_head,
        "n_kv_head": settings.integer("num_key_value_heads", n_head),
        "n_embd": n_embd,
        "head_dim": settings.integer("head_dim", max(1, n_embd // n_head) if apertus else 128),
        "mlp_dim": settings.integer("intermediate_size", 14336 if apertus else 22016),
        "block_size": block_size,
        "vocab_size": settings.integer("vocab_size", 131072 if apertus else 151936),
        "rope_theta": settings.real("rope_theta", 12e6 if apertus else 10000.0),
        "norm_eps": settings.real("rms_norm_eps", 1e-5 if apertus else 1e-6),
        "attention_bias": settings.get("attention_bias", bool, False),
        "tied": settings.get("tie_word_embeddings", bool, False),
    }


def to_config(config: GPTConfig) -> dict:
    """The model's config.json. Raises InputError, naming the flag, if the family does not support it."""
    family = family_of(config)
    common = {
        "architectures": [FAMILIES[family].architecture],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tied,
    }
    if family == "gpt2":
        if config.n_kv_head != config.n_head:
            raise InputError(
                f"--n-kv-head {config.n_kv_head}: GPT-2 in transformers does not support grouped-query attention"
            )
        if config.n_head * config.head_dim != config.n_embd:
            raise InputError(f"--head-dim {config.head_dim}: GPT-2 in transformers requires n_embd / n_head")
        return common | {
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
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "head_dim": config.head_dim,
        "hidden_size": config.n_embd,
        "intermediate_size": config.mlp_dim,
        "max_position_embeddings": config.block_size,
        "hidden_act": "silu" if config.gated else "relu2",
        "rms_norm_eps": config.norm_eps,
        "attention_bias": config.attention_bias,
        "rope_theta": config.rope_theta,  # for transformers 4, which also scales Apertus by default
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
    }


# --- from a model -----------------------------------------------------------------------------------------------------


def parameters_of(model: GPT) -> dict[str, Tensor]:
    """The model's parameters by name, float32 on the CPU, with zeros for GPT-2 biases that our model lacks.

    Raises InputError, naming the parameter, if one is missing, unknown to the family, or contains NaN or Inf.
    """
    config, left, found = model.config, dict(model.named_parameters()), {}
    for name, rows, columns in weights(config):
        shape = (sum(rows),) if columns is None else (sum(rows), columns)
        if name.endswith(".bias") and config.arch == "gpt2" and not config.bias and name not in left:
            found[name] = torch.zeros(shape)
            continue
        tensor = left.pop(name, None)
        if tensor is None or tuple(tensor.shape) != shape:
            seen = "is missing" if tensor is None else f"has the shape {tuple(tensor.shape)}"
            raise InputError(f"the model cannot be exported: its parameter {name} {seen}, where {shape} is expected")
        if not tensor.isfinite().all():
            raise InputError(f"the model cannot be exported: its parameter {name} contains NaN or Inf")
        found[name] = tensor.detach().float().cpu()
    if left:
        family = family_of(config)
        raise InputError(f"the model cannot be exported: {family} models have no parameter {next(iter(left))}")
    return found


def in_dtype(tensor: Tensor, dtype: str, name: str) -> Tensor:
    """The tensor in a dtype, given by its name in torch. Raises InputError, naming the tensor, on overflow."""
    converted = tensor.to(getattr(torch, dtype))
    if not converted.isfinite().all():
        raise InputError(f"{name} has numbers up to {tensor.abs().max():.3g}, too large for {dtype}: use bfloat16")
    return converted


def to_tensors(config: GPTConfig, parameters: dict[str, Tensor], names: Names) -> dict[str, Tensor]:
    """The parameters, split and named as the format requires."""
    tensors = {}
    for weight in weights(config):
        parts = names.parts(weight)
        pieces = parameters[weight.name].split([rows for _, rows in parts])
        for (name, _), tensor in zip(parts, pieces, strict=True):
            tensors[name] = (tensor.t() if names.is_transposed(weight) else tensor).contiguous()
    return tensors
