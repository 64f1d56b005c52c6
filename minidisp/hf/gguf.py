"""Export of a run as one GGUF file, for llama.cpp and software based on it (Ollama, LM Studio).

    python -m minidisp.hf export runs/NAME folder --gguf --dtype q8_0

llama.cpp implements a fixed set of architectures. Models that map onto one of the three listed here can be exported;
others are rejected with the flag to change. tests/llama_cpp.py compares tokens and continuations with those of
llama.cpp.
"""

import dataclasses
import json
import math
import os
import re
import warnings
from pathlib import Path

import torch
from torch import Tensor

from minidisp import InputError, printable
from minidisp.hf.families import Names, family_of, in_dtype, parameters_of, to_tensors
from minidisp.hf.reference import stored_form
from minidisp.model import GPT, GPTConfig
from minidisp.runtime import checkpoint
from minidisp.template import Template, load_template
from minidisp.tokenizer import SPACE, HuggingFaceTokenizer, Tokenizer, to_tokenizer

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}  # of matrices; vectors stay float32
NAMES = Names(
    {
        "wte": "token_embd",
        "wpe": "position_embd",
        "ln_1": "blk.{}.attn_norm",
        "attn.c_attn": ["blk.{}.attn_q", "blk.{}.attn_k", "blk.{}.attn_v"],
        "attn.q_norm": "blk.{}.attn_q_norm",
        "attn.k_norm": "blk.{}.attn_k_norm",
        "attn.c_proj": "blk.{}.attn_output",
        "ln_2": "blk.{}.ffn_norm",
        "mlp.c_fc": ["blk.{}.ffn_gate", "blk.{}.ffn_up"],
        "mlp.c_proj": "blk.{}.ffn_down",
        "ln_f": "output_norm",
        "lm_head": "output",
    }
)
UNGATED = {"mlp.c_fc": "blk.{}.ffn_up"}
ARCHITECTURES = {
    "gpt2": Names(NAMES.modules | UNGATED | {"attn.c_attn": "blk.{}.attn_qkv"}),
    "qwen3": NAMES,
    "apertus": Names(NAMES.modules | UNGATED),
}
# llama.cpp's names of pre-tokenizers by their regular expression, and whether a word that is a token skips the merges
# (ignore_merges).
_WORD, _REST = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
WORDS = {
    rf"{_WORD}|\p{{N}}|{_REST}": ("qwen2", False),
    rf"{_WORD}|\p{{N}}{{1,3}}|{_REST}": ("llama-bpe", True),
}


def export_run(run: str | Path, folder: str | Path, dtype: str = "float32") -> Path:
    """Write a run's model and tokenizer to folder/<run>-<dtype>.gguf; returns that path.

    run: a run folder or a checkpoint file. folder: created if missing; or the path of the file, if it ends in .gguf.
    dtype: of the matrices, a key of DTYPES; the position embeddings and all vectors are float32, as llama.cpp requires.
    With q8_0, a matrix whose row length is not a multiple of 32 is float16. Raises InputError, leaving no file
    behind, if the file already exists, or llama.cpp does not support the model or tokenizer. If the model uses the
    exact GELU, which llama.cpp approximates by the tanh form, warns with the resulting difference in logits.
    """
    try:
        import gguf
    except ImportError:
        raise InputError("a GGUF file needs the package gguf: pip install gguf") from None
    model, tokenizer, _ = checkpoint.load_run(run)
    name = printable(checkpoint.find(run).resolve().parent.name)
    path = Path(folder)
    path = path if path.suffix == ".gguf" else path / f"{name}-{DTYPES[dtype]}.gguf"
    if path.exists():
        raise InputError(f"{path} already exists: choose another folder")
    family = architecture_of(model.config)
    stored_form(model, tokenizer.eos_id)  # raises InputError if the model's code differs from the family's
    if family == "gpt2" and model.config.gelu != "tanh":
        warnings.warn(_about_gelu(model), stacklevel=2)
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)  # the writer would follow a link
    writer = gguf.GGUFWriter(temporary, family)
    _write_settings(writer, model.config, family, dtype, name)
    _write_tokenizer(writer, tokenizer, load_template(checkpoint.find(run).parent, tokenizer))
    tensors = to_tensors(model.config, parameters_of(model), ARCHITECTURES[family])
    if family == "apertus":  # llama.cpp has no tied embeddings for it
        tensors.setdefault("output.weight", tensors["token_embd.weight"])
    for name, tensor in tensors.items():
        kind = gguf.GGMLQuantizationType[_kind(name, tensor, dtype)]
        if kind.name == "F16":
            in_dtype(tensor, "float16", name)  # raises InputError on overflow
        writer.add_tensor(name, gguf.quants.quantize(tensor.numpy(), kind), raw_dtype=kind)
    made = not path.parent.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if made:
            path.parent.rmdir()
        # numpy's error on a full disk: "8224 requested and 3216 written"
        if isinstance(error, OSError) and error.errno is None:
            advice = "free some space, or choose another folder"
            raise InputError(f"{path} cannot be written to its end: {advice}") from None
        raise
    return path


