"""How two checkpoints differ: arrays, bases, experts. Array by array, so that large ones fit."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from scipy.optimize import linear_sum_assignment

from emoe_jax import stored
from emoe_jax.basis import BASIS_KEYS
from emoe_jax.checkpoint import CheckpointError
from emoe_jax.config import require
from train.diversity import mean_similarity

Tree = Any
Rows = list[dict[str, Any]]

_PLACE = re.compile(r"(?P<tree>\w+)/blocks/groups/(?P<place>\d+)/(?P<rest>.+)")
"""Name of an array of the blocks, which `models.stack` keeps by their place in the period."""


class Difference(NamedTuple):
    """What `compare` finds, one list of rows a table.

    Attributes:
        params: by `relative`, ‖B - A‖ / ‖A‖, largest first; then those that only one side has or
            that have other shapes there.
        bases: angles in degrees between the subspaces of a basis and its counterpart.
        experts: how alike the experts of the two are, by their weights.
        router: the running state of the routers, as `params`.
        others: the optimizer's state and the step, as `params`.
    """

    params: Rows
    bases: Rows
    experts: Rows
    router: Rows
    others: Rows


def compare(a: Side, b: Side) -> Difference:
    """Compares two steps; relative norms are of A's.

    Raises:
        CheckpointError: an array of one of them is damaged.
        ValueError: the two share no array.
    """
    common = [name for name, spec in a.specs.items() if _same(spec, b.specs, name)]
    require(bool(common), f"{a.folder} and {b.folder} have no array of the same name and shape")
    period = _period(common)
    bases: Rows = []
    experts = _Experts(period)
    tables: dict[str, Rows] = {"params": [], "router": [], "others": []}
    for name, x, y in zip(common, a.values(common), b.values(common), strict=True):
        tables[_table(name)].append(_change(name, x, y))
        if name.rpartition("/")[2] in BASIS_KEYS and _table(name) != "others":
            bases += _basis_rows(name, x, y, period)
        experts.add(name, x, y)
    for rows in tables.values():
        rows.sort(key=lambda row: -row["relative"])
    for row in _alone(a, b):
        tables[_table(row["array"])].append(row)
    return Difference(bases=bases, experts=experts.rows(), **tables)


def _table(name: str) -> str:
    """The list of `Difference` that an array belongs to."""
    top = name.partition("/")[0]
    return top if top in ("params", "router") else "others"


class Side:
    """One of the two that are compared: a step's folder.

    Attributes:
        folder: where it lies.
        record: see `manifest`.
        specs: of its arrays by name.

    Raises:
        CheckpointError: its record cannot be read.
    """

    def __init__(self, folder: epath.Path) -> None:
        self.folder = folder
        try:
            self.record = stored.read_record(folder)
            self.specs = stored.read_specs(folder, self.record)
        except Exception as error:
            raise CheckpointError(f"{folder} cannot be read: {stored.reason(error)}") from error

    def values(self, names: list[str]) -> Iterator[np.ndarray]:
        """Its arrays one after another, float64."""
        for name, value in stored.each_array(self.folder, self.record, names):
            if isinstance(value, stored.Damage):
                raise CheckpointError(
                    f"{name} in {self.folder} is damaged: {value.reason}; compare other"
                    " steps: diff DIR STEP STEP, or --step"
                )
            yield np.asarray(value, np.float64)


def _same(spec: Any, others: dict[str, Any], name: str) -> bool:
    return name in others and others[name].shape == spec.shape


def _alone(a: Side, b: Side) -> Rows:
    """Arrays without a counterpart of the same shape."""
    rows = []
    for name in sorted(a.specs.keys() | b.specs.keys()):
        shapes = [list(s.specs[name].shape) if name in s.specs else None for s in (a, b)]
        if shapes[0] != shapes[1]:
            told = ["absent" if shape is None else str(shape) for shape in shapes]
            rows.append({"array": name, "shape": f"{told[0]} in A, {told[1]} in B"})
    return rows


def _change(name: str, x: np.ndarray, y: np.ndarray) -> dict[str, Any]:
    """How much an array differs; `relative` is infinite where A is zero and B is not."""
    distance, length = float(np.linalg.norm(y - x)), float(np.linalg.norm(x))
    relative = 0.0 if distance == 0 else distance / length if length else math.inf
    values = {"relative": relative, "largest": np.abs(y - x).max()}
    means = {"mean A": x.mean(), "mean B": y.mean(), "std A": x.std(), "std B": y.std()}
    return {"array": name, "shape": str(list(x.shape))} | _plain(values | means)


def _plain(values: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}


# ------------------------------------------------------------------------------------------- bases


def principal_angles(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Angles between the column spaces of two matrices [D,R], radians [R], ascending.

    By sine and cosine together: a cosine alone loses angles below 1e-8, a sine those near a right
    angle (Björck and Golub 1973).
    """
    q, p = np.linalg.qr(x)[0], np.linalg.qr(y)[0]
    overlap = q.T @ p
    cosine = np.linalg.svd(overlap, compute_uv=False)  # descending
    sine = np.linalg.svd(p - q @ overlap, compute_uv=False)[::-1]  # ascending
    return np.arctan2(sine, cosine)


