"""Examples as training data: rows, masks, packing, mixtures, and the loss against a loop over one example at a time."""

import functools
import json
import random

import numpy as np
import pytest
import torch
from conftest import write_text

import train
from data import prepare
from minidisp import InputError
from minidisp.config import command_line, from_dict, parse, to_dict
from minidisp.countermeasures import Teacher
from minidisp.data import Batches, Dataset, Examples, Mixture, pack, shares
from minidisp.model import GPT, GPTConfig
from minidisp.template import Template

WORDS = [*write_text.__doc__.split(), "x", "yy", "zzz"]


def dialogue(rng: random.Random, turns: int) -> list[dict]:
    say = lambda: " ".join(rng.choices(WORDS, k=rng.randint(1, 6)))  # noqa: E731
    return [{"role": ("user", "assistant")[i % 2], "content": say()} for i in range(turns)]


def write_rows(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="session")
def examples(tmp_path_factory):
    """120 dialogues of one to three exchanges in bytes, some ending in an unanswered turn."""
    folder, rng = tmp_path_factory.mktemp("examples"), random.Random(0)
    rows = [{"messages": dialogue(rng, rng.choice((2, 2, 3, 4, 6)))} for _ in range(120)]
    rows[7]["messages"].insert(0, {"role": "system", "content": "Be brief."})
    source = write_rows(folder / "rows.jsonl", rows)
    assert prepare.main(["--input", source, "--tokenizer", "byte", "--out", str(folder / "prepared")]) == 0
    return folder / "prepared"


@functools.cache
def rendered(corpus, split: str) -> list[tuple[list[int], list[bool]]]:
    """The examples of a split, computed from the template alone, in the order of the rows."""
    dataset, found = Dataset(corpus), []
    for line in (corpus.parent / "rows.jsonl").read_text().splitlines():
        messages = json.loads(line)["messages"]
        if split_of("\n".join(f"{m['role']}\n{m['content']}" for m in messages)) == split:
            found.append(Template.of(dataset.tokenizer).render(messages))
    return found


def split_of(text: str) -> str:
    import hashlib

    percent = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 100
    return "train" if percent < 90 else "val" if percent < 95 else "test"


def used(ids: list[int], counted: list[bool], block_size: int) -> tuple[list[int], list[bool]]:
    """The part of an example that is trained on: up to its last counted token, truncated at the start."""
    stop = len(counted) - counted[::-1].index(True)
    start = max(0, stop - block_size - 1)
    return ids[start:stop], counted[start:stop]


def test_shards_and_masks_follow_the_template(examples):
    dataset = Dataset(examples)
    assert dataset.meta["format"] == 2
    for name in ("train", "val", "test"):
        split, wanted = dataset.split(name), rendered(examples, name)
        assert split.documents == len(wanted)
        assert split.slice(0, split.tokens).tolist() == [i for ids, _ in wanted for i in ids]
        flags = [2 * (at == 0) + counts for _, counted in wanted for at, counts in enumerate(counted)]
        assert split.mask.slice(0, split.tokens).tolist() == flags
        counted = [i for ids, flags in wanted for i, counts in zip(ids, flags, strict=True) if counts]
        meta = dataset.meta["splits"][name]
        assert (meta["counted"], meta["bytes"]) == (len(counted), len(dataset.tokenizer.decode(counted).encode()))


