"""Rows, windows, exact state and the tokenizer of a run."""

import dataclasses
import pathlib
from typing import Any

import chex
import numpy as np
import pytest

from tests.data.documents import S, byte_config, check_state, take, write_documents
from train.data.text import TextConfig, TextData, load_text


@pytest.fixture
def data(tmp_path: pathlib.Path) -> TextData:
    """Twelve documents of 3 to 60 bytes; documents 0, 4 and 8 are held out."""
    texts = [chr(ord("a") + i) * (3 + (23 * i) % 58) for i in range(12)]
    return load_text(byte_config(write_documents(tmp_path, texts)))


# Rows


def test_short_documents_share_a_row(tmp_path: pathlib.Path) -> None:
    # Two training documents of 2 and 3 tokens: 3 and 4 positions with the end.
    data = load_text(
        byte_config(write_documents(tmp_path, ["held", "ab", "cde"]), sequence_length=8)
    )
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
    iterator = data.train_iterator(6, seed=3, rows=np.arange(3, 6))
    for batch in take(iterator, 40):
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
    iterator = load_text(
        byte_config(write_documents(tmp_path, texts), sequence_length=64)
    ).train_iterator(8, seed=0)
    padding = np.mean([np.mean(batch["segments"] == 0) for batch in take(iterator, 64)])
    iterator.close()
    assert padding < 0.06


# Seeds, shards, state


def test_next_seed_is_not_the_next_epoch(data: TextData) -> None:
    batches = []
    for seed in (0, 1):
        iterator = data.train_iterator(4, seed=seed)
        batches.append(take(iterator, 60))
        iterator.close()
    first = {batch["tokens"].tobytes() for batch in batches[0]}
    second = {batch["tokens"].tobytes() for batch in batches[1]}
    assert len(first & second) < 5


@pytest.mark.parametrize("steps", [0, 1, 63, 64, 65, 150])
def test_state_continues_with_the_next_batch(data: TextData, steps: int) -> None:
    # 256 rows are packed at once: 64 batches of 4.
    check_state(data, steps)


def in_shards(data: TextData, count: int) -> TextData:
    return dataclasses.replace(data, config=dataclasses.replace(data.config, shards=count))


@pytest.mark.parametrize("count", [1, 2, 4])
def test_rows_make_up_the_same_batches_however_they_are_read(data: TextData, count: int) -> None:
    """What a global batch holds depends on the number of data shards alone."""
    sharded = in_shards(data, count)
    whole = sharded.train_iterator(8, seed=1)
    expected = take(whole, 20)
    for parts in ([range(4), range(4, 8)], [range(2), [2], range(3, 8)], [range(0, 8, 2)]):
        iterators = [sharded.train_iterator(8, seed=1, rows=np.array(rows)) for rows in parts]
        for batch in expected:
            for rows, iterator in zip(parts, iterators, strict=True):
                mine = {key: leaf[np.array(rows)] for key, leaf in batch.items()}
                chex.assert_trees_all_equal(next(iterator), mine)
        position: dict[str, Any] = {}
        for iterator in iterators:
            position |= iterator.get_state()
            iterator.close()
        assert position == whole.get_state()
    whole.close()


def test_a_position_serves_other_readers(data: TextData) -> None:
    whole = in_shards(data, 2).train_iterator(4, seed=1)
    take(whole, 9)
    half = in_shards(data, 2).train_iterator(4, seed=1, rows=np.array([2, 3]))
    with pytest.raises(ValueError, match=r"the position in the data lacks shards \[1\]"):
        half.set_state({"0": whole.get_state()["0"]})
    half.set_state(whole.get_state())
    assert half.get_state().keys() == {"1"}  # the other shard was never opened
    for batch in take(whole, 5):
        chex.assert_trees_all_equal(next(half), {key: leaf[2:] for key, leaf in batch.items()})
    whole.close()
    half.close()


def test_mixture_keeps_the_weights_row_by_row(tmp_path: pathlib.Path) -> None:
    sources = []
    for letter in "ab":
        (tmp_path / letter).mkdir()
        sources.append(write_documents(tmp_path / letter, [letter * (40 + i) for i in range(6)]))
    config = TextConfig(
        sources=tuple(sources), weights=(3.0, 1.0), tokenizer="bytes", sequence_length=S
    )
    data = load_text(config)
    iterator = data.train_iterator(4, seed=0)
    for batch in take(iterator, 20):
        rows = [int((row == ord("a")).any()) for row in batch["tokens"]]
        assert sum(rows) == 3
    iterator.close()
    check_state(data, 17)


# Held-out windows


@pytest.mark.parametrize("batch", [1, 4])
def test_heldout_scores_each_target_exactly_once(data: TextData, batch: int) -> None:
    scored: dict[int, int] = {}
    batches = list(data.heldout_batches(batch))
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
    chex.assert_trees_all_equal(batches, list(data.heldout_batches(batch)))


