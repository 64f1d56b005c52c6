"""GGUF files, compared with gguf's own table of names, with a few lines of SentencePiece merging, and with
llama.cpp."""

import itertools
import json
import os
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("gguf")
pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")

import gguf
import tokenizers
from safetensors.torch import load_file

from minidisp import InputError, hf
from minidisp.hf import gguf as ours
from minidisp.tokenizer import ByteTokenizer, HuggingFaceTokenizer, train_sentencepiece
from tests import forked, llama_cpp
from tests.test_hf import write_run
from tests.test_tokenizer import HARD, SOURCE_CODE, byte_level_bpe

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
KINDS = {
    "gpt2": {"gelu": "tanh"},
    "gpt2-untied": {"gelu": "tanh", "tied": False, "bias": False, "norm_eps": 1e-3, "mlp_dim": 96},
    "qwen3": {"arch": "qwen3"},
    "qwen3-grouped": {
        "arch": "qwen3",
        "n_kv_head": 2,
        "head_dim": 12,
        "rope_theta": 300.0,
        "tied": False,
        "mlp_dim": 96,
    },
    "fast": {"arch": "qwen3", "mlp": "relu2", "n_kv_head": 2, "norm_eps": 1e-3},
}


@pytest.fixture(scope="module")
def sentencepiece_tokenizer():
    return train_sentencepiece([SOURCE_CODE], 320)


