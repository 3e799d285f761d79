"""Weight files: which are found, what they become, what is refused, how they are written."""

import os
import pathlib
import re
import sys
import types

import ml_dtypes
import numpy as np
import pytest
import safetensors
from safetensors.numpy import load_file, save_file

from emoe_jax.interop import files

DATA = pathlib.Path(__file__).parents[1] / "data" / "torch"
HUB = "anzheCheng/EMoE"


def ramp(*shape, dtype=np.float32):
    return (np.arange(np.prod(shape, dtype=int)).reshape(shape) / np.float32(8)).astype(dtype)


def write(folder, name="model.safetensors", **arrays):
    save_file({key.replace("__", "."): value for key, value in arrays.items()}, folder / name)
    return folder / name


def test_torch_file_becomes_float32():
    state = files.read_state(DATA / "every_kind.pth")
    for name in ("float32", "float16", "bfloat16", "float64"):
        np.testing.assert_array_equal(state[name], ramp(2, 3), strict=True)
    np.testing.assert_array_equal(state["transposed"], ramp(4, 6).T, strict=True)
    assert {state[name].dtype.name for name in ("int64", "uint8", "bool")} == {
        "int64",
        "uint8",
        "bool",
    }
    assert all(array.flags.c_contiguous for array in state.values())


def test_float32_stays_bit_for_bit(tmp_path):
    """Minus zero, the smallest subnormal, the largest number, one third."""
    values = np.array([-0.0, 1e-45, 3.4028235e38, 1 / 3], np.float32)
    state = files.read_state(write(tmp_path, w=values))
    assert state["w"].tobytes() == values.tobytes()


def test_safetensors_dtypes_and_shapes(tmp_path):
    arrays = {
        "half": ramp(2, dtype=np.float16),
        "brain": ramp(2, dtype=ml_dtypes.bfloat16),
        "scalar": np.array(0.5, np.float32),
        "empty": np.empty((0, 3), np.float32),
        "count": np.array([2**40]),
    }
    state = files.read_state(write(tmp_path, **arrays))
    for name in ("half", "brain"):
        np.testing.assert_array_equal(state[name], ramp(2), strict=True)
    for name in ("scalar", "empty", "count"):
        np.testing.assert_array_equal(state[name], arrays[name], strict=True)


@pytest.mark.parametrize(
    ("names", "stripped"),
    [
        (("module.a", "module.b"), {"a", "b"}),
        (("model.a", "model.b"), {"a", "b"}),
        (("module.model.a", "module.model.b"), {"a", "b"}),
        (("model.module.a", "model.module.b"), {"module.a", "module.b"}),
        (("module.a", "b"), {"module.a", "b"}),
        (("module.model.a", "module.b"), {"model.a", "b"}),
    ],
)
def test_prefixes(tmp_path, names, stripped):
    path = write(tmp_path, **{name.replace(".", "__"): ramp(2) for name in names})
    assert set(files.read_state(path)) == stripped


def test_prefix_of_data_parallel_in_a_torch_file():
    assert set(files.read_state(str(DATA / "checkpoint.pt"))) >= {"0.weight", "1.running_mean"}


def test_nan_and_infinity(tmp_path):
    bad = {f"bad{i}": np.array([0, np.nan, -np.inf][i % 3 :], np.float16) for i in range(7)}
    path = write(tmp_path, good=ramp(2), **bad)
    message = "7 of 8 tensors hold NaN or infinity .*: bad0, bad1, bad2, bad3, bad4, "
    with pytest.raises(ValueError, match=message + re.escape("...")):
        files.read_state(path)


def test_float64_beyond_float32(tmp_path):
    with pytest.raises(ValueError, match=r"1 of 1 tensors .*\(as float32\): w\."):
        files.read_state(write(tmp_path, w=np.array([1e300])))


@pytest.mark.parametrize("kept", [0, 4, 40, -1])
def test_truncated_safetensors(tmp_path, kept):
    path = write(tmp_path, w=ramp(8))
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model\.safetensors is no .* cut short or damaged"):
        files.read_state(path)


def test_safetensors_without_tensors(tmp_path):
    with pytest.raises(ValueError, match="holds no tensors"):
        files.read_state(write(tmp_path))


def test_safetensors_of_a_dtype_that_numpy_lacks(tmp_path):
    with pytest.raises(ValueError, match=r"holds a dtype that cannot be read .*float8_e4m3fn"):
        files.read_state(write(tmp_path, w=ramp(2, dtype=ml_dtypes.float8_e4m3fn)))


