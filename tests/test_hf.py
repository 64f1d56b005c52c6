"""Hugging Face models, both ways: transformers is the oracle for logits, hidden states, losses and token ids."""

import dataclasses
import errno
import itertools
import json
import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")

import tokenizers
from safetensors.torch import load_file, save_file

import eval as evaluation  # not the builtin
import minidisp
import train
from data import prepare
from minidisp import InputError, hf, loss
from minidisp.config import from_dict, parse, to_dict
from minidisp.data import Dataset
from minidisp.dispersion import dispersion_loss
from minidisp.hf import families
from minidisp.hf.other import load_other
from minidisp.hf.reference import stored_form
from minidisp.model import GPT, MLP, Attention, Block, GPTConfig
from minidisp.ops.attention import torch_attention
from minidisp.runtime import checkpoint
from minidisp.tokenizer import ByteTokenizer, train_sentencepiece
from tests.conftest import SMALL, small_config, write_text
from tests.test_tokenizer import HARD, SOURCE_CODE, byte_level_bpe

EOS = "<|endoftext|>"
GPT2 = {
    "vocab_size": 90,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 48,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
NO_DROPOUT = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
QWEN3 = {
    "vocab_size": 90,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 48,
}
APERTUS = QWEN3 | {
    "hidden_act": "relu2",
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": None,
}


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def randomise(model):
    """Larger than at initialisation, including biases and norms, so that everything has an effect."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_((0.15 if p.ndim > 1 else 0.4) * torch.randn(p.shape, generator=generator) + (p.ndim == 1))
    return model.eval()


def build(transformers, family: str, **options):
    """A transformers model with random weights."""
    if family == "gpt2":
        return randomise(transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**GPT2, **options})))
    if family == "apertus":
        return randomise(transformers.ApertusForCausalLM(transformers.ApertusConfig(**{**APERTUS, **options})))
    return randomise(transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**{**QWEN3, **options})))


@torch.no_grad()
def assert_same_outputs(theirs, ours: GPT):
    """Logits and every hidden state, in float32, over the whole context."""
    idx = torch.randint(ours.config.vocab_size, (2, ours.config.block_size), generator=torch.Generator().manual_seed(1))
    wanted, got = theirs(idx, output_hidden_states=True), ours(idx, return_hidden_states=True)
    torch.testing.assert_close(got.logits, wanted.logits, atol=1e-4, rtol=0)
    assert wanted.logits.std() > 0.1
    assert len(got.hidden_states) == len(wanted.hidden_states) == ours.config.n_layer + 1
    for a, b in zip(got.hidden_states, wanted.hidden_states, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


OPTIONS = {
    "gpt2": [
        {},
        {"activation_function": "gelu"},
        {"activation_function": "gelu_pytorch_tanh"},
        {"tie_word_embeddings": False},
        {"n_inner": 40, "layer_norm_epsilon": 1e-2},
        {"n_head": 1, "n_layer": 1, "n_positions": 7, "vocab_size": 11},
        {"reorder_and_upcast_attn": True, "resid_pdrop": 0.3},
    ],
    "qwen3": [
        {},
        {"num_key_value_heads": 2},
        {"num_key_value_heads": 1, "head_dim": 14},
        {"attention_bias": True, "head_dim": 2},
        {"tie_word_embeddings": True},
        {"rms_norm_eps": 1e-2, "rope_parameters": {"rope_type": "default", "rope_theta": 300.0}},
        {"use_sliding_window": True, "sliding_window": 48, "max_window_layers": 0},
    ],
    "apertus": [
        {},
        {"num_key_value_heads": 2, "head_dim": 10, "tie_word_embeddings": True},
        {"attention_bias": True, "rms_norm_eps": 1e-2},
    ],
}
ALL_OPTIONS = [(family, options) for family, several in OPTIONS.items() for options in several]


@pytest.mark.parametrize(("family", "options"), ALL_OPTIONS, ids=str)
def test_import_gives_the_same_logits_and_hidden_states(transformers, tmp_path, family, options):
    theirs = build(transformers, family, **options)
    theirs.save_pretrained(tmp_path)
    ours = minidisp.hf.load_model(tmp_path)
    assert not ours.training
    assert_same_outputs(theirs, ours)
    shorter = hf.load_model(str(tmp_path), block_size=5)
    idx = torch.arange(5).unsqueeze(0)
    torch.testing.assert_close(shorter(idx).logits, ours(idx).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shards_and_dtypes(transformers, tmp_path, family, dtype):
    theirs = build(transformers, family).to(dtype)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    ours = hf.load_model(tmp_path)
    assert all(p.dtype == torch.float32 for p in ours.parameters())
    # Not theirs.float(): its rotary frequencies would stay rounded to bfloat16.
    assert_same_outputs(transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), ours)


def test_loading_leaves_the_random_numbers_alone(models):
    state = torch.get_rng_state()
    hf.load_model(models / "qwen3")
    assert torch.equal(torch.get_rng_state(), state)


def test_old_gpt2_files_have_no_prefix_and_keep_the_causal_mask(transformers, tmp_path):
    theirs = build(transformers, "gpt2")
    theirs.save_pretrained(tmp_path)
    old = {k.removeprefix("transformer."): v for k, v in load_file(tmp_path / hf.WEIGHTS).items()}
    for layer in range(3):
        old[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 48, 48).tril()
        old[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    old["lm_head.weight"] = old["wte.weight"].clone()  # tied, but stored nevertheless
    save_file(old, tmp_path / hf.WEIGHTS)
    assert_same_outputs(theirs, hf.load_model(tmp_path))
    old["lm_head.weight"] += 1
    save_file(old, tmp_path / hf.WEIGHTS)
    with pytest.raises(InputError, match="tie_word_embeddings"):
        hf.load_model(tmp_path)


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_a_tied_matrix_may_be_stored_under_either_name(transformers, tmp_path, family):
    theirs = build(transformers, family, tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / hf.WEIGHTS)
    name = next(name for name in tensors if name.endswith(("wte.weight", "embed_tokens.weight")))
    tensors["lm_head.weight"] = tensors.pop(name)
    save_file(tensors, tmp_path / hf.WEIGHTS, metadata={"format": "pt"})
    assert_same_outputs(transformers.AutoModelForCausalLM.from_pretrained(tmp_path), hf.load_model(tmp_path))
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "tie_word_embeddings": False}))
    assert name in refusal(hf.load_model, tmp_path)


# --- export -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sentencepiece_tokenizer():
    return train_sentencepiece([SOURCE_CODE], 320)


def write_run(folder: Path, tokenizer, **fields) -> GPT:
    """A run folder with a random model in it."""
    config = from_dict(
        {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 40, **fields, "vocab_size": tokenizer.vocab_size}
    )
    model = randomise(GPT(config))
    folder.mkdir()
    torch.save({"model": model.state_dict(), "config": to_dict(config), "step": 0}, folder / checkpoint.LAST)
    tokenizer.save(folder / "tokenizer.model")
    return model


EXPORTS = [
    {},
    {"bias": False},
    {"gelu": "tanh", "tied": False, "dropout": 0.2},
    {"mlp_dim": 50, "norm_eps": 1e-2},
    {"arch": "qwen3"},
    {"arch": "qwen3", "n_kv_head": 2, "head_dim": 10, "rope_theta": 300.0, "norm_eps": 1e-2, "mlp_dim": 50},
    {"arch": "qwen3", "n_kv_head": 1, "attention_bias": True, "tied": False},
    {"arch": "qwen3", "mlp": "relu2", "zero_init": True},
    {"arch": "qwen3", "mlp": "relu2", "n_kv_head": 2, "head_dim": 10, "rope_theta": 300.0, "tied": False},
]


@pytest.mark.parametrize("fields", EXPORTS, ids=str)
def test_export_gives_the_same_logits_in_transformers(transformers, tmp_path, capsys, fields):
    model = write_run(tmp_path / "run", ByteTokenizer(), **fields)
    assert hf.main(["export", str(tmp_path / "run"), str(tmp_path / "out" / "folder")]) == 0
    folder = tmp_path / "out" / "folder"
    assert str(folder) in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["folder"]
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert (theirs.config.eos_token_id, theirs.dtype) == (256, torch.float32)
    assert_same_outputs(theirs, model)
    again = hf.load_model(folder)
    idx = torch.arange(40).unsqueeze(0)
    assert torch.equal(again(idx).logits, model(idx).logits)
    assert (again.config.tied, again.num_params() - model.num_params()) in [
        (model.config.tied, 0),
        (True, biases(model)),
    ]


def biases(model: GPT) -> int:
    """The number of parameters that GPT-2 has in addition to ours without biases."""
    return GPT(dataclasses.replace(model.config, bias=True)).num_params() - model.num_params()


TEXT = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"]),
        st.sampled_from("\u2581\u2585 \n\t\r\0<>/sunkx0123456789()[]:=defrtun "),
    )
)


@pytest.mark.parametrize("kind", ["sentencepiece", "byte", "huggingface"])
def test_an_exported_tokenizer_gives_the_same_ids_and_the_text_back(
    transformers, tmp_path, sentencepiece_tokenizer, kind
):
    tokenizer = {
        "sentencepiece": lambda: sentencepiece_tokenizer,
        "byte": ByteTokenizer,
        "huggingface": byte_level_bpe,
    }[kind]()
    write_run(tmp_path / "run", tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(hf.export(tmp_path / "run", tmp_path / "out"))
    ours = hf.load_tokenizer(tmp_path / "out")
    assert (theirs.eos_token_id, len(theirs)) == (tokenizer.eos_id, tokenizer.vocab_size)
    assert (ours.eos_id, ours.token_bytes) == (tokenizer.eos_id, tokenizer.token_bytes)

    def check(text):
        ids = tokenizer.encode(text)
        assert theirs.encode(text) == theirs(text)["input_ids"] == ours.encode(text) == ids
        assert theirs.decode(ids) == text

    for text in [*HARD, f"a{theirs.eos_token}b", "<unk>", "</s>", " " * 77 + "\n" + " " * 31, "x" * 9]:
        check(text)
    # Words of the vocabulary in any order, where merges compete, and arbitrary text.
    words = [token.decode() for token in tokenizer.token_bytes if len(token) > 1] or ["ab"]
    words = st.lists(st.sampled_from(words), max_size=12).map("".join)
    settings(max_examples=250, deadline=None, derandomize=True)(given(st.one_of(TEXT, words))(check))()


def test_the_exported_bpe_merges_as_sentencepiece_does():
    """Every text of up to 11 letters, for vocabularies of repetitive words, where merges compete most."""
    texts = ["".join(letters) for n in range(1, 12) for letters in itertools.product("ab", repeat=n)]
    for seed in range(6):
        rng = random.Random(seed)
        words = ["".join(rng.choices("ab", k=rng.randint(2, 13))) for _ in range(8)]
        tokenizer = train_sentencepiece([" ".join(rng.choices(words, k=400))], 280)
        exported = tokenizers.Tokenizer.from_str(json.dumps(hf.to_tokenizer(tokenizer)[0]))
        assert [encoding.ids for encoding in exported.encode_batch(texts)] == tokenizer.encode_batch(texts)


def test_settings_that_the_format_cannot_represent_are_rejected(tmp_path, capsys):
    write_run(tmp_path / "grouped", ByteTokenizer(), n_kv_head=2)
    write_run(tmp_path / "wide", ByteTokenizer(), head_dim=16)
    write_run(tmp_path / "squared", ByteTokenizer(), mlp="relu2")
    write_run(tmp_path / "fine", ByteTokenizer())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for arguments, expected in [
        (["grouped", "out"], "--n-kv-head 2"),
        (["wide", "out"], "--head-dim 16"),
        (["squared", "out"], "--mlp relu2"),
        (["fine", "full"], "full"),
        (["missing", "out"], "missing"),
        (["fine"], "DIR"),
    ]:
        assert hf.main(["export", *(str(tmp_path / a) for a in arguments)]) == 2
        error = capsys.readouterr().err
        assert expected in error
        assert error.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"grouped", "wide", "squared", "fine", "full"}


def parallel(self, x, positions, cache):
    return x + self.attn(self.ln_1(x), positions, cache) + self.mlp(self.ln_2(x))


def normed_after(self, x, positions, cache):
    x = x + self.ln_1(self.attn(x, positions, cache))
    return x + self.ln_2(self.mlp(x))


def swish(self, x):
    return self.c_proj(torch.nn.functional.silu(self.c_fc(x)))


def swapped_gate(self, x):
    up, gate = self.c_fc(x).chunk(2, dim=-1)
    return self.c_proj(torch.nn.functional.silu(gate) * up)


def last_seven(self, x, positions, cache, original=Attention.forward):
    """Attention to the last 7 tokens only."""
    mask = torch.ones(x.shape[1], x.shape[1]).tril().triu(-7).bool()
    with pytest.MonkeyPatch.context() as patch:
        masked = lambda qkv, H, H_kv, *_: torch_attention(qkv, H, H_kv, kept=(lambda kv: kv, mask))  # noqa: E731
        patch.setattr("minidisp.model.causal_attention", masked)
        return original(self, x, positions, cache)


def other_gelu(self, x):
    return self.c_proj(torch.nn.functional.gelu(self.c_fc(x), approximate="tanh"))


def capped(self, idx, *rest, original=GPT.forward, **options):
    out = original(self, idx, *rest, **options)
    return out._replace(logits=30 * (out.logits / 30).tanh())


def scaled_embedding(self, idx, *rest, original=GPT._backbone, **options):
    with torch.no_grad():
        self.wte.weight.mul_(1.001)  # and so on: any other embedding
        out = original(self, idx, *rest, **options)
        self.wte.weight.div_(1.001)
    return out


@pytest.mark.parametrize(
    ("where", "method", "hack", "arch"),
    [
        (Block, "forward", parallel, "gpt2"),
        (Block, "forward", parallel, "qwen3"),
        (Block, "forward", normed_after, "gpt2"),
        (MLP, "forward", swish, "gpt2"),
        (MLP, "forward", other_gelu, "gpt2"),
        (MLP, "forward", swapped_gate, "qwen3"),
        (Attention, "forward", last_seven, "qwen3"),
        (GPT, "forward", capped, "gpt2"),
        (GPT, "_backbone", scaled_embedding, "qwen3"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_silently_modified_model_is_rejected(tmp_path, monkeypatch, capsys, where, method, hack, arch):
    """Same parameters and config, but a different function: only the outputs show it."""
    write_run(tmp_path / "run", ByteTokenizer(), arch=arch)
    monkeypatch.setattr(where, method, hack)
    assert hf.main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "logits" in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_other_parameters_and_settings_are_refused_by_name():
    def fresh(**fields) -> GPT:
        return GPT(GPTConfig(n_layer=2, n_head=2, n_embd=8, block_size=8, vocab_size=20, **fields)).eval()

    def with_parameter(name: str, parameter: torch.Tensor | None) -> GPT:
        model = fresh()
        module, _, kind = name.rpartition(".")
        parameter = parameter if parameter is None else torch.nn.Parameter(parameter)
        model.get_submodule(module).register_parameter(kind, parameter)
        return model

    for name, parameter in [
        ("h.1.scale", torch.ones(8)),
        ("h.0.attn.q_norm", torch.ones(4)),
        ("h.0.attn.c_proj.gain", torch.ones(())),
        ("lm_head.weight", torch.ones(20, 8)),
        ("ln_f.weight", None),
        ("h.1.mlp.c_fc.bias", None),
        ("h.1.ln_2.weight", torch.ones(9)),
        ("h.0.mlp.c_proj.weight", torch.full((8, 32), math.nan)),
    ]:
        assert name in refusal(stored_form, with_parameter(name, parameter), 1)
    stored_form(fresh(), 1)


def test_a_new_setting_of_the_model_is_refused_by_name_unless_it_is_off(monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Longer(GPTConfig):
        parallel_blocks: bool = False

    monkeypatch.setattr(families, "GPTConfig", Longer)
    assert families.to_config(Longer())["model_type"] == "gpt2"
    assert "--parallel-blocks True" in refusal(families.to_config, Longer(parallel_blocks=True))
    for fields in ({"arch": "mamba"}, {"mlp": "maxout"}, {"gelu": "quick"}):
        other, ((name, value),) = Longer(), fields.items()
        object.__setattr__(other, name, value)
        assert f"--{name} {value}" in refusal(families.to_config, other)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_export_in_half_precision(transformers, tmp_path, dtype):
    model = write_run(tmp_path / "run", ByteTokenizer(), arch="qwen3", mlp="relu2")
    hf.export(tmp_path / "run", tmp_path / "out", dtype)
    tensors = load_file(tmp_path / "out" / hf.WEIGHTS)
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)}
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == getattr(torch, dtype)
    assert torch.equal(hf.load_model(tmp_path / "out").wte.weight, model.wte.weight.to(getattr(torch, dtype)).float())


def test_numbers_too_large_for_a_dtype_are_refused(tmp_path):
    model = write_run(tmp_path / "run", ByteTokenizer())
    state = torch.load(tmp_path / "run" / checkpoint.LAST)
    state["model"]["wpe.weight"][3, 4] = 1e5
    torch.save(state, tmp_path / "run" / checkpoint.LAST)
    assert "wpe.weight" in refusal(hf.export, tmp_path / "run", tmp_path / "out", "float16")
    assert model
    hf.export(tmp_path / "run", tmp_path / "out", "bfloat16")


# --- evaluating and training ------------------------------------------------------------------------------------------


def save_with_tokenizer(model, folder: Path, tokenizer, **tokenizer_config) -> Path:
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer.tokenizer_json))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOS, **tokenizer_config}))
    return folder


@pytest.fixture(scope="module")
def gpt2(transformers, tmp_path_factory) -> Path:
    """A GPT-2 whose embedding has more rows than its tokenizer has tokens."""
    tokenizer = byte_level_bpe()
    model = build(
        transformers, "gpt2", vocab_size=tokenizer.vocab_size + 7, eos_token_id=tokenizer.eos_id, **NO_DROPOUT
    )
    return save_with_tokenizer(model, tmp_path_factory.mktemp("models") / "gpt2", tokenizer)


@pytest.fixture(scope="module")
def gpt2_corpus(gpt2, tmp_path_factory) -> Path:
    """The text of `corpus` in that model's tokens."""
    folder = tmp_path_factory.mktemp("gpt2-corpus")
    text = write_text(folder / "text.txt")
    arguments = [
        "--input",
        str(text),
        "--name",
        "letters",
        "--tokenizer",
        f"hf:{gpt2}",
        "--out",
        str(folder / "prepared"),
    ]
    assert prepare.main(arguments) == 0
    return folder / "prepared"


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_evaluation_agrees_with_transformers(transformers, gpt2, gpt2_corpus, corpus, tmp_path, family):
    """The same loss as a loop over transformers' model and tokenizer, on a corpus with its own or another tokenizer."""
    folder = gpt2
    if family == "qwen3":
        tokenizer = byte_level_bpe(qwen=True)
        model = build(transformers, "qwen3", vocab_size=tokenizer.vocab_size + 3, num_key_value_heads=2)
        folder = save_with_tokenizer(model, tmp_path / "qwen3", tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = Dataset(corpus).tokenizer.decode(Dataset(corpus).split("val").slice(0, 1500).tolist())
    stream = torch.tensor([their_tokenizer.eos_token_id, *their_tokenizer(text)["input_ids"]])
    nats = 0.0
    for start in range(0, len(stream) - 1, 48):  # windows side by side, the last one of full length, too
        counted = min(48, len(stream) - 1 - start)
        row = stream[start + counted - 48 : start + counted + 1].unsqueeze(0)
        with torch.no_grad():
            log_probs = theirs(row[:, :-1]).logits.double().log_softmax(-1).gather(2, row[:, 1:, None])
        nats += log_probs[0, 48 - counted :].sum().item()
    for data in [corpus] if family == "qwen3" else [corpus, gpt2_corpus]:
        limit = 1500 if data == corpus else len(stream) - 1
        flags = ["--hf", str(folder), "--data", str(data), "--tokens", str(limit), "--stride", "48"]
        (scores,) = evaluation.main(flags)
        assert scores["tokens"] == len(stream) - 1
        assert scores["loss"] == pytest.approx(-nats / scores["tokens"], abs=1e-5)
        assert scores["bits_per_byte"] == pytest.approx(-nats / math.log(2) / len(text.encode()), abs=1e-5)
        assert len(scores["condensation"]["mean_cosine_by_layer"]) == 4


def test_a_run_and_its_export_evaluate_to_the_same(run, bpe_corpus, tmp_path):
    tokenizer = Dataset(bpe_corpus).tokenizer
    write_run(tmp_path / "bpe", tokenizer, arch="qwen3")
    runs = [run, tmp_path / "bpe"]
    folders = [str(hf.export(path, tmp_path / f"{i}")) for i, path in enumerate(runs)]
    scores = evaluation.main([*map(str, runs), "--hf", folders[0], "--hf", folders[1], "--data", str(bpe_corpus)])
    for before, after in zip(scores[:2], scores[2:], strict=True):
        assert (after["tokens"], after["bytes"]) == (before["tokens"], before["bytes"])
        assert after["loss"] == pytest.approx(before["loss"], abs=1e-6)


def test_evaluation_together_with_a_run_and_with_a_shorter_context(run, gpt2, capsys):
    scores = evaluation.main([str(run), "--hf", str(gpt2), "--tokens", "500", "--block-size", "8", "--sample", "ab"])
    assert [s["name"] for s in scores] == ["small", "gpt2"]
    assert [s["block_size"] for s in scores] == [8, 8]  # the flag counts for runs and folders alike
    assert "--- gpt2\nab" in capsys.readouterr().out
    assert evaluation.cli(["--hf", str(gpt2), "--data", "pystdlib", "--block-size", "49"]) == 2
    assert "--block-size 48 or less, not 49" in capsys.readouterr().err
    assert evaluation.cli(["--hf", str(gpt2)]) == 2
    assert "--data" in capsys.readouterr().err


def test_training_starts_from_a_hugging_face_model(transformers, gpt2, gpt2_corpus, tmp_path):
    """The run starts with the model's weights, steps, is resumed, and its export is that model's folder again."""
    defaults = from_dict({})
    base = {k: v for k, v in SMALL.items() if k not in ("n_layer", "n_head", "n_embd")} | {"block_size": 24}
    base |= {"init_from": str(gpt2), "data": str(gpt2_corpus), "dispersion": 0.1}
    start = from_dict({**base, "max_steps": 0, "out": str(tmp_path / "start")})
    assert start.n_layer == defaults.n_layer != 3
    train.main(start)
    model, tokenizer = minidisp.load(tmp_path / "start")
    source = hf.load_model(gpt2, block_size=24)
    assert tokenizer.hash == hf.load_tokenizer(gpt2).hash
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), source.state_dict().values(), strict=True)
    )
    train.main(from_dict({**base, "max_steps": 2, "save_every": 1, "out": str(tmp_path / "run")}))
    train.main(parse(["--resume", "--out", str(tmp_path / "run"), "--max-steps", "3"]))
    moved, _ = minidisp.load(tmp_path / "run" / checkpoint.LAST)
    assert not torch.equal(moved.wte.weight, source.wte.weight)
    folder = hf.export(tmp_path / "run" / checkpoint.LAST, tmp_path / "out")
    assert_same_outputs(transformers.AutoModelForCausalLM.from_pretrained(folder), moved)


