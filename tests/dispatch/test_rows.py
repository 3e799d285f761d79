"""Moving rows: what spread and collect compute, and that each is the other's transpose."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emoe_jax.dispatch.rows import Layout, collect_rows, combine_rows, spread_rows

pytestmark = pytest.mark.usefixtures("strict")

T, K, M, D = 5, 2, 7, 3
NOWHERE = M

# Token 0 stands at rows 1 and 4, token 1 at row 0, token 2 nowhere, token 3 at 2 and 6, token 4 at
# 5; row 3 is empty.
PLACES = np.array([[1, 4], [0, M], [M, M], [6, 2], [M, 5]], np.int32)
LAYOUT = Layout(PLACES, np.array([2, 0, 7, T * K, 1, 9, 6], np.int32))
SOURCES = np.array([1, 0, 3, T, 0, 4, 3], np.int32)


def draw(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def test_spread_copies_and_collect_sums():
    tokens = jnp.asarray([[1.0], [2.0], [3.0], [4.0], [5.0]])
    rows = spread_rows(tokens, LAYOUT)
    chex.assert_trees_all_equal(rows[:, 0], jnp.array([2.0, 1.0, 4.0, 0.0, 1.0, 5.0, 4.0]))
    back = collect_rows(rows, LAYOUT)
    chex.assert_trees_all_equal(back[:, 0], jnp.array([2.0, 2.0, 0.0, 8.0, 5.0]))


def test_gradients_equal_those_of_plain_indexing():
    tokens, rows = draw((T, D)), draw((M, D), 1)
    to_rows, to_tokens = draw((M, D), 2), draw((T, D), 3)
    padded_places = np.where(PLACES == NOWHERE, 0, PLACES)
    held = (PLACES != NOWHERE)[..., None]

    def plain_spread(tokens):
        return jnp.concatenate([tokens, jnp.zeros((1, D))])[SOURCES]

    def plain_collect(rows):
        return jnp.sum(jnp.where(held, rows[padded_places], 0.0), axis=1)

    spread = jax.vjp(lambda x: spread_rows(x, LAYOUT), tokens)
    plain = jax.vjp(plain_spread, tokens)
    chex.assert_trees_all_close((spread[0], spread[1](to_rows)), (plain[0], plain[1](to_rows)))
    collect = jax.vjp(lambda x: collect_rows(x, LAYOUT), rows)
    plain = jax.vjp(plain_collect, rows)
    chex.assert_trees_all_close(
        (collect[0], collect[1](to_tokens)), (plain[0], plain[1](to_tokens)), rtol=1e-6
    )


def test_combining_weighs_and_its_gradients_are_those_of_plain_indexing():
    rows, gates, to_tokens = draw((M, D)), draw((T, K), 1), draw((T, D), 2)

    def plain(rows, gates):
        padded = jnp.concatenate([rows, jnp.zeros((1, D))])
        return jnp.sum(gates[..., None] * padded[PLACES], axis=1)

    ours = jax.vjp(lambda *x: combine_rows(*x, LAYOUT), rows, gates)
    theirs = jax.vjp(plain, rows, gates)
    chex.assert_trees_all_close(
        (ours[0], ours[1](to_tokens)), (theirs[0], theirs[1](to_tokens)), rtol=1e-5
    )
    assert not np.asarray(ours[1](to_tokens)[1])[PLACES == NOWHERE].any()


def test_combining_keeps_rows_in_their_own_dtype():
    rows, gates = draw((M, D)).astype(jnp.bfloat16), draw((T, K), 1)
    out, pull = jax.vjp(lambda *x: combine_rows(*x, LAYOUT), rows, gates)
    assert out.dtype == jnp.float32
    assert {leaf.dtype.name for leaf in jax.tree.leaves(pull) if leaf.shape == (M, D)} == {
        "bfloat16"
    }
    assert [leaf.dtype.name for leaf in pull(out)] == ["bfloat16", "float32"]


def test_no_direction_scatters():
    tokens, rows = draw((T, D)), draw((M, D))
    spread = jax.make_jaxpr(jax.grad(lambda x: jnp.sum(jnp.square(spread_rows(x, LAYOUT)))))(tokens)
    collect = jax.make_jaxpr(jax.grad(lambda x: jnp.sum(jnp.square(collect_rows(x, LAYOUT)))))(rows)
    assert "scatter" not in str(spread)
    combine = jax.make_jaxpr(
        jax.grad(lambda *x: jnp.sum(jnp.square(combine_rows(*x, LAYOUT))), argnums=(0, 1))
    )(rows, draw((T, K)))
    assert "scatter" not in str(collect)
    assert "scatter" not in str(combine)
    assert "gather" in str(spread)


@jax.jit
def both_products(tokens, rows, layout):
    spread = jnp.vdot(spread_rows(tokens, layout), rows)
    return spread, jnp.vdot(tokens, collect_rows(rows, layout))


@given(seed=st.integers(0, 10_000), filled=st.integers(0, min(M, T * K)))
def test_the_maps_are_each_others_transpose(seed, filled):
    # Any injective partial map of the T·K places into the M rows.
    rng = np.random.default_rng(seed)
    places = np.full((T * K,), NOWHERE, np.int32)
    assignments = np.full((M,), T * K, np.int32)
    some = rng.permutation(T * K)[:filled]
    places[some] = rng.permutation(M)[:filled]
    assignments[places[some]] = some
    tokens, rows = draw((T, D), seed), draw((M, D), seed + 1)
    left, right = both_products(tokens, rows, Layout(places.reshape(T, K), assignments))
    np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-4)


def test_bfloat16_is_summed_in_float32_and_rounded_once():
    # 1 + 2^-8 + 2^-8 is 1 + 2^-7, which bfloat16 holds; adding one by one in bfloat16 stays at 1.
    rows = jnp.array([[1.0], [2.0**-8], [2.0**-8]], jnp.bfloat16)
    layout = Layout(np.array([[0, 1, 2]], np.int32), np.array([0, 1, 2], np.int32))
    total = collect_rows(rows, layout)
    assert total.dtype == jnp.bfloat16
    assert float(total[0, 0]) == 1.0 + 2.0**-7
    pulled = jax.vjp(lambda x: spread_rows(x, layout), jnp.ones((1, 1), jnp.bfloat16))[1]
    assert float(pulled(rows)[0][0, 0]) == 1.0 + 2.0**-7