def test_heldout_windows_by_hand(tmp_path: pathlib.Path) -> None:
    data = load_text(byte_config(write_documents(tmp_path, ["abcde", "x"]), sequence_length=4))
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
    parts = [list(data.heldout_batches(4, rows=np.array(rows))) for rows in ([0, 1], [2, 3])]
    for batch, first, second in zip(whole, *parts, strict=True):
        joined = {key: np.concatenate([first[key], second[key]]) for key in batch}
        chex.assert_trees_all_equal(joined, batch)


# Tokenizers of a run


def test_bpe_is_trained_on_training_documents_only(tmp_path: pathlib.Path) -> None:
    tokenizers = []
    for name, heldout in (("one", "zzzz zzzz zzzz"), ("two", "something else")):
        (tmp_path / name).mkdir()
        source = write_documents(tmp_path / name, [heldout, *["the cat sat on the mat"] * 2])
        run = tmp_path / name / "run" / "tokenizer.json"
        config = byte_config(
            source, tokenizer="bpe", vocab_size=262, cache_dir=str(tmp_path / "cache")
        )
        load_text(config, tokenizer_path=run)
        tokenizers.append(run.read_bytes())
    assert tokenizers[0] == tokenizers[1]
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_run_goes_on_with_its_own_tokenizer(tmp_path: pathlib.Path) -> None:
    source = write_documents(tmp_path, ["held", "the cat sat on the mat", "the dog"])
    run = tmp_path / "run" / "tokenizer.json"
    config = byte_config(source, tokenizer="bpe", vocab_size=262, cache_dir=str(tmp_path / "cache"))
    first = load_text(config, tokenizer_path=run)
    second = load_text(config, tokenizer_path=run)
    text = "the cat"
    np.testing.assert_array_equal(second.tokenizer.encode(text), first.tokenizer.encode(text))
    by_path = load_text(byte_config(source, tokenizer=str(run)))
    assert by_path.tokenizer.vocab_size == 262
    with pytest.raises(ValueError, match=r"data.vocab_size=300.*has 262 ids.*vocab_size=262"):
        load_text(byte_config(source, tokenizer=str(run), vocab_size=300))
    with pytest.raises(ValueError, match=r"tokenizer\.json has 262 ids"):
        load_text(byte_config(source), tokenizer_path=run)


def test_a_run_refuses_other_documents(tmp_path: pathlib.Path) -> None:
    source = write_documents(tmp_path, ["held", "the cat", "the dog"])
    run = tmp_path / "run" / "tokenizer.json"
    load_text(byte_config(source), tokenizer_path=run)
    write_documents(tmp_path, ["held", "the cat", "another"])
    with pytest.raises(ValueError, match=r"the train documents are not those.*--workdir"):
        load_text(byte_config(source), tokenizer_path=run)
    write_documents(tmp_path, ["other", "the cat", "the dog"])
    with pytest.raises(ValueError, match=r"the heldout documents are not those"):
        load_text(byte_config(source), tokenizer_path=run)


def test_what_is_held_out_is_not_trained_on_though_it_is_repeated(tmp_path: pathlib.Path) -> None:
    data = load_text(byte_config(write_documents(tmp_path, ["held", "text", "held"])))
    assert data.train_targets == 4 + 1
    with pytest.raises(ValueError, match=r"every training document .* is held out as well"):
        load_text(byte_config(write_documents(tmp_path, ["held", "held", "held"])))


def test_vocab_size_of_bytes(tmp_path: pathlib.Path) -> None:
    source = write_documents(tmp_path, ["held", "text"])
    assert load_text(byte_config(source, vocab_size=258)).tokenizer.vocab_size == 258
    with pytest.raises(ValueError, match=r"data.vocab_size=512.*'bytes' has 258 ids"):
        load_text(byte_config(source, vocab_size=512))


# Arguments


def test_arguments_of_the_iterators(data: TextData) -> None:
    with pytest.raises(ValueError, match=r"batch=5 is not a multiple of data\.shards=2"):
        in_shards(data, 2).train_iterator(5, seed=0)
    for rows in ([], [-1], [4], [1, 1], [1, 0]):
        with pytest.raises(ValueError, match=r"rows=.* must be ascending rows of a batch of 4"):
            data.train_iterator(4, seed=0, rows=np.array(rows, int))
    with pytest.raises(ValueError, match="batch=0 must be at least 1"):
        data.heldout_batches(0)
    with pytest.raises(ValueError, match="seed=-1"):
        data.train_iterator(4, seed=-1)


def test_a_damaged_record_of_the_split_is_named(tmp_path: pathlib.Path) -> None:
    source, run = write_documents(tmp_path, ["held", "text"]), tmp_path / "run" / "tokenizer.json"
    load_text(byte_config(source), tokenizer_path=run)
    run.with_name("split.json").write_text('{"train"')
    with pytest.raises(ValueError, match=r"split\.json is no JSON"):
        load_text(byte_config(source), tokenizer_path=run)