def test_the_settings_of_an_imported_tokenizer_go_out_as_they_came(transformers, gpt2, tmp_path):
    """Through a corpus and a run; the hash that decides whether the two match depends on the tokenizer only."""
    source, text = shutil.copytree(gpt2, tmp_path / "source"), write_text(tmp_path / "text.txt", words=900)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    tokenizer.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": ["<user>", "<end>"]})
    tokenizer.add_tokens(["<think>"])
    tokenizer.chat_template = "{% for m in messages %}<user>{{ m['content'] }}<end>{% endfor %}"
    tokenizer.save_pretrained(source)
    transformers.GenerationConfig(do_sample=True, top_p=0.7, pad_token_id=291).save_pretrained(source)
    settings = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**settings, "pad_token_id": 291}))
    assert hf.load_tokenizer(source).hash != hf.load_tokenizer(gpt2).hash  # it has more tokens
    flags = ["--input", str(text), "--name", "t", "--tokenizer", f"hf:{source}", "--out", str(tmp_path / "corpus")]
    assert prepare.main(flags) == 0
    base = {k: v for k, v in SMALL.items() if k not in ("n_layer", "n_head", "n_embd")} | {"block_size": 24}
    base |= {"init_from": str(source), "data": str(tmp_path / "corpus"), "max_steps": 1, "eval_tokens": 24}
    train.main(from_dict({**base, "out": str(tmp_path / "run")}))
    out = hf.export(tmp_path / "run", tmp_path / "out")
    for path in source.iterdir():
        if path.name not in ("config.json", hf.WEIGHTS):
            assert (out / path.name).exists(), path.name
            if path.suffix == ".json":
                assert json.loads((out / path.name).read_text()) == json.loads(path.read_text())
            else:
                assert (out / path.name).read_bytes() == path.read_bytes()
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    assert theirs.pad_token == "<pad>"
    chat = [{"role": "user", "content": "for x <think>"}]
    assert theirs.apply_chat_template(chat)["input_ids"] == tokenizer.apply_chat_template(chat)["input_ids"]
    assert theirs.encode("<user>") == [theirs.convert_tokens_to_ids("<user>")]
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert (model.generation_config.top_p, model.config.pad_token_id) == (0.7, 291)
    again = hf.load_tokenizer(out)
    assert (again.hash, again.files) == (hf.load_tokenizer(source).hash, hf.load_tokenizer(source).files)
    (source / "chat_template.jinja").write_text("another")
    assert hf.load_tokenizer(source).hash == again.hash
    (source / "generation_config.json").write_text("{")
    assert str(source / "generation_config.json") in refusal(hf.load_tokenizer, source)


