"""One step of a checkpoint as it lies on the disk, read by one process on its own.

`Checkpoints` adds what several processes must agree on. Nothing here waits for another process, so
that one which finds damage can tell the others, and a program that looks on needs only one device.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from emoe_jax.manifest import digests, flatten, unseal

Tree = dict[str, Any]

STATE = "state"
"""Item of the arrays."""

RUN = "run"
"""Item of the record, see `manifest`."""


_SHAPE = b".zarray"
"""Key of an array's shape, which lies with the index."""


_READERS = 16
"""Arrays that are read at the same time."""

_INDEX_BYTES = 100_000_000
"""Of the arrays' index kept while they are read."""


class Damage(NamedTuple):
    """What is wrong with a step.

    Attributes:
        array: its name; empty where the whole step is concerned.
        files: those that hold it, relative to the step's folder; empty where that is unknown.
        reason: in words.
    """

    array: str
    files: list[str]
    reason: str


def read_record(folder: epath.Path) -> Tree:
    """The content of a step's record: `arrays`, `data_state`, `meta`, and since seals `metrics`.

    Raises:
        Exception: it cannot be read, or is not what was saved.
    """
    return unseal(dict(ocp.handlers.JsonCheckpointHandler().restore(folder / RUN)))


def read_metrics(folder: epath.Path) -> Tree:
    """The metrics of a step, empty where none can be read; of old steps those that orbax keeps."""
    try:
        record = read_record(folder)
        if "metrics" in record:
            return dict(record["metrics"])
        return dict(json.loads((folder / "metrics" / "metrics").read_text()))
    except Exception:  # what is damaged is said where the step is read
        return {}


def read_specs(folder: epath.Path, record: Tree) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of each array; those of old records are known to orbax alone.

    Raises:
        Exception: orbax's metadata cannot be read.
    """
    kinds = record["arrays"]
    if all("shape" in kind for kind in kinds.values()):
        return {
            name: jax.ShapeDtypeStruct(tuple(kind["shape"]), jnp.dtype(kind["dtype"]))
            for name, kind in kinds.items()
        }
    tree = ocp.PyTreeCheckpointHandler().metadata(folder / STATE).tree
    leaves = flatten(tree, lambda name, leaf: None)
    return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in leaves.items()}


def read_arrays(
    folder: epath.Path, wanted: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """Arrays by name on the shardings that are wanted, this process's part of them.

    By tensorstore and not by orbax, whose reader waits for other processes, and which leaves reads
    behind it that nobody awaits when one of them fails.

    Args:
        folder: the step's.
        wanted: specs with shardings, by name.

    Raises:
        Exception: what tensorstore finds wrong.
    """
    context = ts.Context({"cache_pool": {"total_bytes_limit": _INDEX_BYTES}})

    def read(name: str) -> jax.Array:
        spec = _array_spec(folder, name)
        store = ts.open(spec, open=True, read=True, context=context).result()
        return _place(store, wanted[name])

    with ThreadPoolExecutor(_READERS) as pool:
        futures = [pool.submit(read, name) for name in wanted]
        try:
            return {name: each.result() for name, each in zip(wanted, futures, strict=True)}
        finally:
            futures.clear()  # an error would keep what others have read


def _place(store: ts.TensorStore, spec: jax.ShapeDtypeStruct) -> jax.Array:
    """An array on its sharding; what several devices hold is read once."""
    kind = store.shape, store.dtype.numpy_dtype
    if kind != (spec.shape, spec.dtype):
        raise ValueError(f"it is {kind[1]}{list(kind[0])} on the disk, saved was {spec}")
    parts: dict[str, np.ndarray] = {}

    def part(index: Any) -> np.ndarray:
        key = str(index)
        if key not in parts:
            parts[key] = store[index].read().result()
        return parts[key]

    return jax.make_array_from_callback(spec.shape, spec.sharding, part)


def _base(folder: epath.Path) -> Tree | str:
    """Where tensorstore finds the arrays' files."""
    path = f"{folder / STATE}/"
    return path if "://" in path else {"driver": "file", "path": path}


