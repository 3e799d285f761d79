"""How rows travel between the devices of an expert group: what goes where in one round, and back.

Letters: X devices on the mesh axis `expert`, each holding E/X experts; T tokens of this device,
A = T·K assignments. A device sorts its assignments by expert, and so by the device that holds the
expert. A transport of limited room takes the assignments in rounds: round r takes the next
assignments of each list, in order. Every device knows all counts, so all agree on the rounds, and
no row needs a label: the place where it arrives tells its expert.

Everything here runs inside `shard_map`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from emoe_jax.dispatch.dropless import ranks, sort_by_expert
from emoe_jax.dispatch.rows import Layout, no_gradient
from emoe_jax.remat import decided
from emoe_jax.sharding import AXES, varying_alike

Array = jax.Array

AXIS = "expert"
"""The mesh axis over which experts are spread."""


def vary(leaf: Array, over: Collection[str] = ()) -> Array:
    """Marks an array that differs over the mesh axes `over` as different on every device.

    So all that is computed with it has one type; the transpose sums the gradients. Axes of one
    device are left out, here as in all of the exchange (`sharding.splitting`).
    """
    same = tuple(axis for axis in AXES if axis not in over and lax.axis_size(axis) > 1)
    return lax.pcast(leaf, same, to="varying") if same else leaf


class Sorted(NamedTuple):
    """A device's assignments by expert, and the counts of all devices.

    Attributes:
        order: [A] int32, assignments by expert; those that go nowhere come last.
        position: [T,K] int32, where in `order` each assignment stands.
        experts: [T,K] int32, E for nowhere.
        counts: [X,E] int32, assignments of each device to each expert; the same on every device.
        me: [] int32, this device's place on the axis.
    """

    order: Array
    position: Array
    experts: Array
    counts: Array
    me: Array

    @property
    def held(self) -> int:
        """E/X, experts of one device."""
        devices, experts = self.counts.shape
        return experts // devices

    @property
    def volume(self) -> Array:
        """[X,X] int32, assignments from each device (rows) to each."""
        devices = self.counts.shape[0]
        return jnp.sum(self.counts.reshape(devices, devices, self.held), axis=2, dtype=jnp.int32)


class Window(NamedTuple):
    """What one round moves: S rows leave this device, R rows arrive.

    Attributes:
        leaving: which of the S rows holds which assignment.
        arriving: [R] int32, which of this device's experts each arriving row is for; E/X for none.
        there: moves rows [S,D] to [R,D]; linear.
        back: moves rows [R,D] to [S,D]; its transpose.
    """

    leaving: Layout
    arriving: Array
    there: Callable[[Array], Array]
    back: Callable[[Array], Array]


def sort_assignments(experts: Array, count: int) -> Sorted:
    """Sorts the assignments [T,K] of this device by expert and gathers everybody's counts."""
    order, _, sizes = sort_by_expert(experts.reshape(-1), count)
    position = ranks(order).reshape(experts.shape)
    counts = decided(lax.all_gather(sizes, AXIS))
    me = lax.axis_index(AXIS).astype(jnp.int32)
    return Sorted(order, position, experts, counts, me)


class Transport(NamedTuple):
    """A way to move rows.

    Attributes:
        room: (A, X, buffer_factor) to the room of one round, in rows.
        rounds: (plan, room) to how many rounds the group needs, at least one.
        overflow: (plan, room) to how many of this device's assignments the first leaves out.
        window: (plan, room, turn) to what that round moves.
    """

    room: Callable[[int, int, float], int]
    rounds: Callable[[Sorted, int], Array]
    overflow: Callable[[Sorted, int], Array]
    window: Callable[[Sorted, int, Array | int], Window]


def _ceil(buffer_factor: float, rows: float) -> int:
    # Rounded first, as in `capacity.slots`.
    return max(1, math.ceil(round(buffer_factor * rows, 6)))


# --- all_to_all: P slots for each pair of devices ----------------------------------------------


def fixed_room(assignments: int, devices: int, buffer_factor: float) -> int:
    """P = ceil(buffer_factor · A / X) slots for one peer, at most A."""
    return min(assignments, _ceil(buffer_factor, assignments / devices))