def test_added_tokens_without_a_row_are_text_with_a_warning(transformers, gpt2, tmp_path):
    source = shutil.copytree(gpt2, tmp_path / "source")
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    assert len(tokenizer) == 290
    tokenizer.add_tokens([f"<extra{i}>" for i in range(9)])  # the embedding has 7 rows to spare
    tokenizer.save_pretrained(source)
    with pytest.warns(UserWarning, match="297 rows and none for <extra7>, <extra8>"):
        model, ours = hf.load(source)
    text = "x<extra6> <extra7>"
    ids = ours.encode(text)
    assert tokenizer.convert_tokens_to_ids("<extra6>") == 296 == max(ids)
    assert tokenizer.convert_tokens_to_ids("<extra7>") == 297
    assert ours.decode(ids) == text
    assert (ours.vocab_size, model.config.vocab_size) == (297, 297)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(source)
    idx = torch.tensor([ids])
    torch.testing.assert_close(model(idx).logits, theirs(idx).logits, atol=1e-4, rtol=0)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": "<extra8>"}))
    assert "no row" in refusal(hf.load_tokenizer, source)


def test_mid_training_rejects_mismatches(gpt2, gpt2_corpus, corpus, tmp_path, capsys):
    for flags, expected in [
        (["--data", str(corpus)], f"hf:{gpt2}"),
        (["--data", str(gpt2_corpus), "--n-layer", "5"], "n_layer 3, not 5"),
        (["--data", str(gpt2_corpus), "--block-size", "64"], "--block-size 48 or less, not 64"),
        (["--data", str(gpt2_corpus), "--resume"], "leave out --init-from"),
    ]:
        flags = ["--init-from", str(gpt2), "--block-size", "16", "--out", str(tmp_path / "run"), *flags]
        assert train.cli(flags) == 2
        error = capsys.readouterr().err
        assert expected in error
        assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