@pytest.mark.parametrize("block_size", [16, 48, 128, 700])
@pytest.mark.parametrize("packed", [True, False])
def test_every_example_is_in_one_window_of_each_epoch(examples, block_size, packed):
    """Complete if it fits, otherwise its end; nothing else is counted, and windows are filled with examples only."""
    split = Dataset(examples).split("train")
    batches = Examples(split, block_size, seed=3, packing="separate" if packed else "none")
    wanted = sorted(used(*example, block_size) for example in rendered(examples, "train"))
    assert batches.cut == sum(
        len(u) < len(used(*e, 10**6)[0]) for e in rendered(examples, "train") for u in [used(*e, block_size)[0]]
    )
    openings = {tuple(used(*example, block_size)[0][:2]) for example in rendered(examples, "train")}
    for epoch in range(2):
        x, y, segments = batches.batch(epoch * batches.n, batches.n)
        assert x.shape == y.shape == segments.shape == (batches.n, block_size)
        found = []
        for row in zip(x, y, segments, strict=True):
            assert row[2][0] == 0
            assert set(np.diff(row[2])) <= {0, 1}
            for number in range(row[2][-1] + 1):
                ids, targets = (part[row[2] == number].tolist() for part in row[:2])
                if max(targets) < 0:  # it fills the window
                    assert len(ids) < 2 or tuple(ids[:2]) in openings
                    continue
                assert targets[-1] >= 0
                found.append(([*ids, targets[-1]], [t >= 0 for t in targets]))
                assert [t for t in targets if t >= 0] == [
                    i for i, t in zip([*ids, targets[-1]][1:], targets, strict=True) if t >= 0
                ]
        assert sorted(found) == sorted((ids, counted[1:]) for ids, counted in wanted)
        if packed:
            assert batches.n <= 1.1 * sum(len(ids) - 1 for ids, _ in wanted) / block_size + 1
    again = Examples(split, block_size, seed=3, packing="separate" if packed else "none")
    for first, count in ((5, 9), (batches.n - 2, 4), (7 * batches.n + 1, 3)):
        whole, parts = again.batch(first, count), [batches.batch(k, 1) for k in range(first, first + count)]
        for i, column in enumerate(whole):
            assert np.array_equal(column, np.concatenate([part[i] for part in parts]))


def test_packing_is_best_fit():
    assert pack([5, 4, 3, 2, 6], 8) == [[0, 2], [1, 3], [4]]
    rng = np.random.default_rng(0)
    sizes, room = rng.integers(1, 65, 500), 64
    windows: list[list[int]] = []
    for i, size in enumerate(sizes):
        rooms = [room - sum(sizes[window]) for window in windows]
        fitting = [left for left in rooms if left >= size]
        if fitting:  # of several equally full ones, any is fine
            windows[rooms.index(min(fitting))].append(i)
        else:
            windows.append([i])
    found = pack(sizes, room)
    assert sorted(i for window in found for i in window) == list(range(500))
    assert max(sizes[window].sum() for window in found) <= room
    assert len(found) == len(windows)


@pytest.mark.parametrize("arch", ["gpt2", "qwen3"])
@pytest.mark.parametrize("packed", [True, False])
def test_the_loss_and_its_gradient_equal_a_loop_over_one_example_at_a_time(examples, arch, packed):
    """In float64: each example goes through the model alone, at positions from 0; the counted losses are averaged."""
    block_size = 48
    torch.manual_seed(0)
    config = GPTConfig(arch=arch, n_layer=2, n_head=2, n_kv_head=1, n_embd=16, block_size=block_size, vocab_size=257)
    model = GPT(config).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    model.zero_grad()
    split = Dataset(examples).split("val")
    x, y, segments = map(
        torch.from_numpy, Examples(split, block_size, seed=0, packing="separate" if packed else "none").all()
    )
    loss = model(x, y, segments=segments).loss
    loss.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    total, number = 0.0, 0
    for example in rendered(examples, "val"):
        ids, counted = used(*example, block_size)
        log_p = model(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
        for at, (token, counts) in enumerate(zip(ids[1:], counted[1:], strict=True)):
            if counts:
                total, number = total - log_p[at, token], number + 1
    (total / number).backward()
    assert number == int((y >= 0).sum())
    assert loss.item() == pytest.approx((total / number).item(), rel=1e-12)
    for gradient, p in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, p.grad, rtol=1e-9, atol=1e-12)


SMALL_MODEL = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 48, "device": "cpu", "recipe": "gpt2"}
RUN = {
    **SMALL_MODEL,
    "batch_size": 4,
    "max_steps": 8,
    "warmup_steps": 2,
    "eval_every": 4,
    "eval_tokens": 300,
    "log_every": 1,
    "save_every": 4,
}


@pytest.fixture(scope="session")
def base(corpus, tmp_path_factory):
    """A run on text, to fine-tune."""
    out = tmp_path_factory.mktemp("base") / "base"
    train.main(from_dict({**RUN, "data": str(corpus), "out": str(out)}))
    return out


