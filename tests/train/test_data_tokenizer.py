"""Tokenizers: exact round trips, deterministic training, one file, plain errors."""

import json
import pathlib

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from train.data import tokenizer as tokenizer_module
from train.data.tokenizer import BOS, EOS, Tokenizer, byte_tokenizer, cached_bpe, train_bpe

DOCUMENTS = [
    "the cat sat on the mat, and the dog sat by the cat\n" * 20,
    "there is the other cat; the mat was theirs\n" * 20,
]
BYTES = byte_tokenizer()
BPE = train_bpe(DOCUMENTS, 270)


def test_byte_ids_are_the_bytes() -> None:
    assert BYTES.encode("aé\n").tolist() == [97, 0xC3, 0xA9, 10]
    assert BYTES.encode("").tolist() == []
    assert BYTES.encode("a").dtype == np.int32
    assert (BYTES.vocab_size, BYTES.bos_id, BYTES.eos_id) == (258, 256, 257)


def test_bpe_ids_are_specials_then_bytes_then_merges() -> None:
    assert (BPE.vocab_size, BPE.bos_id, BPE.eos_id) == (270, 0, 1)
    ids = BPE.encode("the cat")
    assert ids.dtype == np.int32
    assert len(ids) < len("the cat")
    assert ids.max() < 270


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
@settings(deadline=None)
@given(text=st.text())
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
@pytest.mark.parametrize("text", [BOS, f"a{EOS}b", " \r\n\t  x ", "e\u0301", "\ufeff", "\x00", ""])
def test_round_trip_of_awkward_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    # The name of a special token inside a document is text, not the special token.
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids.tolist())


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
@settings(deadline=None)
@given(ids=st.lists(st.integers(-(2**40), 2**40) | st.integers(0, 300)))
def test_decode_never_raises(tokenizer: Tokenizer, ids: list[int]) -> None:
    tokenizer.decode(ids).encode("utf-8")


def test_decode_marks_what_is_no_text() -> None:
    # 0xC3 begins a two-byte character that never comes; 258 is no id; 256 and 257 are no text.
    assert BYTES.decode([256, 97, 0xC3, 98, 258, -1, 257]) == "a\ufffdb\ufffd\ufffd"


def test_encode_batch_equals_encode() -> None:
    texts = ["", "the cat", "é" * 10, *DOCUMENTS]
    for tokenizer in (BYTES, BPE):
        for ids, text in zip(tokenizer.encode_batch(texts), texts, strict=True):
            np.testing.assert_array_equal(ids, tokenizer.encode(text))


