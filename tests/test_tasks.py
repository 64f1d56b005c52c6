"""Questions with choices and completions, against one token after the other in float64; and a conversation."""

import gzip
import io
import json
import math
import os
import re

import numpy as np
import pytest
import torch

import eval as evaluation  # not the builtin
from data import prepare
from minidisp import InputError, hf, load, sampling, tasks
from minidisp.template import Template

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """80 exchanges in bytes, most of them longer than the context of 32 tokens."""
    folder, rng = tmp_path_factory.mktemp("examples"), np.random.default_rng(0)
    rows = [{"prompt": words(rng, 3), "completion": words(rng, int(rng.integers(1, 9)))} for _ in range(80)]
    source = write(folder / "rows.jsonl", rows)
    assert prepare.main(["--input", source, "--tokenizer", "byte", "--out", str(folder / "prepared")]) == 0
    return folder / "prepared"


@pytest.fixture(scope="module", params=["gpt2", "qwen3"])
def model(request, bpe_corpus):
    """A model with random weights, larger than at initialisation, with a context of 24 tokens, and a tokenizer."""
    from minidisp.data import Dataset
    from minidisp.model import GPT, GPTConfig

    tokenizer = Dataset(bpe_corpus).tokenizer
    torch.manual_seed(0)
    config = GPTConfig(
        arch=request.param, n_layer=2, n_head=2, n_embd=32, block_size=24, vocab_size=tokenizer.vocab_size
    )
    model = GPT(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.ndim == 1), std=0.3)
    return model, tokenizer


def words(rng, n):
    return " ".join("".join(rng.choice([*"abcdefgh"], rng.integers(1, 6))) for _ in range(n))


