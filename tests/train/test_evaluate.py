"""Evaluation: its numbers are those of a plain computation over the same held-out data."""

import functools
import json
import math
import sys
import types

import jax
import numpy as np
import pytest

from tests.train.tiny import S, lm_tree, vit_tree
from train import evaluate, run
from train.config import freeze
from train.loop import train


@functools.cache
def loaded(workdir):
    """A run, its trained state and step."""
    return run.load_trained(workdir, {})


@pytest.fixture
def trained_run(finished, one_device):
    return loaded(finished.workdir)


def test_bits_per_byte_equal_a_plain_computation(finished, trained_run):
    this, state, step = trained_run
    assert step == 24
    tokenizer = this.data.tokenizer
    texts = sorted((finished.workdir.parent / "text").glob("*.txt"))[::3]
    frames = [
        [tokenizer.bos_id, *text.read_bytes(), tokenizer.eos_id]  # the ids of bytes are the bytes
        for text in texts
    ]

    @jax.jit
    def log_probs(tokens):
        logits, _ = this.model.bind(state["params"], state["router"])(tokens)
        return jax.nn.log_softmax(logits)

    # Every target once: windows of S that begin S/2 apart score what the last one did not reach.
    nats, targets = 0.0, 0
    for frame in frames:
        scored = begin = 0
        while scored < len(frame) - 1:
            end = min(begin + S, len(frame) - 1)
            window = np.zeros((1, S), np.int32)
            window[0, : end - begin] = frame[begin:end]
            logs = np.asarray(log_probs(window), np.float64)[0]
            for position in range(scored, end):
                nats -= logs[position - begin, frame[position + 1]]
                targets += 1
            begin, scored = begin + S // 2, end
    raw = sum(text.stat().st_size for text in texts)
    assert targets == raw + len(texts)  # all bytes and each document's end
    expected = nats / math.log(2) / raw
    assert finished.scalars["eval/bits_per_byte"] == pytest.approx(expected, rel=1e-5)
    assert finished.scalars["eval/loss"] == pytest.approx(nats / targets, rel=1e-5)


def test_a_loaded_run_scores_as_at_the_end_of_training(finished, trained_run):
    this, state, _ = trained_run
    scalars, rows = evaluate.evaluate(this, evaluate.compile_evaluate(this), state)
    assert scalars == pytest.approx(finished.scalars, rel=1e-6)
    assert [row["layer"] for row in rows] == ["layer_00", "layer_01"]
    assert scalars.keys() >= {"eval/router/layer_00/max_vio", "eval/router/layer_01/drop_fraction"}
    for row in rows:
        assert sum(row["load"]) == pytest.approx(1.0, rel=1e-6)
        assert row["max_vio"] == pytest.approx(4 * max(row["load"]) - 1, rel=1e-5)


def test_the_batch_of_the_evaluation_does_not_matter(finished, one_device):
    this, state, _ = run.load_trained(finished.workdir, {"accumulate": 4})
    assert this.eval_batch == 2
    scalars, _ = evaluate.evaluate(this, evaluate.compile_evaluate(this), state)
    assert scalars["eval/loss"] == pytest.approx(finished.scalars["eval/loss"], rel=1e-5)
    name = "eval/router/layer_01/max_vio"
    assert scalars[name] == pytest.approx(finished.scalars[name], rel=1e-4)


def test_accuracy_equals_a_plain_computation_and_padding_counts_nowhere(tmp_path, one_device):
    tree = vit_tree(batch=128, steps=2, eval_every=2)
    scalars, rows = train(tree, tmp_path)
    this, state, _ = run.load_trained(tmp_path, {})
    images = this.data.heldout_images
    assert images == 360  # 104 rows of the third batch are padding
    batches = list(this.data.heldout_batches(128))
    assert [int(batch["scored"].sum()) for batch in batches] == [128, 128, 104]

    @jax.jit
    def forward(pixels):
        logits, aux = this.model.bind(state["params"], state["router"])(pixels)
        return logits, jax.nn.log_softmax(logits), aux["0"].stats["load"]

    pixels = np.concatenate([batch["images"][batch["scored"]] for batch in batches])
    labels = np.concatenate([batch["labels"][batch["scored"]] for batch in batches])
    logits, logs, load = map(np.asarray, forward(pixels))
    right = np.argmax(logits, -1) == np.argmax(labels, -1)
    assert scalars["eval/accuracy"] == pytest.approx(right.mean())
    assert scalars["eval/loss"] == pytest.approx(-(logs * labels).sum() / images, rel=1e-5)
    np.testing.assert_allclose(rows[0]["load"], load[0] / load[0].sum(), rtol=1e-4)