def test_training_is_deterministic(tmp_path: pathlib.Path) -> None:
    train_bpe(DOCUMENTS, 270).save(tmp_path / "a.json")
    BPE.save(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
def test_save_and_load_one_file(tokenizer: Tokenizer, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "new" / "tokenizer.json"
    tokenizer.save(path)
    loaded = Tokenizer.load(path)
    assert [p.name for p in path.parent.iterdir()] == ["tokenizer.json"]
    assert (loaded.vocab_size, loaded.bos_id, loaded.eos_id) == (
        tokenizer.vocab_size,
        tokenizer.bos_id,
        tokenizer.eos_id,
    )
    text = f"the cat {BOS} é\n"
    np.testing.assert_array_equal(loaded.encode(text), tokenizer.encode(text))


def test_too_little_text_names_the_size_that_works() -> None:
    # "aaaa" merges to aa and aaaa: 2 specials, 256 bytes and 2 merges.
    with pytest.raises(ValueError, match=r"data.vocab_size=300.*only 260 ids.*vocab_size=260"):
        train_bpe(["aaaa"], 300)
    assert train_bpe(["aaaa"], 260).encode("aaaa").size == 1


def test_cache_is_by_content(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = cached_bpe(DOCUMENTS, 265, str(tmp_path))
    cached_bpe(DOCUMENTS, 266, str(tmp_path))
    cached_bpe([*DOCUMENTS, "more"], 265, str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 3
    monkeypatch.setattr(tokenizer_module, "train_bpe", None)  # a second training would fail
    again = cached_bpe(DOCUMENTS, 265, str(tmp_path))
    np.testing.assert_array_equal(again.encode("the cat"), first.encode("the cat"))


def test_cache_folder_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tokenizer_module.default_cache_dir("") == tmp_path / "emoe_jax"
    assert tokenizer_module.default_cache_dir(str(tmp_path / "x")) == tmp_path / "x"


def test_cache_that_cannot_be_written_names_the_remedy(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"data\.cache_dir"):
        cached_bpe(DOCUMENTS, 265, str(tmp_path / "file"))


def test_missing_and_damaged_files(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json.*'bytes', 'bpe'"):
        Tokenizer.load(tmp_path / "nowhere.json")
    damaged = tmp_path / "tokenizer.json"
    damaged.write_text('{"version": "1.0"')
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer\.json"):
        Tokenizer.load(damaged)


def test_a_tokenizer_that_would_drop_a_byte_is_refused(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "tokenizer.json"
    BYTES.save(file)
    tree = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = tree["model"]["vocab"]
    vocabulary["twenty"] = vocabulary.pop("2")
    file.write_text(json.dumps(tree))
    with pytest.raises(ValueError, match=r"tokenizer\.json .* has no token for the byte 0x32"):
        Tokenizer.load(file)


@pytest.mark.parametrize("index", [2**24, 2**32 - 1])
def test_an_id_that_no_model_has_a_row_for_is_refused(tmp_path: pathlib.Path, index: int) -> None:
    file = tmp_path / "tokenizer.json"
    BYTES.save(file)
    tree = json.loads(file.read_text(encoding="utf-8"))
    tree["model"]["vocab"]["2"] = index
    file.write_text(json.dumps(tree))
    with pytest.raises(
        ValueError, match=f"tokenizer.json has {index + 1} ids, .* at most 16777216"
    ):
        Tokenizer.load(file)


def _byte_level(special: str, **changes: object) -> tokenizers.Tokenizer:
    """Returns a mergeless byte-level tokenizer with one special token and some parts replaced."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([special])
    for name, part in changes.items():
        setattr(backend, name, part)
    return backend


def test_one_foreign_special_token_serves_as_both() -> None:
    tokenizer = Tokenizer(_byte_level("<|endoftext|>"))
    assert tokenizer.bos_id == tokenizer.eos_id == 256
    assert tokenizer.decode(tokenizer.encode("aé")) == "aé"
    assert tokenizer.encode("a").tolist() != [97]  # its alphabet is sorted another way


def test_an_id_of_two_tokens_is_refused(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "theirs.json"
    train_bpe(["abab abab"], 259).save(path)
    tree = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = tree["model"]["vocab"]
    vocabulary["\u0143"] = 258  # the merge's
    path.write_text(json.dumps(tree), encoding="utf-8")
    with pytest.raises(ValueError, match=r"theirs.json has 259 tokens, but only 258 ids"):
        Tokenizer.load(path)


@pytest.mark.parametrize(
    ("backend", "words"),
    [
        (_byte_level("<pad>"), "none of the special tokens"),
        (_byte_level(BOS, normalizer=normalizers.NFC()), "none of the special tokens"),
        (_byte_level("<|endoftext|>", normalizer=normalizers.NFC()), "does not give back the text"),
        (
            _byte_level(
                "<|endoftext|>", pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)
            ),
            "does not give back the text",
        ),
    ],
    ids=["no specials", "no end", "normaliser", "prefix space"],
)
def test_unfit_tokenizers_are_refused(
    backend: tokenizers.Tokenizer, words: str, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "theirs.json"
    backend.save(str(path))
    with pytest.raises(ValueError, match=words) as error:
        Tokenizer.load(path)
    assert "theirs.json" in str(error.value)


def test_tokenizer_that_is_not_byte_level_is_refused(tmp_path: pathlib.Path) -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"caf漢": 0, "<unk>": 1}, unk_token="<unk>"))
    backend.add_special_tokens(["<|endoftext|>"])
    path = tmp_path / "words.json"
    path.write_text(json.dumps(json.loads(backend.to_str())))
    with pytest.raises(ValueError, match=r"words\.json is not byte-level"):
        Tokenizer.load(path)