# --- untrusted files --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Our own exports, so that rejections are tested without transformers."""
    folder = tmp_path_factory.mktemp("exports")
    for arch, fields in {"gpt2": {}, "qwen3": {"arch": "qwen3"}, "apertus": {"arch": "qwen3", "mlp": "relu2"}}.items():
        write_run(folder / f"run-{arch}", ByteTokenizer(), **fields)
        hf.export(folder / f"run-{arch}", folder / arch)
    return folder


def refusal(call, *arguments) -> str:
    with pytest.raises(InputError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("arch", "changes", "expected"),
    [
        ("gpt2", {"model_type": "llama"}, "model_type is llama"),
        ("apertus", {"hidden_act": "xielu"}, "hidden_act is xielu"),
        ("apertus", {"hidden_act": None}, "xIELU"),
        ("apertus", {"rope_parameters": None}, "rope_parameters"),
        ("apertus", {"hidden_act": "silu"}, "hidden_act is silu"),
        ("gpt2", {"model_type": ["gpt2"]}, "model_type"),
        ("gpt2", {"model_type": None}, "model_type"),
        ("gpt2", {"n_layer": "2"}, "n_layer is 2, but must be of type int"),
        ("gpt2", {"n_layer": True}, "n_layer is True"),
        ("gpt2", {"n_layer": 10**30}, "n_layer"),
        ("gpt2", {"layer_norm_epsilon": 10**400}, "layer_norm_epsilon"),
        ("gpt2", {"n_layer": 900}, "config.json has 900 layers, but there are only"),
        ("gpt2", {"n_layer": 3}, "no tensor transformer.h.2"),
        ("gpt2", {"n_layer": 1}, "transformer.h.1"),
        ("gpt2", {"n_embd": 64}, "shape"),
        ("gpt2", {"n_head": 5}, "multiple"),
        ("gpt2", {"vocab_size": 10**6}, "shape"),
        ("gpt2", {"vocab_size": -1}, "vocab_size"),
        ("gpt2", {"n_positions": 41}, "shape"),
        ("gpt2", {"activation_function": "relu"}, "activation_function is relu"),
        ("gpt2", {"activation_function": {"a": 1}}, "activation_function"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
        ("gpt2", {"layer_norm_epsilon": "nan"}, "layer_norm_epsilon"),
        ("gpt2", {"layer_norm_epsilon": -1}, "layer_norm_epsilon"),
        ("gpt2", {"tie_word_embeddings": False}, "lm_head.weight"),
        ("gpt2", {"auto_map": {"AutoModel": "code.Model"}}, "auto_map"),
        ("gpt2", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("qwen3", {"hidden_act": "gelu"}, "hidden_act"),
        ("qwen3", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling"),
        ("qwen3", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_parameters"),
        ("qwen3", {"rope_parameters": 5}, "rope_parameters"),
        ("qwen3", {"rope_parameters": {"rope_theta": "x"}}, "rope_theta"),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8}, "sliding_window"),
        ("qwen3", {"attention_bias": True}, "bias"),
        ("qwen3", {"num_key_value_heads": 3}, "multiple"),
        ("qwen3", {"head_dim": 7}, "even"),
    ],
    ids=str,
)
def test_strange_configs_are_refused_by_name(models, tmp_path, arch, changes, expected):
    folder = shutil.copytree(models / arch, tmp_path / "model")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    message = refusal(hf.load_model, folder)
    assert expected in message
    assert str(folder) in message


OTHER = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 257,
    "max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_hidden_layers": 10**6}, "1,000,000 layers for 28 tensors"),
        ({"hidden_size": 1 << 14, "intermediate_size": 1 << 16}, "parameters, but the weights are"),
        ({"vocab_size": 1 << 30}, "parameters, but the weights are"),
        ({"attn_implementation": "somebody/kernel"}, "are never loaded"),
        ({"text_config": {"_attn_implementation": "somebody/kernel"}}, "are never loaded"),
        ({"text_config": [{"auto_map": {"AutoModel": "code.Model"}}]}, "are never loaded"),
    ],
    ids=str,
)
def test_a_model_of_another_family_is_no_larger_than_its_weights_and_runs_no_code(models, tmp_path, changes, expected):
    transformers = pytest.importorskip("transformers")
    folder = shutil.copytree(models / "gpt2", tmp_path / "model")
    (folder / "config.json").write_text(json.dumps(OTHER | changes))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", None)
        assert expected in refusal(load_other, folder)


