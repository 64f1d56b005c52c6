"""The evaluation: every token once, numbers that agree with each other and with slow, separate computations."""

import json
import math
import re
import shutil

import numpy as np
import pytest
import torch

import eval as evaluation  # not the builtin
from data import prepare
from minidisp import InputError, load, scoring
from minidisp.data import Dataset
from tests.conftest import small_config, write_text
from train import main as train_main


@pytest.fixture(scope="session")
def bpe_run(bpe_corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "bpe"
    train_main(small_config(bpe_corpus, out))
    return out


def test_every_token_is_predicted_once_from_the_text_before_it(run, corpus):
    """One token after the other through the whole model, in float64."""
    model, vocabulary = load(run)
    model = model.double()
    tokens = Dataset(corpus).split("val").slice(0, 100)
    got = scoring.token_nats(model, tokens, vocabulary.eos_id, 8, torch.device("cpu"))
    stream = [vocabulary.eos_id, *tokens]
    for i in range(100):
        # The first window reads from the start; later ones advance by 8 and reach back as far as the context of 32 goes.
        start = 0 if i < 32 else min(100, 32 + 8 * ((i - 32) // 8 + 1)) - 32
        log_probs = model(torch.tensor([stream[start : i + 1]])).logits[0, -1].log_softmax(-1)
        assert got[i] == pytest.approx(-log_probs[tokens[i]].item(), abs=1e-9)


def test_scores_agree_through_the_counts(run, corpus, tmp_path):
    (scores,) = evaluation.main([str(run), "--json", str(tmp_path / "scores.json")])
    split = Dataset(corpus).split("val")
    assert (scores["tokens"], scores["bytes"], scores["words"]) == (split.tokens, split.bytes, split.words)
    nats = scores["loss"] * scores["tokens"]
    assert math.log(scores["perplexity"]) * scores["tokens"] == pytest.approx(nats, rel=1e-12)
    assert scores["bits_per_byte"] * scores["bytes"] * math.log(2) == pytest.approx(nats, rel=1e-12)
    assert math.log(scores["word_perplexity"]) * scores["words"] == pytest.approx(nats, rel=1e-12)
    assert json.loads((tmp_path / "scores.json").read_text()) == [scores]


def test_condensation_agrees_with_plain_numpy(run, corpus):
    (scores,) = evaluation.main([str(run)])
    model, _ = load(run)
    split = Dataset(corpus).split("val")
    T, n = 32, min(100, split.tokens // 32)
    starts = np.linspace(0, split.tokens - T, n).astype(int)
    averaged = np.zeros((3, T, T))
    for start in starts:
        idx = torch.from_numpy(split.slice(start, start + T)).unsqueeze(0)
        for layer, z in enumerate(model(idx, return_hidden_states=True).hidden_states):
            z = z[0].detach().double().numpy()
            z = z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-3)
            averaged[layer] += np.clip(z @ z.T, -1, 1) / n
    want = averaged.mean(axis=(1, 2))
    np.testing.assert_allclose(scores["condensation"]["mean_cosine_by_layer"], want, atol=1e-5)
    assert scores["condensation"]["last_half_mean"] == pytest.approx(want[2], abs=1e-5)


def test_a_run_does_not_differ_from_itself(run, capsys):
    scores = evaluation.main([str(run), str(run)])
    assert scores[1]["versus_first"] == {"bits_per_byte": 0.0, "low": 0.0, "high": 0.0, "verdict": "no difference",
                                         "nats_per_token": 0.0, "tokens_better": 0.5}  # fmt: skip
    printed = capsys.readouterr().out
    assert "no difference that this text can show" in printed
    assert "settings that differ" not in printed


def test_an_untrained_model_is_worse(run, corpus, tmp_path, capsys):
    train_main(small_config(corpus, tmp_path / "untrained", max_steps=0))
    scores = evaluation.main([str(run), str(tmp_path / "untrained"), "--figures", str(tmp_path / "figures")])
    versus = scores[1]["versus_first"]
    assert 0 < versus["low"] < versus["bits_per_byte"] < versus["high"]
    assert versus["bits_per_byte"] == pytest.approx(scores[1]["bits_per_byte"] - scores[0]["bits_per_byte"], abs=1e-9)
    assert versus["verdict"] == "worse"
    assert versus["nats_per_token"] == pytest.approx(scores[1]["loss"] - scores[0]["loss"], abs=1e-9)
    assert 0 < versus["tokens_better"] < 0.5
    printed = capsys.readouterr().out
    assert ": worse (" in printed
    assert re.search(r"^max_steps +12 +0$", printed, re.M)
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        f"{name}.{suffix}" for name in ("heatmap", "cosine_by_layer", "loss_by_step") for suffix in ("png", "pdf")
    }


def test_a_plain_sentence_for_every_outcome():
    """Blocks that differ for certain, and blocks that differ both ways."""
    rng = np.random.default_rng(0)
    base = rng.uniform(500, 900, 200)

    def result(name, nats, tokenizer="t"):
        scores = {
            "name": name,
            "bytes": 200 * scoring.BLOCK_BYTES,
            "bits_per_byte": nats.sum() / math.log(2) / (200 * 1024),
        }
        return scoring.Result({**scores, "tokenizer": tokenizer}, nats, nats)

    results = [
        result("a", base),
        result("b", base * 0.98),
        result("c", base * 1.02, "u"),
        result("d", base + rng.normal(0, 30, 200)),
    ]
    better, worse, same = evaluation.compare_texts(results)
    assert re.fullmatch(r"b against a: -0\.0\d+ bits/byte, 95 % interval -\S+ to -\S+: better \(2\.0% fewer bits, 100% of the "
                        r"tokens predicted better\)", better)  # fmt: skip
    assert re.fullmatch(r"c against a: \+.* to \+\S+: worse \(2\.0% more bits\)", worse)
    assert re.fullmatch(r"d against a: .* -\S+ to \+\S+: no difference that this text can show \(\d\d% of .*\)", same)
    assert "tokens_better" not in results[2].scores["versus_first"]


def test_one_block_of_text_tells_nothing(run, capsys):
    scores = evaluation.main([str(run), str(run), "--tokens", "200"])
    assert scores[1]["versus_first"]["verdict"] == "too little text to tell"
    assert "too little text to tell" in capsys.readouterr().out


def test_names_tell_runs_apart(tmp_path):
    paths = [str(tmp_path / part) for part in ("a/x", "b/x", "a/x/ckpt_last.pt", "b/x/ckpt_last.pt")]
    assert evaluation.short_names([]) == []
    assert evaluation.short_names(paths[:1] * 2) == ["x", "x"]
    assert evaluation.short_names(paths[:2]) == ["a/x", "b/x"]
    assert evaluation.short_names(paths[2:]) == ["a/x/ckpt_last.pt", "b/x/ckpt_last.pt"]


def test_layers_prints_every_layer(run, capsys):
    (scores,) = evaluation.main([str(run), "--tokens", "300", "--layers"])
    last = capsys.readouterr().out.strip().splitlines()[-1]
    measured = scores["condensation"]
    assert last.split()[:2] == ["2", f"{measured['mean_cosine_by_layer'][2]:.3f}"]
    assert f"{measured['effective_rank_by_layer'][2]:.1f}" in last.split()


def test_models_with_other_tokenizers_read_the_same_text(run, bpe_run, bpe_corpus, capsys):
    byte, bpe = evaluation.main([str(run), str(bpe_run)])
    assert "not comparable" in capsys.readouterr().out
    assert byte["tokens"] > bpe["tokens"]
    assert (byte["bytes"], byte["words"]) == (bpe["bytes"], bpe["words"])
    assert bpe["tokens"] == Dataset(bpe_corpus).split("val").tokens  # that corpus has the same text


def test_part_of_a_split_ends_with_a_whole_character(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("añb€c" * 400, encoding="utf-8")
    out = tmp_path / "data"
    assert prepare.main(["--input", str(text), "--name", "signs", "--tokenizer", "byte", "--out", str(out)]) == 0
    for limit in range(1, 12):
        part = evaluation.Text.read(Dataset(out), "val", limit)
        assert limit - 2 <= len(part.tokens) <= limit
        assert "".join(part.documents).encode() == bytes(part.tokens.tolist())
    whole = evaluation.Text.read(Dataset(out), "val", 0)
    assert whole.ends
    assert "\ufffd" not in "".join(whole.documents)


def test_a_sample_continues_the_prompt(run, capsys):
    evaluation.main([str(run), "--tokens", "200", "--sample", "abc "])
    assert "abc " in capsys.readouterr().out


def test_one_checkpoint_file_can_be_named(run):
    scores = evaluation.main([str(run / "ckpt_last.pt"), "--tokens", "100"])
    assert scores[0]["tokens"] == 100


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["missing"], "missing"),
        (["RUN", "--data", "nonsense"], "nonsense"),
        (["RUN", "--split", "train"], "--split"),
        (["RUN", "--tokens", "-1"], "--tokens"),
        (["RUN", "--tokens", "1"], "--tokens"),
        (["RUN", "--stride", "33"], "stride"),
        (["RUN", "--jsn", "x"], "--json"),
        (["RUN", "--json", "FILE/x.json"], "FILE"),
        (["RUN", "--html", "FILE/x.html"], "FILE"),
        ([], "RUN"),
    ],
)
def test_bad_usage_is_one_line_and_exit_2(run, tmp_path, monkeypatch, capsys, flags, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("")
    assert evaluation.cli([str(run) if flag == "RUN" else flag for flag in flags]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1


def test_a_run_without_its_tokenizer_is_named(run, tmp_path):
    shutil.copy(run / "ckpt_last.pt", tmp_path)
    with pytest.raises(InputError, match=r"tokenizer\.model"):
        load(tmp_path)


def test_help_has_no_traceback(capsys):
    with pytest.raises(SystemExit) as done:
        evaluation.main(["--help"])
    assert done.value.code == 0
    assert "--sample" in capsys.readouterr().out


def test_a_shorter_text_than_the_context(run, tmp_path):
    text = write_text(tmp_path / "text.txt", words=60)
    out = tmp_path / "data"
    assert prepare.main(["--input", str(text), "--name", "short", "--tokenizer", "byte", "--out", str(out)]) == 0
    (scores,) = evaluation.main([str(run), "--data", str(out)])
    assert scores["tokens"] == Dataset(out).split("val").tokens < 32
    assert scores["condensation"]["tokens_per_sequence"] == scores["tokens"]
