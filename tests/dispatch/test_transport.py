"""Transports: which row leaves in which round and where it arrives, against loops in Python."""

import math
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from emoe_jax.dispatch import transport
from emoe_jax.dispatch.dropless import sort_by_expert
from emoe_jax.sharding import AXES, BATCH_AXES, MeshConfig, make_mesh

X, E, T, K = 4, 8, 5, 2
A, HELD = T * K, E // X
ROOMS = {"all_to_all": 2, "ragged_all_to_all": 9}
TRANSPORTS = tuple(ROOMS)


def on_devices(body):
    """Runs a function of one device's arrays on X devices; all arrays [X,...], but for the last."""
    assert len(jax.devices()) >= X
    mesh = make_mesh(MeshConfig(data=1, expert=X), jax.devices()[:X])

    def one(turn, *arrays):
        varying = [transport.vary(a[0], BATCH_AXES) for a in arrays]
        return jax.tree.map(lambda leaf: leaf[None], body(transport.vary(turn), *varying))

    def run(turn, *arrays):
        rows = PartitionSpec(BATCH_AXES)
        specs = (PartitionSpec(), *(rows for _ in arrays))
        mapped = jax.shard_map(one, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(AXES))
        return mapped(turn, *arrays)

    jitted = jax.jit(run)
    return lambda turn, *arrays: jax.device_get(jitted(jnp.int32(turn), *arrays))


def test_an_order_is_typed_as_differing_by_device():
    """What the backward pass keeps of it leaves `shard_map` by this type."""
    mesh = make_mesh(MeshConfig(data=1, expert=X), jax.devices()[:X])
    rows = PartitionSpec(BATCH_AXES)

    def order(out):
        return jax.shard_map(
            lambda experts: sort_by_expert(experts, E)[0], mesh=mesh, in_specs=rows, out_specs=out
        )

    experts = np.arange(X * A, dtype=np.int32)[::-1] % E
    expected = np.argsort(experts.reshape(X, A), axis=1, kind="stable").reshape(-1)
    np.testing.assert_array_equal(jax.jit(order(rows))(experts), expected)
    with pytest.raises(ValueError, match="out_specs"):
        jax.eval_shape(order(PartitionSpec()), experts)


# --- windows --------------------------------------------------------------------------------------


@cache
def window_of(name):
    """One round on X devices, of experts [X,T,K]: numbers of rounds, and what moves."""
    way, room = transport.TRANSPORTS[name], ROOMS[name]

    def body(turn, experts):
        plan = transport.sort_assignments(experts, E)
        window = way.window(plan, room, turn)
        # Each row carries its assignment and its device, both counted from 1.
        own = window.leaving.assignments
        labels = jnp.stack([own + 1, jnp.full_like(own, plan.me + 1)])
        labels = jnp.where(own < A, labels, 0).T.astype(jnp.float32)
        there = window.there(labels)
        return {
            "rounds": way.rounds(plan, room),
            "overflow": way.overflow(plan, room),
            "sources": window.leaving.sources,
            "assignments": own,
            "places": window.leaving.places,
            "arriving": window.arriving,
            "labels": labels,
            "there": there,
            "back": window.back(there),
        }

    return on_devices(body)