def test_a_folder_with_a_model(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        files.read_state(tmp_path)
    path = write(tmp_path, w=ramp(2))
    assert files.locate(str(tmp_path)) == path
    assert set(files.read_state(tmp_path)) == {"w"}


def test_other_suffix(tmp_path):
    (tmp_path / "w.npz").touch()
    with pytest.raises(ValueError, match=r"suffix '\.npz'; files with \.safetensors, \.pth"):
        files.read_state(tmp_path / "w.npz")


REPOSITORIES = {
    HUB: ["config.json", "model.safetensors", "weights.pth"],
    "old/release": ["README.md", "weights.pth"],
    "many/files": ["a.pth", "b.pth"],
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub with some repositories; notes what it was asked for."""
    asked = []
    write(tmp_path, w=ramp(2))

    def hf_hub_download(repository, file):
        asked.append((repository, file))
        return str(tmp_path / file)

    def list_repo_files(repository):
        if repository in REPOSITORIES:
            return REPOSITORIES[repository]
        raise OSError(f"404 {repository}")

    fake = types.SimpleNamespace(hf_hub_download=hf_hub_download, list_repo_files=list_repo_files)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    return asked


def test_hub_repository(hub):
    assert set(files.read_state(HUB)) == {"w"}
    assert hub == [(HUB, "config.json"), (HUB, "model.safetensors")]


def test_hub_repository_with_one_other_file(hub):
    assert files.locate("old/release").name == "weights.pth"
    assert hub == [("old/release", "weights.pth")]


def test_hub_repository_with_a_choice(hub):
    with pytest.raises(ValueError, match=r"many/files has no model.* a\.pth, b\.pth\. Download"):
        files.locate("many/files")
    assert hub == []


def test_hub_has_no_such_repository(hub):
    with pytest.raises(FileNotFoundError, match=r"no file or folder no/such, .* fetched .* 404"):
        files.locate("no/such")


@pytest.mark.parametrize(
    "missing",
    [
        "weights",
        "runs/weights.pth",
        "runs/model.safetensors",
        "runs/a/b",
        "/weights",
        "../weights",
        "https://a/b",
        "a/b c",
        pathlib.Path("runs/weights"),
    ],
)
def test_missing_files_are_not_looked_for_on_the_hub(hub, missing):
    with pytest.raises(FileNotFoundError, match=r"There is no file .*OWNER/NAME"):
        files.locate(missing)
    assert hub == []


def test_a_folder_named_like_a_repository_is_local(hub, tmp_path, monkeypatch):
    (tmp_path / HUB).mkdir(parents=True)
    write(tmp_path / HUB, v=ramp(2))
    monkeypatch.chdir(tmp_path)
    assert set(files.read_state(HUB)) == {"v"}
    assert hub == []


def test_hub_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModuleNotFoundError, match=re.escape("pip install 'emoe_jax[hub]'")):
        files.read_state(HUB)


def test_write_and_read_back(tmp_path):
    """Arrays that lie otherwise in memory are written by value."""
    arrays = {
        "transposed": ramp(4, 6).T,
        "reversed": ramp(4)[::-1],
        "scalar": np.array(0.5, np.float32),
        "brain": ramp(3, dtype=ml_dtypes.bfloat16),
    }
    path = tmp_path / "out.safetensors"
    files.write_safetensors(path, arrays, {"format": "pt"})
    for name, array in load_file(path).items():
        np.testing.assert_array_equal(array, arrays[name], strict=True)
    with safetensors.safe_open(path, framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_written_file_has_the_usual_permissions(tmp_path):
    (tmp_path / "usual").touch()
    files.write_safetensors(tmp_path / "w.safetensors", {"w": ramp(2)})
    assert os.stat(tmp_path / "w.safetensors").st_mode == os.stat(tmp_path / "usual").st_mode


def test_a_failed_write_leaves_the_file_before(tmp_path):
    path = write(tmp_path, w=ramp(2))
    before = path.read_bytes()
    with pytest.raises(Exception, match='Unknown dtype "object"'):
        files.write_safetensors(path, {"w": np.array([None])})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    files.write_safetensors(path, {"v": ramp(3)})
    assert set(files.read_state(path)) == {"v"}


def test_write_into_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"make the folder .*none first"):
        files.write_safetensors(tmp_path / "none" / "w.safetensors", {"w": ramp(2)})
    assert list(tmp_path.iterdir()) == []
