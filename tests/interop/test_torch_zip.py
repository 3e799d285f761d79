"""Files of torch.save read without torch: values, and programs that are not run.

tests/data/torch was written by torch (tests/data/write_torch_files.py); the rest is made here, from
the opcodes of pickle.
"""

import os
import pathlib
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest

from emoe_jax.interop import torch_zip

DATA = pathlib.Path(__file__).parents[1] / "data" / "torch"
BUILD, REDUCE = b"b", b"R"


def ramp(*shape, dtype=np.float32):
    values = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    integral = np.issubdtype(dtype, np.integer)
    return (values if integral else values / np.float32(8)).astype(dtype)


def plain(value):
    """The opcodes that push a value."""
    return pickle.dumps(value, protocol=2)[2:-1]


def named(module, name):
    return f"c{module}\n{name}\n".encode()


def call(module, name, *args):
    return named(module, name) + b"(" + b"".join(args) + b"t" + REDUCE


def storage(numel=6, key="0", kind="FloatStorage"):
    return b"(%bt" % b"".join(
        (plain("storage"), named("torch", kind), plain(key), plain("cpu"), plain(numel))
    )


def tensor(offset=0, shape=(2, 3), strides=(3, 1), lies_in=None):
    lies_in = storage() if lies_in is None else lies_in
    rest = (plain(offset), plain(shape), plain(strides), plain(False), plain({}))
    return call("torch._utils", "_rebuild_tensor_v2", lies_in + b"Q", *rest)


def write(folder, value, data=None, **entries):
    """Writes {"w": value} with one storage, by default of six float32."""
    path = folder / "weights.pth"
    data = ramp(6).tobytes() if data is None else data
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}" + plain("w") + value + b"s.")
        archive.writestr("a/data/0", data)
        for name, text in entries.items():
            archive.writestr(f"a/{name}", text)
    return path


def assert_same(got, want):
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    assert got.tobytes() == want.tobytes()
    assert got.flags.c_contiguous
    assert got.flags.writeable


FLOATS = ("float32", "float16", "bfloat16", "float64")
INTEGERS = ("int64", "int32", "int16", "int8", "uint8")


def test_every_dtype_bit_for_bit():
    state = torch_zip.read(DATA / "every_kind.pth")
    for name in FLOATS + INTEGERS:
        dtype = ml_dtypes.bfloat16 if name == "bfloat16" else np.dtype(name)
        assert_same(state[name], ramp(2, 3, dtype=dtype))
    assert_same(state["bool"], np.array([True, False, True]))


def test_every_way_to_lie_in_a_storage():
    state = torch_zip.read(DATA / "every_kind.pth")
    shared = ramp(4, 6)
    assert_same(state["shared"], shared)
    assert_same(state["transposed"], shared.T.copy())
    assert_same(state["part"], shared[1:3, 1::2].copy())
    assert_same(state["column"], shared[:, 2:3].copy())
    assert_same(state["expanded"], np.repeat(ramp(3)[:, None], 2, axis=1))
    assert_same(state["scalar"], np.array(0.5, np.float32))
    assert_same(state["empty"], np.empty((0, 3), np.float32))
    assert_same(state["parameter"], ramp(3))
    assert not np.shares_memory(state["shared"], state["part"])


def test_checkpoint_with_optimizer_and_numbers():
    """The state dict under "model" alone, with its names, its order and its step counter."""
    state = torch_zip.read(DATA / "checkpoint.pt")
    linear = {"module.0.weight": ramp(2, 3), "module.0.bias": ramp(2)}
    norm = {f"module.1.{name}": ramp(2) for name in ("weight", "bias")}
    buffers = {f"module.1.running_{name}": ramp(2) for name in ("mean", "var")}
    steps = {"module.1.num_batches_tracked": np.array(0)}
    want = linear | norm | buffers | steps
    assert list(state) == list(want)
    for name, value in want.items():
        assert_same(state[name], value)


@pytest.mark.parametrize("wrapper", torch_zip.WRAPPERS)
def test_wrappers(tmp_path, wrapper):
    inner = b"}" + plain("inner") + tensor() + b"s"
    path = write(tmp_path, plain(1) + b"s" + plain(wrapper) + inner)
    assert_same(torch_zip.read(path)["inner"], ramp(2, 3))