def lists_of(experts):
    """For each device and peer, its assignments by expert, then in their own order."""
    flat = experts.reshape(X, A)
    return [
        [sorted((a for a in range(A) if flat[d, a] // HELD == p), key=lambda a: flat[d, a])
         for p in range(X)]
        for d in range(X)
    ]  # fmt: skip


def arrivals(name, experts, turn):
    """What stands in each row of each device: (device, assignment), or None."""
    lists, room = lists_of(experts), ROOMS[name]
    cut = slice(turn * room, (turn + 1) * room)
    if name == "all_to_all":
        return [
            [row for d in range(X) for row in fill([(d, a) for a in lists[d][p][cut]], room)]
            for p in range(X)
        ]
    queues = [[(d, a) for d in range(X) for a in lists[d][p]] for p in range(X)]
    return [fill(queue[cut], room) for queue in queues]


def fill(rows, room):
    return rows + [None] * (room - len(rows))


def rounds_by_hand(name, experts):
    lists = lists_of(experts)
    fixed = [len(lists[d][p]) for d in range(X) for p in range(X)]
    queues = [sum(len(lists[d][p]) for d in range(X)) for p in range(X)]
    fullest = max(fixed if name == "all_to_all" else queues)
    return max(1, math.ceil(fullest / ROOMS[name]))


# Experts from the first number up to below the second; E is nowhere.
LOADS = {"even": (0, E + 1), "one expert": (3, 4), "one device": (6, E), "nowhere": (E, E + 1)}


@given(
    name=st.sampled_from(TRANSPORTS),
    load=st.sampled_from(tuple(LOADS)),
    seed=st.integers(0, 10_000),
)
def test_rounds_carry_what_a_loop_carries(name, load, seed):
    low, high = LOADS[load]
    experts = np.random.default_rng(seed).integers(low, high, (X, T, K)).astype(np.int32)
    rounds = rounds_by_hand(name, experts)
    seen = []
    for turn in range(rounds + 1):  # one more than needed: it moves nothing
        expected = arrivals(name, experts, turn)
        found = window_of(name)(turn, experts)
        assert found["rounds"].tolist() == [rounds] * X
        for p in range(X):
            labels = [(0, 0) if row is None else (row[1] + 1, row[0] + 1) for row in expected[p]]
            np.testing.assert_array_equal(found["there"][p], labels)
            of = [HELD if r is None else experts.reshape(X, A)[r] - p * HELD for r in expected[p]]
            np.testing.assert_array_equal(found["arriving"][p], of)
            check_own_side({key: value[p] for key, value in found.items()}, expected, p)
        moved = [row for rows in expected for row in rows if row is not None]
        if turn == 0:
            left = np.array([sum(experts[d].flat < E) for d in range(X)])
            left -= np.array([sum(row[0] == d for row in moved) for d in range(X)])
            np.testing.assert_array_equal(found["overflow"], left)
        seen += moved
    everything = [(d, a) for d in range(X) for a in range(A) if experts.reshape(X, A)[d, a] < E]
    assert sorted(seen) == everything


def check_own_side(found, expected, d):
    """Sources, assignments and places of device d agree; back undoes there."""
    leaving = {row[1] for rows in expected for row in rows if row is not None and row[0] == d}
    assert {int(a) for a in found["assignments"] if a < A} == leaving
    sources = np.where(found["assignments"] < A, found["assignments"] // K, T)
    np.testing.assert_array_equal(found["sources"], sources)
    S = len(found["assignments"])
    for a, place in enumerate(found["places"].reshape(-1)):
        assert found["assignments"][place] == a if a in leaving else place == S
    np.testing.assert_array_equal(found["back"], found["labels"])


def test_rounds_worked_out_by_hand():
    # Four assignments of device 0 to device 1, of which all_to_all carries two a round: first that
    # for expert 2, then those for expert 3. Nothing else moves.
    experts = np.full((X, T, K), E, np.int32)
    experts[0, :2] = [[3, 3], [3, 2]]
    first, second = (window_of("all_to_all")(turn, experts) for turn in (0, 1))
    assert first["rounds"].tolist() == [2] * X
    assert first["overflow"].tolist() == [2, 0, 0, 0]
    assert first["assignments"][0].tolist() == [A, A, 3, 0, A, A, A, A]
    assert second["assignments"][0].tolist() == [A, A, 1, 2, A, A, A, A]
    assert first["sources"][0].tolist() == [T, T, 1, 0, T, T, T, T]
    assert first["arriving"][1].tolist() == [0, 1, 2, 2, 2, 2, 2, 2]
    assert second["arriving"][1].tolist() == [1, 1, 2, 2, 2, 2, 2, 2]


@pytest.mark.parametrize(
    ("room", "assignments", "devices", "factor", "rows"),
    [
        (transport.fixed_room, 100, 8, 1.25, 16),  # 15.625
        (transport.fixed_room, 100, 10, 1.1, 11),  # in floating point a little more than 11
        (transport.fixed_room, 100, 8, 20.0, 100),  # never more than there are
        (transport.fixed_room, 2, 8, 0.1, 1),  # never none
        (transport.ragged_room, 40, 8, 1.25, 50),
        (transport.ragged_room, 10, 2, 1.1, 11),
        (transport.ragged_room, 4, 2, 3.0, 8),
        (transport.ragged_room, 4, 2, 0.1, 1),
    ],
)
def test_rooms(room, assignments, devices, factor, rows):
    assert room(assignments, devices, factor) == rows


# --- ragged_all_to_all on CPU ---------------------------------------------------------------------

SENT, RECEIVED = 13, 12  # up to 2 rows for each of 4 peers, and as many gaps


def ragged_by_loop(operand, output, starts, sizes, targets):
    """The documented meaning of `lax.ragged_all_to_all`: senders by rows, receivers by columns."""
    result = output.copy()
    for sender in range(X):
        for peer in range(X):
            for i in range(sizes[sender, peer]):
                row = operand[sender, starts[sender, peer] + i]
                result[peer, targets[sender, peer] + i] = row
    return result


def emulate(turn, operand, output, starts, sizes, targets, receives):
    """The emulation, and the gradient of the operand that JAX derives from it."""
    call = partial(
        transport.emulated_ragged,
        output=output,
        input_offsets=starts,
        send_sizes=sizes,
        output_offsets=targets,
        recv_sizes=receives,
    )
    out, pull = jax.vjp(call, operand)
    return out, pull(output)[0]


emulated = cache(lambda: on_devices(emulate))


@given(seed=st.integers(0, 10_000))
def test_the_emulation_means_what_ragged_all_to_all_means(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, 3, (X, X)).astype(np.int32)
    starts = offsets(rng, sizes)
    targets = offsets(rng, sizes.T).T
    operand = rng.standard_normal((X, SENT, 3), np.float32)
    output = rng.standard_normal((X, RECEIVED, 3), np.float32)
    out, gradient = emulated()(0, operand, output, starts, sizes, targets, sizes.T)
    np.testing.assert_array_equal(out, ragged_by_loop(operand, output, starts, sizes, targets))
    # The transpose sends each row back to where it came from.
    back = ragged_by_loop(output, np.zeros_like(operand), targets.T, sizes.T, starts.T)
    np.testing.assert_array_equal(gradient, back)


def offsets(rng, sizes):
    """[X,X] where each part begins: parts in any order, some with a gap of one row before them."""
    begins = np.zeros_like(sizes)
    for row, begin in zip(sizes, begins, strict=True):
        at = 0
        for part in rng.permutation(X):
            at += rng.integers(0, 2)
            begin[part] = at
            at += row[part]
    return begins


def test_the_emulation_as_the_documentation_of_jax_shows_it():
    # Device 0 sends 1 row to itself and 2 to device 1, device 1 sends 1 and 1.
    operand = np.zeros((X, SENT, 1), np.float32)
    operand[0, :3, 0], operand[1, :2, 0] = (1, 2, 2), (3, 4)
    starts, sizes, targets = (np.zeros((X, X), np.int32) for _ in range(3))
    sizes[:2, :2] = [[1, 2], [1, 1]]
    starts[:2, :2] = [[0, 1], [0, 1]]
    targets[:2, :2] = [[0, 0], [1, 2]]
    output = np.zeros((X, RECEIVED, 1), np.float32)
    out, _ = emulated()(0, operand, output, starts, sizes, targets, sizes.T)
    assert out[0, :, 0].tolist() == [1, 3] + [0] * 10
    assert out[1, :, 0].tolist() == [2, 2, 4] + [0] * 9


@cache
def moved():
    """The moves of a round of `ragged_all_to_all`, and the gradient of each."""

    def body(turn, experts, rows, cotangent):
        window = transport.ragged_window(transport.sort_assignments(experts, E), 9, turn)
        there, pull = jax.vjp(window.there, rows)
        back, pull_back = jax.vjp(window.back, cotangent)
        return there, pull(cotangent)[0], back, pull_back(rows)[0]

    return on_devices(body)


@given(seed=st.integers(0, 10_000), turn=st.integers(0, 2))
def test_each_ragged_move_is_the_gradient_of_the_other(seed, turn):
    rng = np.random.default_rng(seed)
    experts = rng.integers(0, E + 1, (X, T, K)).astype(np.int32)
    rows = rng.standard_normal((X, A, 3), np.float32)
    cotangent = rng.standard_normal((X, 9, 3), np.float32)
    there, of_there, back, of_back = moved()(turn, experts, rows, cotangent)
    np.testing.assert_array_equal(of_there, back)
    np.testing.assert_array_equal(of_back, there)
    # <there x, y> = <x, back y>: the two are transposes, over all devices together.
    left, right = np.vdot(there.astype(float), cotangent), np.vdot(rows.astype(float), back)
    np.testing.assert_allclose(left, right, atol=1e-5)


# --- lowering -------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [True, False])
def test_a_mesh_that_tells_its_devices_leaves_no_conditional_around_an_exchange(known):
    mesh = make_mesh(MeshConfig(data=1, expert=X), jax.devices()[:X]).abstract_mesh
    if not known:
        mesh = mesh.update(abstract_device=None)

    def move(rows, sizes):
        offsets = transport.Offsets(*(transport.vary(sizes) for _ in range(4)))
        return transport._ragged(A, transport.vary(rows, BATCH_AXES), offsets, offsets)

    specs = PartitionSpec(BATCH_AXES), PartitionSpec()
    moved = jax.shard_map(move, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(AXES))
    jaxpr = jax.make_jaxpr(moved)(jnp.ones((X * A, 3)), jnp.zeros(X, jnp.int32))
    assert ("platform_index" in str(jaxpr)) is not known