def _basis_rows(name: str, x: np.ndarray, y: np.ndarray, period: int) -> Rows:
    """One row a basis of an array [...,D,R]; the first axis is over the repeats."""
    rows = []
    for index in np.ndindex(x.shape[:-2]):
        angles = np.degrees(principal_angles(x[index], y[index]))
        rest = f" {list(index[1:])}" if index[1:] else ""
        row = {"layer": _layer(name, index[0] if index else 0, period), "array": name + rest}
        angle = {"mean angle": angles.mean(), "median angle": np.median(angles)}
        rows.append(row | {"rank": len(angles)} | _plain(angle | {"largest angle": angles[-1]}))
    return rows


# ----------------------------------------------------------------------------------------- experts


class _Experts:
    """Products of the experts' weights, summed over their arrays."""

    def __init__(self, period: int) -> None:
        self._period = period
        self._sums: dict[str, np.ndarray] = {}

    def add(self, name: str, x: np.ndarray, y: np.ndarray) -> None:
        """Adds an array [repeats,E,...] if it is one of experts."""
        prefix, experts, _ = name.partition("/experts/")
        if not experts or not name.startswith("params/"):
            return
        for repeat in range(x.shape[0]):
            flat = [side[repeat].reshape(side.shape[1], -1) for side in (x, y)]
            products = np.stack([flat[i] @ flat[j].T for i, j in ((0, 1), (0, 0), (1, 1))])
            layer = _layer(prefix + "/", repeat, self._period)
            self._sums[layer] = self._sums.get(layer, 0.0) + products

    def rows(self) -> Rows:
        """One row a layer: who resembles whom, and how alike the experts of a side are."""
        rows = []
        for layer, (cross, own_a, own_b) in sorted(self._sums.items()):
            lengths = [np.sqrt(np.maximum(np.diag(own), 1e-300)) for own in (own_a, own_b)]
            across = cross / np.outer(*lengths)
            one, two = (
                mean_similarity(own / np.outer(n, n))
                for own, n in zip((own_a, own_b), lengths, strict=True)
            )
            means = {"same expert": float(np.diag(across).mean())}
            means |= {"similarity A": one, "similarity B": two, "change": two - one}
            rows.append({"layer": layer, "experts": len(cross), "moved": moved(across)} | means)
        return rows


def moved(across: np.ndarray) -> str:
    """Which expert of A resembles another one of B than its own number, such as "0>3 3>0".

    Args:
        across: cosines [E,E] between the experts of A and of B; each of A is given one of B so that
            their sum is largest.
    """
    left, right = linear_sum_assignment(across, maximize=True)
    pairs = [f"{i}>{j}" for i, j in zip(left, right, strict=True) if i != j]
    return " ".join(pairs) or "none"


def _period(names: list[str]) -> int:
    """How many places the blocks' period has."""
    found = [_PLACE.match(name) for name in names]
    return 1 + max((int(match["place"]) for match in found if match), default=0)


def _layer(name: str, repeat: int, period: int) -> str:
    """The block's name, such as layer_03; the array's own where it is of no block."""
    match = _PLACE.match(name)
    return f"layer_{repeat * period + int(match['place']):02d}" if match else name
