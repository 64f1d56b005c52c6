"""The TensorBoard and wandb loggers."""

import sys
import types

import pytest

import train
from minidisp import InputError, report
from minidisp.runtime import checkpoint
from tests.conftest import small_config


def test_tensorboard_matches_metrics_jsonl(corpus, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    out = tmp_path / "run"
    train.main(small_config(corpus, out, tensorboard=True, max_steps=6))
    train.main(small_config(corpus, out, tensorboard=True, max_steps=8, resume=True))
    events = accumulator.EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    lines = report.read_metrics(out / "metrics.jsonl")
    for name in ("loss", "lr", "val_loss"):
        scalars = {event.step: event.value for event in events.Scalars(name)}
        assert scalars == pytest.approx({line["step"]: line[name] for line in lines if name in line}, rel=1e-6)
    last = [event.value for event in events.Scalars("mean_cosine_by_layer/02")][-1]
    assert last == pytest.approx(lines[-1]["mean_cosine_by_layer"][2], rel=1e-6)
    train.main(small_config(corpus, out, overwrite=True, max_steps=1))
    assert list((out / "tensorboard").iterdir()) == []


def test_wandb_matches_metrics_jsonl(corpus, tmp_path, monkeypatch):
    calls = []

    class Run:
        def log(self, scalars, step):
            calls.append((step, scalars))

        def finish(self):
            calls.append("finish")

    def init(**options):
        calls.append(options)
        return Run()

    fake = types.SimpleNamespace(init=init, Error=RuntimeError)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    out = tmp_path / "run"
    train.main(small_config(corpus, out, wandb=True, max_steps=2))
    options, *logged, last = calls
    assert (options["project"], options["name"], options["dir"]) == ("minidisp", "run", str(out))
    assert options["config"]["max_steps"] == 2
    assert last == "finish"
    lines = report.read_metrics(out / "metrics.jsonl")
    assert [step for step, _ in logged] == [line["step"] for line in lines]
    for (_, scalars), line in zip(logged, lines, strict=True):
        for name in line.keys() - {"step", "histogram_by_layer", "mean_cosine_by_layer", "off_diagonal_mean_by_layer"}:
            assert scalars[name] == pytest.approx(line[name])
        assert all(isinstance(value, float | int) for value in scalars.values())

    def refuse(**options):
        raise RuntimeError("no API key")

    fake.init = refuse
    with pytest.raises(InputError, match=r"no API key.*WANDB_MODE=offline"):
        train.main(small_config(corpus, tmp_path / "other", wandb=True))


def test_wandb_continues_the_same_run(corpus, tmp_path, monkeypatch):
    begun = []
    fake = types.SimpleNamespace(Error=RuntimeError)
    fake.init = lambda **options: (
        begun.append(options) or types.SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    out = tmp_path / "run"
    train.main(small_config(corpus, out, wandb=True, max_steps=1))
    train.main(small_config(corpus, out, wandb=True, max_steps=2, resume=True))
    train.main(small_config(corpus, out, wandb=True, max_steps=1, overwrite=True))
    train.main(small_config(corpus, tmp_path / "late", max_steps=1))
    train.main(small_config(corpus, tmp_path / "late", wandb=True, max_steps=2, resume=True))
    first, resumed, anew, late = (options["id"] for options in begun)
    assert first == resumed
    assert len({first, anew, late}) == 3
    assert {options["resume"] for options in begun} == {"allow"}  # even if it was removed there in the meantime
    (out / "wandb_id").write_bytes(b"../\xff x")
    with pytest.raises(InputError, match=r"wandb_id does not hold a wandb run id"):
        train.main(small_config(corpus, out, wandb=True, max_steps=2, resume=True))


def test_tensorboard_of_a_run_that_starts_again(tmp_path):
    """Stopped before its first checkpoint, or at one: only lines missing from metrics.jsonl are discarded."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    metrics = tmp_path / "metrics.jsonl"
    for kept, resume in (([], False), ([], True), ([0, 1], True), ([0, 1, 2], True)):
        metrics.write_text("".join(f'{{"step": {step}}}\n' for step in kept))
        (logger,) = report.loggers(tensorboard=True, wandb=False)
        logger.open(tmp_path, {"resume": resume}, kept[-1] if kept else 0)
        for step in range(len(kept), 5):
            logger.log({"step": step, "loss": float(step)})
        logger.close()
        events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
        events.Reload()
        assert [event.step for event in events.Scalars("loss")] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("flag", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_a_missing_logger_is_named_before_anything_is_lost(corpus, tmp_path, monkeypatch, flag, module):
    out = tmp_path / "run"
    train.main(small_config(corpus, out, max_steps=1))
    monkeypatch.setitem(sys.modules, module, None)  # importing it fails
    with pytest.raises(InputError, match=rf"--{flag} .*pip install {flag}.*minidisp\[{flag}\]"):
        train.main(small_config(corpus, out, overwrite=True, **{flag: True}))
    assert (out / checkpoint.LAST).exists()


def test_a_logger_that_fails_to_start_loses_nothing(corpus, tmp_path, monkeypatch):
    class Error(Exception):
        pass

    def refuse(**_):
        raise Error("no such key")

    out = tmp_path / "run"
    train.main(small_config(corpus, out, max_steps=1))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=refuse, Error=Error))
    with pytest.raises(InputError, match="--wandb: no such key"):
        train.main(small_config(corpus, out, overwrite=True, wandb=True))
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    (out / "wandb_id").write_text("abc\n")
    train.main(small_config(corpus, out, max_steps=1, overwrite=True))
    assert not (out / "wandb_id").exists()
