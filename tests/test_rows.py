"""Rows of examples by their fields: their conversion, and rejected rows, with file and line."""

import gzip
import json

import pytest

from data import prepare
from minidisp.data import Dataset
from minidisp.examples import Unusable, as_messages


def said(*turns: str) -> list[dict]:
    """user, assistant, user, ...; a turn that starts with "s:" is from the system."""
    messages = [{"role": "system", "content": turn[2:]} for turn in turns[:1] if turn.startswith("s:")]
    rest = turns[len(messages) :]
    return messages + [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(rest)]


KINDS = {
    "messages": ({"messages": said("s:Be brief.", "a", "b", "c")}, said("s:Be brief.", "a", "b", "c")),
    "completion": ({"prompt": "a\n", "completion": " b", "id": 7}, said("a\n", " b")),
    "alpaca": ({"instruction": "Add.", "input": "1 2", "output": "3"}, said("Add.\n\n1 2", "3")),
    "alpaca without input": ({"instruction": "Hi", "input": "", "output": "Ho"}, said("Hi", "Ho")),
    "alpaca without the field": ({"instruction": "Hi", "output": "Ho"}, said("Hi", "Ho")),
    "sharegpt": (
        {
            "conversations": [
                {"from": "system", "value": "x"},
                {"from": "human", "value": "a"},
                {"from": "gpt", "value": "b"},
            ]
        },
        said("s:x", "a", "b"),
    ),
    "both": ({"prompt": "p", "prompt_id": "1", "messages": said("a", "b")}, said("a", "b")),
}
BAD = [
    ({"prompt": "a", "completion": ""}, "empty completion", "message 2"),
    ({"prompt": "a", "completion": " \n"}, "empty completion", "message 2"),
    ({"prompt": "a", "completion": None}, "null", "'completion'"),
    ({"prompt": 3, "completion": "a"}, "not a text", "'prompt'"),
    ({"prompt": "a", "completion": "\ud83d"}, "half a surrogate pair", "'completion'"),
    ({"messages": "a"}, "not a list", "'messages'"),
    ({"messages": []}, "no completion", "nothing to learn"),
    ({"messages": said("a")}, "no completion", "nothing to learn"),
    ({"messages": ["a"]}, "not a message", r"messages\[0\]"),
    ({"messages": [{"role": "user"}]}, "not a message", r"messages\[0\]"),
    (
        {"messages": [*said("a", "b"), {"role": "tool", "content": "c"}]},
        "unknown role",
        r"messages\[2\]: the role \"tool\"",
    ),
    ({"conversations": [{"from": "bing", "value": "c"}]}, "unknown role", '"bing"'),
    ({"messages": said("a", "b")[1:]}, "begins with the assistant", "message 1"),
    ({"messages": [*said("s:x", "a", "b")[:1], *said("a", "b")[1:]]}, "begins with the assistant", "message 2"),
    ({"messages": [*said("a"), *said("b", "c")]}, "two turns in a row", "messages 1 and 2 are both from the user"),
    ({"messages": [*said("a", "b"), *said("c", "d")[1:]]}, "two turns in a row", "message 3"),
    ({"messages": [*said("a", "b"), {"role": "system", "content": "c"}]}, "system message later on", "message 3"),
    ({"messages": [{"role": "user", "content": None}, {"role": "assistant", "content": "b"}]}, "null", "content"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_row_is_a_dialogue(kind):
    row, messages = KINDS[kind]
    assert as_messages(row) == messages


def test_other_rows_are_no_examples():
    for row in (
        {"text": "a"},
        {"prompt": "a"},
        {"instruction": "a", "input": "b"},
        {"context": "a", "completion": "b"},
    ):
        assert as_messages(row) is None


@pytest.mark.parametrize(("row", "reason", "message"), BAD)
def test_rows_that_cannot_be_trained_on(row, reason, message):
    with pytest.raises(Unusable, match=message) as error:
        as_messages(row)
    assert error.value.reason == reason


def good(n: int) -> list[dict]:
    return [{"prompt": f"question {i}", "completion": f"answer {i * i}"} for i in range(n)]


def make(path, rows) -> list[str]:
    text = json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return ["--input", str(path), "--tokenizer", "byte", "--name", "t", "--out", str(path.parent / "out")]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.parquet"])
def test_files_of_every_kind_give_the_same_corpus(tmp_path, name):
    rows = [*good(60), {"messages": said("a", "b", "c", "d")}] if name != "rows.parquet" else good(60)
    if name == "rows.parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        import pyarrow

        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / name)
        flags = ["--input", str(tmp_path / name), "--tokenizer", "byte", "--name", "t", "--out", str(tmp_path / "out")]
    else:
        flags = make(tmp_path / name, rows)
    assert prepare.main(flags) == 0
    dataset = Dataset(tmp_path / "out")
    assert dataset.template is not None
    assert sum(dataset.split(split).documents for split in ("train", "val", "test")) == len(rows)
    (tmp_path / "same").mkdir()
    assert prepare.main(make(tmp_path / "same" / "rows.jsonl", rows)) == 0
    assert Dataset(tmp_path / "same" / "out").hash == dataset.hash


def test_parquet_of_dialogues(tmp_path, capsys):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows = [{"messages": said(f"a {i}", "b" * (i % 7 + 1)), "source": "x"} for i in range(60)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    flags = ["--tokenizer", "byte", "--name", "t", "--out", str(tmp_path / "out")]
    assert prepare.main(["--input", str(tmp_path / "rows.parquet"), *flags]) == 0
    assert Dataset(tmp_path / "out").template is not None
    assert "rows.parquet, examples of messages, split by hash" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("row", "reason", "message"), [*BAD, ({"text": "a text"}, "of another kind", "a text among examples")]
)
def test_a_bad_row_is_named_with_file_and_line_or_left_out_and_counted(tmp_path, capsys, row, reason, message):
    rows = good(60)
    rows.insert(40, row)
    flags = make(tmp_path / "rows.jsonl", rows)
    assert prepare.main(flags) == 2
    assert f"{tmp_path / 'rows.jsonl'}, line 41: " in capsys.readouterr().err
    assert not (tmp_path / "out" / "meta.json").exists()
    assert prepare.main([*flags, "--bad-rows", "skip"]) == 0
    assert Dataset(tmp_path / "out").meta["skipped"] == {reason: 1}


def test_an_example_among_texts_is_a_bad_row(tmp_path, capsys):
    rows = [{"text": f"some text {i}"} for i in range(60)]
    assert prepare.main(make(tmp_path / "rows.jsonl", [*rows, *good(1)])) == 2
    assert "line 61: an example among texts" in capsys.readouterr().err


def test_a_row_that_the_template_rejects_is_a_bad_row(tmp_path, capsys):
    from test_template import bpe

    source = "{% if messages[0].content == 'no' %}{{ raise_exception('not this') }}{% endif %}"
    source += "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    bpe(tmp_path, source).save(tmp_path / "tokenizer.model")
    rows = [*good(60), {"prompt": "no", "completion": "x"}]
    flags = make(tmp_path / "rows.jsonl", rows)
    flags = [*flags[:2], *flags[4:], "--tokenizer-from", str(tmp_path / "tokenizer.model")]
    assert prepare.main(flags) == 2
    assert "rows.jsonl, line 61: the chat template cannot render it: not this" in capsys.readouterr().err
    assert prepare.main([*flags, "--bad-rows", "skip"]) == 0
    assert Dataset(tmp_path / "out").meta["skipped"] == {"refused by the template": 1}
    assert sum(split["documents"] for split in Dataset(tmp_path / "out").meta["splits"].values()) == 60


def test_one_document_and_a_field_that_is_named(tmp_path, capsys):
    flags = make(tmp_path / "rows.jsonl", good(60))
    assert prepare.main([*flags, "--one-document"]) == 2
    assert "--one-document joins texts, but these are examples" in capsys.readouterr().err
    assert prepare.main([*flags, "--field", "completion"]) == 0  # then the rows are texts
    assert Dataset(tmp_path / "out").template is None