@pytest.mark.parametrize(
    ("model", "layers"),
    [
        ({"depth": 4, "moe_every": 2}, [1, 3]),
        ({"depth": 4, "moe_every": 1}, [0, 1, 2, 3]),
        ({"depth": 5, "moe_blocks": (4, 0, 2)}, [0, 2, 4]),
        ({"depth": 12, "moe_every": 3}, [2, 5, 8, 11]),
        ({"depth": 2, "moe_every": 0}, []),
    ],
)
def test_routing_rows_are_named_by_block_and_in_order(model, layers, tmp_path, one_device):
    config = freeze(lm_tree(model=model))
    this = run.Run(config, *[None] * 6)
    # What the model gives: places in the period, each with an axis over the repeats. Every value
    # here is the number of its block.
    repeated = not config.model.moe_blocks
    period = max(config.model.moe_every, 1) if repeated else config.model.depth
    metrics = {}
    for place in range(period):
        blocks = np.arange(place, config.model.depth, period)
        if blocks[0] in layers:
            loads = np.stack([blocks, blocks], axis=-1)
            metrics[str(place)] = {"max_vio": blocks, "load": loads}
    rows = evaluate.routing_rows(this, metrics)
    assert [row["layer"] for row in rows] == [f"layer_{i:02d}" for i in layers]
    assert [row["max_vio"] for row in rows] == layers
    assert [row["load"] for row in rows] == [[i, i] for i in layers]


def test_the_result_is_printed_with_step_and_amount(finished, trained_run, capsys):
    this, _, step = trained_run
    evaluate.print_evaluation(this, finished.scalars, finished.rows, step)
    printed = capsys.readouterr().out
    bits = finished.scalars["eval/bits_per_byte"]
    assert f"step 24: held out {bits:.4f} bits per byte" in printed
    assert f"on {this.data.heldout_bytes:,} bytes" in printed
    assert f"held-out data, router {this.config.model.moe.router}" in printed
    assert "layer_01" in printed


def test_tokens_that_statistics_leave_out_are_printed_where_there_are_any(
    finished, trained_run, capsys
):
    this, _, step = trained_run
    for share in (0.0, 0.125):
        rows = [row | {"left_out": share} for row in finished.rows]
        evaluate.print_evaluation(this, finished.scalars, rows, step)
        assert ("0.125" in capsys.readouterr().out) == (share > 0)


def test_a_folder_without_run_or_checkpoint_is_refused(finished, tmp_path, one_device):
    with pytest.raises(FileNotFoundError, match=r"holds no run: there is no config\.json; train"):
        run.load_trained(tmp_path, {})
    (tmp_path / "config.json").write_text((finished.workdir / "config.json").read_text())
    with pytest.raises(FileNotFoundError, match=r"no checkpoints at .* the folder does not exist"):
        run.load_trained(tmp_path, {})
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no finished checkpoint yet"):
        run.load_trained(tmp_path, {})


def test_a_damaged_config_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is no JSON .*Expecting property"):
        run.load_trained(tmp_path, {})


def test_the_program_writes_its_table(finished, one_device, tmp_path, monkeypatch):
    class Flags:
        workdir, override, step = str(finished.workdir), ["accumulate=4"], "best"
        json, train_batches = str(tmp_path / "table.json"), 0

    monkeypatch.setattr(evaluate, "flags", types.SimpleNamespace(FLAGS=Flags))
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "train.evaluate"])
    evaluate.main([])
    table = json.loads((tmp_path / "table.json").read_text())
    assert [row["layer"] for row in table["rows"]] == ["all", "layer_00", "layer_01"]
    assert table["rows"][0]["step"] == 24
    loss = finished.scalars["eval/loss"]
    assert table["rows"][0]["eval/loss"] == pytest.approx(loss, rel=1e-6)