def lines(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run) -> dict:
    return torch.load(run / "ckpt_last.pt", weights_only=True)["model"]


@pytest.mark.parametrize("mixed", [False, True])
def test_a_fine_tuning_run_that_was_stopped_resumes_bit_for_bit(examples, corpus, base, tmp_path, mixed):
    data = [f"{examples}:3", f"{corpus}:1"] if mixed else str(examples)
    fields = {**RUN, "data": data, "init_from": str(base), "dispersion": 0.1, "noisy_embedding": 1.0, "dropout": 0.1}
    train.main(from_dict({**fields, "out": str(tmp_path / "whole")}))
    stopped = tmp_path / "stopped"
    train.main(from_dict({**fields, "out": str(stopped)}))
    (stopped / "ckpt_last.pt").unlink()
    train.main(from_dict({**fields, "out": str(tmp_path / "half"), "keep": 9}))
    (stopped / "ckpt_last.pt").write_bytes((tmp_path / "half" / "ckpt_00000004.pt").read_bytes())
    train.main(parse(["--resume", "--out", str(stopped)]))
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(tensor, weights(stopped)[name]), name
    kept = [
        {k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")}
        for line in lines(tmp_path / "whole")
    ]
    again = [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in lines(stopped)]
    assert again == kept
    assert (stopped / "template.json").exists()
    if mixed:
        assert {tuple(line["share_by_corpus"]) for line in kept if "ce" in line} == {(0.75, 0.25)}
        last = [line for line in kept if "val_loss" in line][-1]
        assert min(last["val_loss_by_corpus"]) < last["val_loss"] < max(last["val_loss_by_corpus"])


def test_training_counts_only_the_answers_for_any_micro_batch(examples, tmp_path):
    """The loss of a step is the mean over its counted targets, and so it is for every split into micro-batches."""
    fields = {**RUN, "data": str(examples), "max_steps": 3, "eval_every": 3}
    for size, accum in ((4, 1), (1, 4)):
        train.main(from_dict({**fields, "batch_size": size, "grad_accum": accum, "out": str(tmp_path / str(size))}))
    logged = [[line["ce"] for line in lines(tmp_path / size) if "ce" in line] for size in ("4", "1")]
    assert logged[0] == pytest.approx(logged[1], rel=1e-5)
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=48, vocab_size=257))
    x, y, segments = map(torch.from_numpy, Examples(Dataset(examples).split("train"), 48, 0).batch(0, 4))
    assert logged[0][0] == pytest.approx(model(x, y, segments=segments).loss.item(), rel=1e-5)


def test_a_mixture_takes_its_share_of_each_and_each_in_its_own_order(examples, corpus):
    parts = [Examples(Dataset(examples).split("train"), 48, 1), Batches(Dataset(corpus).split("train"), 48, 1)]
    alone = [part.batch(0, 60) for part in parts]
    taken = [0, 0]
    mixture = Mixture(parts, (3, 2))
    for k in range(50):
        x, y, segments = mixture.batch(k, 1)
        i = int(np.array_equal(x[0], alone[1][0][taken[1]]))
        assert np.array_equal(x[0], alone[i][0][taken[i]])
        assert np.array_equal(y[0], alone[i][1][taken[i]])
        assert np.array_equal(segments[0], alone[0][2][taken[0]] if i == 0 else np.zeros(48))
        taken[i] += 1
        assert abs(taken[0] - 0.6 * (k + 1)) < 1
    assert taken == [30, 20]
    assert shares((3, 2), 5, 10) == {"share_by_corpus": [0.6, 0.4]}
    whole = mixture.batch(7, 12)
    for i in range(3):
        assert np.array_equal(whole[i], np.concatenate([mixture.batch(k, 1)[i] for k in range(7, 19)]))