def read(path: Path) -> tuple[dict, dict]:
    """The settings of a file, and its tensors as numbers."""
    reader = gguf.GGUFReader(path)
    tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    return {name: field.contents() for name, field in reader.fields.items()}, tensors


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_agrees_with_the_one_for_transformers(tmp_path, kind):
    """Tensor by tensor, under the names that gguf has for those of transformers; and setting by setting."""
    model = write_run(tmp_path / "run", ByteTokenizer(), **KINDS[kind])
    settings, tensors = read(ours.export_run(tmp_path / "run", tmp_path / "out"))
    folder = hf.export(tmp_path / "run", tmp_path / "folder")
    config, theirs = json.loads((folder / "config.json").read_text()), load_file(folder / hf.WEIGHTS)
    arch = settings["general.architecture"]
    assert arch == config["model_type"]
    (number,) = (number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(number, 2)
    found = {}
    for name, tensor in theirs.items():
        transposed = arch == "gpt2" and ".h." in name and tensor.ndim == 2
        found[names.get_name(name, (".weight", ".bias"))] = (tensor.T if transposed else tensor).numpy()
    if kind == "fast":  # for models without tied weights in llama.cpp
        found["output.weight"] = found["token_embd.weight"]
    assert found.keys() == tensors.keys()
    for name, tensor in found.items():
        np.testing.assert_array_equal(tensors[name], tensor, err_msg=name)
    wanted = {
        "context_length": ("n_positions", "max_position_embeddings"),
        "embedding_length": ("n_embd", "hidden_size"),
        "block_count": ("n_layer", "num_hidden_layers"),
        "feed_forward_length": ("n_inner", "intermediate_size"),
        "attention.head_count": ("n_head", "num_attention_heads"),
        "attention.head_count_kv": (None, "num_key_value_heads"),
        "attention.key_length": (None, "head_dim"),
        "attention.value_length": (None, "head_dim"),
        "attention.layer_norm_epsilon": ("layer_norm_epsilon", None),
        "attention.layer_norm_rms_epsilon": (None, "rms_norm_eps"),
        "rope.freq_base": (None, "rope_theta"),
        "rope.dimension_count": (None, "head_dim"),
    }
    for key, of in wanted.items():
        name = of[arch != "gpt2"]
        assert settings.get(f"{arch}.{key}") == (name and pytest.approx(config[name])), key
    assert model.config.block_size == settings[f"{arch}.context_length"]


def test_relu2_is_the_xielu_that_the_file_asks_for(tmp_path):
    write_run(tmp_path / "run", ByteTokenizer(), **KINDS["fast"])
    settings, _ = read(ours.export_run(tmp_path / "run", tmp_path / "out"))
    x = torch.linspace(-9, 9, 500)
    for layer in range(2):
        raw_p, raw_n, beta, eps = (settings[f"xielu.{name}"][layer] for name in ("alpha_p", "alpha_n", "beta", "eps"))
        alpha_p, alpha_n = (torch.nn.functional.softplus(torch.tensor(raw)) for raw in (raw_p, raw_n))
        above = alpha_p * x**2 + beta * x
        below = (alpha_n + beta) * (torch.expm1(x.clamp(max=eps)) - x) + beta * x  # arXiv 2411.13010
        torch.testing.assert_close(torch.where(x > 0, above, below), x.relu() ** 2, atol=0, rtol=1e-6)


@pytest.mark.parametrize("dtype", ours.DTYPES)
def test_dtypes(tmp_path, dtype):
    model = write_run(tmp_path / "run", ByteTokenizer(), **KINDS["gpt2"], mlp_dim=50)
    path = ours.export_run(tmp_path / "run", tmp_path / "out", dtype)
    assert path.name == f"run-{ours.DTYPES[dtype]}.gguf"
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    vectors = {name for name in kinds if name.endswith(".bias") or "norm" in name} | {"position_embd.weight"}
    assert {kinds[name] for name in vectors} == {"F32"}
    assert kinds["blk.1.ffn_down.weight"] == {"q8_0": "F16"}.get(dtype, ours.DTYPES[dtype])  # rows of 50
    others = kinds.keys() - vectors - {"blk.0.ffn_down.weight", "blk.1.ffn_down.weight"}
    assert {kinds[name] for name in others} == {ours.DTYPES[dtype]}
    _, tensors = read(path)
    wanted = model.wte.weight.detach().numpy()
    bits = {"float32": 24, "float16": 11, "bfloat16": 8, "q8_0": 7}[dtype]
    largest = np.abs(wanted).reshape(-1, 32).max(1).repeat(32).reshape(wanted.shape)
    assert (np.abs(tensors["token_embd.weight"] - wanted) <= largest * 2.0**-bits).all()
    if dtype != "float32":
        assert not np.array_equal(tensors["token_embd.weight"], wanted)


def merged(text: str, settings: dict) -> list[int]:
    """Tokens of a text by SentencePiece's rule: always merge the best pair of neighbours, the leftmost if equal."""
    tokens, kinds = settings["tokenizer.ggml.tokens"], settings["tokenizer.ggml.token_type"]
    ids, scores = {token: i for i, token in enumerate(tokens)}, settings["tokenizer.ggml.scores"]
    parts = list(text.replace(" ", "\u2581"))
    while True:
        pairs = [(-scores[ids[a + b]], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ids]
        if not pairs:
            break
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    found = []
    for part in parts:
        if part in ids:
            assert kinds[ids[part]] == gguf.TokenType.NORMAL
        found += [ids[part]] if part in ids else [ids[f"<0x{byte:02X}>"] for byte in part.encode()]
    return found


@pytest.mark.parametrize("kind", ["sentencepiece", "byte", "reimported", "without a space"])
def test_tokens(tmp_path, sentencepiece_tokenizer, kind):
    tokenizer = ByteTokenizer() if kind == "byte" else sentencepiece_tokenizer
    if kind == "without a space":  # in which a space is a byte
        tokenizer = train_sentencepiece(["GATTACACATTAGACCGTAAGGT" * 90], 280)
    write_run(tmp_path / "run", tokenizer, **KINDS["gpt2"])
    if kind == "reimported":  # the same BPE, as the package tokenizers has it
        tokenizer = hf.load_tokenizer(hf.export(tmp_path / "run", tmp_path / "folder"))
        (tmp_path / "again").mkdir()
        write_run(tmp_path / "again" / "run", tokenizer, **KINDS["gpt2"])
    settings, _ = read(ours.export_run(next(tmp_path.glob("again/run"), tmp_path / "run"), tmp_path / "out"))
    for text in [*HARD, *llama_cpp.TEXTS]:
        if "\u2581" not in text and len(text) < 1000:
            assert merged(text, settings) == tokenizer.encode(text)
    assert settings["tokenizer.ggml.model"] == "llama"
    assert settings["tokenizer.ggml.add_space_prefix"] is False
    assert settings["tokenizer.ggml.bos_token_id"] == settings["tokenizer.ggml.eos_token_id"] == tokenizer.eos_id
    types = settings["tokenizer.ggml.token_type"]
    assert len(types) == tokenizer.vocab_size
    assert types.count(gguf.TokenType.BYTE) == (
        255 if kind in ("byte", "without a space") else 256
    )  # without the space
    assert types[tokenizer.eos_id] == gguf.TokenType.CONTROL


def bpe_with(pre_tokenizer, rows: int = 0, files: dict | None = None, **changes) -> HuggingFaceTokenizer:
    """A byte-level tokenizer that splits words differently."""
    base = byte_level_bpe(qwen=True).tokenizer_json
    pre_tokenizer = json.loads(pre_tokenizer.__getstate__())
    packed = {**base, "pre_tokenizer": pre_tokenizer, "model": {**base["model"], **changes}}
    return HuggingFaceTokenizer(HuggingFaceTokenizer.pack(packed, "<|endoftext|>", rows, files))


def words(kind: str):
    """The pre-tokenizers with a name in llama.cpp, as in the original files of the models."""
    pre, in_bytes = (
        tokenizers.pre_tokenizers,
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    )
    digits = {"qwen2": r"\p{N}", "llama-bpe": r"\p{N}{1,3}"}.get(kind)
    if digits:
        pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits
        pattern += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        return pre.Sequence([pre.Split(tokenizers.Regex(pattern), "isolated"), in_bytes])
    own = pre.ByteLevel(add_prefix_space=False, use_regex=True)
    return pre.Sequence([pre.Digits(individual_digits=True), own]) if kind == "smollm" else own


WORDS = ("gpt-2", "qwen2", "llama-bpe", "smollm")


@pytest.mark.parametrize("kind", WORDS)
def test_an_imported_tokenizer(tmp_path, kind):
    files = {"tokenizer_config.json": json.dumps({"pad_token": "<|im_start|>", "chat_template": "{{ messages }}"})}
    tokenizer = bpe_with(words(kind), 300, files, ignore_merges=kind == "llama-bpe")
    write_run(tmp_path / "run", tokenizer, **KINDS["qwen3"])
    settings, _ = read(ours.export_run(tmp_path / "run", tmp_path / "out"))
    assert (settings["tokenizer.ggml.model"], settings["tokenizer.ggml.pre"]) == ("gpt2", kind)
    tokens, kinds = settings["tokenizer.ggml.tokens"], settings["tokenizer.ggml.token_type"]
    model = tokenizer.tokenizer_json["model"]
    assert all(tokens[i] == token for token, i in model["vocab"].items())
    assert [merge.split(" ") for merge in settings["tokenizer.ggml.merges"]] == [[*merge] for merge in model["merges"]]
    assert (len(tokens), kinds[-1]) == (300, gguf.TokenType.UNUSED)
    assert {tokens[i]: kind for i, kind in enumerate(kinds) if kind not in (1, 5)} == {
        "<|endoftext|>": gguf.TokenType.CONTROL,
        "<|im_start|>": gguf.TokenType.CONTROL,
        "<think>": gguf.TokenType.USER_DEFINED,
    }
    assert tokens[settings["tokenizer.ggml.padding_token_id"]] == "<|im_start|>"
    assert settings["tokenizer.chat_template"] == "{{ messages }}"
    assert settings["tokenizer.ggml.add_bos_token"] is False  # as in its own settings


def test_models_unsupported_by_llama_cpp_are_rejected_with_advice(tmp_path, capsys, sentencepiece_tokenizer):
    qwen = byte_level_bpe(qwen=True)
    write_run(tmp_path / "plain", sentencepiece_tokenizer)
    folder = hf.export(tmp_path / "plain", tmp_path / "folder")
    packed = hf.load_tokenizer(folder).tokenizer_json

    def changed(**model) -> HuggingFaceTokenizer:
        both = {**packed, "model": {**packed["model"], **model}}
        return HuggingFaceTokenizer(HuggingFaceTokenizer.pack(both, "</s>", 0))

    merges, space = packed["model"]["merges"], {"vocab": {**packed["model"]["vocab"], "a\u2581": 320}}
    more = {
        token: 320 + i for i, token in enumerate(("/", "s", ">", "/s", "/s>")) if token not in packed["model"]["vocab"]
    }
    parts = {"vocab": {**packed["model"]["vocab"], **more}, "merges": [*merges, ["/", "s"], ["/s", ">"]]}
    for number, (tokenizer, fields, expected) in enumerate(
        [
            (ByteTokenizer(), {"arch": "qwen3", "attention_bias": True}, "--attention-bias"),
            (ByteTokenizer(), {"mlp": "relu2"}, "--mlp relu2"),
            (qwen, {"arch": "qwen3"}, "does not support the pre-tokenizer"),
            (bpe_with(words("llama-bpe")), {"arch": "qwen3"}, "does not support the pre-tokenizer"),
            (changed(merges=merges[1:]), {"arch": "qwen3"}, "cannot reproduce the merges"),
            (changed(**space), {"arch": "qwen3"}, "U+2581"),
            (changed(**parts), {"arch": "qwen3"}, "'</s>' from text"),
        ]
    ):
        run = tmp_path / f"run{number}"
        write_run(run, tokenizer, **fields)
        assert hf.main(["export", str(run), str(tmp_path / "out"), "--gguf"]) == 2
        error = capsys.readouterr().err
        assert expected in error
        assert error.count("\n") == 1
        assert not (tmp_path / "out").exists()


def test_the_command(tmp_path, capsys, monkeypatch):
    write_run(tmp_path / "run", ByteTokenizer(), **KINDS["fast"])
    flags = ["export", str(tmp_path / "run"), str(tmp_path / "out"), "--gguf", "--dtype", "Q8_0"]
    assert hf.main(flags) == 0
    assert str(tmp_path / "out" / "run-Q8_0.gguf") in capsys.readouterr().out
    assert hf.main(flags) == 2
    assert "already exists" in capsys.readouterr().err
    assert hf.main([*flags[:4], "--dtype", "float16"]) == 0  # beside it
    assert hf.main(["export", str(tmp_path / "run"), str(tmp_path / "here" / "a.gguf"), "--gguf"]) == 0
    assert sorted(path.name for path in tmp_path.rglob("*.*") if path.suffix != ".pt") == [
        "a.gguf",
        "run-F16.gguf",
        "run-Q8_0.gguf",
        "tokenizer.model",
    ]
    capsys.readouterr()
    assert hf.main([*flags[:3], "--dtype", "q8_0"]) == 2
    assert "--gguf" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert hf.main(flags) == 2
    assert "pip install gguf" in capsys.readouterr().err


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    def full(_):
        raise OSError("8224 requested and 3216 written")  # as numpy puts it

    write_run(tmp_path / "run", ByteTokenizer(), **KINDS["fast"])
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    assert hf.main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--gguf"]) == 2
    assert "run-F32.gguf cannot be written to its end: free some space" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_exact_gelu_goes_out_as_the_tanh_form_and_the_difference_is_reported(tmp_path, capsys):
    write_run(tmp_path / "erf", ByteTokenizer(), gelu="erf")
    write_run(tmp_path / "tanh", ByteTokenizer(), gelu="tanh")
    assert hf.main(["export", str(tmp_path / "erf"), str(tmp_path / "a.gguf"), "--gguf"]) == 0
    out = capsys.readouterr().out
    off, same = re.search(r"off by up to (\S+) of their standard deviation.*the same for ([\d.]+)%", out).groups()
    assert 0 < float(off) < 0.1
    assert float(same) > 90
    assert hf.main(["export", str(tmp_path / "tanh"), str(tmp_path / "b.gguf"), "--gguf"]) == 0
    assert "GELU" not in capsys.readouterr().out


def test_the_short_command(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "run", ByteTokenizer(), gelu="tanh")
    done = forked.run("-m", "minidisp.gguf", "run", "x.gguf", cwd=tmp_path, env=ENVIRONMENT)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "x.gguf").is_file()
    monkeypatch.setattr(sys, "argv", ["gguf"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("minidisp.gguf", run_name="__main__")
    assert end.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.skipif(not llama_cpp.installed(), reason="xllamacpp is not installed: see llama_cpp.py")
@pytest.mark.parametrize("kind", [*KINDS, "byte", *WORDS])
def test_llama_cpp_tokenizes_and_continues_in_the_same_way(tmp_path, kind):
    run = tmp_path / "run"
    if kind in WORDS:
        tokenizer = bpe_with(words(kind), 300, ignore_merges=kind == "llama-bpe")
    else:
        tokenizer = ByteTokenizer() if kind == "byte" else train_sentencepiece([SOURCE_CODE, *llama_cpp.TEXTS], 700)
    write_run(run, tokenizer, **{"block_size": 96, **KINDS.get(kind, KINDS["qwen3"])})
    for dtype in ours.DTYPES if kind in KINDS else ["float32"]:
        assert llama_cpp.compare(run, dtype) == []


def test_refused_before_anything_is_written(tmp_path):
    model = write_run(tmp_path / "run", ByteTokenizer(), **KINDS["gpt2"])
    state = torch.load(tmp_path / "run" / "ckpt_last.pt")
    state["model"]["h.1.attn.c_attn.weight"][0, 0] = 1e6
    torch.save(state, tmp_path / "run" / "ckpt_last.pt")
    with pytest.raises(InputError, match=r"blk.1.attn_qkv.weight has numbers up to 1e\+06, too large for float16"):
        ours.export_run(tmp_path / "run", tmp_path / "out", "float16")
    assert not (tmp_path / "out").exists()
    assert model
