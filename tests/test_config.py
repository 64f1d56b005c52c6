"""Settings: command line, config.json, and back."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

import minidisp
import train
from minidisp import InputError
from minidisp.config import PRESETS, RECIPES, Config, command_line, flags, from_dict, parse, read_json, to_dict
from minidisp.flags import flag
from minidisp.model import GPTConfig
from minidisp.runtime import init_from
from minidisp.runtime.cli import exit_code


def test_defaults_are_the_tiny_preset_and_the_fast_recipe():
    assert parse([]) == from_dict({"recipe": "fast", **RECIPES["fast"]})
    assert parse(["--recipe", "gpt2"]) == Config()
    assert parse([]).run_dir.as_posix() == "runs/pystdlib-tiny-d0-s0"
    assert parse(["--dispersion", "0.1", "--seed", "3", "--data", "a/b"]).run_dir.name == "b-tiny-d0.1-s3"


def test_a_run_is_named_after_the_folder_of_its_corpus(tmp_path, monkeypatch):
    (tmp_path / "text" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "text" / "below")
    for data, name in ((".", "below"), ("..", "text"), ("../", "text"), ("pystdlib", "pystdlib")):
        assert parse(["--data", data]).run_dir.name == f"{name}-tiny-d0-s0"


def test_every_field_but_the_vocabulary_has_a_flag_with_a_help_text():
    assert {field.name for field in flags()} == {field.name for field in dataclasses.fields(Config)} - {"vocab_size"}
    assert all(len(field.metadata["help"]) > 10 for field in flags())


@pytest.mark.parametrize("preset", PRESETS)
def test_config_survives_json(preset):
    config = parse(["--preset", preset, "--lr", "1", "--no-bias"])
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_flags_win_over_presets_and_presets_over_a_file(tmp_path):
    file = tmp_path / "config.json"
    saved = to_dict(parse(["--recipe", "gpt2", "--n-layer", "3", "--lr", "0.5", "--out", "somewhere"]))
    file.write_text(json.dumps({**saved, "environment": {"torch": "2"}}))
    config = parse(["--config", str(file), "--lr", "0.25"])
    assert (config.n_layer, config.lr, config.out) == (3, 0.25, "")
    config = parse(["--config", str(file), "--preset", "gpt2", "--n-head", "6"])
    assert (config.n_layer, config.n_head, config.n_embd, config.lr) == (12, 6, 768, 6e-4)


def test_a_recipe_wins_over_the_preset_and_flags_over_the_recipe(tmp_path):
    assert parse(["--recipe", "fast"]) == parse([])
    fast = parse(["--preset", "mini", "--recipe", "fast", "--schedule", "cosine"])
    assert (fast.n_embd, fast.lr, fast.schedule) == (384, RECIPES["fast"]["lr"], "cosine")
    file = tmp_path / "config.json"
    file.write_text(json.dumps(to_dict(fast)))
    assert parse(["--config", str(file)]) == fast
    with pytest.raises(InputError, match="--recipe gpt2"):
        parse(["--config", str(file), "--recipe", "gpt2"])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"n_layers": 3}, "n_layers"),
        ({"n_layer": "3"}, "n_layer"),
        ({"n_layer": 3.0}, "n_layer"),
        ({"n_layer": True}, "n_layer"),
        ({"bias": 1}, "bias"),
        ({"arch": "rnn"}, "arch"),
        ({"lr": None}, "lr"),
        ({"arch": ["gpt2"]}, "arch"),
    ],
)
def test_wrong_settings_are_named(values, expected):
    with pytest.raises(InputError, match=expected):
        from_dict(values)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lr", "0", "--lr is 0.0, but must be above 0"),
        ("beta1", "1", "--beta1 is 1.0, but must be at least 0 and below 1"),
        ("weight-decay", "-0.001", "--weight-decay is -0.001, but must be at least 0"),
        ("dispersion-clamp", "0", "--dispersion-clamp is 0.0, but must be above 0 and below 1"),
        ("dispersion-tau", "1e-45", "--dispersion-tau is 1e-45, but must be at least 1e-06 and at most 1000000.0"),
        ("dropout", "1", "--dropout is 1.0, but must be at least 0 and below 1"),
        ("n-layer", "0", "--n-layer is 0, but must be at least 1 and at most 1000"),
        ("max-steps", "9" * 30, "--max-steps is an integer of more than 20 digits, but must be at most 2147483647"),
        ("seed", "4294967296", "--seed is 4294967296, but must be at least 0 and at most 4294967295"),
        ("min-lr", "-1", "--min-lr is -1.0, but must be at least 0"),
        ("grad-clip", "inf", "--grad-clip is inf, but must be a finite number"),
        ("dispersion", "1e39", "--dispersion is 1e\\+39, but must be at least -1e\\+38 and at most 1e\\+38"),
    ],
)
def test_values_beyond_the_bounds_of_a_flag_are_rejected(name, value, message):
    with pytest.raises(InputError, match=f"^{message}$"):
        parse([f"--{name}={value}"])


def test_a_new_flag_has_the_bounds_that_it_declares():
    @dataclasses.dataclass(frozen=True)
    class Changed(Config):
        share: float = flag(0.5, "a share", low=0.25, below=1)
        count: int | None = flag(None, "a count", above=2, high=5)

    assert (Changed(share=0.25).share, Changed(count=5).count) == (0.25, 5)
    for values in ({"share": 0.2}, {"share": 1}, {"count": 2}, {"count": 6}, {"share": math.nan}):
        with pytest.raises(InputError, match=f"--{next(iter(values))} is "):
            Changed(**values)


@pytest.mark.parametrize("content", ["", "[1]", "{", "\udcff"])
def test_a_file_that_is_no_config_is_named(tmp_path, content):
    file = tmp_path / "config.json"
    file.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=r"config\.json"):
        read_json(file)


def test_help_lists_every_flag(capsys):
    with pytest.raises(SystemExit) as done:
        parse(["--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert all(f"--{field.name.replace('_', '-')}" in text for field in flags())


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (None, 0, ""),
        (InputError("--lr is odd"), 2, "x.py: --lr is odd\n"),
        (OSError(28, "No space left on device", "out/a"), 2, "x.py: out/a: No space left on device\n"),
        (OSError(28, "No space left on device"), 2, "x.py: input/output: No space left on device\n"),
        (KeyboardInterrupt(), 130, "x.py: interrupted\n"),
    ],
)
def test_a_command_ends_in_one_line(error, code, line, capsys):
    def command():
        if error:
            raise error

    assert exit_code("x.py", command) == code
    assert capsys.readouterr().err == line


def test_a_command_line_is_read_back():
    fields = {
        "lr": 1e-4,
        "n_embd": 48,
        "n_head": 3,
        "tied": False,
        "zero_init": True,
        "schedule": "linear",
        "out": "a b/c",
    }
    config = parse(command_line(fields))
    assert {name: getattr(config, name) for name in fields} == fields


def test_a_preset_that_was_typed_counts_in_all_that_presets_set(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(to_dict(parse(["--preset", "mini", "--recipe", "fast", "--lr", "0.5"]))))
    tiny = parse(["--config", str(file), "--preset", "tiny"])
    fast = parse(["--recipe", "fast"])
    assert tiny == fast
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(file.read_text())
    for typed in ([], ["--preset", "mini"], ["--recipe", "fast"]):  # with --resume they select the run
        resumed = parse(["--resume", "--out", str(run), *typed])
        assert (resumed.n_layer, resumed.lr, resumed.arch) == (6, 0.5, "qwen3")
    with pytest.raises(InputError, match="preset mini: leave out --preset tiny"):
        parse(["--resume", "--out", str(run), "--preset", "tiny"])


@pytest.mark.parametrize(
    ("flags", "recipe", "optimizer", "lr"),
    [
        (["--preset", "mini"], "fast", "muon", 6e-3),
        (["--preset", "gpt2"], "gpt2", "adamw", 6e-4),
        (["--preset", "gpt2-xl"], "gpt2", "adamw", 2e-4),
        (["--preset", "qwen3-0.6b"], "gpt2", "adamw", 3e-4),
        (["--preset", "gpt2", "--recipe", "fast"], "fast", "muon", 6e-3),
        (["--recipe", "gpt2", "--preset", "mini"], "gpt2", "adamw", 1e-3),
        (["--optimizer", "adamw"], "fast", "adamw", 6e-3),
    ],
)
def test_the_recipe_that_a_command_does_not_name(flags, recipe, optimizer, lr):
    config = parse(flags)
    assert (config.recipe, config.optimizer, config.lr) == (recipe, optimizer, lr)


@pytest.mark.parametrize(
    ("architecture", "recipe"),
    [
        ({}, "gpt2"),
        ({"arch": "qwen3"}, "gpt2"),
        ({"arch": "qwen3", "mlp": "relu2", "tied": False}, "fast"),
        ({"arch": "qwen3", "mlp": "relu2", "tied": False, "zero_init": True}, "fast"),
    ],
)
def test_the_model_that_a_run_starts_from_decides_its_recipe(monkeypatch, architecture, recipe):
    source = GPTConfig(**architecture, n_layer=2)
    monkeypatch.setattr(init_from, "architecture_of", lambda name: (source, False))
    config = parse(["--init-from", "x"])
    assert (config.recipe, config.optimizer) == (recipe, "muon" if recipe == "fast" else "adamw")
    for name in ("arch", "mlp", "tied", "zero_init", "n_layer"):
        assert getattr(config, name) == getattr(source, name)
    typed = parse(["--init-from", "x", "--recipe", "gpt2"])
    assert (typed.recipe, typed.optimizer, typed.mlp) == ("gpt2", "adamw", source.mlp)


OLD_RUN = json.loads(
    (Path(__file__).parent / "old_run.json").read_text()
)  # saved by the version before fast became the default


def test_an_old_config_keeps_its_meaning(corpus, tmp_path):
    """Training with an old config.json reproduces its losses, also without the settings that did not exist then."""
    (tmp_path / "config.json").write_text(json.dumps(OLD_RUN["config"]))
    config = parse(["--config", str(tmp_path / "config.json"), "--data", str(corpus), "--out", str(tmp_path / "again")])
    assert (config.recipe, config.arch, config.optimizer, config.lr) == ("gpt2", "gpt2", "adamw", 3e-3)
    train.main(config)
    lines = [json.loads(line) for line in (tmp_path / "again" / "metrics.jsonl").read_text().splitlines()]
    assert [line["ce"] for line in lines if "ce" in line] == pytest.approx(OLD_RUN["ce"], abs=1e-5)
    assert [line["val_loss"] for line in lines if "val_loss" in line] == pytest.approx(OLD_RUN["val_loss"], abs=1e-5)
    older = {
        name: value for name, value in OLD_RUN["config"].items() if name not in ("recipe", "zero_init", "embedding_lr")
    }
    (tmp_path / "config.json").write_text(json.dumps(older))
    line = ["--config", str(tmp_path / "config.json"), "--data", str(corpus), "--out", str(tmp_path / "again")]
    assert parse(line) == config


def test_the_folder_of_a_run_names_unusual_settings(monkeypatch):
    monkeypatch.setattr(init_from, "architecture_of", lambda source: (from_dict(RECIPES["fast"]), False))
    names = {
        "": "pystdlib-tiny-d0-s0",
        "--recipe fast --seed 2": "pystdlib-tiny-d0-s2",
        "--recipe gpt2": "pystdlib-tiny-d0-s0-recipe_gpt2",
        "--preset gpt2": "pystdlib-gpt2-d0-s0",
        "--preset gpt2 --recipe fast": "pystdlib-gpt2-d0-s0-recipe_fast",
        "--optimizer adamw --lr 3e-3": "pystdlib-tiny-d0-s0-optimizer_adamw-lr_0.003",
        "--max-steps 9 --eval-every 3 --n-layer 2": "pystdlib-tiny-d0-s0-n_layer_2",
        "--batch-size 2 --grad-accum 4": "pystdlib-tiny-d0-s0",  # the same eight sequences per step
        "--grad-accum 2 --preset mini": "pystdlib-mini-d0-s0-sequences_64",
        "--init-from runs/base --dispersion 0.1": "pystdlib-tiny-d0.1-s0-init_from_base",
    }
    for line, name in names.items():
        assert parse(line.split()).run_dir.as_posix() == f"runs/{name}"
    names = ["beta1", "beta2", "momentum", "ema", "lr", "weight-decay", "grad-clip", "embedding-lr"]
    names += ["dispersion-tau", "dispersion-clamp"]
    everything = parse(["--n-layer=2", "--dropout=.1", *(f"--{name}=0.123456789" for name in names)])
    other = dataclasses.replace(everything, grad_clip=0.2)
    assert len(everything.run_dir.name) <= 200
    assert everything.run_dir != other.run_dir


def test_resuming_finds_the_folder_that_the_command_began_with(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for line in ("--recipe gpt2 --lr 0.01", "--optimizer adamw", "--dispersion -1e-3"):
        config = parse(line.split())
        config.run_dir.mkdir(parents=True)
        (config.run_dir / "config.json").write_text(json.dumps(to_dict(config)))
        for more in ("", "--max-steps 900"):
            resumed = parse([*line.split(), "--resume", *more.split()])
            assert dataclasses.replace(resumed, out="", resume=False, max_steps=config.max_steps) == config
    assert (
        parse(["--optimizer", "adamw", "--weight-decay", "0.5", "--resume"]).weight_decay == 0.5
    )  # a resumed run may change it
    with pytest.raises(InputError, match="no run in runs/pystdlib-tiny-d0-s1"):
        parse(["--resume", "--seed", "1"])


@pytest.mark.parametrize("value", ["-1e-3", "-.5", "-2.", "-1E+2", "-0.1"])
def test_a_negative_number_is_a_value(value):
    assert parse(["--dispersion", value]).dispersion == float(value)
    assert parse([f"--dispersion={value}", "--seed", "1"]).dispersion == float(value)
    with pytest.raises(InputError, match="--lr is -"):
        parse(["--lr", value])


def test_small_negative_values_are_read_back():
    for value in (-1e-3, -1e-17, -2.5, -1e20):
        assert parse(command_line({"dispersion": value, "seed": 3})).dispersion == value


def test_the_version_is_known(capsys):
    with pytest.raises(SystemExit) as done:
        parse(["--version"])
    assert done.value.code == 0
    assert capsys.readouterr().out == f"minidisp {minidisp.__version__}\n"


def test_the_default_learning_rate_of_a_fine_tuning_run(monkeypatch):
    """The recipe's or the preset's, and a tenth of it from a Hugging Face model; without a preset, lower for wider
    models; an explicit value is kept."""
    sources = {
        "fast": from_dict({**RECIPES["fast"]}),
        "wide": GPTConfig(n_layer=12, n_head=12, n_embd=768, block_size=1024),
    }

    def started(line: str, hugging_face: bool = False) -> Config:
        monkeypatch.setattr(init_from, "architecture_of", lambda name: (sources[name], hugging_face))
        return parse(["--init-from", *line.split()])

    assert [started(line).lr for line in ("fast", "wide", "wide --preset gpt2")] == [6e-3, 7.5e-4, 6e-4]
    assert [started(line, True).lr for line in ("fast", "wide", "wide --preset gpt2")] == [6e-4, 7.5e-5, 6e-5]
    assert [started(f"{name} --lr 0.002").lr for name in sources] == [0.002, 0.002]
    assert started("fast").run_dir == from_dict({**RECIPES["fast"], "recipe": "fast", "init_from": "fast"}).run_dir