def architecture_of(config: GPTConfig) -> str:
    """llama.cpp's name for the model's architecture. Raises InputError, with the flag to change, if there is none."""
    family = family_of(config)
    if config.attention_bias:
        raise InputError("--attention-bias: llama.cpp's architecture has no such biases: train without it")
    return family


@torch.no_grad()
def _about_gelu(model: GPT) -> str:
    """The effect of replacing the exact GELU by the tanh form, measured on random tokens, as a message."""
    other = GPT(dataclasses.replace(model.config, gelu="tanh")).eval()
    other.load_state_dict(model.state_dict())
    T = min(model.config.block_size, 256)
    idx = torch.randint(model.config.vocab_size, (1, T), generator=torch.Generator().manual_seed(0))
    exact, found = model(idx).logits, other(idx).logits
    off = (found - exact).abs().max() / exact.std()
    same = (found.argmax(-1) == exact.argmax(-1)).float().mean()
    return (
        "llama.cpp's GPT-2 only supports the tanh form of GELU, but this model uses the exact one: logits are off by "
        f"up to {off:.1g} of their standard deviation, and the most likely token is the same for {same:.1%} of {T} "
        "random tokens"
    )


def _kind(name: str, tensor: Tensor, dtype: str) -> str:
    if tensor.ndim == 1 or name == "position_embd.weight":
        return "F32"
    return "F16" if dtype == "q8_0" and tensor.shape[1] % 32 else DTYPES[dtype]


def _write_settings(writer, config: GPTConfig, family: str, dtype: str, name: str) -> None:
    import gguf

    kind = DTYPES[dtype]
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[f"ALL_{kind}" if kind == "F32" else f"MOSTLY_{kind}"])
    if kind == "Q8_0":
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.mlp_dim)
    writer.add_head_count(config.n_head)
    if family == "gpt2":
        writer.add_layer_norm_eps(config.norm_eps)
        return
    writer.add_head_count_kv(config.n_kv_head)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    if family == "apertus":
        # xIELU is alpha_p x^2 + beta x above 0 and alpha_n (e^x - 1 - x) + beta x below: with 1, 0 and 0 it is ReLU^2.
        # The file stores alphas before softplus; for alpha_n, beta is added after it.
        writer.add_xielu_alpha_p([math.log(math.e - 1)] * config.n_layer)
        writer.add_xielu_alpha_n([-1e4] * config.n_layer)
        writer.add_xielu_beta([0.0] * config.n_layer)
        writer.add_xielu_eps([-1e-6] * config.n_layer)


# --- tokenizer --------------------------------------------------------------------------------------------------------


def _write_tokenizer(writer, tokenizer: Tokenizer, template: Template | None) -> None:
    """Write tokens, their types and merges. No space is prepended, and the name of a special token is plain text,
    except in the chat template of a run trained on examples."""
    import gguf

    kinds = gguf.TokenType
    tokenizer_json, _ = to_tokenizer(tokenizer)
    model, added = tokenizer_json["model"], tokenizer_json["added_tokens"]
    rows = range(tokenizer.vocab_size)
    tokens = {i: token for token, i in model["vocab"].items()} | {token["id"]: token["content"] for token in added}
    types = {i: kinds.NORMAL if i in tokens else kinds.UNUSED for i in rows}
    for token in added:
        if token.get("single_word"):
            raise InputError(f"llama.cpp cannot restrict the token {token['content']!r} to whole words (single_word)")
        special = token["special"] or token["id"] == tokenizer.eos_id
        types[token["id"]] = kinds.CONTROL if special else kinds.USER_DEFINED
    if model.get("byte_fallback"):
        scores = _as_sentencepiece(tokens, types, model["merges"], kinds)
        writer.add_tokenizer_model("llama")
        writer.add_token_scores([scores.get(tokens.get(i), -float(len(rows))) for i in rows])
        writer.add_add_space_prefix(False)
        unknown = next((token["id"] for token in added if token["content"] == "<unk>"), tokenizer.eos_id)
        writer.add_unk_token_id(unknown)  # without one, it would be token 0
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_words(tokenizer_json["pre_tokenizer"], bool(model.get("ignore_merges"))))
        writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    writer.add_token_list([tokens.get(i, f"[UNUSED{i}]").encode() for i in rows])
    writer.add_token_types([types[i] for i in rows])
    _write_special_tokens(writer, tokenizer, {token["content"]: token["id"] for token in added}, template)


