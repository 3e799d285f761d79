"""Ids that are kept on disk: what is read is what was encoded; damage costs time alone."""

import pathlib

import chex
import numpy as np
import pytest

from train.data import encoded
from train.data import tokenizer as tokenizers_of
from train.data.encoded import kept_ids
from train.data.tokenizer import Tokenizer, byte_tokenizer, train_bpe

TEXTS = ["abab", "", "b a b", "\u6f22"]


@pytest.fixture(autouse=True)
def worth(monkeypatch):
    monkeypatch.setattr(encoded, "LEAST_CHARACTERS", 1)


@pytest.fixture
def calls(monkeypatch):
    """How many texts were encoded at each call."""
    made, encode = [], Tokenizer.encode_batch

    def watched(self, texts):
        made.append(len(texts))
        return encode(self, texts)

    monkeypatch.setattr(Tokenizer, "encode_batch", watched)
    return made


def check(tokenizer: Tokenizer, folder: pathlib.Path, texts=TEXTS) -> None:
    """Ids are those of the tokenizer, whether they are read or made."""
    ids = kept_ids(tokenizer, texts, str(folder))
    chex.assert_trees_all_equal(ids, [tokenizer.encode(text) for text in texts])
    assert all(each.dtype == np.int32 for each in ids)


def files(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(folder.glob("ids-*.npz"))


def test_texts_are_encoded_once(tmp_path, calls):
    tokenizer = train_bpe(TEXTS, 260)
    check(tokenizer, tmp_path)
    assert calls.count(len(TEXTS)) == 1
    check(tokenizer, tmp_path)
    assert calls.count(len(TEXTS)) == 1
    (file,) = files(tmp_path)
    with np.load(file) as parts:
        assert parts["ids"].dtype == np.uint16


def test_other_texts_and_other_tokenizers_have_files_of_their_own(tmp_path):
    for number, (tokenizer, texts) in enumerate(
        [
            (byte_tokenizer(), TEXTS),
            (train_bpe(TEXTS, 260), TEXTS),
            (byte_tokenizer(), ["abab", "b a b"]),
            (byte_tokenizer(), ["ababb a b", ""]),
        ]
    ):
        check(tokenizer, tmp_path, texts)
        assert len(files(tmp_path)) == number + 1


def test_another_version_of_the_library_has_a_file_of_its_own(tmp_path, monkeypatch):
    check(byte_tokenizer(), tmp_path)
    monkeypatch.setattr(tokenizers_of.tokenizers, "__version__", "0")
    check(byte_tokenizer(), tmp_path)
    assert len(files(tmp_path)) == 2


@pytest.fixture
def kept(tmp_path):
    """A file of ids, and what it holds."""
    check(byte_tokenizer(), tmp_path)
    (file,) = files(tmp_path)
    return file, file.read_bytes()


def test_no_flipped_bit_changes_an_id(kept, tmp_path, caplog):
    file, whole = kept
    for bit in range(0, 8 * len(whole), 3):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        check(byte_tokenizer(), tmp_path)
    assert "is damaged" in caplog.text


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", None])
def test_what_is_damaged_is_made_again(kept, tmp_path, caplog, content):
    file, whole = kept
    file.write_bytes(whole[: len(whole) // 2] if content is None else content)
    check(byte_tokenizer(), tmp_path)
    assert "is damaged" in caplog.text
    assert file.read_bytes() == whole


def test_lengths_that_are_not_the_ids_are_damage(kept, tmp_path, caplog):
    file, _ = kept
    with file.open("wb") as out:
        encoded._write(out, [np.array([1, 2], np.int32)])
    check(byte_tokenizer(), tmp_path)
    assert "it holds 1 documents of 2 ids" in caplog.text


def test_large_ids_keep_their_values(tmp_path):
    file = tmp_path / "ids.npz"
    documents = [np.array([2**16, 3], np.int32), np.array([], np.int32)]
    with file.open("wb") as out:
        encoded._write(out, documents)
    chex.assert_trees_all_equal(encoded._read(file, 2), documents)


def test_a_folder_that_cannot_be_written_is_told(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    check(byte_tokenizer(), tmp_path / "file" / "inside")
    assert "ids cannot be kept in" in caplog.text


def test_few_characters_are_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(encoded, "LEAST_CHARACTERS", sum(map(len, TEXTS)) + 1)
    check(byte_tokenizer(), tmp_path)
    assert not files(tmp_path)
