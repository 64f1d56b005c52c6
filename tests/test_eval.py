"""The evaluation: every token once, and results that agree with each other and with slow, independent computations."""

import dataclasses
import io
import itertools
import json
import math
import os
import re
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import eval as evaluation  # not the builtin
from data import prepare
from minidisp import InputError, hf, load, sampling, scoring
from minidisp.comparison import APART, Run, group_runs
from minidisp.config import Config
from minidisp.data import Dataset, strided_windows
from minidisp.sampling import Sampling
from minidisp.tokenizer import ByteTokenizer
from tests.conftest import small_config, write_text
from train import main as train_main


def test_every_token_is_predicted_once_from_the_text_before_it(run, corpus):
    """One token after the other through the whole model, in float64."""
    model, tokenizer = load(run)
    model = model.double()
    tokens = Dataset(corpus).split("val").slice(0, 100)
    got = scoring.token_nats(model, tokens, tokenizer.eos_id, 8, torch.device("cpu"))
    stream = [tokenizer.eos_id, *tokens]
    for i in range(100):
        # The first window reads from the start; later ones advance by 8 and reach back as far as the context of 32
        # goes.
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
    assert scores[1]["versus_first"] == {
        "bits_per_byte": 0.0,
        "low": 0.0,
        "high": 0.0,
        "verdict": "no difference",
        "nats_per_token": 0.0,
        "tokens_better": 0.5,
    }
    printed = capsys.readouterr().out
    assert "no difference: both predict the same on this text" in printed
    assert "settings that differ" not in printed


def test_an_untrained_model_is_worse(run, corpus, tmp_path, capsys):
    train_main(small_config(corpus, tmp_path / "untrained", max_steps=0))
    scores = evaluation.main([str(run), str(tmp_path / "untrained"), "--figures", str(tmp_path / "figures")])
    versus = scores[1]["versus_first"]
    assert 0 < versus["low"] < versus["bits_per_byte"] < versus["high"]
    assert versus["bits_per_byte"] == pytest.approx(scores[1]["bits_per_byte"] - scores[0]["bits_per_byte"], abs=1e-9)
    assert versus["verdict"] == "one seed"
    assert versus["nats_per_token"] == pytest.approx(scores[1]["loss"] - scores[0]["loss"], abs=1e-9)
    assert 0 < versus["tokens_better"] < 0.5
    printed = capsys.readouterr().out.split("untrained against small", 1)[1]
    assert "no verdict from one seed: the interval covers only the text" in printed
    assert printed.index("no verdict") < printed.index("bits per byte")  # the answer first
    assert re.search(r"^max_steps +12 +0$", printed, re.M)
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        f"{name}.{suffix}" for name in ("heatmap", "cosine_by_layer", "loss_by_step") for suffix in ("png", "pdf")
    }


def seed_run(name, seed, lr=0.1, data="d", tokenizer="t", **settings):
    return Run(name, tokenizer, {"seed": seed, "lr": lr, "data": "books", "batch_size": 8, **settings}, data)


def text_results(runs, *nats):
    n_bytes = 200 * scoring.BLOCK_BYTES
    scores = [
        {"name": r.name, "tokenizer": r.tokenizer, "bytes": n_bytes, "bits_per_byte": x.sum() / math.log(2) / n_bytes}
        for r, x in zip(runs, nats, strict=True)
    ]
    blocks = np.full(200, scoring.BLOCK_BYTES)
    return [scoring.Result(s, x, blocks, x) for s, x in zip(scores, nats, strict=True)]