def test_a_state_dict_carries_metadata_which_is_dropped(tmp_path):
    ordered = call("collections", "OrderedDict") + plain("w") + tensor() + b"s"
    path = write(tmp_path, plain(1) + b"s" + plain("state_dict") + ordered)
    with_metadata = ordered + plain({"_metadata": {"": {"version": 1}}}) + BUILD
    assert list(torch_zip.read(path)) == ["w"]
    path = write(tmp_path, plain(1) + b"s" + plain("state_dict") + with_metadata)
    assert_same(torch_zip.read(path)["w"], ramp(2, 3))


def test_what_it_asks_to_run_is_named_and_not_run(tmp_path):
    marker = tmp_path / "marker"
    attack = call("posix", "system", plain(f"echo ran > {marker}"))
    pickle.loads(b"\x80\x02" + attack + b".")  # pickle itself does run it
    assert marker.exists()
    marker.unlink()
    path = write(tmp_path, attack)
    with pytest.raises(ValueError) as error:
        torch_zip.read(path)
    assert not marker.exists()
    for words in (str(path), "`posix.system`", "Nothing of it was run", "model.state_dict()"):
        assert words in str(error.value)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("collections", "OrderedDict.fromkeys"),
        ("torch", "load"),
        ("torch._utils", "_rebuild_tensor_v3"),
        ("argparse", "Namespace"),
    ],
)
@pytest.mark.parametrize("by_stack", [False, True])
def test_every_other_name_is_refused(tmp_path, module, name, by_stack):
    stacked = plain(module) + plain(name) + b"\x93"
    value = (stacked if by_stack else named(module, name)) + b")" + REDUCE
    with pytest.raises(ValueError, match=rf"asks to run `{module}\.{name}`"):
        torch_zip.read(write(tmp_path, value))