def _write_special_tokens(writer, tokenizer: Tokenizer, ids: dict[str, int], template: Template | None) -> None:
    """Write BOS, EOS and padding tokens and the chat template. As in training, a text is preceded by the EOS of the one
    before, and an example starts with its template; an imported tokenizer keeps its own settings. ids: those of the
    added tokens."""
    files = tokenizer.files if isinstance(tokenizer, HuggingFaceTokenizer) else {}
    settings = json.loads(files.get("tokenizer_config.json", "{}"))

    def token_id(name: str) -> int | None:
        token = settings.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        return ids.get(token) if isinstance(token, str) else None

    bos, pad = token_id("bos_token"), token_id("pad_token")
    writer.add_bos_token_id(tokenizer.eos_id if bos is None else bos)
    writer.add_eos_token_id(tokenizer.eos_id)
    if pad is not None:
        writer.add_pad_token_id(pad)
    writer.add_add_bos_token(settings.get("add_bos_token") is True if files else template is None)
    writer.add_add_eos_token(False)
    source = files.get("chat_template.jinja") or settings.get("chat_template")
    source = template.chat_template if template else source
    if isinstance(source, str):
        writer.add_chat_template(source)
    if template and template.stop_id != tokenizer.eos_id:
        writer.add_eot_token_id(template.stop_id)


def _as_sentencepiece(tokens: dict, types: dict, merges: list, kinds) -> dict[str, float]:
    """Convert tokens and types to those of a SentencePiece model, in place; returns the scores of mergeable tokens.

    Like SentencePiece, llama.cpp merges any two neighbours that form a token, the best-scored token first. Raises
    InputError if that is not equivalent to the list of merges, or would produce a special token from text.
    """
    for i, token in tokens.items():
        if types[i] == kinds.NORMAL and re.fullmatch("<0x[0-9A-F]{2}>", token):
            types[i] = kinds.BYTE
        elif types[i] == kinds.NORMAL and SPACE in token:
            raise InputError(f"llama.cpp would treat U+2581 in the token {token!r} as a space")
    plain = {token for i, token in tokens.items() if types[i] == kinds.NORMAL}
    pairs = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in merges]
    ranks = {token: rank for rank, token in enumerate(dict.fromkeys(a + b for a, b in pairs))}

    def cuts(token: str, known: set[str]) -> list[tuple[str, str]]:
        return [(token[:i], token[i:]) for i in range(1, len(token)) if {token[:i], token[i:]} <= known]

    by_character = {token: cuts(token, plain | {*token}) for token in tokens.values()}  # characters need not be tokens
    unmerged = any(by_character[token] for token in plain - {*ranks})
    if unmerged or pairs != [pair for token in ranks for pair in cuts(token, plain)]:
        raise InputError(
            "llama.cpp cannot reproduce the merges of this tokenizer: it would merge pairs that form a token but are "
            "not in the list"
        )
    for i, token in tokens.items():
        if types[i] in (kinds.CONTROL, kinds.BYTE) and by_character[token]:
            raise InputError(f"llama.cpp would produce the special token {token!r} from text, as its parts are tokens")
    for i, token in tokens.items():
        if types[i] == kinds.NORMAL:
            tokens[i] = token.replace(" ", SPACE)
        elif types[i] == kinds.BYTE and token == "<0x20>" and " " not in plain:  # the tokenizer has no other space
            tokens[i], types[i] = SPACE, kinds.NORMAL
    return {token.replace(" ", SPACE): -float(rank) for token, rank in ranks.items()}


def _words(pre_tokenizer: dict | None, ignore_merges: bool) -> str:
    """llama.cpp's name for the pre-tokenizer of a byte-level tokenizer."""
    pre_tokenizer = pre_tokenizer or {}
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer.get("type") == "Sequence" else [pre_tokenizer]
    first, last, found = steps[0], steps[-1], None
    if last.get("type") == "ByteLevel" and len(steps) <= 2:
        if not last.get("use_regex", True) and first.get("type") == "Split":
            whole = (first.get("behavior"), first.get("invert", False)) == ("Isolated", False)
            found = WORDS.get(first["pattern"].get("Regex")) if whole else None
        elif last.get("use_regex", True) and len(steps) == 1:  # GPT-2's own words
            found = ("gpt-2", False)
        elif last.get("use_regex", True) and first == {"type": "Digits", "individual_digits": True}:
            found = ("smollm", False)
    if found is None or found[1] != ignore_merges:
        raise InputError("llama.cpp does not support the pre-tokenizer of this tokenizer")
    return found[0]
