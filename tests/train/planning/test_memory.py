"""Memory by formula, with the numbers in sight."""

import dataclasses

import pytest

from tests.train.planning.shapes import D, E, F, K, L, N, S, small
from train.planning.memory import (
    SCRATCH,
    kept_bytes,
    loss_positions,
    predict,
    rows_here,
    sizes_of,
    weigh,
)

ONE = {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1}
HEADS, KV, DIM = 4, 2, 16


def test_parameters_by_part():
    weights = weigh(small())
    experts = L * E * 3 * D * F * 4
    assert weights.held(ONE, "experts") == experts
    assert weights.held(ONE, "vocabulary") == 2 * N * D * 4
    assert weights.held(ONE) == weights.count * 4
    # Experts lie over expert, fsdp and tensor; the vocabulary over fsdp and tensor.
    spread = {"data": 2, "fsdp": 2, "expert": 4, "tensor": 2}
    assert weights.held(spread, "experts") == experts / 16
    assert weights.held(spread, "vocabulary") == 2 * N * D * 4 / 4


def test_what_may_split_the_model():
    common = weigh(small()).common
    assert common["expert"] == E
    assert common["fsdp"] == D
    assert common["data"] == 1


def test_optimizer_is_two_moments():
    memory = predict(small(), weigh(small()), ONE)
    assert memory.optimizer == 2 * memory.parameters
    bias = L * E * 4  # of the router, which is loss_free
    assert memory.arguments == 3 * memory.parameters + 4 * 4 * 16 * S + bias


@pytest.mark.parametrize(
    ("remat", "expected"),
    [
        ("full", L * 16 * S * D * 4),
        # The input, queries, keys and values, the map behind them, the router's scores.
        ("dots", L * 16 * S * 4 * (D + (HEADS + 2 * KV) * DIM + D + E)),
        # The input, chosen experts and their order.
        ("exchange", L * 16 * S * 4 * (D + K + K)),
    ],
)
def test_kept_activations(remat, expected):
    config = small(model={"remat": remat})
    assert kept_bytes(config, sizes_of(config, ONE)) == expected


def test_rows_of_the_exchange():
    # 16 sequences over 4 devices: A = 4·32·2 = 256 assignments, 1.25 times 64 slots for each peer.
    mesh = ONE | {"expert": 4}
    assert sizes_of(small(), mesh).rows == 4 * 80
    assert rows_here(small(moe={"exchange": "ragged_all_to_all"}), 256, 4) == 320
    assert rows_here(small(moe={"exchange": "all_gather"}), 256, 4) == 4 * 256
    assert rows_here(small(), 256, 1) == 256


def test_the_larger_scratch_counts():
    config = small(model={"dtype": "bfloat16", "remat": "dots"})
    memory = predict(config, weigh(config), ONE)
    t = 16 * S
    attention = SCRATCH.scores * 4 * 16 * HEADS * S * S + SCRATCH.hidden * 4 * t * D
    rows = t * K * 2 * (SCRATCH.rows * D + SCRATCH.inner * F)
    experts = rows + SCRATCH.weights * 2 * E * 3 * D * F
    assert memory.scratch == max(attention, experts)
    assert experts > attention


def test_a_large_chunk_of_logits_is_the_peak():
    def memory(chunk, accumulate=1):
        config = small(model={"dtype": "bfloat16", "remat": "dots", "loss_chunk": chunk})
        model = dataclasses.replace(config.model, vocab_size=50_000)
        config = dataclasses.replace(config, model=model, accumulate=accumulate)
        return predict(config, weigh(config), ONE)

    few, many, halves = memory(1), memory(16 * S), memory(16 * S, accumulate=2)
    # The head in bfloat16 and its gradient in float32, and logits of all 16 sequences.
    head = (2 + 4) * 50_000 * D
    loss = head + SCRATCH.logits * 4 * 16 * S * 50_000
    assert many.total == pytest.approx(many.arguments + many.activations + loss)
    assert few.total < many.total
    # Of half as many at a time, beside all gradients of those before.
    loss = head + SCRATCH.logits * 4 * 8 * S * 50_000 + halves.parameters
    assert halves.total == pytest.approx(halves.arguments + halves.activations + loss)


def test_a_chunk_holds_a_token_of_each_sequence_at_least():
    for chunk, positions in ((1, 1), (16, 1), (47, 2), (16 * S, S), (17 * S, S)):
        config = small(model={"loss_chunk": chunk})
        assert loss_positions(config.model, sizes_of(config, ONE)) == positions


def test_a_fused_kernel_holds_no_scores():
    plain, fused = (small(model={"attention": attention}) for attention in ("xla", "cudnn"))
    kept = [kept_bytes(config, sizes_of(config, ONE)) for config in (plain, fused)]
    # One and a half float32 arrays [B,H,S,S] of each block, where nothing is computed again.
    assert kept[0] - kept[1] == L * 1.5 * 4 * 16 * HEADS * S * S
