"""Both tokenizers: lossless for every text, the same file every time, and clear about files that are none."""

import hashlib
import io
import json
import random

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from minidisp import InputError
from minidisp.tokenizer import ByteTokenizer, SentencePieceTokenizer, _sentences, load, train_sentencepiece

SOURCE_CODE = (
    "def f(x):\n        if x == 12:\n                return [x]\n\n    # a comment, and the word\r\n\tEND\n" * 200
)
HARD = [
    "",
    " ",
    "  leading and trailing  ",
    "a\tb\r\nc\rd\n\n\n        e",
    "\0 a\0",
    "\u2581 \u2581\u2581a\u2581",
    "\u2585",
    "<unk></s><s><0x41> <pad>",
    "\ufeff\ufb01 A\u030a \u00c5 \u3000 \u00a0 \u200d",
    "\U0001f642\U0001f469\u200d\U0001f680 \U0010ffff \ud7ff \ue000",
    "\u6f22\u5b57\u4eee\u540d\u4ea4\u3058\u308a\u6587",
    "x" * 200_000,
    " " * 100_000 + "\n",
]


@pytest.fixture(scope="module")
def trained() -> SentencePieceTokenizer:
    return train_sentencepiece([SOURCE_CODE], 320)


@pytest.fixture(params=["byte", "sentencepiece"])
def tokenizer(request, trained):
    return ByteTokenizer() if request.param == "byte" else trained


@pytest.mark.parametrize("text", HARD, ids=lambda text: ascii(text[:12]))
def test_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.eos_id not in ids
    assert sum(len(tokenizer.token_bytes[i]) for i in ids) == len(text.encode())


def test_round_trip_of_random_text(trained):
    alphabet = st.one_of(
        st.characters(exclude_categories=["Cs"]), st.sampled_from("\u2581\u2585 \n\t\r\0<>/aeinst_0123456789")
    )

    @settings(max_examples=300, deadline=None, derandomize=True)
    @given(st.text(alphabet))
    def check(text):
        for tokenizer in (trained, ByteTokenizer()):
            assert tokenizer.decode(tokenizer.encode(text)) == text
        assert trained.encode_batch([text, "x" + text]) == [trained.encode(text), trained.encode("x" + text)]

    check()


def test_every_byte_can_be_decoded(tokenizer):
    assert set(tokenizer.token_bytes) >= {bytes([byte]) for byte in range(256)}
    assert len(tokenizer.token_bytes) == tokenizer.vocab_size


def test_eos_stands_for_nothing(tokenizer):
    ids = tokenizer.encode("ab")
    assert tokenizer.decode([*ids, tokenizer.eos_id, *ids]) == "abab"
    assert tokenizer.token_bytes[tokenizer.eos_id] == b""


def test_half_a_character_decodes_to_a_replacement(tokenizer):
    ids = tokenizer.encode("\u4e00")
    assert len(ids) == 3
    assert tokenizer.decode(ids[:2]) == "\ufffd"


def test_half_a_surrogate_pair_is_refused(tokenizer):
    with pytest.raises(UnicodeEncodeError):
        tokenizer.encode("a\ud83d")
    with pytest.raises(UnicodeEncodeError):
        tokenizer.encode_batch(["a", "\ud83d"], threads=2)


def test_batches_and_threads_change_nothing(tokenizer):
    rng = random.Random(0)
    texts = ["".join(rng.choices(SOURCE_CODE, k=rng.randrange(300))) for _ in range(50)] + ["", "a\u2581b"]
    expected = [tokenizer.encode(text) for text in texts]
    for threads in (1, 2, 5):
        assert tokenizer.encode_batch(texts, threads) == expected
        assert tokenizer.encode_batch(texts[:50], threads) == expected[:50]
    assert tokenizer.encode_batch([]) == []


