"""An independent implementation of the families, without model.py, against which every export is checked."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from minidisp import InputError
from minidisp.hf.families import FAMILIES, GELU, parameters_of, to_config, to_tensors
from minidisp.loss import is_other_distribution
from minidisp.model import GPT


def stored_form(model: GPT, eos_id: int) -> tuple[dict, dict[str, Tensor]]:
    """(config.json, tensors in float32) of a model, which give the same logits and the same loss.

    They are compared on random tokens over the context, at most 1,024 (fewer if the vocabulary is so large that the
    logits would exhaust memory), including two end-of-text tokens. Raises InputError for anything that no family
    supports; changes in the code of a block are detected by the logits.
    """
    config, parameters = to_config(model.config), parameters_of(model)
    tensors = to_tensors(model.config, parameters, FAMILIES[config["model_type"]].names)
    T = min(model.config.block_size, 1024, max(64, (1 << 26) // model.config.vocab_size))
    idx = torch.randint(model.config.vocab_size, (T,), generator=torch.Generator().manual_seed(0))
    idx[[T // 3, 2 * T // 3]] = eos_id
    with torch.no_grad():
        logits = model(idx.unsqueeze(0)).logits[0].double()
    wanted = reference_logits(config, tensors, idx, torch.float64)
    rounding = (reference_logits(config, tensors, idx, torch.float32) - wanted).abs().max()
    error, size = (logits - wanted).abs().max(), wanted.std()
    if not error <= 10 * rounding + 1e-5 * size:
        raise InputError(
            f"the model cannot be exported: its logits are not those of {config['architectures'][0]} with its weights "
            f"(off by {error / size:.1g} standard deviations): its code computes something that this format cannot "
            "represent"
        )
    with torch.no_grad():
        nats = model(idx.unsqueeze(0), idx.roll(-1).unsqueeze(0), loss_reduction="none").loss[0].double()
    nats_wanted = F.cross_entropy(wanted, idx.roll(-1), reduction="none")
    if is_other_distribution() or not (nats - nats_wanted).abs().max() <= 20 * rounding + 2e-5 * size:
        raise InputError(
            "the model cannot be exported: its loss is not the cross-entropy of its logits, so it was trained for "
            "different probabilities: put changes of the logits into GPT.logits, not into the loss"
        )
    return config, tensors


@torch.no_grad()
def reference_logits(config: dict, tensors: dict[str, Tensor], idx: Tensor, dtype: torch.dtype) -> Tensor:
    """The logits (T, V) of the model in a config.json and tensors, for the tokens idx (T,), computed in a dtype.

    Written from the families' definitions, without model.py. Every export is compared with it before it is written.
    """
    gpt2 = config["model_type"] == "gpt2"
    embedding = "transformer.wte.weight" if gpt2 else "model.embed_tokens.weight"
    x = tensors[embedding][idx].to(dtype)
    x = (_gpt2_blocks if gpt2 else _qwen3_blocks)(config, tensors, x)
    return x @ tensors[embedding if config["tie_word_embeddings"] else "lm_head.weight"].to(dtype).T


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention, (T, H D), of q (T, H, D) to k and v (T, KV, D), each shared by H / KV adjacent query heads."""
    T, heads, D = q.shape
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("thd,shd->hts", q, k) / math.sqrt(D)
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    return torch.einsum("hts,shd->thd", scores.masked_fill(future, -math.inf).softmax(-1), v).reshape(T, heads * D)


def _gpt2_blocks(config: dict, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    def linear(x: Tensor, name: str) -> Tensor:
        return x @ tensors[f"{name}.weight"].to(x.dtype) + tensors[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + config["layer_norm_epsilon"]).sqrt()
        return x * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    def gelu(x: Tensor) -> Tensor:
        if GELU[config["activation_function"]] == "tanh":
            return 0.5 * x * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())
        return 0.5 * x * (1 + (x / math.sqrt(2)).erf())

    T, heads = len(x), config["n_head"]
    x = x + tensors["transformer.wpe.weight"][:T]
    for layer in range(config["n_layer"]):
        block = f"transformer.h.{layer}"
        q, k, v = linear(norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn").view(T, 3, heads, -1).unbind(1)
        x = x + linear(_attention(q, k, v), f"{block}.attn.c_proj")
        x = x + linear(gelu(linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")), f"{block}.mlp.c_proj")
    return norm(x, "transformer.ln_f")


def _qwen3_blocks(config: dict, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    def linear(x: Tensor, name: str) -> Tensor:
        return x @ tensors[f"{name}.weight"].to(x.dtype).T + tensors.get(f"{name}.bias", 0)

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt() * tensors[f"{name}.weight"]

    def rotate(x: Tensor) -> Tensor:  # (T, H, D)
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    T, D, apertus = len(x), config["head_dim"], config["model_type"] == "apertus"
    frequencies = config["rope_theta"] ** (-torch.arange(0, D, 2, dtype=x.dtype) / D)
    angles = torch.outer(torch.arange(T, dtype=x.dtype), frequencies)
    cos, sin = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)  # (T, 1, D / 2)
    before = ("input_layernorm", "post_attention_layernorm")
    if apertus:
        before = ("attention_layernorm", "feedforward_layernorm")
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        y = norm(x, f"{block}.{before[0]}")
        q, k, v = (linear(y, f"{block}.self_attn.{part}_proj").view(T, -1, D) for part in "qkv")
        q, k = (rotate(norm(z, f"{block}.self_attn.{part}_norm")) for z, part in ((q, "q"), (k, "k")))
        x = x + linear(_attention(q, k, v), f"{block}.self_attn.o_proj")
        y = norm(x, f"{block}.{before[1]}")
        up = linear(y, f"{block}.mlp.up_proj")
        hidden = up.relu().square() if apertus else F.silu(linear(y, f"{block}.mlp.gate_proj")) * up
        x = x + linear(hidden, f"{block}.mlp.down_proj")
    return norm(x, "model.norm")
