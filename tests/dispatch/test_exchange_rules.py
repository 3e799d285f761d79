"""What exchanges drop where asked to, what they refuse, and where the layer does without one."""

import collections
import math
import re
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params
from jax.sharding import PartitionSpec

from emoe_jax import MoE, MoEConfig
from emoe_jax.dispatch import exchange, transport
from emoe_jax.dispatch.exchange import choose_exchange
from emoe_jax.experts import apply_experts
from emoe_jax.sharding import MeshConfig, make_mesh
from tests.dispatch.agreement import SHARE, draw
from train.collectives import collectives

X, E, T, K, D, F = 4, 8, 24, 2, 4, 4
A = T // X * K
TRANSPORTS = ("all_to_all", "ragged_all_to_all")


def four_devices():
    assert len(jax.devices()) >= X
    return make_mesh(MeshConfig(data=1, expert=X), jax.devices()[:X])


def on(mesh, function):
    """The function, compiled for the devices of a mesh."""
    jitted = jax.jit(function)

    def run(*args):
        with jax.set_mesh(mesh):
            return jitted(*args)

    return run


def make_weights():
    shapes = {"w_up": (E, D, F), "w_down": (E, F, D), "b_up": (E, F), "b_down": (E, D)}
    return {name: draw(shape, i) / 2 for i, (name, shape) in enumerate(shapes.items())}


def assert_close(actual, expected, share=SHARE):
    def check(a, b):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=0, atol=share * max(np.abs(b).max(), 1e-2))

    jax.tree.map(check, actual, expected)


# --- drops ----------------------------------------------------------------------------------------


@cache
def dropping(name, factor):
    """Outputs, what was dropped, and the gradients of tokens, gates and weights."""
    room = {"exchange": name, "buffer_factor": factor, "on_overflow": "drop"}
    config = MoEConfig(experts=E, top_k=K, **room)
    mesh = four_devices()

    def loss(tokens, gates, weights, experts, target):
        done = exchange(tokens, experts, gates, weights, apply_experts, config, mesh.abstract_mesh)
        return jnp.sum(jnp.square(done.out - target)), done

    gradient = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)
    return on(mesh, gradient)


@jax.jit
def by_hand(tokens, gates, weights, experts, target, kept):
    """The same by every expert on every token, with the gates of what is not kept at zero."""

    def loss(tokens, gates, weights):
        every = jnp.broadcast_to(tokens, (E, *tokens.shape))
        each = apply_experts(weights, every, jnp.full((E,), T, jnp.int32))
        chosen = jax.nn.one_hot(experts, E) * (gates * kept)[..., None]
        out = jnp.einsum("tke,etd->td", chosen, each)
        return jnp.sum(jnp.square(out - target)), out

    return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(tokens, gates, weights)


def kept_by_loop(name, experts, room):
    """[T,K] which assignments find a slot: by expert, then in their order, on each device."""
    kept = np.zeros((X, A), bool)
    flat = experts.reshape(X, A)
    taken = np.zeros((X, X) if name == "all_to_all" else (X,), int)
    for d in range(X):
        for a in sorted(range(A), key=lambda a: flat[d, a]):
            if flat[d, a] == E:
                continue
            peer = flat[d, a] // (E // X)
            slot = (d, peer) if name == "all_to_all" else peer
            kept[d, a] = taken[slot] < room
            taken[slot] += 1
    return kept.reshape(T, K)


LOADS = {"even": (0, E + 1), "one expert": (3, 4), "one device": (6, E)}


@settings(max_examples=12)
@given(
    name=st.sampled_from(TRANSPORTS), load=st.sampled_from(tuple(LOADS)), seed=st.integers(0, 99)
)
def test_drops_are_those_of_a_loop_and_the_rest_is_dense(name, load, seed):
    # Half of a balanced load: 0.5 · 12 / 4 slots of a pair, rounded up, or 0.5 · 12 rows.
    room = {"all_to_all": 2, "ragged_all_to_all": 6}[name]
    assert transport.TRANSPORTS[name].room(A, X, 0.5) == room
    experts = np.random.default_rng(seed).integers(*LOADS[load], (T, K)).astype(np.int32)
    tokens, target, gates = (
        draw((T, D), seed),
        draw((T, D), seed + 1),
        np.abs(draw((T, K), seed + 2)),
    )
    kept = kept_by_loop(name, experts, room)
    given = (tokens, gates, make_weights(), experts, target)
    (_, done), gradients = dropping(name, 0.5)(*given)
    (_, out), expected = by_hand(*given, kept.astype(np.float32))
    assert float(done.dropped) == np.sum(experts < E) - np.sum(kept)
    assert float(done.exchanges) == 1
    assert float(done.overflows) == float(done.dropped > 0)
    assert_close((done.out, gradients), (out, expected))
    assert not np.any(np.asarray(gradients[1])[~kept])