def test_a_plain_sentence_for_every_outcome():
    """Blocks with a certain difference, and with differences of both signs; one seed each, so there is no verdict."""
    rng = np.random.default_rng(0)
    base = rng.uniform(500, 900, 200)
    runs = [
        seed_run("a", 0),
        seed_run("b", 0, 0.2),
        seed_run("c", 0, 0.2, tokenizer="u"),
        seed_run("d", 0, 0.3),
        seed_run("e", 0, 0.2, data="other"),
        Run("f", "t"),
        seed_run("g", 1),
    ]
    nats = [base, base * 0.98, base * 1.02, base + rng.normal(0, 30, 200), base * 0.9, base * 0.9, base * 0.97]
    results = text_results(runs, *nats)
    group, better, worse, same, other, unknown = evaluation.compare_texts(runs, results).sentences
    assert re.fullmatch(r"a and 1 more: 2 seeds, mean \d\.\d+ bits/byte, standard deviation 0\.\d+", group)
    assert re.fullmatch(
        r"b against a and 1 more: -0\.0\d+ bits/byte, 95 % interval over the text -\S+ to -\S+: no verdict "
        r"from one seed: .* \(2\.0% fewer bits, 100% of the tokens predicted better\)",
        better,
    )
    assert re.fullmatch(r"c .* \+.* to \+\S+: no verdict, .* different tokenizers \(2\.0% more bits\)", worse)
    assert re.fullmatch(r"d .* -\S+ to \+\S+: no verdict from one seed: .*\d\d% of .*\)", same)
    assert re.fullmatch(r"e .* no verdict, .* different data: this text may be training text .*", other)
    assert re.fullmatch(r"f .* no verdict, since the training data of f is not known .*", unknown)
    assert "tokens_better" not in results[2].scores["versus_first"]
    verdicts = [result.scores["versus_first"]["verdict"] for result in results[1:]]
    assert verdicts == ["one seed", "another tokenizer", "one seed", "other data", "data unknown", "same configuration"]


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [
        ([0.02, 0.021, 0.019], "better"),
        ([-0.02, -0.021, -0.019], "worse"),
        ([0.02, -0.02, 0.01], "not significant"),
        ([0.02, 0.02], "two seeds"),
    ],
)
def test_a_verdict_takes_three_pairs_of_seeds(gains, verdict):
    """Paired by seed, in any order, with any measures; logging and device settings do not change the configuration."""
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(1)
    bases = [rng.uniform(500, 900, 200) * (1 + 0.1 * seed) for seed in range(len(gains))]  # seeds differ by more
    first = [seed_run(f"x-s{seed}", seed, log_every=seed) for seed in range(len(gains))]
    other = [seed_run(f"y-s{seed}", seed, 0.2, device="cpu", out=str(seed)) for seed in range(len(gains))]
    runs = [*first, *other[::-1], seed_run("y-s9", 9, 0.2)]
    nats = [*bases, *[base * (1 - gain) for base, gain in zip(bases, gains, strict=True)][::-1], bases[0]]
    results = text_results(runs, *nats)
    found = evaluation.compare_texts(runs, results)
    assert [group["name"] for group in found.groups] == ["x", "y"]
    assert found.groups[1]["seeds"] == [*range(len(gains))[::-1], 9]
    versus = found.groups[1]["versus_first"]
    assert (versus["pairs"], versus["verdict"]) == (len(gains), verdict)
    bits = {run.name: result.scores["bits_per_byte"] for run, result in zip(runs, results, strict=True)}
    pairs = [[bits[f"{name}-s{seed}"] for seed in range(len(gains))] for name in "yx"]
    interval = stats.ttest_rel(*pairs).confidence_interval(0.95)
    assert (versus["low"], versus["high"]) == pytest.approx((interval.low, interval.high))
    words = {"not significant": "not significant with 3 seeds"}.get(verdict, verdict)
    assert verdict == "two seeds" or words == found.sentences[-1].split(": ")[-1].split(" (")[0]
    # A batch split into micro-steps is the same configuration, another number of sequences is not.
    assert len(group_runs([seed_run("a", 0), seed_run("b", 1, batch_size=4, grad_accum=2)])) == 1
    assert len(group_runs([seed_run("a", 0), seed_run("b", 1, batch_size=4)])) == 2


def test_settings_that_do_not_count_exist():
    assert {field.name for field in dataclasses.fields(Config)} >= APART


def test_a_corpus_that_changed_between_two_runs(tmp_path, capsys):
    """The second run's held-out text may be training text of the first."""
    text, out = write_text(tmp_path / "text.txt", words=4000), tmp_path / "corpus"
    command = ["--tokenizer", "byte", "--out", str(out), "--input"]
    prepare.main([*command, str(text)])
    train_main(small_config(out, tmp_path / "a", max_steps=2, warmup_steps=1))
    (tmp_path / "shorter.txt").write_text(text.read_text()[:15000])
    prepare.main([*command, str(tmp_path / "shorter.txt"), "--overwrite"])
    train_main(small_config(out, tmp_path / "b", max_steps=2, warmup_steps=1))
    capsys.readouterr()
    scores = evaluation.main([str(tmp_path / "a"), str(tmp_path / "b")])
    shown = capsys.readouterr().out
    assert scores[1]["versus_first"]["verdict"] == "other data"
    assert f"{out} differs from the corpus that a was trained on" in shown
    assert "no verdict, since they were trained on different data" in shown


def test_one_block_of_text_tells_nothing(run, capsys):
    scores = evaluation.main([str(run), str(run), "--tokens", "200"])
    assert scores[1]["versus_first"]["verdict"] == "too little text to tell"
    assert "nan" not in capsys.readouterr().out