def test_weights_beyond_the_memory_are_refused_before_they_are_read(models, tmp_path, monkeypatch):
    folder = shutil.copytree(models / "gpt2", tmp_path / "model")
    monkeypatch.setattr("minidisp.runtime.device.memory_bytes", lambda device: 1000)
    assert "needs" in refusal(hf.load_model, folder)
    run = models / "run-gpt2"
    assert str(checkpoint.find(run)) in refusal(checkpoint.load, run)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_weights_that_are_no_file_are_refused(models, tmp_path, make):
    folder = shutil.copytree(models / "gpt2", tmp_path / "model")
    (folder / hf.WEIGHTS).unlink()
    make(folder / "a.safetensors")
    (folder / hf.INDEX).write_text(json.dumps({"weight_map": {"x": "a.safetensors"}}))
    assert "a.safetensors is not a file" in refusal(hf.load_model, folder)


def test_damaged_weights_are_refused_by_name(models, tmp_path):
    folder = shutil.copytree(models / "gpt2", tmp_path / "model")
    path, whole = folder / hf.WEIGHTS, (models / "gpt2" / hf.WEIGHTS).read_bytes()
    tensors = load_file(path)
    header = int.from_bytes(whole[:8], "little")
    for what, content in {
        "empty": b"",
        "pickle": b"\x80\x04\x95\x10" + bytes(100),
        "short": whole[:-10],
        "long": whole + bytes(8),
        "header": (10**12).to_bytes(8, "little") + whole[8:],
        "half header": whole[: header // 2],
        "not JSON": whole[:8] + b"x" * header + whole[8 + header :],
    }.items():
        path.write_bytes(content)
        assert str(path) in refusal(hf.load_model, folder), what
    save_file(tensors | {"extra.weight": torch.zeros(2)}, path)
    assert "extra.weight" in refusal(hf.load_model, folder)
    save_file(tensors | {"transformer.ln_f.bias": torch.zeros(32, dtype=torch.int64)}, path)
    assert "I64" in refusal(hf.load_model, folder)
    path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    assert "only safetensors" in refusal(hf.load_model, folder)


def test_an_index_cannot_lead_out_of_the_folder(models, tmp_path):
    folder = shutil.copytree(models / "gpt2", tmp_path / "model")
    (folder / hf.WEIGHTS).rename(tmp_path / "outside.safetensors")
    index = folder / hf.INDEX
    for name in (
        "../outside.safetensors",
        str(tmp_path / "outside.safetensors"),
        "..",
        "a\\b.safetensors",
        "x.bin",
        "",
    ):
        index.write_text(json.dumps({"weight_map": {"transformer.wte.weight": name}}))
        assert f"{index}: the shard {name!r}" in refusal(hf.load_model, folder)
    index.write_text("[" * 100_000)
    assert str(index) in refusal(hf.load_model, folder)
    for bad in ([], {}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"a": 1}}):
        index.write_text(json.dumps(bad))
        assert str(index) in refusal(hf.load_model, folder)
    index.write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    assert "gone.safetensors" in refusal(hf.load_model, folder)
    for name in ("a.safetensors", "b.safetensors"):
        shutil.copy(tmp_path / "outside.safetensors", folder / name)
    index.write_text(json.dumps({"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}))
    assert "is also in a.safetensors" in refusal(hf.load_model, folder)


def test_invalid_folders(tmp_path, models, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "file").touch()
    for name in ("missing", "runs/missing", "file", "../x", "a/b/c"):
        assert name in refusal(hf.load_model, name)
    assert "config.json" in refusal(hf.load_model, tmp_path)
    assert "tokenizer.json" in refusal(hf.load_tokenizer, tmp_path)
    folder = shutil.copytree(models / "gpt2", tmp_path / "model")
    (folder / "tokenizer_config.json").write_text("{}")
    assert hf.load_tokenizer(folder).eos_id == 256  # from config.json
    (folder / "config.json").unlink()
    assert "end-of-sequence" in refusal(hf.load_tokenizer, folder)


def test_a_name_on_the_hub(models, tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.chdir(tmp_path)
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        if name == "owner/gone":
            raise OSError("no such\nrepository")
        return str(models / "gpt2")

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert hf.load("owner/model")[0].config.n_layer == 2
    assert asked == [("owner/model", hf.FILES)]
    assert hf.is_folder("distilgpt2")
    assert hf.load("gpt2")[0].config.n_layer == 2  # names from before the hub had owners
    assert asked[1:] == [("gpt2", hf.FILES)]
    assert not hf.is_folder("distilgpt3")
    assert not any(pattern.endswith((".bin", ".py", "*")) for pattern in hf.FILES)
    assert "no such repository" in refusal(hf.load_model, "owner/gone")


def test_missing_packages_are_named(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for package, call, argument in [
        ("safetensors", hf.load_model, models / "gpt2"),
        ("tokenizers", hf.load_tokenizer, models / "gpt2"),
        ("huggingface_hub", hf.load_model, "owner/model"),
    ]:
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            message = refusal(call, argument)
        assert package in message
        assert f"pip install {package}" in message


# --- in other programs ------------------------------------------------------------------------------------------------


def test_the_trainer_example(transformers, gpt2, tmp_path, monkeypatch):
    """With a learning rate of 0, the logged loss is the cross-entropy plus weighted dispersion, by plain formulas."""
    pytest.importorskip("accelerate")
    from examples import hf_trainer

    text = write_text(tmp_path / "text.txt", words=400)
    common = {
        "length": 24,
        "max_steps": 2,
        "use_cpu": True,
        "logging_steps": 2,
        "save_strategy": "no",
        "disable_tqdm": True,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "lr_scheduler_type": "constant",
    }
    batches = []

    class Recording(hf_trainer.DispersionTrainer):
        def compute_loss(self, model, inputs, *arguments, **options):
            batches.append(inputs["input_ids"])
            return super().compute_loss(model, inputs, *arguments, **options)

    monkeypatch.setattr(hf_trainer, "DispersionTrainer", Recording)
    trainer = hf_trainer.main(str(gpt2), str(text), str(tmp_path / "out"), learning_rate=0.0, **common)
    model, losses = trainer.model.train(), []
    with torch.no_grad():
        for x in batches:
            out = model(x, labels=x, output_hidden_states=True)
            disp = torch.stack([dispersion_loss(z, impl="reference") for z in out.hidden_states[1:]]).mean()
            losses.append((out.loss * 23 / 24 + 0.1 * disp).item())  # Trainer divides by all 24 tokens of a row
    assert len(batches) == 4
    assert trainer.state.log_history[0]["loss"] == pytest.approx(np.mean(losses), abs=1e-4)
    rows = trainer.train_dataset[:2]
    with torch.no_grad():
        x = torch.tensor([row["input_ids"] for row in rows])
        plain = model(x, labels=x).loss.item() * 23 / 24
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(plain, abs=1e-5)  # without the regulariser
    assert len(rows[0]["input_ids"]) == 24
    common["length"] = 1000  # more than its context
    moved = hf_trainer.main(str(gpt2), str(text), str(tmp_path / "out"), learning_rate=1e-3, **common).model
    assert not torch.equal(moved.transformer.wte.weight, model.transformer.wte.weight)


def test_the_trainer_example_says_in_one_line_what_it_cannot_use(transformers, gpt2, tmp_path, capsys):
    pytest.importorskip("accelerate")
    from examples import hf_trainer

    (tmp_path / "short.txt").write_text("nine char")
    (tmp_path / "latin.txt").write_bytes(b"\xe9" * 5000)
    for arguments, expected in [
        ([gpt2, tmp_path / "short.txt", tmp_path / "out"], "short.txt has 9 tokens"),
        ([gpt2, tmp_path / "latin.txt", tmp_path / "out"], "latin.txt is not UTF-8"),
        ([gpt2, tmp_path / "gone.txt", tmp_path / "out"], "gone.txt"),
        ([tmp_path / "missing", tmp_path / "short.txt", tmp_path / "out"], "missing"),
        ([gpt2, tmp_path / "short.txt"], "OUT"),
    ]:
        assert hf_trainer.cli([str(argument) for argument in arguments]) == 2
        error = capsys.readouterr().err
        assert expected in error
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_lm_evaluation_harness_runs_the_exported_folder(tmp_path, sentencepiece_tokenizer):
    """A custom task, offline; the harness's log-likelihoods equal our model's."""
    pytest.importorskip("lm_eval")
    model = write_run(tmp_path / "run", sentencepiece_tokenizer, arch="qwen3")
    hf.export(tmp_path / "run", tmp_path / "folder")
    documents = [{"question": f"if x == {i}", "choices": [":", " or", "\u2581\n"], "answer": i % 3} for i in range(3)]
    (tmp_path / "tiny.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    (tmp_path / "tiny.yaml").write_text(f"""
task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/tiny.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
""")
    folder = f"pretrained={tmp_path}/folder,dtype=float32"
    command = [
        sys.executable,
        "-m",
        "lm_eval",
        "--model",
        "hf",
        "--model_args",
        folder,
        "--tasks",
        "tiny",
        "--include_path",
        str(tmp_path),
        "--device",
        "cpu",
        "--log_samples",
        "--output_path",
        str(tmp_path / "results"),
    ]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, env=os.environ | offline, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (samples,) = (tmp_path / "results").rglob("samples_tiny_*.jsonl")
    for line in samples.read_text().splitlines():
        sample = json.loads(line)
        for choice, response in zip(sample["doc"]["choices"], sample["filtered_resps"], strict=True):
            context, whole = (sentencepiece_tokenizer.encode(sample["doc"]["question"] + end) for end in ("", choice))
            log_probs = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
            wanted = sum(log_probs[i - 1, whole[i]].item() for i in range(len(context), len(whole)))
            assert float(response[0]) == pytest.approx(wanted, abs=1e-3)


def test_small_config_is_unchanged(corpus, tmp_path):
    """A config.json from before the fields for Hugging Face models can still be read, with the same meaning."""
    saved = to_dict(small_config(corpus, tmp_path))
    for name in ("norm_eps", "attention_bias"):
        del saved[name]
    assert from_dict(saved) == small_config(corpus, tmp_path)


def test_an_export_that_cannot_be_written_leaves_nothing(run, tmp_path, monkeypatch, capsys):
    import safetensors.torch

    def full(*_, **__):
        raise safetensors.SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    assert hf.main(["export", str(run), str(tmp_path / "out")]) == 2
    assert "out cannot be written: I/O error: No space left" in capsys.readouterr().err
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert hf.main(["export", str(run), "."]) == 2
    assert not list((tmp_path / "here").iterdir())
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path / "here")
    assert hf.main(["export", str(run), "."]) == 0  # for example a container's working folder, which cannot be replaced
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
    assert hf.load_model(".").config.n_layer


def test_an_export_fills_an_empty_folder_that_cannot_be_renamed(run, tmp_path, monkeypatch, capsys):
    """As a mount point, below a read-only parent, or through a link."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    inode = (tmp_path / "real").stat().st_ino
    monkeypatch.setattr(Path, "rmdir", lambda self, rmdir=Path.rmdir: refuse(self, "real") or rmdir(self))
    assert hf.main(["export", str(run), str(tmp_path / "link")]) == 0
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").stat().st_ino == inode
    assert hf.load_model(tmp_path / "real").config.n_layer
    assert hf.main(["export", str(run), str(tmp_path / "real")]) == 2
    assert "already exists" in capsys.readouterr().err


def refuse(path: Path, name: str) -> None:
    if path.name == name:
        raise OSError(errno.EBUSY, "Device or resource busy", str(path))


def test_of_an_imported_config_the_ids_of_special_tokens_alone_are_exported(models, tmp_path, capsys):
    """The tokenizer of a run may have any origin: nothing in it may change the computation."""
    tokenizer = hf.load_tokenizer(models / "gpt2")
    packed = {
        "bos_token_id": 3,
        "eos_token_id": [1, 5],
        "pad_token_id": 10**9,
        "auto_map": {"AutoConfig": "evil.Config"},
        "activation_function": "relu",
        "layer_norm_epsilon": 0.5,
        "n_layer": 1,
        "model_type": "qwen3",
    }
    tokenizer.files["config.json"] = json.dumps(packed)
    from minidisp.hf.exporter import _files

    config = json.loads(_files({"activation_function": "gelu"}, tokenizer, None)["config.json"])
    assert config == {
        "activation_function": "gelu",
        "bos_token_id": 3,
        "eos_token_id": [1, 5],
        "pad_token_id": None,
    }


def test_a_loss_that_is_not_of_the_logits_is_not_exported(run, tmp_path, monkeypatch, capsys):
    plain = loss.plain
    monkeypatch.setattr(loss, "plain", lambda z, targets: plain(5 * (z / 5).tanh(), targets))
    assert hf.main(["export", str(run), str(tmp_path / "out")]) == 2
    assert "into GPT.logits" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(GPT, "logits", lambda self, x: 0.01 * (self.lm_head(x) / 0.01).tanh())
    assert hf.main(["export", str(run), str(tmp_path / "out")]) == 2
    assert "its logits are not those of" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(loss, "plain", lambda z, targets: plain(z, targets) + 0.1 * z.logsumexp(-1).square())
    assert hf.main(["export", str(run), str(tmp_path / "out")]) == 0  # a regulariser changes no probabilities


def test_rotary_settings_reach_every_version_of_transformers():
    """Version 4 gives Apertus a different RoPE scaling unless the config says that there is none."""
    config = families.to_config(GPTConfig(n_layer=1, n_head=2, n_embd=16, arch="qwen3", mlp="relu2", tied=False))
    assert (config["rope_theta"], config["rope_scaling"]) == (1e4, None)