REBUILD = named("torch._utils", "_rebuild_parameter")
DEFAULTS = plain((None, {"__defaults__": (1,)}))


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(REBUILD + DEFAULTS + BUILD, id="change a function"),
        pytest.param(REBUILD + plain({"x": 1}) + BUILD, id="give a function attributes"),
        pytest.param(tensor() + plain({"x": 1}) + BUILD, id="give a tensor attributes"),
        pytest.param(tensor() + plain((None, {"shape": (9,)})) + BUILD, id="change a tensor"),
        pytest.param(storage() + b"Q" + plain((None, {"numel": 9})) + BUILD, id="change a storage"),
        pytest.param(REBUILD + b")\x81", id="make an instance of a function"),
        pytest.param(call("torch._utils", "_rebuild_tensor_v2", plain(1)), id="too few arguments"),
        pytest.param(call("torch", "FloatStorage"), id="call a storage class"),
        pytest.param(tensor(lies_in=plain("0")), id="a storage that is no tuple"),
        pytest.param(tensor(lies_in=storage(numel="6")), id="a size that is no number"),
        pytest.param(b"\x82\x01", id="EXT1"),
        pytest.param(plain(1) + b"r\xff\xff\xff\x7f", id="memo index that needs 16 GiB"),
    ],
)
def test_abuse_of_what_is_allowed(tmp_path, value):
    with pytest.raises(ValueError, match=r"weights\.pth is no file of torch\.save, or damaged"):
        torch_zip.read(write(tmp_path, value))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"shape": (3, 3)}, "ends at element 8, outside its storage of 6"),
        ({"strides": (4, 1)}, "ends at element 6, outside"),
        ({"offset": 1}, "ends at element 6, outside"),
        ({"offset": 2**70, "shape": (), "strides": ()}, "outside its storage"),
        ({"shape": (2**62, 4), "strides": (0, 1)}, "expands 6 stored elements"),
        ({"shape": (0, 2**63)}, "expands 6 stored elements"),
        ({"strides": (-3, 1)}, "no valid"),
        ({"offset": -1}, "no valid"),
        ({"shape": (-2, 3)}, "no valid"),
        ({"shape": (2, True)}, "no valid"),
        ({"shape": (2, 3.0)}, "no valid"),
        ({"strides": (3,)}, "no valid"),
        ({"shape": [2, 3]}, "no valid"),
        ({"shape": (1,) * 65, "strides": (1,) * 65}, "no valid"),
        ({"lies_in": storage(numel=600)}, "24 bytes, not 600 of float32"),
        ({"lies_in": storage(kind="DoubleStorage")}, "24 bytes, not 6 of float64"),
        ({"lies_in": storage(key="../0")}, r"lacks its entry a/data/\.\./0"),
    ],
)
def test_tensors_outside_their_storage(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        torch_zip.read(write(tmp_path, tensor(**wrong)))


def test_a_dimension_of_one_may_have_any_stride(tmp_path):
    path = write(tmp_path, tensor(shape=(1, 6), strides=(2**70, 1)))
    assert_same(torch_zip.read(path)["w"], ramp(1, 6))


def test_byte_order(tmp_path):
    assert list(torch_zip.read(write(tmp_path, tensor(), byteorder="little"))) == ["w"]
    with pytest.raises(ValueError, match="byte order b'big'; only b'little' is read"):
        torch_zip.read(write(tmp_path, tensor(), byteorder="big"))


@pytest.mark.parametrize(
    "value", [plain(3), plain({"lr": 0.1}), call("torch", "Size", plain((2,)))]
)
def test_no_tensors(tmp_path, value):
    with pytest.raises(ValueError, match=r"holds no named tensors, .* its entries are 'w'"):
        torch_zip.read(write(tmp_path, value))


def test_no_dict(tmp_path):
    path = tmp_path / "list.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps([1], protocol=2))
    with pytest.raises(ValueError, match="holds a list, not a state dict"):
        torch_zip.read(path)


def test_legacy_file():
    with pytest.raises(
        ValueError, match=r"torch before 1\.6, which is not read\. Open it with torch"
    ):
        torch_zip.read(DATA / "legacy.pth")


@pytest.mark.parametrize("start", [b"", b"\x80\x04N.", b"\x93NUMPY", b"PK"])
def test_other_files(tmp_path, start):
    path = tmp_path / "other.pt"
    path.write_bytes(start)
    with pytest.raises(ValueError, match=r"no file of torch\.save: it does not begin as a zip"):
        torch_zip.read(path)


def test_other_zip_archives(tmp_path):
    np.savez(tmp_path / "a.npz", a=1)
    with pytest.raises(ValueError, match=r"it has 0 entries NAME/data\.pkl, not one"):
        torch_zip.read(tmp_path / "a.npz")


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
def test_truncated_archive(tmp_path, kept):
    data = (DATA / "checkpoint.pt").read_bytes()
    path = tmp_path / "cut.pt"
    path.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(ValueError, match=r"cut\.pt is cut short or damaged .* download it again"):
        torch_zip.read(path)


def test_a_changed_byte_of_a_weight(tmp_path):
    path = write(tmp_path, tensor())
    data = path.read_bytes()
    path.write_bytes(data.replace(ramp(6).tobytes(), ramp(6)[::-1].tobytes()))
    with pytest.raises(ValueError, match=r"is cut short or damaged .*CRC"):
        torch_zip.read(path)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        torch_zip.read(os.fspath(tmp_path / "none.pth"))


def test_an_expansion_beyond_memory_is_refused(tmp_path):
    path = write(tmp_path, tensor(shape=(2**21,), strides=(0,)))
    with pytest.raises(ValueError, match="expands 6 stored elements to 2097152, more than 1048576"):
        torch_zip.read(path)


def test_compressed_entries_are_refused(tmp_path):
    path = write(tmp_path, tensor())
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    with pytest.raises(ValueError, match=r"compressed entry a/data.pkl, which torch.save does not"):
        torch_zip.read(path)


def test_messages_stay_short(tmp_path):
    path = write(tmp_path, tensor(shape=tuple(range(-5000, 0)), strides=()))
    with pytest.raises(ValueError, match="no valid storage") as error:
        torch_zip.read(path)
    assert len(str(error.value)) < 1000