def test_save_and_load(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.model"
    tokenizer.save(path)
    loaded = load(path)
    assert type(loaded) is type(tokenizer)
    assert loaded.token_bytes == tokenizer.token_bytes
    assert (loaded.vocab_size, loaded.eos_id) == (tokenizer.vocab_size, tokenizer.eos_id)
    assert loaded.hash == tokenizer.hash == hashlib.sha256(path.read_bytes()).hexdigest()


def test_byte_ids_are_bytes():
    tokenizer = ByteTokenizer()
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (257, 256)
    assert tokenizer.encode("\u00e9") == [0xC3, 0xA9]


def test_training_is_deterministic(trained):
    again = train_sentencepiece(iter([SOURCE_CODE]), 320)
    assert again.hash == trained.hash
    assert train_sentencepiece([SOURCE_CODE, "other words"], 320).hash != trained.hash


def test_indentation_and_line_ends_are_tokens(trained):
    assert trained.vocab_size == 320
    assert {b" " * 8, b"):\n"} <= set(trained.token_bytes)
    assert b"12" not in trained.token_bytes  # digits stay single


def test_text_that_the_trainer_would_skip_is_used():
    """Reserved characters and very long lines would make SentencePiece leave out what stands next to them."""
    for text in ("\u2585 qqqqqq " * 50, "\u2581qqqqqq\0" * 50, "qqqqqq " * 100_000):
        assert b"qqqqqq" in {token.strip() for token in train_sentencepiece([text], 264).token_bytes}


def test_sentences_cover_the_text():
    text = SOURCE_CODE + "x" * 10_000 + "\n\nend"
    pieces = list(_sentences(text))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 4000


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        (["hello world\n" * 10], 4096, "at most 285 different tokens, not 4096: lower --vocab-size to 285"),
        (["hello world\n" * 10], 260, "raise --vocab-size to 267"),
        (["hello"], 100, "raise --vocab-size"),
        (["hello"], 1, "256 bytes"),
        ([], 300, "no text"),
        (["", "\n"], 300, "no text"),
    ],
)
def test_impossible_vocabularies(texts, vocab_size, message):
    with pytest.raises(InputError, match=message):
        train_sentencepiece(texts, vocab_size)


def test_the_vocabulary_sizes_that_errors_suggest_work():
    for vocab_size in (267, 285):
        assert train_sentencepiece(["hello world\n" * 10], vocab_size).vocab_size == vocab_size


def test_special_names_in_the_text_are_no_special_tokens():
    text = "<unk> </s> <0x41> <s> "
    tokenizer = train_sentencepiece([text * 1000], 264)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def foreign_model(**options) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([SOURCE_CODE[:4000]] * 5),
        model_writer=model,
        model_type="bpe",
        minloglevel=2,
        **{"vocab_size": 320, "byte_fallback": True, **options},
    )
    return model.getvalue()


def test_bad_files_are_refused_by_name(trained, tmp_path):
    path = tmp_path / "tokenizer.model"
    trained.save(path)
    whole = path.read_bytes()
    bad = {
        "empty": b"",
        "text": b"hello",
        "half": whole[: len(whole) // 2],
        "start": whole[:1000],
        "shorter": whole[:-10],
        "longer": whole + b"junk",
        "json": json.dumps({"tokenizer": "other"}).encode(),
        "byte": b'{"tokenizer": "byte", "version": 2}\n',
        "normalises": foreign_model(),
        "no fallback": foreign_model(vocab_size=60, byte_fallback=False, add_dummy_prefix=False),
        "no EOS": foreign_model(eos_id=-1, add_dummy_prefix=False, normalization_rule_name="identity"),
    }
    for what, content in bad.items():
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"tokenizer\.model: ") as error:
            load(path)
        assert "\n" not in str(error.value), what
    with pytest.raises(InputError, match=r"tokenizer\.model: is a directory|Is a directory"):
        load(tmp_path)
    with pytest.raises(InputError, match="missing"):
        load(tmp_path / "missing")