def test_batches_of_training_are_scored_as_a_plain_computation_scores_them(
    finished, trained_run, capsys
):
    this, state, _ = trained_run
    scalars, rows = evaluate.evaluate(this, evaluate.compile_evaluate(this, 3), state)
    first, second, third = evaluate.training(this, 3)
    drawn = [*evaluate.training(this, 2)]
    for batch, again in zip((first, second), drawn, strict=True):
        np.testing.assert_array_equal(batch["tokens"], again["tokens"])  # one seed, one stream
    assert (first["tokens"] != second["tokens"]).any()

    # Drawn from the training documents alone, which the held-out ones are not among.
    texts = sorted((finished.workdir.parent / "text").glob("*.txt"))
    seen = b"\n".join(text.read_bytes() for number, text in enumerate(texts) if number % 3)
    piece = first["tokens"][0][first["segments"][0] == 1]
    assert bytes(piece[piece < 256].astype(np.uint8)) in seen

    @jax.jit
    def log_probs(batch):
        where = {"segments": batch["segments"], "positions": batch["positions"]}
        logits, _ = this.model.bind(state["params"], state["router"])(batch["tokens"], **where)
        return jax.nn.log_softmax(logits)

    nats = targets = 0.0
    for batch in (first, second, third):
        logs = np.asarray(log_probs(batch), np.float64)
        real = batch["segments"] > 0
        picked = np.take_along_axis(logs, batch["targets"][..., None], -1)[..., 0]
        nats, targets = nats - picked[real].sum(), targets + real.sum()
    assert scalars["eval/loss"] == pytest.approx(nats / targets, rel=1e-5)
    assert "eval/bits_per_byte" not in scalars
    assert all(sum(row["load"]) == pytest.approx(1.0, rel=1e-6) for row in rows)

    evaluate.print_evaluation(this, scalars, rows, 24, 3)
    printed = capsys.readouterr().out
    assert f"step 24: loss {scalars['eval/loss']:.4f} nats on 3 batches of training" in printed
    assert "Routing on 3 batches of training, router" in printed


def test_a_number_of_batches_below_zero_is_refused(finished, monkeypatch):
    class Flags:
        workdir, train_batches = str(finished.workdir), -1

    monkeypatch.setattr(evaluate, "flags", types.SimpleNamespace(FLAGS=Flags))
    with pytest.raises(ValueError, match="--train_batches=-1 is below zero; 0 means the held-out"):
        evaluate.main([])


def test_training_batches_of_images_have_a_loss_and_no_accuracy(tmp_path, one_device):
    """Labels may be mixed, and then nothing is right or wrong."""
    train(vit_tree(batch=8, steps=2, eval_every=2, data={"mixup": 0.5}), tmp_path)
    this, state, _ = run.load_trained(tmp_path, {})
    scalars, rows = evaluate.evaluate(this, evaluate.compile_evaluate(this, 2), state)
    assert "eval/accuracy" not in scalars
    batches = list(evaluate.training(this, 2))

    def loss(batch):
        logits, _ = this.model.bind(state["params"], state["router"])(batch["images"])
        return -(jax.nn.log_softmax(logits) * batch["labels"]).sum()

    expected = sum(float(loss(batch)) for batch in batches) / 16
    assert scalars["eval/loss"] == pytest.approx(expected, rel=1e-5)
    assert len(rows) == 1


def test_rows_that_the_shards_of_the_data_do_not_divide_are_refused(finished, one_device):
    this, _, _ = run.load_trained(finished.workdir, {"accumulate": 4, "data.shards": 4})
    words = r"2 rows \(batch=8 over accumulate=4\), which data.shards=4 .*--override=accumulate=1"
    with pytest.raises(ValueError, match=words):
        next(evaluate.training(this, 1))