def _array_spec(folder: epath.Path, name: str) -> Tree:
    """What tensorstore calls an array: orbax writes zarr into one OCDBT database."""
    place = {"driver": "ocdbt", "base": _base(folder), "path": name.replace("/", ".") + "/"}
    return {"driver": "zarr", "kvstore": place}


def each_array(
    folder: epath.Path, record: Tree, names: Iterable[str]
) -> Iterator[tuple[str, jax.Array | Damage]]:
    """Arrays of a step, one after another, on the first device: each, or what is wrong with it.

    Args:
        folder: the step's.
        record: from `read_record`.
        names: of those that are read.
    """
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    specs = read_specs(folder, record)
    for name in names:
        spec = specs[name]
        placed = jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=here)
        try:
            arrays = read_arrays(folder, {name: placed})
            changed = changed_arrays(record, arrays)
        except Exception as error:
            yield name, Damage(name, files_of(folder, name), reason(error))
            continue
        if changed:
            yield name, Damage(name, files_of(folder, name), "holds other bits than were saved")
        else:
            yield name, arrays[name]


def examine(folder: epath.Path) -> list[Damage]:
    """What is wrong with a step: every array is read and compared with its digest.

    Only what a reader uses is judged: orbax keeps files of which a restored value does not depend.
    """
    damage = []
    try:
        record = read_record(folder)
        names = list(record["arrays"])
        for _, value in each_array(folder, record, names):
            if isinstance(value, Damage):
                damage.append(value)
    except Exception as error:
        return [Damage("", [f"{RUN}/metadata"], reason(error))]
    if len(damage) == len(names) > 1:  # their index is damaged: one reason for all
        return [damage[0]._replace(array="")]
    return damage


def changed_arrays(record: Tree, arrays: Mapping[str, jax.Array]) -> list[str]:
    """Names of the arrays that hold other bits than were saved."""
    entries = record["arrays"]
    saved = {name: entry["digest"] for name, entry in entries.items()}
    return [name for name, value in digests(arrays).items() if value != saved.get(name)]


def files_of(folder: epath.Path, name: str) -> list[str]:
    """The files that hold an array's values, relative to the step's folder.

    Small arrays lie in a node of the index, larger ones in files of their own or with others.
    """
    files: set[str] = set()
    try:
        base = ts.KvStore.open(_base(folder)).result()
        newest = ts.ocdbt.dump(base).result()["versions"][-1]["root"]["location"]
        _collect(base, newest, name.replace("/", ".").encode() + b"/", b"", files)
    except Exception:  # the index itself is damaged, and the reason says so
        return []
    return sorted(f"{STATE}/{file}" for file in files)


def _collect(base: ts.KvStore, node: str, prefix: bytes, above: bytes, files: set[str]) -> None:
    """Adds the files of the keys with a prefix under a node of OCDBT's index.

    Keys in a node leave out `above`, which all of them begin with.
    """
    for entry in ts.ocdbt.dump(base, node).result()["entries"]:
        if "location" in entry:  # a node below
            lower = above + entry["subtree_common_prefix"]
            _collect(base, entry["location"], prefix, lower, files)
        elif (above + entry["key"]).startswith(prefix) and not entry["key"].endswith(_SHAPE):
            files.add(_file(entry.get("indirect_value", node)))


def _file(location: str) -> str:
    """The path in such as "value:ocdbt.process_0/:d/e943:0:3742"."""
    _, folder, name, _, _ = location.split(":")
    return folder + name


def reason(error: BaseException) -> str:
    """What failed, without tensorstore's dump of its configuration."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = (str(error).splitlines() or [""])[0].partition(" [tensorstore_spec")[0]
    # The reason stands at the end, after the names of files.
    short = text if len(text) <= 400 else f"{text[:150]} ... {text[-250:]}"
    return f"{type(error).__name__}: {short.rstrip('.')}"