@pytest.mark.parametrize(
    ("data", "pairs"),
    [
        ("a", [("a", 1)]),
        (("a:3", "b:1"), [("a", 3), ("b", 1)]),
        (("a:0.5", "b"), [("a", 1), ("b", 2)]),
        (("a:6", "data/b:4"), [("a", 3), ("data/b", 2)]),
        ("C:\\corpus", [("C:\\corpus", 1)]),
    ],
)
def test_weights(data, pairs):
    assert from_dict({"data": data}).corpora == pairs
    saved = json.loads(json.dumps(to_dict(from_dict({"data": data}))))
    assert from_dict(saved).corpora == pairs
    line = command_line({"data": saved["data"]})
    assert parse(line).corpora == pairs


@pytest.mark.parametrize(
    "data", [["a:0", "b"], ["a:-1", "b"], ["a:1.2.3", "b"], ["a", "a:2"], ["a:99999999", "b"], ["a:0.001", "b:999999"]]
)
def test_invalid_weights_are_rejected(data):
    with pytest.raises(InputError, match=r"^--data"):
        from_dict({"data": data})


@pytest.mark.slow
@pytest.mark.slow
def test_two_processes_and_sharded_weights_give_the_run_of_one(examples, corpus, base, tmp_path):
    """With dispersion, noise and distillation, on a mixture; the halves of a step have different numbers of targets."""
    from test_distributed import assert_same_curve, curve, several

    fields = {"data": [f"{examples}:3", f"{corpus}:1"], "init_from": str(base), "distill": str(base), "dispersion": 0.1}
    fields |= {**RUN, "noisy_embedding": 1.0, "eval_tokens": 200}
    train.main(from_dict({**fields, "out": str(tmp_path / "one")}))
    several(2, corpus, tmp_path, [["two", fields], ["sharded", {**fields, "shard": True}]])
    for name in ("two", "sharded"):
        assert_same_curve(curve(tmp_path / name), curve(tmp_path / "one"), abs=2e-4, rel=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["gpt2", "qwen3"])
def test_a_compiled_model_keeps_examples_apart(examples, arch):
    torch.manual_seed(0)
    model = GPT(GPTConfig(arch=arch, n_layer=2, n_head=2, n_embd=16, block_size=48, vocab_size=257))
    x, y, segments = map(torch.from_numpy, Examples(Dataset(examples).split("train"), 48, 0).batch(0, 4))
    results = []
    for form in (model, torch.compile(model)):
        model.zero_grad()
        loss = form(x, y, segments=segments).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("arch", ["gpt2", "qwen3"])
def test_low_precision_keeps_examples_apart(examples, arch, dtype):
    """An example's losses equal those in a window of its own, up to rounding of the dtype."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(arch=arch, n_layer=2, n_head=2, n_embd=16, block_size=48, vocab_size=257))
    split, found = Dataset(examples).split("val"), []
    for packing in ("separate", "none"):
        x, y, segments = map(torch.from_numpy, Examples(split, 48, 0, packing).all())
        with torch.autocast("cpu", dtype):
            losses = model(x, y, segments=segments, loss_reduction="none").loss[y >= 0]
        found.append(losses.sort().values)
    torch.testing.assert_close(*found, rtol=2e-2, atol=2e-2)


def test_distillation_counts_the_answers_alone(examples, base, tmp_path):
    """As temperature^2 KL(teacher || student), averaged over the counted targets, each example by itself."""
    config = from_dict({**RUN, "data": str(examples), "distill": str(base), "vocab_size": 257})
    teacher = Teacher(config, Dataset(examples), torch.device("cpu"))
    torch.manual_seed(1)
    student = GPT(config)
    x, y, segments = map(torch.from_numpy, Examples(Dataset(examples).split("val"), 48, 0).all())
    hidden = student(x, y, return_hidden_states=True, segments=segments).hidden_states[-1]
    found = teacher.divergence(x, hidden, student.logits, y, segments)
    total, number, t = 0.0, 0, config.distill_temperature
    for example in rendered(examples, "val"):
        ids, counted = used(*example, 48)
        p, q = ((m(torch.tensor([ids[:-1]])).logits[0] / t).log_softmax(-1) for m in (teacher.model, student))
        chosen = torch.tensor(counted[1:])
        total, number = total + ((p.exp() * (p - q)).sum(-1)[chosen]).sum(), number + sum(counted[1:])
    torch.testing.assert_close(found, t**2 * total / number, rtol=1e-4, atol=1e-6)
