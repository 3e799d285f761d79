"""Bytes that programs move, against counts by hand. Four devices: X-1 of X parts come from others.

Rows here are [8,2] float32 over all devices: 2 rows of 8 bytes on each, 16 bytes.
"""

import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from train.collectives import RULES, collectives, received

MESH = AbstractMesh((2, 4), ("data", "expert"), axis_types=(AxisType.Auto,) * 2)
ROWS = PartitionSpec("expert")


def trace(body, rows=8, out=ROWS, mesh=MESH):
    """The program of one device's body on [rows / 4, 2] float32."""
    mapped = jax.shard_map(body, mesh=mesh, in_specs=ROWS, out_specs=out, check_vma=False)
    return jax.make_jaxpr(mapped)(jax.ShapeDtypeStruct((rows, 2), jnp.float32))


def count(body, platform="cpu", **kwargs):
    return collectives(trace(body, **kwargs), "expert", platform)


def swap(x):
    return lax.all_to_all(x.reshape(4, -1), "expert", 0, 0).reshape(x.shape)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        # 16 bytes, of which a quarter stays.
        (swap, 12),
        # 64 bytes come together, 48 of them from the others.
        (lambda x: lax.all_gather(x, "expert"), 48),
        # Of the sum of 4 parts of 64 bytes a device keeps 16, to which 3 others give 16 each.
        (lambda x: lax.psum_scatter(jnp.tile(x, (4, 1)), "expert", tiled=True), 48),
        # A ring sends 3 quarters of 16 bytes twice.
        (lambda x: lax.psum(x, "expert"), 24),
        (lambda x: lax.pmax(x, "expert"), 24),
        # Over both axes, 8 devices: 7 eighths of 16 bytes twice.
        (lambda x: lax.psum(x, ("data", "expert")), 28),
        (lambda x: lax.ppermute(x, "expert", [(0, 1), (1, 0)]), 16),
        # Two pairs: half of the 16 bytes stays.
        (
            lambda x: lax.all_to_all(
                x.reshape(2, -1), "expert", 0, 0, axis_index_groups=[[0, 1], [2, 3]]
            ),
            8,
        ),
        # Not over the axis, or nothing moves.
        (lambda x: lax.psum(x, "data"), 0),
        (lambda x: x + lax.axis_index("expert").astype(jnp.float32), 0),
    ],
)
def test_each_collective_by_hand(body, expected):
    assert received(count(body)) == expected


def test_a_half_wide_dtype_moves_half():
    assert received(count(lambda x: swap(x.astype(jnp.bfloat16)))) == 6


def test_scans_multiply():
    def nested(x):
        def outer(x, _):
            x, _ = lax.scan(lambda x, _: (swap(x), None), x, length=5)
            return swap(x), None

        return lax.scan(outer, x, length=3)[0]

    found = count(nested)
    assert [each.times for each in found] == [15, 3]
    assert received(found) == 18 * 12


def test_while_stands_apart_for_one_turn():
    def loop(x):
        def turn(_, x):
            return lax.fori_loop(0, 3, lambda _, x: swap(x), x)

        return lax.fori_loop(1, jnp.sum(x).astype(jnp.int32), turn, swap(x))

    found = count(loop)
    assert [(each.loops, each.times) for each in found] == [(0, 1), (1, 3)]
    assert received(found) == 12
    assert received(found, loops=True) == 36


def test_the_condition_of_a_while_is_asked_once_more():
    def loop(x):
        return lax.while_loop(lambda x: lax.psum(x[0, 0], "expert") > 0, swap, x)

    found = count(loop)
    assert received(found) == 6  # 3 quarters of 4 bytes twice
    assert received(found, loops=True) == 6 + 12


def test_of_a_cond_the_branch_that_moves_most():
    def choose(x):
        branches = [swap, lambda x: swap(swap(x)), lambda x: x]
        return lax.switch(jnp.sum(x).astype(jnp.int32), branches, x)

    assert received(count(choose)) == 24


def test_of_a_choice_by_platform_that_platforms_branch():
    def choose(x):
        return lax.platform_dependent(x, cpu=lambda x: swap(swap(x)), default=swap)

    assert received(count(choose, "cpu")) == 24
    assert received(count(choose, "tpu")) == received(count(choose, "cuda")) == 12


def test_programs_inside_programs_count():
    @jax.custom_vjp
    def custom(x):
        return swap(x)

    custom.defvjp(lambda x: (swap(x), None), lambda _, out: (swap(out),))
    assert received(count(lambda x: jax.jit(custom)(x))) == 12

    def gradient(x):
        again = jax.checkpoint(lambda x: jnp.sum(jnp.sin(swap(x))))
        return jax.grad(lambda x: again(x) + jnp.sum(custom(x)))(x)

    # Forward 2; the checkpoint's again and its transpose; the custom one's.
    assert [each.kind for each in count(gradient)] == ["all_to_all"] * 5


def test_room_of_a_ragged_exchange_is_an_upper_bound():
    def ragged(x):
        sizes = jnp.zeros((4,), jnp.int32)
        out = jnp.zeros((5, 2), jnp.float32)
        return lax.ragged_all_to_all(x, out, sizes, sizes, sizes, sizes, axis_name="expert")

    (found,) = count(ragged)
    assert (found.kind, found.shape, found.given, found.received) == (
        "ragged_all_to_all",
        (2, 2),
        16,
        40,
    )


def test_what_is_not_known_is_refused(monkeypatch):
    monkeypatch.delitem(RULES, "all_to_all")
    with pytest.raises(ValueError, match=r"has a collective 'all_to_all' over .* known are all_"):
        count(swap)


def test_counts_are_those_of_the_lowered_program():
    def body(x):
        x, _ = lax.scan(lambda x, _: (swap(x), None), x, length=3)
        return lax.fori_loop(0, jnp.sum(x).astype(jnp.int32), lambda _, x: swap(x), swap(x))

    mapped = jax.shard_map(body, mesh=MESH, in_specs=ROWS, out_specs=ROWS, check_vma=False)
    rows = jax.ShapeDtypeStruct((8, 2), jnp.float32)
    lower = partial(jax.jit(mapped).trace(rows).lower, lowering_platforms=("cpu",))
    assert len(re.findall(r"stablehlo\.all_to_all", lower().as_text())) == len(count(body)) == 3