def test_two_runs_on_one_block_of_text_have_no_interval(run, corpus, tmp_path, capsys):
    train_main(small_config(corpus, tmp_path / "other", max_steps=1, warmup_steps=1, log_every=7))
    scores = evaluation.main([str(run), str(tmp_path / "other"), "--tokens", "100"])
    assert scores[1]["versus_first"]["verdict"] == "too little text to tell"
    shown = capsys.readouterr().out
    assert "too little text for an interval: no verdict from one seed" in shown
    assert "nan" not in shown
    assert "log_every" not in shown


def test_names_tell_runs_apart(tmp_path):
    paths = [str(tmp_path / part) for part in ("a/x", "b/x", "a/x/ckpt_last.pt", "b/x/ckpt_last.pt")]
    assert evaluation.short_names([]) == []
    assert evaluation.short_names(paths[:1] * 2) == ["x", "x"]
    assert evaluation.short_names(paths[:2]) == ["a/x", "b/x"]
    assert evaluation.short_names(paths[2:]) == ["a/x/ckpt_last.pt", "b/x/ckpt_last.pt"]


def test_layers_prints_every_layer(run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")  # a narrow terminal gets a column per layer
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


class Script:
    """A model with predefined samples: the tokens for each seed."""

    def __init__(self, *tokens_by_seed):
        self.tokens_by_seed, self.given, self.asked = tokens_by_seed, 0, []
        self.wte = types.SimpleNamespace(weight=torch.zeros(1))

    def stream(self, idx, max_new_tokens, temperature, top_k, top_p, seed, stop_token):
        seeds = [seed] if isinstance(seed, int) else seed
        self.asked.append((idx.tolist(), seed))
        for token in itertools.islice(
            zip(*(self.tokens_by_seed[seed] for seed in seeds), strict=False), max_new_tokens
        ):
            self.given += 1
            yield torch.tensor(token)[:, None]
            if {*token} <= {*stop_token}:
                return


@given(st.text(max_size=12), st.text(min_size=1, max_size=3), st.binary(max_size=3))
@settings(max_examples=200, deadline=None)
def test_a_stream_is_whole_characters_that_add_up(text, stop, broken):
    """Compared with decoding everything at once and cutting then; the text may end in bytes that are not UTF-8."""
    tokenizer, bits = ByteTokenizer(), []
    data = text.encode() + broken
    whole = data.decode(errors="replace")
    for end in (None, stop):
        bits.clear()
        sample = sampling.stream_sample(Script(data), tokenizer, "x", Sampling(stop=end), 0, bits.append)
        assert "".join(bits) == sample["continuation"] == (whole.split(stop)[0] if end else whole)
        assert all("\ufffd" not in bit for bit in bits) or "\ufffd" in whole
    if stop not in whole:
        assert sample["new_tokens"] == len(data)


def test_a_sample_ends_where_it_should():
    tokenizer, bits = ByteTokenizer(), []
    model = Script(b"one\ntwo\n\nthree")
    sample = sampling.stream_sample(model, tokenizer, "", Sampling(stop="\n\n"), 0, bits.append)
    assert sample["continuation"] == "one\ntwo"
    assert model.given == sample["new_tokens"] == 9  # nothing is sampled after it
    assert bits[:4] == ["o", "n", "e", ""]  # the newline may be the first of two, and waits
    assert bits[4] == "\nt"
    model = Script([*b"a", 256, *b"b"])
    assert sampling.stream_sample(model, tokenizer, "\u00e9", Sampling(), 0, bits.append)["continuation"] == "a"
    assert model.asked == [([[256, 0xC3, 0xA9]], 0)]
    assert (
        sampling.stream_sample(Script(b"abcdef"), tokenizer, "", Sampling(max_new_tokens=3), 0, bits.append)[
            "new_tokens"
        ]
        == 3
    )


@pytest.mark.parametrize("every", [2, 16])
def test_a_sample_ends_there_also_where_tokens_are_fetched_rarely(monkeypatch, every):
    """More tokens may have been sampled after EOS; an incomplete character before it is invalid."""
    tokenizer = ByteTokenizer()
    for script in ([*b"abc\xc3", 256, *b"de"], [256, *b"de"], b"one\ntwo\n\nthree", b"ab"):
        found = []
        for n in (1, every):
            monkeypatch.setattr(sampling, "look_every", lambda device, n=n: n)
            model, bits = Script(script), []
            model.stream = lambda *args, stop_token, stream=model.stream: stream(*args, stop_token=[-1])
            sample = sampling.stream_sample(model, tokenizer, "", Sampling(stop="\n\n"), 0, bits.append)
            found.append((sample["continuation"], sample["new_tokens"], "".join(bits)))
        assert found[0] == found[1]
    assert sampling.stream_sample(Script([*b"a\xc3", 256, 7]), tokenizer, "", Sampling(), 0, print)["new_tokens"] == 3


def test_prompts_are_answered_together_and_in_their_order():
    model = Script([*b"x\ny", 256, 7], [*b"zz", 256, 256])
    found = sampling.sample_all(model, ByteTokenizer(), ["bb", "a", "cc"], Sampling(samples=2, stop="\n"))
    assert [(s["prompt"], s["seed"], s["continuation"], s["new_tokens"]) for s in found] == [
        (prompt, seed, text, n) for prompt in ("bb", "a", "cc") for seed, text, n in ((0, "x", 4), (1, "zz", 3))
    ]
    assert sorted(len(idx) for idx, _ in model.asked) == [2, 4]


def test_a_batch_gives_the_same_samples_as_each_seed_alone(bpe_run):
    """Also if some end early and leave the batch, and if the context is full."""
    model, tokenizer = load(bpe_run)
    prompts = ["abc", "d e f g", "abd"]
    options = Sampling(samples=9, max_new_tokens=50, temperature=1.5, top_k=20, top_p=0.95, seed=3)
    stop = tokenizer.eos_id
    for _ in range(2):
        stops = {tokenizer.eos_id, stop}
        wanted = [(tokenizer.encode(prompt), seed) for prompt in prompts for seed in range(3, 12)]
        together = sampling.continue_all(
            model, [ids for ids, _ in wanted], options, [seed for _, seed in wanted], stops
        )
        for (ids, seed), got in zip(wanted, together, strict=True):
            alone = model.generate(torch.tensor([ids]), 50, 1.5, 20, 0.95, seed, stop_token=[*stops])
            assert got == alone[0, len(ids) :].tolist()
        stop = max(
            {*together[0]}, key=lambda token: sum(ids.count(token) for ids in together)
        )  # one that many samples contain sooner or later
    assert len({len(ids) for ids in together}) > 1


def test_one_prompt_many_runs_and_seeds(run, tmp_path, capsys):
    """Exactly the text generated by hand, both in the JSON file and on screen."""
    path = tmp_path / "new" / "samples.json"
    flags = [
        "--max-new-tokens",
        "20",
        "--samples",
        "2",
        "--seed",
        "5",
        "--top-k",
        "9",
        "--top-p",
        "0.9",
        "--temperature",
        "1.5",
    ]
    evaluation.main(
        [str(run), str(run / "ckpt_last.pt"), "--tokens", "100", "--sample", "abc ", "--json", str(path), *flags]
    )
    shown = capsys.readouterr().out
    scores = json.loads(path.read_text())
    model, tokenizer = load(run / "ckpt_last.pt")
    for seed in (5, 6):
        prompt = torch.tensor([[tokenizer.eos_id, *tokenizer.encode("abc ")]])
        out = model.generate(prompt, 20, 1.5, 9, 0.9, seed, stop_token=tokenizer.eos_id)[0, 5:]
        (sample,) = (s for s in scores[1]["samples"] if s["seed"] == seed)
        assert sample["continuation"] == tokenizer.decode(out.tolist())
        assert f"--- ckpt_last.pt, seed {seed}\nabc {sample['continuation']}\n" in shown
    assert [s["seed"] for s in scores[0]["samples"]] == [5, 6]
    assert re.search(r"^\S+: [\d,]+ tokens in \d+\.\d s, [\d,]+ per second$", shown, re.M)


def test_a_file_of_prompts(run, tmp_path, monkeypatch, capsys):
    """Nothing is evaluated; greedy continuations do not depend on which prompts are batched together."""
    monkeypatch.setattr(scoring, "token_nats", None)
    prompts, path = tmp_path / "prompts.txt", tmp_path / "out.json"
    prompts.write_bytes("\ufeffabc\r\n\n\u00e9 b\nxyz\n".encode())
    evaluation.main(
        [
            str(run),
            "--prompts",
            str(prompts),
            "--split",
            "none",
            "--json",
            str(path),
            "--temperature",
            "0",
            "--max-new-tokens",
            "15",
        ]
    )
    (scores,) = json.loads(path.read_text())
    assert [s["prompt"] for s in scores["samples"]] == ["abc", "\u00e9 b", "xyz"]
    for sample in scores["samples"]:
        again = sampling.stream_sample(*load(run), sample["prompt"], Sampling(temperature=0, max_new_tokens=15), 0, str)
        assert sample["continuation"] == again["continuation"]
    assert "loss" not in scores


def test_playing_at_the_terminal(run, monkeypatch, capsys):
    monkeypatch.setattr(scoring, "token_nats", None)  # nothing is evaluated
    monkeypatch.setattr("sys.stdin", io.StringIO("abc\nde f\n\nnot this\n"))
    (scores,) = evaluation.main([str(run), "--sample", "-", "--max-new-tokens", "4"])
    assert [s["prompt"] for s in scores["samples"]] == ["abc", "de f"]
    monkeypatch.setattr("sys.stdin", io.StringIO("abc"))  # then Ctrl-D
    assert len(evaluation.main([str(run), "--sample", "-", "--max-new-tokens", "4"])[0]["samples"]) == 1
    assert "bits per byte" not in capsys.readouterr().out


def test_files_are_there_before_anything_is_printed_or_sampled(run, tmp_path, monkeypatch):
    """Not even a closed stdout can lose them."""

    def refuse(*_, **__):
        raise RuntimeError("no more output")

    monkeypatch.setattr(evaluation, "stream_sample", refuse)
    files = [tmp_path / "a.json", tmp_path / "new" / "a.html"]
    flags = [str(run), "--tokens", "300", "--json", str(files[0]), "--html", str(files[1])]
    with pytest.raises(RuntimeError, match="no more output"):
        evaluation.main([*flags, "--sample", "x"])
    assert json.loads(files[0].read_text())[0]["tokens"] == 300
    assert "minidisp: evaluation report" in files[1].read_text()
    for file in files:
        file.unlink()
    monkeypatch.setattr("sys.stdout", types.SimpleNamespace(write=refuse, flush=refuse))
    with pytest.raises(RuntimeError, match="no more output"):
        evaluation.main(flags)
    assert all(file.exists() for file in files)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-16"])
def test_a_sample_on_any_stdout(run, tmp_path, monkeypatch, encoding):
    monkeypatch.setattr(
        evaluation, "stream_sample", lambda *rest: rest[-1]("\u4e2d\U0001f642") or {"new_tokens": 1, "seconds": 1}
    )
    stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr("sys.stdout", stdout)
    evaluation.main([str(run), "--split", "none", "--sample", "\u0436", "--json", str(tmp_path / "r.json")])
    stdout.flush()
    written = stdout.buffer.getvalue().decode(encoding)
    assert ("\u0436\u4e2d\U0001f642" if encoding == "utf-16" else "\\u0436\\u4e2d\\U0001f642") in written


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--sample", "caf\udce9"], "--sample is not UTF-8"),
        (["--sample", "x", "--stop", "\udce9"], "--stop is not UTF-8"),
        (["--sample", "x", "--stop", ""], "--stop is empty"),
        (["--sample", "x", "--temperature", "nan"], "--temperature is nan"),
        (["--sample", "x", "--temperature", "1e-45"], "--temperature is 1e-45"),
        (["--sample", "x", "--temperature", "inf"], "--temperature is inf"),
        (["--sample", "x", "--top-p", "nan"], "--top-p is nan"),
        (["--sample", "x", "--top-k", "0"], "--top-k is 0"),
        (["--sample", "x", "--samples", "0"], "--samples is 0"),
        (["--sample", "x", "--max-new-tokens", "-3"], "--max-new-tokens is -3"),
        (["--sample", "x", "--seed", "-1"], "--seed is -1"),
        (["--temperature", "0.5"], "--temperature needs --sample"),
        (["--seed", "3"], "--seed needs --sample"),
        (["--split", "none"], "nothing to do"),
        (["--split", "none", "--sample", "x", "--html", "x.html"], "--html needs held-out text"),
        (["--prompts", "EMPTY"], "contains no prompts"),
        (["--prompts", "LATIN"], "LATIN, line 2, is not UTF-8"),
        (["--prompts", ""], "No such file"),
        (["--json", "FOLDER"], "--json 'FOLDER' is a folder"),
        (["--json", ""], "--json '' is a folder"),
        (["--json", "/dev/null"], "not a regular file"),
        (["--json", "EMPTY/deeper/x.json"], "EMPTY/deeper/x.json cannot be written: Not a directory"),
        (["--json", "x" * 255], "cannot be written: File name too long"),
        (["--html", "/proc/x/y.html"], "--html /proc/x/y.html cannot be written"),
        (["--figures", "EMPTY"], "--figures EMPTY is not a folder"),
        (["--figures", "/proc/x"], "--figures /proc/x cannot be written"),
        (["--json", "same", "--html", "FOLDER/../same"], "different paths"),
        (["--texts", "-1"], "--texts"),
        (["--minimal-pairs", "*.nothing"], "no such file"),
        (["--minimal-pairs", ""], "no such file"),
        (["--minimal-pairs", "EMPTY"], "no rows"),
        (["--minimal-pairs", "EMPTY", "b.jsonl"], "quote the pattern"),
    ],
)
def test_unsupported_options_are_rejected_before_the_first_forward_pass(
    run, tmp_path, monkeypatch, capsys, flags, expected
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("minidisp.model.GPT.forward", None)
    (tmp_path / "EMPTY").write_text("\n")
    (tmp_path / "LATIN").write_bytes(b"good\nbad \xe9\n")
    (tmp_path / "FOLDER").mkdir()
    before = sorted(tmp_path.iterdir())
    assert evaluation.cli([str(run), *flags]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_a_model_that_diverged_is_not_sampled_from_or_compared(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    state = torch.load(run / "ckpt_last.pt")
    state["model"]["h.0.mlp.c_fc.weight"][3, 5] = math.nan
    torch.save(state, tmp_path / "run" / "ckpt_last.pt")
    broken = str(tmp_path / "run" / "ckpt_last.pt")
    for flags in (["--sample", "-"], ["--texts", "2"]):
        with pytest.raises(InputError, match=r"ckpt_last\.pt cannot be sampled from"):
            evaluation.main([broken, *flags])
    for runs in ([str(run), broken], [broken, str(run)]):
        scores = evaluation.main([*runs, "--tokens", "2000"])
        assert scores[1]["versus_first"]["verdict"] == "undefined"
        assert "tokens_better" not in scores[1]["versus_first"]
        assert "undefined, as the loss of ckpt_last.pt is NaN or Inf" in capsys.readouterr().out


# Minimal pairs


def write_pairs(folder, seed=0, n=15):
    """Two files of pairs over the letters of the corpus, with very different lengths, some with two equal sentences."""
    rng = np.random.default_rng(seed)

    def sentence():
        return " ".join(
            "".join(rng.choice([*"abcdefghijklmnop"], rng.integers(1, 9))) for _ in range(rng.integers(1, 12))
        )

    folder.mkdir()
    for name, field in (("first", "syntax"), ("second", None)):
        lines = []
        for i in range(n):
            good = sentence()
            record = {
                "sentence_good": good,
                "sentence_bad": good if i % 10 == 0 else sentence(),
                "linguistics_term": f"t{i % 3}",
            }
            lines.append(json.dumps({**record, **({"field": field, "UID": name} if field else {})}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "*.jsonl"


def slow_values(model, tokenizer, pattern):
    """The score of every pair in the files, one sentence and one window at a time, in float64."""
    model = model.double()
    values = {}
    for file in sorted(pattern.parent.iterdir()):
        values[file.stem] = []
        for line in file.read_text().splitlines():
            totals = []
            for key in ("sentence_good", "sentence_bad"):
                stream = [tokenizer.eos_id, *tokenizer.encode(json.loads(line)[key])]
                total = 0.0
                for window in strided_windows(len(stream) - 1, model.config.block_size, model.config.block_size // 2):
                    logits = model(torch.tensor([stream[window.context_start : window.stop]])).logits[0]
                    for i in range(window.start, window.stop):
                        total += logits[i - window.context_start].log_softmax(-1)[stream[i + 1]].item()
                totals.append(total)
            values[file.stem].append(1.0 if totals[0] > totals[1] else 0.5 if totals[0] == totals[1] else 0.0)
    return values


@pytest.mark.parametrize("tokenizer", ["byte", "bpe", "hugging face"])
def test_minimal_pairs_agree_with_a_loop(run, bpe_run, tmp_path, capsys, tokenizer):
    """Many sentences are longer than the context of 32 tokens, others far shorter."""
    pattern = write_pairs(tmp_path / "pairs")
    who, loaded = [str(run)], load(run)
    if tokenizer == "bpe":
        who, loaded = [str(bpe_run)], load(bpe_run)
    if tokenizer == "hugging face":
        pytest.importorskip("tokenizers")
        hf.export(bpe_run, tmp_path / "folder")
        who, loaded = ["--hf", str(tmp_path / "folder")], hf.load(tmp_path / "folder")
    (scores,) = evaluation.main([*who, "--split", "none", "--minimal-pairs", str(pattern)])
    found, want = scores["minimal_pairs"], slow_values(*loaded, pattern)
    assert found["by_file"].keys() == {"first", "second"}
    for name, part in found["by_file"].items():
        assert part["accuracy"] == pytest.approx(np.mean(want[name]), abs=1e-12)
        assert 0 <= part["low"] < part["accuracy"] < part["high"] <= 1
    everything = want["first"] + want["second"]
    assert (found["pairs"], found["accuracy"]) == (30, pytest.approx(np.mean(everything), abs=1e-12))
    assert {name: part["pairs"] for name, part in found["by_field"].items()} == {"syntax": 15}
    for i, (name, part) in enumerate(found["by_term"].items()):
        assert name == f"t{i}"
        assert part["accuracy"] == pytest.approx(np.mean(want["first"][i::3] + want["second"][i::3]), abs=1e-12)
    shown = capsys.readouterr().out
    assert re.search(rf"^all +30 +{100 * np.mean(everything):.1f} \(", shown, re.M)


def test_minimal_pairs_are_paired_between_runs(run, bpe_run, tmp_path, capsys):
    pattern = write_pairs(tmp_path / "pairs")
    page = tmp_path / "page.html"
    scores = evaluation.main(
        [str(run), str(run), str(bpe_run), "--tokens", "300", "--minimal-pairs", str(pattern), "--html", str(page)]
    )
    same, other = (s["minimal_pairs"]["versus_first"] for s in scores[1:])
    assert same == {"accuracy": 0.0, "low": 0.0, "high": 0.0, "verdict": "no difference"}
    first, third = (np.concatenate([*slow_values(*load(r), pattern).values()]) for r in (run, bpe_run))
    difference = third - first
    drawn = difference[np.random.default_rng(1).integers(0, 30, (20000, 30))].mean(axis=1)
    assert other["accuracy"] == pytest.approx(difference.mean(), abs=1e-12)
    assert [other["low"], other["high"]] == pytest.approx(np.quantile(drawn, (0.025, 0.975)), abs=0.034)
    shown = capsys.readouterr().out
    assert "of the minimal pairs, 95 % interval" in shown
    assert "<caption>minimal pairs</caption>" in page.read_text()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"sentence_good": "a"}', "sentence_bad is missing"),
        (b'{"sentence_good": "a", "sentence_bad": " "}', "sentence_bad"),
        (b'{"sentence_good": "a", "sentence_bad": 3}', "sentence_bad"),
        (b'{"sentence_good": "\\ud800", "sentence_bad": "b"}', "sentence_good"),
        (b'{"sentence_good": "a", "sentence_bad": "b", "field": ["x"]}', "field"),
        (b'{"sentence_good": "a", "sentence_bad": "b", "UID": "\\u001b[31m"}', "UID"),
        (b'{"sentence_good": "a", "sentence_bad": "b"', "not JSON"),
        (b'{"sentence_good": "\xe9", "sentence_bad": "b"}', "not JSON"),
        (b'["a", "b"]', "not a JSON object"),
    ],
)
def test_a_bad_pair_is_named(run, tmp_path, monkeypatch, line, expected):
    monkeypatch.setattr("minidisp.model.GPT.forward", None)
    good = b'{"sentence_good": "\\u05d0\\u200f!", "sentence_bad": "b"}'  # Hebrew, with a mark of its direction
    (tmp_path / "x[1].jsonl").write_bytes(b"\xef\xbb\xbf" + good + b"\n\n" + line + b"\r\n")
    with pytest.raises(InputError, match=rf"x\[1\]\.jsonl, line 3,.*{expected}"):
        evaluation.main([str(run), "--split", "none", "--minimal-pairs", str(tmp_path / "x[1].jsonl")])


# Text generation


@pytest.mark.parametrize("many", [False, True])
def test_how_it_writes(run, bpe_run, corpus, tmp_path, capsys, many):
    """One long document is cut into stretches; of many documents, those that are long enough are used whole."""
    flags, texts = [], None
    if many:
        (tmp_path / "in").mkdir()
        for i in range(60):
            write_text(tmp_path / "in" / f"{i}.txt", words=5 if i % 2 else 150, seed=i)
        command = [
            "--input",
            str(tmp_path / "in" / "*.txt"),
            "--name",
            "many",
            "--tokenizer",
            "byte",
            "--out",
            str(tmp_path / "many"),
        ]
        assert prepare.main(command) == 0
        flags = ["--data", str(tmp_path / "many"), "--split", "val"]
        documents = scoring.Text.read(Dataset(tmp_path / "many"), "val", 0).documents
        texts = [d for d in documents if len(d) > 300][:1]
    count = len(texts) if texts else 3
    scores = evaluation.main([str(run), str(bpe_run), *flags, "--texts", str(count), "--seed", "4"])
    shown = capsys.readouterr().out
    if not many:
        joined = "".join(scoring.Text.read(Dataset(corpus), "val", 0).documents)
        texts = [joined[i * (len(joined) // 3) :] for i in range(3)]
    assert scores[0]["writing"]["of"] == ("documents" if many else "stretches of the text")
    for who, score in zip((run, bpe_run), scores, strict=True):
        model, tokenizer = load(who)
        rows = [tokenizer.encode(text)[:160] for text in texts]
        for way, options in (("greedy", {"temperature": 0}), ("nucleus", {"temperature": 1, "top_p": 0.95, "seed": 4})):
            prompts = torch.tensor([[tokenizer.eos_id, *row[:32]] for row in rows])
            new = model.generate(prompts, 128, **options)[:, 33:].tolist()
            check_ngrams(score["writing"][way], new)
        check_ngrams(score["writing"]["true"], [row[32:] for row in rows])
    assert f"{scores[1]['writing']['greedy']['rep_2']:.3f}" in shown
    assert "not comparable across runs" in shown


def check_ngrams(found, rows):
    """By counting: an n-gram is repeated if it occurs earlier in the same text."""
    for n in (2, 3, 4):
        shares = []
        for row in rows:
            grams = [row[i : i + n] for i in range(len(row) - n + 1)]
            shares.append(sum(gram in grams[:i] for i, gram in enumerate(grams)) / len(grams))
        assert found[f"rep_{n}"] == pytest.approx(sum(shares) / len(shares), abs=1e-12)
    for n in (1, 2):
        grams = [tuple(row[i : i + n]) for row in rows for i in range(len(row) - n + 1)]
        assert found[f"distinct_{n}"] == pytest.approx(len(set(grams)) / len(grams), abs=1e-12)


def test_every_key_is_explained(run, tmp_path):
    """docs/metrics.md names all keys of the JSON file and of metrics.jsonl."""
    page = (Path(evaluation.__file__).parent / "docs" / "metrics.md").read_text(encoding="utf-8")
    explained = set(re.findall(r"`(\w+)`", page))
    pairs = write_pairs(tmp_path / "pairs", n=3)
    flags = [
        "--tokens",
        "2000",
        "--texts",
        "2",
        "--minimal-pairs",
        str(pairs),
        "--sample",
        "a",
        "--max-new-tokens",
        "2",
    ]
    scores = evaluation.main([str(run), str(run), *flags])[1]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    names = {"syntax", "t0", "t1", "t2", "first", "second"}  # of the topics of the pairs

    def keys(value) -> set[str]:
        if isinstance(value, list):
            return {key for item in value for key in keys(item)}
        return (
            value.keys() | {key for item in value.values() for key in keys(item)} if isinstance(value, dict) else set()
        )

    assert keys([scores, lines]) - names <= explained


def test_too_little_text_to_write_on(run, monkeypatch):
    monkeypatch.setattr("minidisp.model.GPT.forward", None)  # nothing is measured first
    with pytest.raises(InputError, match=r"--texts 50: the text is too short"):
        evaluation.main([str(run), "--tokens", "2000", "--texts", "50"])


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


@pytest.mark.skipif(sys.platform != "linux", reason="file names of any bytes")
def test_a_run_whose_name_is_not_utf_8(run, tmp_path):
    name = os.fsdecode(b"caf\xe9")
    shutil.copytree(run, tmp_path / name)
    (score,) = evaluation.main([str(tmp_path / name), "--tokens", "500", "--html", str(tmp_path / "page.html")])
    assert score["name"] == r"caf\xe9"
    assert r"caf\xe9" in (tmp_path / "page.html").read_text()


def test_a_context_of_one_token_and_a_context_for_no_model_are_refused(run, corpus, tmp_path, capsys):
    hf.export(run, tmp_path / "hf")
    base = ["--hf", str(tmp_path / "hf"), "--data", str(corpus), "--tokens", "100"]
    assert evaluation.cli([*base, "--block-size", "1"]) == 2
    assert "a context of one token" in capsys.readouterr().err
    assert evaluation.cli([str(run), "--block-size", "33"]) == 2
    assert "small has learned positions for 32 tokens only" in capsys.readouterr().err