def fixed_rounds(plan: Sorted, slots: int) -> Array:
    """Rounds that the fullest pair of devices needs, at least one."""
    return jnp.maximum(-(-jnp.max(plan.volume) // slots), 1)


def fixed_overflow(plan: Sorted, slots: int) -> Array:
    """Assignments of this device that the first round leaves out."""
    return jnp.sum(jnp.maximum(plan.volume[plan.me] - slots, 0))


def fixed_window(plan: Sorted, slots: int, turn: Array | int) -> Window:
    """Round `turn` of `all_to_all`: ranks turn·P to (turn+1)·P-1 of the list for each peer."""
    devices, count = plan.counts.shape
    A = plan.order.size
    volume = plan.volume[plan.me]
    begin = jnp.cumsum(volume, dtype=jnp.int32) - volume
    first = jnp.asarray(turn, jnp.int32) * slots
    rank = first + jnp.arange(slots, dtype=jnp.int32)
    leaves = rank[None, :] < volume[:, None]
    order = plan.order.at[jnp.minimum(begin[:, None] + rank[None, :], A - 1)].get(
        mode="promise_in_bounds"
    )
    assignments = jnp.where(leaves, order, A).reshape(-1)
    peer = jnp.minimum(plan.experts // plan.held, devices - 1)
    slot = plan.position - begin[peer] - first
    goes = (plan.experts < count) & (slot >= 0) & (slot < slots)
    move = partial(_swap, devices)
    return Window(
        leaving=Layout(jnp.where(goes, peer * slots + slot, devices * slots), assignments),
        arriving=_arriving(plan, rank[None, :].repeat(devices, 0)).reshape(-1),
        there=move,
        back=move,
    )


def _swap(devices: int, rows: Array) -> Array:
    """Part p of the rows goes to device p, which puts it where this device's part belongs."""
    parts = rows.reshape(devices, -1, rows.shape[-1])
    return lax.all_to_all(parts, AXIS, split_axis=0, concat_axis=0).reshape(rows.shape)


def _arriving(plan: Sorted, rank: Array) -> Array:
    """Which of this device's experts the rank-th row from each device is for.

    Args:
        plan: the counts.
        rank: [X,P] int32.

    Returns:
        [X,P] int32, E/X where the device sends no such row.
    """
    mine = lax.dynamic_slice_in_dim(plan.counts, plan.me * plan.held, plan.held, axis=1)
    total = jnp.sum(mine, axis=1, dtype=jnp.int32)
    before = jnp.cumsum(total, dtype=jnp.int32) - total
    expert = _expert_at(mine, before[:, None] + rank)
    return jnp.where(rank < total[:, None], expert, plan.held)


def _expert_at(mine: Array, index: Array) -> Array:
    """The expert of the index-th arriving assignment: by device, then by expert.

    Args:
        mine: [X,E/X] int32, assignments of each device to each expert of this one.
        index: int32, any shape.
    """
    ends = jnp.cumsum(mine.reshape(-1), dtype=jnp.int32)
    found = jnp.searchsorted(ends, index.reshape(-1), side="right", method="sort")
    return (found.astype(jnp.int32) % mine.shape[1]).reshape(index.shape)


# --- ragged_all_to_all: exact sizes, M rows of room where they arrive --------------------------


class Offsets(NamedTuple):
    """The arguments of `lax.ragged_all_to_all`, each [X] int32.

    Attributes:
        from_: first row for each peer in what this device sends.
        send: rows for each peer.
        to: first row of this device's part in what each peer receives.
        receive: rows from each peer.
    """

    from_: Array
    send: Array
    to: Array
    receive: Array


def ragged_room(assignments: int, devices: int, buffer_factor: float) -> int:
    """M = ceil(buffer_factor · A) rows on one device, at most all X·A."""
    return min(devices * assignments, _ceil(buffer_factor, assignments))


def ragged_rounds(plan: Sorted, room: int) -> Array:
    """Rounds that the device with the most arriving rows needs, at least one."""
    return jnp.maximum(-(-jnp.max(jnp.sum(plan.volume, axis=0)) // room), 1)


def ragged_overflow(plan: Sorted, room: int) -> Array:
    """Assignments of this device that the first round leaves out."""
    volume = plan.volume
    before = jnp.cumsum(volume, axis=0, dtype=jnp.int32) - volume
    taken = jnp.clip(room - before[plan.me], 0, volume[plan.me])
    return jnp.sum(volume[plan.me] - taken)


def ragged_window(plan: Sorted, room: int, turn: Array | int) -> Window:
    """Round `turn` of `ragged_all_to_all`: each device takes the next M rows of its queue.

    The queue of a device holds the lists of device 0, 1, ... one after the other.
    """
    devices, count = plan.counts.shape
    A, volume = plan.order.size, plan.volume
    first = jnp.asarray(turn, jnp.int32) * room
    before = jnp.cumsum(volume, axis=0, dtype=jnp.int32) - volume  # [X,X] place in the queue
    begin = jnp.cumsum(volume, axis=1, dtype=jnp.int32) - volume  # [X,X] place in the own order
    low = jnp.clip(first - before, 0, volume)
    high = jnp.clip(first + room - before, 0, volume)
    me = plan.me
    # Kernels may check the offset of an empty part too: it must lie within.
    moves = high > low
    leave, arrive = jnp.where(moves, begin + low, 0), jnp.where(moves, before + low - first, 0)
    going = Offsets(leave[me], (high - low)[me], arrive[me], (high - low)[:, me])
    coming = Offsets(arrive[:, me], (high - low)[:, me], leave[:, me], (high - low)[me])

    peer = jnp.minimum(plan.experts // plan.held, devices - 1)
    queued = plan.position - begin[me][peer] + before[me][peer] - first
    goes = (plan.experts < count) & (queued >= 0) & (queued < room)
    leaves = goes.reshape(-1)[plan.order]
    mine = lax.dynamic_slice_in_dim(plan.counts, me * plan.held, plan.held, axis=1)
    index = first + jnp.arange(room, dtype=jnp.int32)
    return Window(
        leaving=Layout(jnp.where(goes, plan.position, A), jnp.where(leaves, plan.order, A)),
        arriving=jnp.where(index < jnp.sum(mine), _expert_at(mine, index), plan.held),
        there=lambda rows: _ragged(room, rows, going, coming),
        back=lambda rows: _ragged(A, rows, coming, going),
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ragged(length: int, rows: Array, going: Offsets, coming: Offsets) -> Array:
    """Rows [length,D] of what the peers send; zeros elsewhere. `coming` is the way back."""
    out, _ = varying_alike(jnp.zeros((length, rows.shape[1]), rows.dtype), rows)
    native = partial(lax.ragged_all_to_all, axis_name=AXIS)
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        return lax.platform_dependent(rows, out, *going, cpu=emulated_ragged, default=native)
    # Where the mesh tells its devices, for which the program must then be lowered: the other way
    # leaves a conditional around the exchange, and XLA starts nothing inside one while it computes
    # outside.
    return (emulated_ragged if device.platform == "cpu" else native)(rows, out, *going)


def _ragged_forward(length: int, rows: Array, going: Offsets, coming: Offsets) -> Any:
    return _ragged(length, rows, going, coming), (rows.shape[0], going, coming)


def _ragged_backward(length: int, saved: Any, cotangent: Array) -> Any:
    sent, going, coming = saved
    return _ragged(sent, cotangent, coming, going), no_gradient(going), no_gradient(coming)


_ragged.defvjp(_ragged_forward, _ragged_backward)


def emulated_ragged(
    operand: Array,
    output: Array,
    input_offsets: Array,
    send_sizes: Array,
    output_offsets: Array,
    recv_sizes: Array,
) -> Array:
    """`lax.ragged_all_to_all` by `all_gather`, for CPU, which has no kernel for it.

    The arguments mean the same; `recv_sizes` follow from what the peers send and are not read.
    """
    rows = lax.all_gather(operand, AXIS)
    plans = lax.all_gather(jnp.stack([input_offsets, send_sizes, output_offsets]), AXIS)
    start, size, target = plans[:, :, lax.axis_index(AXIS)].T
    index = jnp.arange(output.shape[0], dtype=jnp.int32)[:, None]
    covered = (index >= target) & (index < target + size)
    peer = jnp.argmax(covered, axis=1).astype(jnp.int32)
    row = jnp.clip(start[peer] + index[:, 0] - target[peer], 0, operand.shape[0] - 1)
    return jnp.where(jnp.any(covered, axis=1)[:, None], rows[peer, row], output)


TRANSPORTS = {
    "all_to_all": Transport(fixed_room, fixed_rounds, fixed_overflow, fixed_window),
    "ragged_all_to_all": Transport(ragged_room, ragged_rounds, ragged_overflow, ragged_window),
}
