"""What of a tree of arrays a checkpoint records besides the arrays: names, kinds and digests.

The record of a step is one JSON object: `arrays` (of each by name: global shape, dtype, digest),
`metrics`, `data_state` and `meta` of who saves, and `sha256` of all that.

A digest is of a whole array and not of each shard. It weighs every element by its index in the
whole array, so shards that are damaged, exchanged or shifted all change it, and it is the same
number for every sharding: what eight processes have saved can be checked by one, by two or on
another mesh, each adding up what it reads. Digests of shards could be checked only by reading the
same shards again, and would not notice where they stand.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Tree = Any


def flatten(tree: Any, check: Callable[[str, Any], None], prefix: str = "") -> dict[str, Any]:
    """Leaves by their path, such as `params/w`; `check(name, leaf)` raises on a wrong one."""
    if not isinstance(tree, dict):
        raise ValueError(f"A train state is a nested dict of arrays, and this is {type(tree)}.")
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if not isinstance(key, str) or not key or "." in key or "/" in key:
            raise ValueError(
                f"The key {key!r} under '{prefix}' cannot name an array on the disk: use non-empty "
                "strings without '.' and '/'."
            )
        if isinstance(value, dict):
            leaves |= flatten(value, check, f"{prefix}{key}/")
            continue
        check(prefix + key, value)
        leaves[prefix + key] = value
    return leaves


def nest(leaves: Mapping[str, Any]) -> Tree:
    """The inverse of `flatten`, without empty dicts."""
    tree: Tree = {}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def check_array(name: str, leaf: Any) -> None:
    """Refuses what orbax would refuse late, or store as something else."""
    if not isinstance(leaf, jax.Array):
        raise ValueError(
            f"{name} is {type(leaf).__name__}, not a jax.Array: turn containers into dicts with "
            "string keys, such as {'0': ...}, and numbers into arrays."
        )
    kinds = (jnp.floating, jnp.integer, jnp.bool_)
    if not any(jnp.issubdtype(leaf.dtype, kind) for kind in kinds):
        raise ValueError(
            f"{name} has dtype {leaf.dtype}: store real numbers (jax.random.key_data of a key)."
        )
    if leaf.size == 0:
        raise ValueError(f"{name} has shape {leaf.shape}; an array without elements is not stored.")


def check_spec(name: str, leaf: Any) -> None:
    """A spec must say where the array goes: orbax would take the placement of the saving run."""
    if not isinstance(leaf, jax.ShapeDtypeStruct) or leaf.sharding is None:
        raise ValueError(
            f"{name} is {leaf!r}; give a jax.ShapeDtypeStruct with shape, dtype and sharding."
        )


def describe(leaf: Any) -> str:
    """Shape and dtype as text, such as float32[3,4]; "absent" for None."""
    if leaf is None:
        return "absent"
    return f"{np.dtype(leaf.dtype).name}[{','.join(str(n) for n in leaf.shape)}]"


def entries(arrays: Mapping[str, jax.Array]) -> Tree:
    """Of each array its global shape, dtype and digest, as JSON; see `digests`."""
    sums = digests(arrays)
    return {
        name: {"shape": list(x.shape), "dtype": np.dtype(x.dtype).name, "digest": sums[name]}
        for name, x in arrays.items()
    }


def seal(record: Tree) -> Tree:
    """A JSON object with the hash of its content under `sha256`."""
    content = json.loads(json.dumps(record, allow_nan=False))
    return content | {"sha256": _content_hash(content)}


def unseal(record: Tree) -> Tree:
    """The content of a record, `arrays` included.

    Records from before there were seals hold digests alone, without shapes and dtypes, and no
    metrics.

    Raises:
        ValueError: it is not what was sealed.
    """
    if isinstance(record, dict) and record.keys() == {"meta", "data_state", "digests"}:
        arrays = {name: {"digest": value} for name, value in record["digests"].items()}
        return {"meta": record["meta"], "data_state": record["data_state"], "arrays": arrays}
    content = dict(record)
    if content.pop("sha256", None) != _content_hash(content):
        raise ValueError("its record is not what was saved (sha256 differs)")
    return content


def _content_hash(content: Tree) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def digests(arrays: Mapping[str, jax.Array]) -> dict[str, int]:
    """Digest of each array, the same for every sharding and number of processes.

    All processes that hold a part of the arrays call it together; each reads what it holds. Costs
    one pass over the memory.
    """
    # One compiled call an array, as arrays of a state may lie on different sets of devices.
    sums = {}
    for name, array in arrays.items():
        sums[name] = digest(array)
        if len(array.sharding.device_set) > 1:
            # One at a time: devices on CPU, of one process or of several, that have several sums
            # in flight wait for each other forever.
            sums[name].block_until_ready()
    return {name: int(value) for name, value in jax.device_get(sums).items()}


@jax.jit
def digest(x: jax.Array) -> jax.Array:
    """Sum over elements of (2·index + 1) · bit pattern, modulo 2**32.

    Odd factors are invertible modulo 2**32, so a change of any one word changes the sum; unequal
    factors make an exchange of two words change it (unless their difference times the distance
    is a multiple of 2**31). Integer sums do not depend on order, hence not on sharding.
    """
    if x.dtype.itemsize == 8 or jnp.issubdtype(x.dtype, jnp.floating):
        words = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[x.dtype.itemsize]
        x = jax.lax.bitcast_convert_type(x, words)
    bits = x.astype(jnp.uint32)
    weight = jnp.ones(bits.shape, jnp.uint32)
    stride = 2
    for axis in reversed(range(bits.ndim)):
        index = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        weight += index * jnp.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    return jnp.sum(bits * weight, dtype=jnp.uint32)
