"""Time by formula: terms by hand, and against the traced program."""

import dataclasses

import jax
import pytest

from emoe_jax.config import REMAT
from tests.train.planning.shapes import D, F, K, L, N, S, small
from train.collectives import collectives, received
from train.planning.cost import PEAK, Rates, predict
from train.planning.memory import weigh
from train.planning.operations import products
from train.planning.program import planned, step_on
from train.planning.topology import parse

CPU = parse("cpu:8")
T = 16 * S


def cost_of(config, topology=CPU, max_vio=0.0):
    return predict(config, weigh(config), topology, max_vio)


def test_model_flops_are_six_for_each_active_parameter_and_attention():
    cost = cost_of(small({"data": 8}))
    attention_maps = 2 * D * D + 2 * D * D // 2
    active = L * (attention_maps + K * 3 * D * F + D * 8) + N * D
    assert cost.model_flops == T * (6 * active + 12 * L * D * S)


def test_recomputation_adds_a_forward_pass():
    none, full = (cost_of(small({"data": 8}, model={"remat": remat})) for remat in ("none", "full"))
    head = 3 * 2 * T * D * N
    assert (full.products * 8 - head) == pytest.approx((none.products * 8 - head) * 4 / 3)


def test_the_exchange_of_a_step():
    cost = cost_of(small({"data": 2, "expert": 4}))
    (flow,) = (flow for flow in cost.flows if flow.purpose == "exchange")
    # A device: 2 sequences of 32, 2 experts each, 128 assignments, 4·ceil(1.25·32) rows; there and
    # back, forward and backward, in 2 layers; a quarter stays.
    assert flow.received == 4 * 40 * D * 4 * 3 / 4 * 4 * L
    assert flow.count == 4 * L


@pytest.mark.parametrize(
    ("remat", "chunks"), [*((remat, 1) for remat in REMAT), ("exchange", 2), ("none", 2)]
)
def test_the_formula_counts_what_the_traced_program_does(remat, chunks):
    """Products, and the exchange's bytes; without room to spare, no slot is empty."""
    moe = {"buffer_factor": 1.0, "exchange_chunks": chunks}
    config = small({"data": 2, "expert": 4}, model={"remat": remat}, moe=moe)
    config = planned(config, "tpu", 8)
    traced = step_on(config, CPU).jaxpr
    cost = cost_of(config)
    assert products(traced).total == pytest.approx(cost.products * 8, rel=1e-6)
    (flow,) = (flow for flow in cost.flows if flow.purpose == "exchange")
    found = [
        each
        for each in collectives(traced, "expert", "tpu")
        if each.kind == "all_to_all" and not each.loops
    ]
    assert received(found) == flow.received


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize(
    "moe",
    [
        {"router": "eigen", "basis": {"rank": 16}},
        {"router": "whitened", "basis": {"rank": 16}},
        {"router": "whitened", "basis": {"rank": 16}, "routing": {"subspace": "learned"}},
        {"router": "whitened", "basis": {"rank": 16}, "routing": {"subspace": "fixed"}},
        {"router": "whitened", "basis": {"rank": 4}},
        {"router": "whitened", "basis": {"rank": D}},
    ],
    ids=lambda moe: "-".join(
        [moe["router"], str(moe["basis"]["rank"]), *moe.get("routing", {}).values()]
    ),
)
def test_the_formula_counts_a_token_of_an_eigenbasis_router(moe, remat):
    """Of two batches the difference: what a step does once is the same in both."""
    configs = [
        planned(small({"data": 8}, moe=moe, model={"remat": remat}, batch=batch), "tpu", 8)
        for batch in (16, 32)
    ]
    traced = [products(step_on(config, CPU).jaxpr).total for config in configs]
    counted = [8 * cost_of(config).products for config in configs]
    assert traced[1] - traced[0] == pytest.approx(counted[1] - counted[0], rel=1e-6)


def test_imbalance_costs_products_and_rounds():
    even = cost_of(small({"expert": 8, "data": 1}))
    # One expert a device: the fullest has 1 + MaxVio of the mean.
    skewed = cost_of(small({"expert": 8, "data": 1}), max_vio=1.0)
    experts = 3 * 2 * 3 * (T / 8 * K) * D * F * L
    assert skewed.products - even.products == pytest.approx(experts)
    assert (even.rounds, skewed.rounds) == (1, 2)  # 2 over 1.25
    moved = [
        sum(flow.received for flow in cost.flows if flow.purpose == "exchange")
        for cost in (even, skewed)
    ]
    # There and back, and their gradients'; a second round is run again for its gradients.
    assert moved[1] == moved[0] * (4 + 6) / 4


def test_a_step_is_work_and_then_what_moves():
    cost = cost_of(small({"data": 2, "expert": 4}))
    parts = cost.parts(PEAK)
    moving = sum(took for name, took in parts.items() if name not in ("products", "memory"))
    assert cost.seconds(PEAK) == max(parts["products"], parts["memory"]) + moving
    assert cost.seconds(PEAK, hidden=1.0) == max(parts["products"], parts["memory"], moving)
    slow = Rates(products=0.5, memory=0.5, links=0.5, fixed=1.0)
    assert cost.seconds(slow) == pytest.approx(1.0 + 2 * cost.seconds(PEAK))
    assert cost.bound(PEAK) == max(parts, key=parts.get)
    assert cost.mfu(2.0) == cost.model_flops / (2.0 * 8 * CPU.chip.flops)


def test_one_device_moves_nothing():
    assert cost_of(small(), parse("cpu:1")).flows == ()


def test_microbatches_repeat_the_gathers():
    one, two = (
        cost_of(dataclasses.replace(small({"fsdp": 8, "data": 1}), accumulate=parts))
        for parts in (1, 2)
    )
    gathers = [
        sum(flow.received for flow in cost.flows if flow.purpose == "fsdp gather")
        for cost in (one, two)
    ]
    assert gathers[1] == 2 * gathers[0]
    assert one.products == two.products


def test_loops_of_data_are_left_out_of_the_total():
    def loop(x):
        scanned, _ = jax.lax.scan(lambda x, _: (x @ x, None), x, length=3)
        return jax.lax.while_loop(lambda x: x[0, 0] > 0, lambda x: x @ x, scanned)

    found = products(jax.make_jaxpr(loop)(jax.ShapeDtypeStruct((4, 4), "float32")))
    assert found.total == 3 * 2 * 4**3
    assert found.once == 2 * 2 * 4**3