def test_with_ample_room_nothing_is_dropped():
    # A factor of X gives each pair of devices room for all of a device's assignments.
    experts = np.full((T, K), 3, np.int32)
    tokens, gates = draw((T, D), 0), np.abs(draw((T, K), 1))
    given = (tokens, gates, make_weights(), experts, np.zeros((T, D), np.float32))
    (_, done), gradients = dropping("all_to_all", float(X))(*given)
    (_, out), expected = by_hand(*given, np.ones((T, K), np.float32))
    assert float(done.dropped) == float(done.overflows) == 0
    assert_close((done.out, gradients), (out, expected))


# --- the layer ------------------------------------------------------------------------------------

TOKENS = draw((4, 6, D), 5)


def make_layer(dtype="float32", **values):
    config = MoEConfig(router="softmax", experts=E, top_k=K, hidden=F, activation="gelu", **values)
    return MoE(config, D, dtype=dtype, rngs=nnx.Rngs(0))


def step(layer, mesh=None):
    """Output, stats and the gradients of parameters and tokens."""
    graph, params = nnx.split(layer)

    def loss(params, tokens):
        out, aux = nnx.merge(graph, params)(tokens)
        return jnp.sum(jnp.square(out.astype(jnp.float32) - 1)), (out, aux.stats)

    run = jax.value_and_grad(loss, (0, 1), has_aux=True)
    jitted = jax.jit(run) if mesh is None else on(mesh, run)
    return lambda tokens: jitted(params, tokens)


def test_a_capacity_drops_the_same_on_a_mesh():
    values = {"dispatch": "capacity", "capacity_factor": 0.6, "exchange": "all_gather"}
    layer = make_layer(**values)
    (_, (out, stats)), gradients = step(layer, four_devices())(TOKENS)
    (_, (expected, other)), others = step(layer)(TOKENS)
    # 0.6 · 24 · 2 / 8 slots, rounded up: 4 of each expert's assignments are kept.
    load = np.asarray(other["load"])
    assert float(stats["dropped"]) == float(other["dropped"]) == np.maximum(load - 4, 0).sum() > 0
    assert_close((out, gradients), (expected, others))


@pytest.mark.parametrize("name", [*TRANSPORTS, "all_gather"])
def test_bfloat16_experts_agree_with_one_device(name):
    layer = make_layer("bfloat16", exchange=name)
    tokens = TOKENS.astype(jnp.bfloat16)
    (_, (out, stats)), gradients = step(layer, four_devices())(tokens)
    (_, (expected, _)), others = step(layer)(tokens)
    assert out.dtype == jnp.bfloat16
    assert gradients[1].dtype == jnp.bfloat16
    assert float(stats["exchanges"]) == 1
    # bfloat16 rounds by 2^-9; sums over K and over tokens are made in another order.
    assert_close((out, gradients), (expected, others), share=0.02)


def traced(layer, tokens, mesh):
    """The gradients' program."""
    graph, params = nnx.split(layer)

    def loss(params, tokens):
        return jnp.sum(nnx.merge(graph, params)(tokens)[0].astype(jnp.float32))

    with jax.set_mesh(mesh):
        return jax.jit(jax.grad(loss)).trace(params, tokens).jaxpr