def write(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return str(path)


def slow(model, tokenizer, context, continuation):
    """(log p, greedy, tokens) of a continuation, by the rules of lm-evaluation-harness, which truncate at the start."""
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    start = tokenizer.encode(stripped) if stripped else [tokenizer.eos_id]
    ids = tokenizer.encode(stripped + continuation) if stripped else [*start, *tokenizer.encode(continuation)]
    total, greedy = 0.0, True
    double = model.double()
    for i in range(len(start), len(ids)):
        window = ids[max(0, len(ids) - model.config.block_size - 1) : i]
        log_p = double(torch.tensor([window])).logits[0, -1].log_softmax(-1)
        total += log_p[ids[i]].item()
        greedy &= int(log_p.argmax()) == ids[i]
    model.float()
    return total, greedy, len(ids) - len(start)


def questions(rng, n):
    contexts = [words(rng, int(rng.integers(1, 9))) + str(rng.choice(["", " ", "\n ", ":"])) for _ in range(n - 2)] + [
        "",
        " \n",
    ]
    return [
        {
            "context": c,
            "choices": [f" {words(rng, int(rng.integers(1, 4)))}" for _ in range(2 + i % 3)],
            "answer": i % 2,
        }
        for i, c in enumerate(contexts)
    ]


def test_choices_agree_with_a_loop_in_float64(model, tmp_path):
    """Contexts that are empty, end in whitespace, are shared, or do not fit; duplicates; two kinds of files."""
    rows = questions(np.random.default_rng(0), 14)
    rows.append({**rows[3], "choices": rows[3]["choices"][::-1]})
    rows[0]["choices"] = [" same", " same"]  # of equal ones, the first is chosen
    rows[1]["choices"][0] = rows[1]["choices"][0].strip()  # no leading space
    pattern = write(tmp_path / "q.jsonl.gz", rows)
    read = tasks.read_choices(pattern)
    found = tasks.score_choices(*model, read, CPU)
    want = []
    for row in rows:
        log_p = [slow(*model, row["context"], choice)[0] for choice in row["choices"]]
        norm = [p / len(choice[choice.startswith(" ") :]) for p, choice in zip(log_p, row["choices"], strict=True)]
        want.append([float(np.argmax(values) == row["answer"]) for values in (log_p, norm)])
    assert np.array([found.acc, found.acc_norm]).T.tolist() == want
    assert found.acc[0] == 1
    assert found.acc[3] + found.acc[-1] in (0, 1, 2)


def test_log_probabilities_agree_with_a_loop_in_float64(model):
    rng = np.random.default_rng(1)
    rows = [(row["context"], choice, "here") for row in questions(rng, 12) for choice in row["choices"]]
    passages = tasks.continuations(model[1], 24, rows)
    found = tasks.score(model[0], passages, CPU)
    assert any(len(passage.ids) == 25 for passage in passages)  # some lost their start
    for (context, choice, _), nats, greedy, passage in zip(rows, found.nats, found.greedy, passages, strict=True):
        total, all_likeliest, tokens = slow(*model, context, choice)
        assert nats == pytest.approx(-total, abs=2e-4)
        assert (greedy, sum(passage.counted)) == (all_likeliest, tokens)


def test_a_continuation_longer_than_the_context_is_read_in_windows(model):
    """Every token is scored once, with at least half of the context before it."""
    ids = torch.randint(300, (70,), generator=torch.Generator().manual_seed(0)).tolist()
    found = tasks.score(model[0], [tasks.Passage(ids, [False] * 2 + [True] * 68)], CPU)
    double, want = model[0].double(), 0.0
    for i in range(2, 70):
        start = 0 if i < 25 else 12 * math.ceil((i - 24) / 12)
        start = min(start, 69 - 24)
        want -= double(torch.tensor([ids[start:i]])).logits[0, -1].log_softmax(-1)[ids[i]].item()
    model[0].float()
    assert found.nats[0] == pytest.approx(want, rel=1e-6)


def test_common_prefixes_are_computed_once():
    context = list(range(40))
    passages = [tasks.Passage([*context, 100 + i, 7, 8], [False] * 40 + [True] * 3) for i in range(4)]
    (row,) = tasks.plant(passages)
    assert len(row.tokens) == 39 + 4 * 3
    assert [row.tokens[node] for node in row.passages[0][1]] == [39, 100, 7]


@pytest.fixture(scope="module")
def task_files(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("tasks"), np.random.default_rng(3)
    write(folder / "a.jsonl", questions(rng, 12))
    write(folder / "b.jsonl.gz", questions(rng, 7))
    write(folder / "scored.json", [{"context": words(rng, 3), "completion": " " + words(rng, 1)} for _ in range(9)])
    write(folder / "asked.json", [{"prompt": words(rng, 2), "completion": words(rng, 2)} for _ in range(6)])
    return folder


def test_choices_in_the_json_file_and_on_the_page(run, bpe_run, task_files, tmp_path, capsys):
    flags = ["--choices", str(task_files), "--json", str(tmp_path / "s.json"), "--html", str(tmp_path / "p.html")]
    scores = evaluation.main([str(run), str(bpe_run), *flags])
    shown = capsys.readouterr().out
    saved = json.loads((tmp_path / "s.json").read_text())
    assert [score["choices"] for score in saved] == [score["choices"] for score in scores]
    assert "loss" not in scores[0]
    read = tasks.read_choices(str(task_files))
    for who, score in zip((run, bpe_run), scores, strict=True):
        found = tasks.score_choices(*load(who), read, CPU)
        assert score["choices"].keys() == {"overall", "a", "b"}
        assert score["choices"]["overall"]["acc"] == found.acc.mean()
        assert score["choices"]["a"]["acc_norm"] == found.acc_norm[:12].mean()
        low, high = score["choices"]["overall"]["acc_interval"]
        assert low < found.acc.mean() < high
    overall = scores[1]["choices"]["overall"]
    assert overall["chance"] == pytest.approx(np.mean([1 / len(question.choices) for question in read]))
    assert overall["versus_first"]["acc"] == pytest.approx(overall["acc"] - scores[0]["choices"]["overall"]["acc"])
    assert overall["versus_first"]["acc_verdict"] == "another tokenizer"
    assert "no verdict, since they were trained with different tokenizers" in shown
    assert re.search(
        rf"^b, per character \(acc_norm\) +7 .* {100 * scores[0]['choices']['b']['acc_norm']:.1f} \(", shown, re.M
    )
    assert "<caption>choices</caption>" in (tmp_path / "p.html").read_text()


def test_completions_are_scored_and_answered(run, task_files, tmp_path, capsys):
    """Greedy answers equal those for a single prompt; perplexities follow from the sum of the log-probabilities."""
    flags = ["--completions", str(task_files / "*ed.json"), "--max-new-tokens", "9", "--split", "none"]
    (scores,) = evaluation.main([str(run), *flags])
    found, (model, tokenizer) = scores["completions"], load(run)
    template = Template.of(tokenizer)
    rows = [json.loads(line) for line in (task_files / "scored.json").read_text().splitlines()]
    parts = [slow(model, tokenizer, row["context"], row["completion"]) for row in rows]
    scored = found["scored.json"]
    assert scored["perplexity"] == pytest.approx(math.exp(-np.mean([p[0] for p in parts])), rel=1e-4)
    assert scored["token_perplexity"] == pytest.approx(
        math.exp(-sum(p[0] for p in parts) / sum(p[2] for p in parts)), rel=1e-5
    )
    assert scored["acc"] == np.mean([p[1] for p in parts])
    answers = found["asked.json"]["answers"]
    for answer, line in zip(answers, (task_files / "asked.json").read_text().splitlines(), strict=True):
        ids = template.render([{"role": "user", "content": json.loads(line)["prompt"]}], True).ids
        out = model.generate(torch.tensor([ids[-31:]]), 9, 0, stop_token=[tokenizer.eos_id, template.stop_id])
        assert answer["answer"] == tokenizer.decode(out[0, min(len(ids), 31) :].tolist())
    exact = [a["answer"].strip() == a["completion"].strip() for a in answers]
    assert found["asked.json"]["exact_match"] == np.mean(exact)
    assert found["overall"]["rows"] == 15
    assert found["overall"]["tokens_per_second"] > 0
    shown = capsys.readouterr().out
    if why := tasks.no_sacrebleu():
        assert why in shown
        return
    import sacrebleu

    texts = [[a[key].strip() for a in answers] for key in ("answer", "completion")]
    assert found["asked.json"]["chrf"] == sacrebleu.corpus_chrf(texts[0], [texts[1]]).score
    assert found["asked.json"]["bleu"] == sacrebleu.corpus_bleu(texts[0], [texts[1]]).score


def test_every_assistant_message_of_a_dialogue_is_answered(run, tmp_path):
    """After the messages before it in the file, whatever was answered there; in all forms of dialogues."""
    messages = [
        {"role": "system", "content": "s"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"},
    ]  # fmt: skip
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    rows = [{"messages": messages}, {"conversations": turns}, {"instruction": "a", "input": "e", "output": "b"}]
    path = write(tmp_path / "dialogues.jsonl", rows)
    (scores,) = evaluation.main([str(run), "--completions", path, "--max-new-tokens", "5", "--split", "none"])
    found, (model, tokenizer) = scores["completions"]["dialogues"], load(run)
    template = Template.of(tokenizer)
    user = lambda text: [{"role": "user", "content": text}]  # noqa: E731
    expected = [(messages[:2], "b"), (messages[:4], "d"), (user("a"), "b"), (user("a\n\ne"), "b")]
    assert found["rows"] == len(expected)
    for answer, (before, completion) in zip(found["answers"], expected, strict=True):
        assert (answer["prompt"], answer["completion"]) == (before, completion)
        ids = template.render(before, True).ids[-31:]
        out = model.generate(torch.tensor([ids]), 5, 0, stop_token=[tokenizer.eos_id, template.stop_id])
        assert answer["answer"] == tokenizer.decode(out[0, len(ids) :].tolist())


def test_chrf_and_bleu_are_resampled_as_sacrebleu_does():
    sacrebleu = pytest.importorskip("sacrebleu")
    rng = np.random.default_rng(0)
    references = [words(rng, 8) for _ in range(40)]
    good = [r if i % 2 else r[: len(r) // 2] for i, r in enumerate(references)]
    bad = [r[: len(r) // 3] for r in references]
    a, b = (tasks.Translated(answers, references) for answers in (bad, good))
    metric = sacrebleu.CHRF()
    drawn = np.random.default_rng(5).integers(0, 40, (300, 40))
    pick = lambda texts, which: [texts[i] for i in which]  # noqa: E731
    scores = [metric.corpus_score(pick(good, w), [pick(references, w)]).score for w in drawn]
    assert b.interval("chrf") == pytest.approx(np.quantile(scores, (0.025, 0.975)), abs=3)
    difference, low, high = b.against(a, "chrf")
    assert difference == b.score("chrf") - a.score("chrf")
    assert 0 < low < difference < high


@pytest.mark.parametrize(
    ("flag", "row", "expected"),
    [
        ("choices", {"choices": [" a", " b"], "answer": 0}, "has no context"),
        ("choices", {"context": 3, "choices": [" a", " b"], "answer": 0}, "has no context"),
        ("choices", {"context": "x", "choices": [" a"], "answer": 0}, "has no choices"),
        ("choices", {"context": "x", "choices": " a", "answer": 0}, "has no choices"),
        ("choices", {"context": "x", "choices": [" a", " "], "answer": 0}, "a choice that is empty"),
        ("choices", {"context": "x", "choices": [" a", "\ud800"], "answer": 0}, "surrogate"),
        ("choices", {"context": "x", "choices": [" a", " b"], "answer": 2}, "no answer"),
        ("choices", {"context": "x", "choices": [" a", " b"], "answer": True}, "no answer"),
        ("choices", {"context": "x", "choices": [" a", " b"], "answer": "A"}, "no answer"),
        ("choices", ["x"], "not a JSON object"),
        ("completions", {"context": "x"}, "has no completion"),
        ("completions", {"prompt": "x", "completion": " \n"}, "empty completion"),
        ("completions", {"context": "x", "completion": ""}, "empty completion"),
        ("completions", {"prompt": "", "completion": "x"}, "empty prompt"),
        ("completions", {"prompt": "x", "context": "x", "completion": "y"}, "either a prompt or a context"),
        ("completions", {"text": "x"}, "either a prompt or a context"),
        ("completions", {"messages": [{"role": "user", "content": "x"}]}, "no assistant message"),
        ("completions", {"messages": "x"}, "not a list of messages"),
        (
            "completions",
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
            "a separate file for each kind",
        ),
        ("completions", {"prompt": "x", "completion": "y"}, "a separate file for each kind"),
    ],
)
def test_a_bad_row_is_refused_before_a_model_is_loaded(tmp_path, monkeypatch, flag, row, expected):
    monkeypatch.setattr(evaluation, "load_subjects", None)
    good = {"context": "x", "choices": [" a", " b"], "answer": 1, "completion": " a"}
    path = write(tmp_path / "rows.jsonl.gz", [good, row])
    with pytest.raises(InputError, match=rf"rows\.jsonl\.gz, line 2,? .*{expected}"):
        evaluation.main(["run", f"--{flag}", path])


def test_files_of_rows_have_a_size_that_memory_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "MOST_LINES", 50)
    monkeypatch.setattr(tasks, "MOST_BYTES", 1000)
    row = b'{"context": "x", "completion": " y"}\n'
    for content, line in ((row * 28, 28), (row + b"\n" * 90, 51)):
        (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(content))
        with pytest.raises(InputError, match=rf"x\.jsonl\.gz, line {line}: .*split it"):
            tasks.read_completions(str(tmp_path / "x.jsonl.gz"))


def test_a_file_and_its_compressed_twin_are_refused(tmp_path):
    for name in ("x.jsonl", "x.jsonl.gz"):
        write(tmp_path / name, [{"a": 1}])
    for pattern in (tmp_path, tmp_path / "x*"):
        with pytest.raises(InputError, match=r"x\.jsonl and .*x\.jsonl\.gz are the same rows"):
            tasks.read_rows("--choices", str(pattern))
    assert len(tasks.read_rows("--choices", str(tmp_path / "x.jsonl.gz"))) == 1


def test_files_that_cannot_be_read_are_refused(tmp_path):
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n' * 1000)[:-20])
    (tmp_path / "y.jsonl.gz").write_bytes(b'{"a": 1}\n')
    for name in ("x", "y"):
        with pytest.raises(InputError, match=rf"{name}\.jsonl\.gz is damaged"):
            tasks.read_rows("--choices", str(tmp_path / f"{name}.jsonl.gz"))


def test_a_continuation_without_its_own_token_is_reported(bpe_run):
    class Merging:
        eos_id = 0

        def encode_batch(self, texts, threads=1):
            return [[1] for _ in texts]

    with pytest.raises(InputError, match="line 7: a continuation adds no token to its context"):
        tasks.continuations(Merging(), 8, [("a", "b", "line 7")])


# The conversation


def test_a_conversation(run, monkeypatch, capsys):
    """Earlier turns are part of the prompt as long as they fit; then a line reports what is dropped."""
    model, tokenizer = load(run)
    template, asked = Template.of(tokenizer), []

    def stream_text(model, tokenizer, ids, options, seed, stops, write):
        asked.append((ids, seed, stops))
        write("\x1b[2Jok")
        return 1

    monkeypatch.setattr(sampling, "stream_text", stream_text)
    model.config = evaluation.dataclasses.replace(model.config, block_size=128)
    options = sampling.Sampling(max_new_tokens=16, seed=5)
    sampling.chat(model, tokenizer, template, iter(["one", " ", "two", "x" * 60, "y" * 300]), options, "be brief")
    shown = capsys.readouterr().out
    assert [seed for _, seed, _ in asked] == [5, 6, 7, 8]
    system, answer = {"role": "system", "content": "be brief"}, {"role": "assistant", "content": "\x1b[2Jok"}
    said = [{"role": "user", "content": "one"}, answer, {"role": "user", "content": "two"}]
    assert asked[1][0] == template.render([system, *said], True).ids
    assert "\x1b" not in shown
    assert shown.count("\\x1b[2Jok\n") == 4
    assert "(the context is full: the first" in shown
    assert "only its last 112 tokens are used" in shown
    assert all(len(ids) <= 112 for ids, _, _ in asked)
    assert asked[0][2] == {template.stop_id, tokenizer.eos_id}


def test_ctrl_c_stops_an_answer_and_the_conversation_continues(run, monkeypatch, capsys):
    model, tokenizer = load(run)
    calls = []

    def stream_text(model, tokenizer, ids, options, seed, stops, write):
        calls.append(ids)
        write("half")
        if len(calls) == 1:
            raise KeyboardInterrupt
        return 1

    monkeypatch.setattr(sampling, "stream_text", stream_text)
    model.config = evaluation.dataclasses.replace(model.config, block_size=512)
    sampling.chat(model, tokenizer, Template.of(tokenizer), iter(["a", "b"]), sampling.Sampling(), "")
    assert "half (stopped)\nhalf\n" in capsys.readouterr().out
    assert "half" in tokenizer.decode(calls[1])


def test_chat_through_a_pipe(run, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n\nagain\n"))
    assert evaluation.main([str(run), "--chat", "--max-new-tokens", "5", "--system", "x", "--temperature", "0"]) == []
    assert "> " not in capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"))
    assert evaluation.cli([str(run), "--chat"]) == 2
    assert "not UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--system", "x"], "--system needs --chat"),
        (["--chat", "--sample", "x"], "--sample cannot be combined with --chat"),
        (["--chat", "--json", "x.json"], "--json cannot be combined with --chat"),
        (["--chat", "--split", "val"], "--chat does not evaluate"),
        (["--chat", "OTHER"], "--chat needs exactly one model"),
        (["--chat", "--system", "\udce9"], "--system is not UTF-8"),
        (["--choices", "q.jsonl", "--temperature", "0.3"], "--temperature needs"),
        (["--text-file", "EMPTY"], "contains no text"),
        (["--text-file", "LATIN"], "not UTF-8 text: byte 5"),
        (["--text-file", "SPARSE"], "at most 33,554,432"),
        (["--prompts", "SPARSE"], "at most 4,194,304"),
        (["--text-file", "NUL"], "NUL bytes"),
        (["--text-file", "PIPE"], "PIPE: not a regular file"),
        (["--choices", "FOLDER"], "a.jsonl: not a regular file"),
        (["--text-file", "EMPTY", "--split", "val"], "replaces the corpus"),
        (["--text-file", "missing.txt"], "missing.txt"),
        (["--texts", "2000000000"], "the text is too short"),
        (["--block-size", "64", "--split", "none", "--sample", "x"], "learned positions for 32 tokens only"),
        (["--figures", "f", "--split", "none", "--hf", "x"], "draws training curves"),
    ],
)
def test_incompatible_options_are_rejected(run, tmp_path, monkeypatch, capsys, flags, expected):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("minidisp.model.GPT.forward", None)
    (tmp_path / "EMPTY").write_text("\n")
    (tmp_path / "LATIN").write_bytes(b"good \xe9\n")
    (tmp_path / "NUL").write_bytes(b"a\0b")
    with open(tmp_path / "SPARSE", "wb") as file:
        file.truncate(1 << 26)
    (tmp_path / "FOLDER").mkdir()
    os.mkfifo(tmp_path / "PIPE")
    os.mkfifo(tmp_path / "FOLDER" / "a.jsonl")
    write(tmp_path / "q.jsonl", [{"context": "x", "choices": [" a", " b"], "answer": 1}])
    assert evaluation.cli([str(run), *flags]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1


# Text files, curves, contexts, precision


def test_a_text_file_is_scored_as_one_document(run, bpe_run, tmp_path):
    text = "abc d\u00e9f " * 40
    (tmp_path / "letter.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    scores = evaluation.main([str(run), str(bpe_run), "--text-file", str(tmp_path / "letter.txt")])
    from minidisp.scoring import token_nats

    for who, score in zip((run, bpe_run), scores, strict=True):
        model, tokenizer = load(who)
        ids = np.array(tokenizer.encode(text))
        nats = token_nats(model, ids, tokenizer.eos_id, 16, CPU).sum()
        assert (score["tokens"], score["bytes"]) == (len(ids), len(text.encode()))
        assert score["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text.encode()))


def test_curves_need_no_model(run, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(evaluation, "load_subjects", None)
    evaluation.main([str(run), str(run), "--figures", str(tmp_path / "f"), "--split", "none"])
    assert {path.name for path in (tmp_path / "f").iterdir()} == {"loss_by_step.png", "loss_by_step.pdf"}


def test_a_shorter_context_for_a_run(run):
    model, _ = load(run)
    short = evaluation.with_context(model, 8, "run")
    idx = torch.arange(8)[None]
    assert torch.equal(short(idx).logits, model(idx).logits)
    (score,) = evaluation.main([str(run), "--block-size", "16", "--tokens", "300"])
    assert score["block_size"] == 16
    assert score["condensation"]["tokens_per_sequence"] == 16


def test_bfloat16_is_close_to_float32(run, task_files):
    flags = ["--tokens", "1500", "--choices", str(task_files), "--split", "val"]
    exact, fast = (evaluation.main([str(run), *flags, "--dtype", dtype])[0] for dtype in ("float32", "bfloat16"))
    assert fast["loss"] == pytest.approx(exact["loss"], rel=5e-3)
    assert fast["loss"] != exact["loss"]


def test_samples_of_weights_that_overflow_are_refused(run, tmp_path, capsys):
    """Finite weights, and logits that are not."""
    state = torch.load(run / "ckpt_last.pt")
    state["model"] = {name: tensor * 1e30 for name, tensor in state["model"].items()}
    torch.save(state, tmp_path / "ckpt_last.pt")
    (tmp_path / "tokenizer.model").write_bytes((run / "tokenizer.model").read_bytes())
    for flags in (["--sample", "x"], ["--chat"], ["--prompts", str(run / "config.json")]):
        assert evaluation.cli([str(tmp_path), "--split", "none", *flags]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_a_top_p_below_float32_is_greedy(run):
    (scores,) = evaluation.main([str(run), "--split", "none", "--sample", "abc", "--top-p", "1e-320"])
    (greedy,) = evaluation.main([str(run), "--split", "none", "--sample", "abc", "--temperature", "0"])
    assert scores["samples"][0]["continuation"] == greedy["samples"][0]["continuation"]


# Examples and several corpora


def test_examples_are_measured_one_by_one(examples, run, tmp_path, capsys):
    """Completions only, each example alone, in float64, one token after the other; then together with text."""
    from minidisp.data import Dataset

    assert prepared_alike(run, examples)
    (score,) = evaluation.main([str(run), "--data", str(examples), "--split", "test"])
    split = Dataset(examples).split("test")
    model, tokenizer = load(run)
    double, total, count, n_bytes = model.double(), 0.0, 0, 0
    for start, end in split.examples.tolist():
        ids, mask = split.slice(start, end).tolist(), split.mask.slice(start, end) & 1
        for piece in tasks._pieces(tasks.Passage(ids, mask.astype(bool).tolist()), 32):
            for i in (i for i, counts in enumerate(piece.counted) if counts):
                total -= double(torch.tensor([piece.ids[:i]])).logits[0, -1].log_softmax(-1)[piece.ids[i]].item()
        count += int(mask.sum())
        n_bytes += sum(len(tokenizer.token_bytes[token]) for token, c in zip(ids, mask, strict=True) if c)
    assert (score["tokens"], score["bytes"]) == (count, n_bytes) == (count, split.bytes)
    assert score["loss"] == pytest.approx(total / count, rel=1e-5)
    assert score["bits_per_byte"] == pytest.approx(total / math.log(2) / n_bytes, rel=1e-5)
    with pytest.raises(InputError, match="--texts needs a single plain-text corpus"):
        evaluation.main([str(run), "--data", str(examples), "--texts", "2"])


def prepared_alike(run, corpus):
    from minidisp.data import Dataset

    return load(run)[1].hash == Dataset(corpus).tokenizer.hash


def test_a_mixture_is_measured_by_corpus_and_in_sum(examples, corpus, tmp_path, capsys):
    from tests.conftest import small_config
    from train import main as train_main

    data = (f"{examples}:1", f"{corpus}:2")
    train_main(small_config(corpus, tmp_path / "mixed", max_steps=2, warmup_steps=1, data=data))
    capsys.readouterr()
    (score,) = evaluation.main([str(tmp_path / "mixed")])
    parts = [evaluation.main([str(tmp_path / "mixed"), "--data", str(part)])[0] for part in (examples, corpus)]
    assert len(score["corpora"]) == 2
    for got, want in zip(score["corpora"].values(), parts, strict=True):
        assert got["loss"] == want["loss"]
    nats = sum(part["loss"] * part["tokens"] for part in parts)
    assert score["loss"] == pytest.approx(nats / sum(part["tokens"] for part in parts), rel=1e-12)
    shown = capsys.readouterr().out
    assert "by corpus" in shown
    assert "was trained on" not in shown


def test_a_tokenizer_that_loses_text_is_refused(corpus):
    from minidisp.data import Dataset
    from minidisp.scoring import Text
    from minidisp.tokenizer import ByteTokenizer

    class WithoutDigits(ByteTokenizer):
        hash = "other"

        def encode(self, text):
            return super().encode("".join(c for c in text if not c.isdigit()))

    text = Text(["a1b2"], True, np.array([97]), ByteTokenizer())
    with pytest.raises(InputError, match=r"preserves only 2 of the 4 bytes of this text"):
        text.encode(WithoutDigits())
    with pytest.raises(InputError, match=r"preserves only 2 of the 4 bytes of this text"):
        Text.of("a1b2", WithoutDigits())
    assert len(Text.read(Dataset(corpus), "val", 0).tokens)


# Models of other families


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_other_families_through_transformers(bpe_run, bpe_corpus, tmp_path, capsys, family):
    """Loss and condensation on held-out text equal a loop over transformers' outputs; tasks are rejected."""
    transformers = pytest.importorskip("transformers")
    from minidisp.data import Dataset
    from minidisp.metrics import Condensation

    folder = tmp_path / family
    hf.export(bpe_run, folder)
    tokenizer = hf.load_tokenizer(folder)
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        (folder / name).unlink(missing_ok=True)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = transformers.AutoConfig.for_model(
        family, vocab_size=tokenizer.vocab_size, max_position_embeddings=32, **sizes
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(folder)
    (score,) = evaluation.main(["--hf", str(folder), "--data", str(bpe_corpus), "--tokens", "200", "--stride", "32"])
    tokens = Dataset(bpe_corpus).split("val").slice(0, score["tokens"])
    stream, nats, condensation = torch.tensor([[tokenizer.eos_id, *tokens]]), 0.0, Condensation()
    with torch.no_grad():
        for window in tasks.strided_windows(len(tokens), 32, 32):
            logits = model(stream[:, window.context_start : window.stop]).logits[0].double()
            new = slice(window.start - window.context_start, None)
            targets = stream[0, window.start + 1 : window.stop + 1]
            nats += torch.nn.functional.cross_entropy(logits[new], targets, reduction="sum").item()
        starts = np.linspace(0, len(tokens) - 32, len(tokens) // 32).astype(int)
        rows = torch.tensor(np.stack([tokens[start : start + 32] for start in starts]))
        condensation.update(model(rows, output_hidden_states=True).hidden_states)
    assert score["loss"] == pytest.approx(nats / len(tokens), rel=1e-5)
    want = condensation.result()["mean_cosine_by_layer"]
    assert len(want) == 4
    assert score["condensation"]["mean_cosine_by_layer"] == pytest.approx(want, abs=1e-5)
    assert evaluation.cli(["--hf", str(folder), "--split", "none", "--sample", "x"]) == 2
    assert "supports held-out text only: leave out --sample" in capsys.readouterr().err


# lm-evaluation-harness, if installed: pip install "minidisp[lm-eval]", with a clone in the working directory


def test_scores_equal_lm_evaluation_harness(bpe_run, tmp_path):
    lm_eval = pytest.importorskip("lm_eval")
    pytest.importorskip("transformers")
    rng = np.random.default_rng(7)
    rows = [
        {**row, "context": row["context"].rstrip(" \n") or "x"} for row in questions(rng, 60)
    ]  # it asserts that they are not blank
    rows = [{**row, "context": row["context"] + ["", " ", "\n"][i % 3]} for i, row in enumerate(rows)]
    scored = [{"context": words(rng, 4), "completion": " " + words(rng, 1)} for _ in range(50)]
    files = write(tmp_path / "q.jsonl", rows), write(tmp_path / "s.jsonl", scored)
    hf.export(bpe_run, tmp_path / "hf")
    choices = {
        "task": "choices",
        "output_type": "multiple_choice",
        "doc_to_choice": lambda d: [c[1:] for c in d["choices"]],
        "doc_to_target": lambda d: d["answer"],
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    completions = {
        "task": "completions",
        "output_type": "loglikelihood",
        "target_delimiter": "",
        "doc_to_target": lambda d: d["completion"],
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    }
    configs = []
    for config, file in zip((choices, completions), files, strict=True):
        configs.append(
            {
                **config,
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": {"test": file}},
                "test_split": "test",
                "doc_to_text": lambda d: d["context"],
            }
        )
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(tmp_path / "hf"), "dtype": "float32"},
        tasks=configs,
        device="cpu",
        bootstrap_iters=0,
        batch_size=8,
    )["results"]
    (found,) = evaluation.main([str(bpe_run), "--choices", files[0], "--completions", files[1]])
    for key in ("acc", "acc_norm"):
        assert found["choices"]["overall"][key] == results["choices"][f"{key},none"]
    assert found["completions"]["overall"]["acc"] == results["completions"]["acc,none"]
    assert found["completions"]["overall"]["perplexity"] == pytest.approx(
        results["completions"]["perplexity,none"], rel=1e-5
    )
