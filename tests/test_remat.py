"""What the backward pass computes again: counted in programs, whose results stay as they are."""

import collections

import chex
import jax
import jax.numpy as jnp
import pytest
from jax import lax

from emoe_jax.config import REMAT
from emoe_jax.remat import decided, exchanged, remat
from tests.train.planning.shapes import small
from train.collectives import collectives
from train.planning.program import planned, step_on
from train.planning.topology import parse


def block(x, weight):
    """Rows of x, sorted and turned round (as if they travelled), through a matrix."""
    order = decided(jnp.argsort(lax.stop_gradient(x[:, 0])))
    rows = exchanged(lax.rev(x[order], (0,)))
    return jnp.sum(jnp.sin(rows @ weight))


X = jnp.array([[1.0, 2.0], [3.0, 4.0]])
WEIGHT = jnp.array([[0.5, -1.0], [2.0, 0.25]])


@pytest.mark.parametrize(
    ("policy", "sorts", "journeys", "products"),
    [
        # A journey there, and that of the gradient; the product, and those of both gradients.
        ("none", 1, 2, 3),
        ("full", 2, 3, 4),
        ("dots", 2, 3, 3),
        # Rows and order are kept, the product is not.
        ("exchange", 1, 2, 4),
    ],
)
def test_what_is_computed_again(policy, sorts, journeys, products):
    program = str(jax.make_jaxpr(jax.grad(remat(block, policy), argnums=(0, 1)))(X, WEIGHT))
    counts = [program.count(f" {name}[") for name in ("sort", "rev", "dot_general")]
    assert counts == [sorts, journeys, products]


@pytest.mark.parametrize("policy", REMAT[1:])
def test_values_and_gradients_stay(policy):
    plain, again = (
        jax.value_and_grad(remat(block, name), argnums=(0, 1))(X, WEIGHT)
        for name in ("none", policy)
    )
    chex.assert_trees_all_close(again, plain, rtol=1e-6)


def moved(mesh, exchange, policy):
    """How often each collective over `expert` runs in a training step, by what it brings."""
    moe = {"exchange": exchange, "router": "whitened"}
    config = planned(small(mesh, model={"remat": policy}, moe=moe), "tpu", 8)
    program = step_on(config, parse("cpu:8")).jaxpr
    count = collections.Counter()
    for each in collectives(program, "expert", "tpu"):
        count[each.kind, each.received, each.loops] += each.times
    return count


@pytest.mark.parametrize(
    ("mesh", "exchange"),
    [
        ({"data": 2, "expert": 4}, "all_to_all"),
        ({"fsdp": 2, "expert": 4}, "ragged_all_to_all"),
        ({"tensor": 2, "expert": 4}, "all_gather"),
    ],
)
def test_nothing_travels_a_second_time_unless_asked_to(mesh, exchange):
    once = moved(mesh, exchange, "none")
    assert moved(mesh, exchange, "exchange") == once
    again = moved(mesh, exchange, "full")
    assert again > once
    # What brings the most are the rows, but for the gradients of the head, which are summed once.
    rows = max((key for key in once if not key[0].startswith("psum")), key=lambda key: key[1])
    assert again[rows] > once[rows]
