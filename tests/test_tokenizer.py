"""All tokenizers: lossless for every text, reproducible files, and clear errors for invalid files."""

import hashlib
import io
import json
import random

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from minidisp import InputError
from minidisp.tokenizer import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    _sentences,
    load,
    train_sentencepiece,
)

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


def byte_level_bpe(qwen: bool = False) -> HuggingFaceTokenizer:
    """A small tokenizer like GPT-2's, or like Qwen3's: NFC, words by a regular expression, more added tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    if qwen:
        tokenizer.normalizer = tokenizers.normalizers.NFC()
        words = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"), "isolated")
        in_bytes = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([words, in_bytes])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=290, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False
    )
    tokenizer.train_from_iterator([SOURCE_CODE], trainer)
    if qwen:
        tokenizer.add_special_tokens(["<|im_start|>"])
        tokenizer.add_tokens(["<think>"])
    tokenizer.enable_truncation(7)  # settings in some files that would truncate or pad texts
    tokenizer.enable_padding(length=9)
    return HuggingFaceTokenizer(HuggingFaceTokenizer.pack(json.loads(tokenizer.to_str()), "<|endoftext|>", 0))


@pytest.fixture(params=["byte", "sentencepiece", "gpt2", "qwen3"])
def tokenizer(request, trained):
    kinds = {"byte": ByteTokenizer, "gpt2": byte_level_bpe, "qwen3": lambda: byte_level_bpe(qwen=True)}
    return kinds.get(request.param, lambda: trained)()


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


def test_a_hugging_face_tokenizer_gives_its_own_ids():
    """The same as the package tokenizers with the file, except for names of special tokens and uncomposed letters."""
    ours = byte_level_bpe(qwen=True)
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer.from_str(json.dumps(ours.tokenizer_json))
    theirs.no_truncation()
    theirs.no_padding()
    for text in [SOURCE_CODE[:500], "a\u00e9\U0001f642 <think> x\n\n  12", "\u6f22\u5b57"]:
        assert ours.encode(text) == theirs.encode(text).ids
        assert ours.decode(ours.encode(text)) == text
    names = ["<|endoftext|>", "<|im_start|>", "<think>"]
    ids = [theirs.token_to_id(name) for name in names]
    assert [ours.token_bytes[i] for i in ids] == [b"", b"", b"<think>"]
    for name in names[:2]:
        assert theirs.encode(name).ids == [theirs.token_to_id(name)]
        assert len(ours.encode(name)) > 3
    assert len(ours.encode("e\u0301")) > len(theirs.encode("e\u0301").ids)


def test_the_file_that_the_hub_has_for_gpt2():
    """An older form: the model has no type, merges are strings, and settings that are defaults now are missing."""
    ours = byte_level_bpe()
    old = json.loads(json.dumps(ours.tokenizer_json))
    fields = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "vocab", "merges")
    old["model"] = {name: old["model"][name] for name in fields}
    old["model"] |= {"merges": [" ".join(pair) for pair in old["model"]["merges"]], "continuing_subword_prefix": ""}
    del old["pre_tokenizer"]["use_regex"], old["decoder"]["use_regex"]
    loaded = HuggingFaceTokenizer(HuggingFaceTokenizer.pack(old, "<|endoftext|>", 0))
    assert loaded.token_bytes == ours.token_bytes
    assert loaded.encode(SOURCE_CODE + "<|endoftext|>") == ours.encode(SOURCE_CODE + "<|endoftext|>")


def test_a_hugging_face_vocabulary_is_as_large_as_its_model():
    small = byte_level_bpe()
    padded = HuggingFaceTokenizer(HuggingFaceTokenizer.pack(small.tokenizer_json, "<|endoftext|>", 400))
    assert (padded.vocab_size, padded.token_bytes[small.vocab_size :]) == (400, [b""] * (400 - small.vocab_size))
    assert padded.encode("def f") == small.encode("def f")
    with pytest.raises(ValueError, match="290 tokens, but its model only 289"):
        HuggingFaceTokenizer(HuggingFaceTokenizer.pack(small.tokenizer_json, "<|endoftext|>", 289))


def test_hugging_face_tokenizers_that_cannot_be_used(tmp_path):
    good = byte_level_bpe(qwen=True).tokenizer_json
    added = {"id": 330, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    one_less = {token: i for token, i in good["model"]["vocab"].items() if token != "!"}
    for changes, message in [
        ({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}, "only BPE"),
        ({"model": good["model"] | {"dropout": 0.1}}, "dropout"),
        ({"model": good["model"] | {"vocab": one_less}}, "no token for some bytes"),
        ({"model": good["model"] | {"vocab": 5}}, "damaged"),
        ({"model": good["model"] | {"continuing_subword_prefix": "##"}}, "marks words"),
        ({"model": []}, "damaged"),
        ({"normalizer": {"type": "Lowercase"}}, "Lowercase"),
        (
            {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "StripAccents"}]}},
            "StripAccents",
        ),
        ({"pre_tokenizer": byte_level}, "changes the text"),
        ({"pre_tokenizer": {"type": "Nonsense"}}, "damaged"),
        ({"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}, "neither byte-level"),
        ({"decoder": None}, "neither byte-level"),
        ({"added_tokens": [*good["added_tokens"], {**added, "content": "<s>", "lstrip": True}]}, "strips the spaces"),
        ({"added_tokens": [{"content": "x"}]}, "damaged"),
        ({"added_tokens": 3}, "damaged"),
    ]:
        path = tmp_path / "tokenizer.model"
        path.write_bytes(HuggingFaceTokenizer.pack({**good, **changes}, "<|endoftext|>", 0))
        with pytest.raises(InputError, match=r"tokenizer\.model: ") as error:
            load(path)
        assert message in str(error.value), changes
        assert "\n" not in str(error.value)
    for text in ("[]", "5", "{", "[" * 100_000, '{"a": 1, "a": 2}', '{"a": NaN}', "\ud800"):
        for name in ("config.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.json"):
            path.write_bytes(HuggingFaceTokenizer.pack(good, "<|endoftext|>", 0, {name: text}))
            with pytest.raises(InputError, match=r"tokenizer\.model: "):
                load(path)
    whole = HuggingFaceTokenizer.pack(good, "<|endoftext|>", 0)
    for content in (
        whole[:-40],
        HuggingFaceTokenizer.pack(good, "</s>", 0),
        HuggingFaceTokenizer.pack(good, 5, 0),
        HuggingFaceTokenizer.pack(good, "<|endoftext|>", -1),
        HuggingFaceTokenizer.pack(good, "a", 10**9),
        HuggingFaceTokenizer.pack(good, "d", 0),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"tokenizer\.model: "):
            load(path)


def split_first(good: dict, **step: object) -> dict:
    return {**good, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [step, good["pre_tokenizer"]]}}


def removing(pattern: dict) -> dict:
    return {"type": "Split", "pattern": pattern, "behavior": "Removed", "invert": False}


@pytest.mark.parametrize(
    "step", [{"type": "FixedLength", "length": 0}, removing({"Regex": "[0-9]"}), removing({"String": "#"})]
)
def test_a_tokenizer_that_panics_or_drops_characters_is_refused(tmp_path, capfd, step):
    good = byte_level_bpe().tokenizer_json
    path = tmp_path / "tokenizer.model"
    path.write_bytes(HuggingFaceTokenizer.pack(split_first(good, **step), "<|endoftext|>", 0))
    with pytest.raises(InputError, match=r"tokenizer\.model: this tokenizer (cannot encode|changes) the text") as error:
        load(path)
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("threads", [1, 2])
def test_a_text_that_a_tokenizer_cannot_keep_is_refused(capfd, threads):
    """Undetectable beforehand: a pattern that fails on certain texts only, and one that takes forever on some."""
    good = byte_level_bpe().tokenizer_json
    drops = HuggingFaceTokenizer(
        HuggingFaceTokenizer.pack(split_first(good, **removing({"String": "zq"})), "<|endoftext|>", 0)
    )
    assert drops.encode_batch(["zebra", "q z"], threads) == [drops.encode("zebra"), drops.encode("q z")]
    with pytest.raises(InputError, match="changes the text 'a zq'"):
        drops.encode_batch(["zebra", "a zq"], threads)
    slow = removing({"Regex": "(a|a|aa)+$"}) | {"behavior": "Isolated"}
    stuck = HuggingFaceTokenizer(HuggingFaceTokenizer.pack(split_first(good, **slow), "<|endoftext|>", 0))
    with pytest.raises(InputError, match="cannot encode the text"):
        stuck.encode_batch(["a" * 60 + "b"], threads)
    assert capfd.readouterr() == ("", "")


def test_every_byte_can_be_decoded(tokenizer):
    assert set(tokenizer.token_bytes) >= {bytes([byte]) for byte in range(256)}
    assert len(tokenizer.token_bytes) == tokenizer.vocab_size


def test_eos_decodes_to_nothing(tokenizer):
    ids = tokenizer.encode("ab")
    assert tokenizer.decode([*ids, tokenizer.eos_id, *ids]) == "abab"
    assert tokenizer.token_bytes[tokenizer.eos_id] == b""


def test_half_a_character_decodes_to_a_replacement(tokenizer):
    ids = tokenizer.encode("\u4e00")
    assert len(ids) == 3
    assert tokenizer.decode(ids[:2]) == "\ufffd"


def test_a_lone_surrogate_is_rejected(tokenizer):
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
    assert tokenizer.encode_batch([]) == tokenizer.encode_batch([], threads=2) == []


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
    assert b"12" not in trained.token_bytes  # digits are not merged


def test_text_that_the_trainer_would_skip_is_used():
    """Reserved characters and very long lines would make SentencePiece drop the text next to them."""
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
        (["hello world\n" * 10], 4096, "at most 285 tokens, not 4096: lower --vocab-size to 285"),
        (["hello world\n" * 10], 260, "raise --vocab-size to 267"),
        (["hello"], 100, "--vocab-size is 100, but must be at least 258"),
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


SCRIPTS = {
    "Latin": "abcdefghijklmnopqrstuvwxyz\u00e4\u00f6\u00e9\u00df",
    "Greek": (0x391, 0x3C9),
    "Cyrillic": (0x410, 0x44F),
    "Hebrew": (0x5D0, 0x5EA),
    "Arabic": (0x621, 0x64A),
    "Devanagari": (0x904, 0x94D),
    "Thai": (0xE01, 0xE3A),
    "Ethiopic": (0x1200, 0x1248),
    "hiragana": (0x3041, 0x3096),
    "hangul": (0xAC00, 0xB100),
    "Han": (0x4E00, 0x5E00),
    "emoji": (0x1F600, 0x1F64F),
    "cuneiform": (0x12000, 0x120FF),
    "private use": (0xE000, 0xE0FF),
    "DNA": "ACGT",
    "base64": "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=",
    "digits": "01",
    "controls": (1, 31),
    "marks that combine": (0x300, 0x36F),
    "one letter": "a",
}


def text_in(alphabet: str | tuple[int, int], n: int, seed: int, spaces: int) -> str:
    """n characters, the first of the alphabet being the most frequent, and this many spaces and newlines among them."""
    characters = alphabet if isinstance(alphabet, str) else "".join(map(chr, range(alphabet[0], alphabet[1] + 1)))
    rng = random.Random(seed)
    text = rng.choices(characters, [1 / (i + 2) for i in range(len(characters))], k=n)
    for _ in range(spaces):
        text[rng.randrange(n)] = rng.choice(" \n")
    return "".join(text)


@pytest.mark.parametrize("vocab_size", [300, 4096])
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_without_spaces(script, vocab_size):
    """If a space is rarer than one character in 2,000, SentencePiece has no piece for it."""
    for spaces in (0, 2, 400):
        text = text_in(SCRIPTS[script], 6000, len(script), spaces)
        tokenizer = train_sentencepiece([text], vocab_size, exact=False)
        assert tokenizer.vocab_size <= vocab_size
        for some in (text, f" {text[:50]}  \u2581 a new one\n ", " "):
            ids = tokenizer.encode(some)
            assert tokenizer.decode(ids) == some
            assert sum(len(tokenizer.token_bytes[i]) for i in ids) == len(some.encode())
            assert tokenizer.encode_batch([some, "x", some], 2) == [ids, tokenizer.encode("x"), ids]


def test_every_alphabet():
    """Not only strings of all characters, but texts with only a few, where training can fail."""

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(
        st.lists(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60, unique=True),
        st.sampled_from([262, 280, 400, 4096]),
        st.integers(1, 3000),
        st.integers(0, 4),
        st.integers(0, 1 << 20),
    )
    def check(alphabet, vocab_size, n, spaces, seed):
        text = text_in("".join(alphabet), n, seed, spaces)
        if not text.strip("\r\n"):
            return
        tokenizer = train_sentencepiece([text], vocab_size, exact=False)
        assert tokenizer.vocab_size <= vocab_size
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.decode(tokenizer.encode(" " + text[::-1] + " \u2581")) == " " + text[::-1] + " \u2581"

    check()


def test_a_wish_is_met_as_far_as_the_text_allows():
    assert train_sentencepiece(["hello world\n" * 10], 4096, exact=False).vocab_size == 285
    many = text_in((0x4E00, 0x9000), 40_000, 0, 10)
    with pytest.raises(InputError, match="too small for the characters of this text: raise --vocab-size"):
        train_sentencepiece([many], 1000)
    tokenizer = train_sentencepiece([many], 1000, exact=False)
    assert tokenizer.vocab_size == 1000
    characters = {
        token.decode() for token in tokenizer.token_bytes if token.decode(errors="ignore") and token > b"\x7f"
    }
    assert len({token for token in characters if len(token) == 1}) > 500  # the frequent ones
    assert any(len(token) > 1 for token in characters)  # and room for more
    assert tokenizer.decode(tokenizer.encode(many)) == many


def test_a_tokenizer_without_a_space_is_exported_as_it_is():
    from minidisp.hf import to_tokenizer

    tokenizers = pytest.importorskip("tokenizers")
    ours = train_sentencepiece([text_in("ACGT", 5000, 0, 1)], 400)
    assert b" " not in [ours.token_bytes[i] for i in range(258, 400)]
    theirs = tokenizers.Tokenizer.from_str(json.dumps(to_tokenizer(ours)[0]))
    for text in ("ACGT  GA T", " ", "GATTACA" * 50 + " \u2581 "):
        assert theirs.encode(text).ids == ours.encode(text)


def test_a_hugging_face_file_is_pointed_to_its_folder(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(byte_level_bpe().tokenizer_json))
    with pytest.raises(InputError, match=rf"use --tokenizer hf:{tmp_path}"):
        load(tmp_path / "tokenizer.json")


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
