import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from emoe_jax import manifest
from emoe_jax.manifest import check_array, describe, digest, flatten, nest


def test_digest_is_the_weighted_sum_of_the_words() -> None:
    # float32 1.0 is 0x3f800000, and the weights of three elements are 1, 3, 5
    assert int(digest(jnp.array([0.0, 1.0, 0.0]))) == 3 * 0x3F800000 % 2**32
    assert int(digest(jnp.array([[1, 2], [3, 4]]))) == 1 * 1 + 3 * 2 + 5 * 3 + 7 * 4
    assert int(digest(jnp.array([True, False, True]))) == 1 + 5
    assert int(digest(jnp.array(-1, jnp.int8))) == 2**32 - 1
    assert int(digest(jnp.ones(2, jnp.bfloat16))) == 4 * 0x3F80


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_digest_finds_any_flipped_bit_on_any_sharding(data: st.DataObject) -> None:
    words = data.draw(st.lists(st.integers(0, 2**32 - 1), min_size=16, max_size=16))
    at, bit = data.draw(st.integers(0, 15)), data.draw(st.integers(0, 31))
    flipped = [word ^ (1 << bit if i == at else 0) for i, word in enumerate(words)]
    x, y = (jnp.array(np.array(v, np.uint32).reshape(8, 2)) for v in (words, flipped))
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    spread = jax.device_put(x, NamedSharding(mesh, PartitionSpec("x")))
    assert int(digest(x)) != int(digest(y))
    assert int(digest(x)) == int(digest(spread))


@pytest.mark.parametrize(("devices", "most"), [(1, 3), (8, 1)])
def test_sums_over_several_devices_are_never_in_flight_together(
    devices: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Their programs wait for each other's devices, and on CPU that can be forever.
    flying: list[str] = []
    seen = []

    class Sum(int):
        def block_until_ready(self) -> None:
            flying.clear()

    def started(_: jax.Array) -> Sum:
        flying.append("sum")
        seen.append(len(flying))
        return Sum(7)

    monkeypatch.setattr(manifest, "digest", started)
    mesh = jax.make_mesh((devices,), ("x",), axis_types=(AxisType.Auto,))
    array = jax.device_put(jnp.zeros(8), NamedSharding(mesh, PartitionSpec("x")))
    assert manifest.digests(dict.fromkeys("abc", array)) == dict.fromkeys("abc", 7)
    assert max(seen) == most


def test_flatten_and_nest_are_inverse_but_for_empty_dicts():
    tree = {"a": {"b": jnp.ones(2), "c": {}}, "d": jnp.zeros(())}
    flat = flatten(tree, check_array)
    assert sorted(flat) == ["a/b", "d"]
    assert sorted(flatten(nest(flat), check_array)) == ["a/b", "d"]


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"a": [jnp.ones(1)]}, "a is list, not a jax.Array: turn containers into dicts"),
        ({"a": 1.0}, "a is float, not a jax.Array: .* and numbers into arrays"),
        ({"a.b": jnp.ones(1)}, "key 'a.b' under '' cannot name an array on the disk: use"),
    ],
)
def test_refuses_what_cannot_be_stored_by_name(tree, words):
    with pytest.raises(ValueError, match=words):
        flatten(tree, check_array)


def test_describes_shape_and_dtype():
    assert describe(jnp.ones((3, 4))) == "float32[3,4]"
    assert describe(None) == "absent"
