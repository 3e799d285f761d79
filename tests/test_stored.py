"""Reading a step on one device, and naming what is wrong with it."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts
from etils import epath
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from emoe_jax import stored
from emoe_jax.checkpoint import Checkpoints


@pytest.fixture
def folder(tmp_path: Path) -> epath.Path:
    """A step that eight devices saved: `a/w` lies in a file of its own, `a/b` in the index."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    spread = NamedSharding(mesh, PartitionSpec("x"))
    w = jax.device_put(jax.random.normal(jax.random.key(0), (8, 1000)), spread)
    with Checkpoints(tmp_path, every=1) as checkpoints:
        checkpoints.save(1, {"a": {"w": w, "b": jnp.ones(3)}}, data_state={}, meta={"k": 1})
    return epath.Path(tmp_path / "1")


def flip(file: epath.Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


def test_the_record_tells_shapes_dtypes_and_digests(folder: epath.Path) -> None:
    record = stored.read_record(folder)
    assert record["meta"] == {"k": 1}
    assert record["arrays"]["a/w"].keys() == {"shape", "dtype", "digest"}
    assert record["arrays"]["a/w"]["shape"] == [8, 1000]
    # 1.0 is 0x3f800000, and the weights of three elements are 1, 3, 5.
    entry = {"shape": [3], "dtype": "float32", "digest": 9 * 0x3F800000 % 2**32}
    assert record["arrays"]["a/b"] == entry


def test_arrays_of_eight_devices_are_read_one_by_one_on_one(folder: epath.Path) -> None:
    record = stored.read_record(folder)
    arrays = dict(stored.each_array(folder, record, ["a/b", "a/w"]))
    assert list(arrays) == ["a/b", "a/w"]
    assert len(arrays["a/w"].sharding.device_set) == 1
    expected = np.asarray(jax.random.normal(jax.random.key(0), (8, 1000)))
    np.testing.assert_array_equal(arrays["a/w"], expected)
    assert stored.examine(folder) == []


def test_damage_is_told_with_array_and_file(folder: epath.Path) -> None:
    files = stored.files_of(folder, "a/w")  # the shards lie in one, or in two
    flip(folder / files[0])
    (damage,) = stored.examine(folder)
    assert damage.array == "a/w"
    assert damage.files == files
    assert "other bits than were saved" in damage.reason
    (folder / files[0]).unlink()
    (damage,) = stored.examine(folder)
    assert damage.array == "a/w"
    assert 'Error reading "a.w/' in damage.reason


def test_a_damaged_index_is_one_damage_that_names_its_file(folder: epath.Path) -> None:
    flip(folder / "state/manifest.ocdbt")
    (damage,) = stored.examine(folder)
    assert damage.array == ""
    assert "state/manifest.ocdbt" in damage.reason


def test_a_damaged_record_is_named(folder: epath.Path) -> None:
    file = folder / "run/metadata"
    file.write_text(file.read_text().replace('"k": 1', '"k": 2'))
    (damage,) = stored.examine(folder)
    assert damage == ("", ["run/metadata"], damage.reason)
    assert "its record is not what was saved" in damage.reason
    assert stored.read_metrics(folder) == {}


def test_files_are_found_below_the_first_node_of_an_index(tmp_path: Path) -> None:
    config = {"max_decoded_node_bytes": 400, "max_inline_value_bytes": 16}
    base = {"driver": "file", "path": f"{tmp_path}/state/"}
    store = ts.KvStore.open({"driver": "ocdbt", "base": base, "config": config}).result()
    for number in range(40):
        store.write(b"x%02d/0" % number, b"value" * 10).result()
    found = [stored.files_of(epath.Path(tmp_path), f"x{n:02d}") for n in range(40)]
    assert all(len(files) == 1 for files in found)
    for number, (file,) in enumerate(found):
        whole = (tmp_path / file).read_bytes()
        assert b"value" * 10 in whole, number
