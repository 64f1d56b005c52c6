"""Settings: command line, config.json, and back."""

import dataclasses
import json
import math

import pytest

from minidisp import InputError
from minidisp.config import PRESETS, RECIPES, Config, command_line, flags, from_dict, parse, read_json, to_dict
from minidisp.flags import flag
from minidisp.runtime.cli import exit_code


def test_defaults_are_the_tiny_preset():
    assert parse([]) == Config()
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
    saved = to_dict(parse(["--n-layer", "3", "--lr", "0.5", "--out", "somewhere"]))
    file.write_text(json.dumps({**saved, "environment": {"torch": "2"}}))
    config = parse(["--config", str(file), "--lr", "0.25"])
    assert (config.n_layer, config.lr, config.out) == (3, 0.25, "")
    config = parse(["--config", str(file), "--preset", "gpt2", "--n-head", "6"])
    assert (config.n_layer, config.n_head, config.n_embd, config.lr) == (12, 6, 768, 6e-4)


def test_a_recipe_wins_over_the_preset_and_flags_over_the_recipe(tmp_path):
    assert parse(["--recipe", "gpt2"]) == parse([])
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
        ("n-layer", "0", "--n-layer is 0, but must be at least 1 and at most 10000"),
        ("max-steps", "9" * 30, "--max-steps is an integer of more than 20 digits, but must be at most 2147483647"),
        ("seed", "4294967296", "--seed is 4294967296, but must be at least 0 and at most 4294967295"),
        ("min-lr", "-1", "--min-lr is -1.0, but must be at least 0"),
        ("grad-clip", "inf", "--grad-clip is inf, but must be a finite number"),
        ("dispersion", "1e31", "--dispersion is 1e\\+31, but must be at least -1e\\+30 and at most 1e\\+30"),
    ],
)
def test_the_bounds_of_a_flag_are_beside_it(name, value, message):
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
    for typed in ([], ["--preset", "mini"], ["--recipe", "fast"]):  # with --resume they name the run
        resumed = parse(["--resume", "--out", str(run), *typed])
        assert (resumed.n_layer, resumed.lr, resumed.arch) == (6, 0.5, "qwen3")
    with pytest.raises(InputError, match="preset mini: leave out --preset tiny"):
        parse(["--resume", "--out", str(run), "--preset", "tiny"])