def test_experts_travel_in_the_compute_dtype_and_their_gradients_in_float32():
    layer = make_layer("bfloat16", exchange="all_to_all")
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, expert=2), jax.devices()[:8])
    program = traced(layer, jnp.zeros((8, 6, D), jnp.bfloat16), mesh)
    held = E // 2
    found = collections.Counter(
        (each.kind, each.shape, each.given // math.prod(each.shape))
        for axis in ("fsdp", "data")
        for each in collectives(program, axis, "cpu")
        if len(each.shape) == 3
    )
    # Half of [held,D,F] or [held,F,D] a device: two bytes a number where gathered, again for the
    # backward pass; four where gradients are scattered over fsdp and then summed over data.
    up, down, whole = (held, D // 2, F), (held, F, D // 2), (held, D, F)
    assert found == {
        ("all_gather", up, 2): 2,
        ("all_gather", down, 2): 2,
        ("reduce_scatter", whole, 4): 2,
        ("psum_invariant", up, 4): 1,
        ("psum_invariant", down, 4): 1,
    }


def named_axes(program):
    """Mesh axes that a program names: in collectives, in marks and where a `shard_map` cuts."""
    for eqn in program.eqns:
        if eqn.primitive.name == "shard_map":
            for place in (*eqn.params["in_specs"], *eqn.params["out_specs"]):
                yield from (axis for part in place if part for axis in np.ravel(part))
        for key in ("axes", "axis_name"):
            yield from (axis for axis in np.ravel(eqn.params.get(key, ())) if isinstance(axis, str))
        for inner in jaxprs_in_params(eqn.params):
            yield from named_axes(inner)


@pytest.mark.parametrize(
    ("sizes", "values"),
    [
        ({"data": 4}, {}),
        ({"fsdp": 4}, {}),
        ({"tensor": 4}, {}),
        ({"expert": 2, "tensor": 2}, {}),
        ({"expert": 4}, {"exchange_chunks": 2}),
        ({"expert": 4}, {"on_overflow": "drop"}),
        ({"expert": 4}, {"exchange": "ragged_all_to_all"}),
        ({"expert": 4}, {"exchange": "all_gather"}),
    ],
    ids=str,
)
def test_an_exchange_names_no_axis_of_one_device(sizes, values):
    """XLA on CPU would carry out a sum over one device: a copy of every gradient."""
    mesh = make_mesh(MeshConfig(**{"data": 1} | sizes), jax.devices()[:4])
    program = traced(make_layer(bias=True, **values), TOKENS, mesh).jaxpr
    assert set(named_axes(program)) == set(sizes)


@pytest.mark.parametrize("axis", ["data", "fsdp", "tensor"])
def test_a_mesh_without_an_exchange_equals_one_device(axis):
    layer = make_layer(bias=True)
    mesh = make_mesh(MeshConfig(**{"data": 1, axis: 2}), jax.devices()[:2])
    (_, (out, _)), gradients = step(layer, mesh)(TOKENS)
    (_, (expected, _)), others = step(layer)(TOKENS)
    assert_close((out, gradients), (expected, others))


def forward(layer, context):
    with context:
        return jax.jit(lambda x: layer(x))(TOKENS)


def test_set_mesh_is_enough_to_exchange():
    out, aux = forward(make_layer(exchange="all_gather"), jax.set_mesh(four_devices()))
    assert float(aux.stats["exchanges"]) == 1
    expected, _ = jax.jit(lambda x: make_layer()(x))(TOKENS)
    assert_close(out, expected)


def test_a_mesh_without_our_axes_is_somebody_elses():
    axes = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ("data", "expert"), axis_types=axes, devices=jax.devices()[:4])
    out, aux = forward(make_layer(exchange="all_to_all"), jax.set_mesh(mesh))
    assert float(aux.stats["exchanges"]) == 0
    expected, _ = jax.jit(lambda x: make_layer()(x))(TOKENS)
    assert_close(out, expected)


def test_inside_somebodys_shard_map_each_device_does_its_own_part():
    layer, mesh = make_layer(exchange="all_to_all"), four_devices()
    rows = PartitionSpec("expert")
    mapped = jax.shard_map(
        lambda x: layer(x)[0], mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False
    )
    with jax.set_mesh(mesh):
        lowered = jax.jit(mapped).lower(TOKENS)
        out = lowered.compile()(TOKENS)
    assert "all_to_all" not in lowered.as_text()
    expected, _ = jax.jit(lambda x: make_layer()(x))(TOKENS)
    assert_close(out, expected)


# --- choices and refusals -------------------------------------------------------------------------


def test_auto_is_all_to_all_and_a_name_is_itself():
    assert choose_exchange(MoEConfig()) == "all_to_all"
    for own in (*TRANSPORTS, "all_gather"):
        assert choose_exchange(MoEConfig(exchange=own)) == own


def test_experts_that_the_axis_does_not_divide_are_refused():
    config = MoEConfig(router="softmax", experts=6, top_k=K, hidden=F)
    layer = MoE(config, D, rngs=nnx.Rngs(0))
    words = "mesh.expert=4 does not divide experts=6; choose a divisor"
    with pytest.raises(ValueError, match=words):
        forward(layer, jax.set_mesh(four_devices()))


def test_weights_that_no_rule_spreads_over_experts_are_refused():
    arrays = (draw((T, D), 0), np.zeros((T, K), np.int32), np.zeros((T, K), np.float32))
    weights = {"w_side": np.zeros((E, D, F), np.float32)}
    config, mesh = MoEConfig(experts=E, top_k=K), four_devices().abstract_mesh
    words = r"weights hold 'w_side' \(8, 4, 4\), which sharding.LOGICAL does not spread"
    with pytest.raises(ValueError, match=words):
        exchange(*arrays, weights, apply_experts, config, mesh)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"exchange": "alltoall"}, "exchange='alltoall' is not known; choose one of"),
        ({"on_overflow": "wait"}, "on_overflow='wait' is not known; choose one of"),
        ({"buffer_factor": 0.0}, "buffer_factor=0.0"),
        ({"buffer_factor": -1.0}, "buffer_factor=-1.0"),
        ({"exchange_chunks": 0}, "exchange_chunks=0"),
        ({"exchange_chunks": -2}, "exchange_chunks=-2"),
    ],
)
def test_options_that_make_no_sense_are_refused(values, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        MoEConfig(**values)
