"""Checkpoints: what is restored is what was saved, and what cannot be is said in words."""

import errno
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from emoe_jax import stored
from emoe_jax.checkpoint import (
    CheckpointDamaged,
    CheckpointError,
    CheckpointMismatch,
    Checkpoints,
)
from emoe_jax.manifest import unseal

ROOT = Path(__file__).parents[1]
MESH_SHAPE = (2, 4)


def state(shift: float = 0.0) -> dict:
    """Every kind of leaf: parameters, a bfloat16 moment, a counter, a mask, an empty node."""
    w = jnp.arange(128.0).reshape(8, 16) + shift
    return {
        "params": {"layer_0": {"w": w, "b": jnp.arange(8.0)}, "norm": {}},
        "router": {"mean": jnp.linspace(0.0, 1.0, 8), "load": jnp.arange(8)},
        "opt": {"m": w.astype(jnp.bfloat16), "mask": jnp.arange(4) > 1},
        "step": jnp.int32(7),
    }


def on_one_device(tree: dict) -> dict:
    sharding = SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def over_eight_devices(tree: dict) -> dict:
    """Leading axis over the four, next over the two, where they divide it."""
    assert len(jax.devices()) == 8
    mesh = jax.make_mesh(MESH_SHAPE, ("x", "y"), axis_types=(AxisType.Auto,) * 2)

    def spec(x: jax.Array) -> jax.ShapeDtypeStruct:
        axes = [a if n % 4 == 0 else None for n, a in zip(x.shape, ("y", "x"), strict=False)]
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(spec, tree)


def save(checkpoints: Checkpoints, step: int, tree: dict | None = None, **kwargs: object) -> bool:
    given_ = {"data_state": {}, "meta": {}} | kwargs
    return checkpoints.save(step, state() if tree is None else tree, **given_)  # type: ignore[arg-type]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file can grow beyond `size` bytes: the kernel fails the write, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_new_run_sees_and_restores_what_was_saved(tmp_path: Path) -> None:
    saved = state()
    meta = {"config": {"name": "tiny", "layers": [1, 2]}, "note": None}
    with Checkpoints(tmp_path / "ck", every=5) as checkpoints:
        assert checkpoints.latest_step() is None
        assert checkpoints.all_steps() == []
        assert save(checkpoints, 5, saved, data_state={"0": {"next": 7}, "1": None}, meta=meta)
    with Checkpoints(tmp_path / "ck", every=5) as checkpoints:
        assert checkpoints.latest_step() == 5
        assert checkpoints.restore_meta(5) == meta
        restored = checkpoints.restore(5, on_one_device(saved))
    assert restored.data_state == {"0": {"next": 7}, "1": None}
    assert restored.meta == meta
    assert restored.train_state["params"]["norm"] == {}
    chex.assert_trees_all_equal_shapes_and_dtypes(restored.train_state, saved)
    chex.assert_trees_all_equal(restored.train_state, saved)


def test_one_device_to_eight_and_back_is_bit_equal(tmp_path: Path) -> None:
    saved = state()
    eight = over_eight_devices(saved)
    with Checkpoints(tmp_path, every=1) as checkpoints:
        save(checkpoints, 1, saved)
        spread = checkpoints.restore(1, eight).train_state
        save(checkpoints, 2, spread)
        back = checkpoints.restore(2, on_one_device(saved)).train_state
    chex.assert_trees_all_equal(jax.tree.map(lambda x: x.sharding, spread), shardings(eight))
    w = spread["params"]["layer_0"]["w"]
    assert w.addressable_shards[0].data.shape == (2, 8)  # [8, 16] over (4, 2)
    chex.assert_trees_all_equal(spread, saved)
    chex.assert_trees_all_equal(back, saved)
    chex.assert_trees_all_equal(
        jax.tree.map(lambda x: x.sharding, back), shardings(on_one_device(saved))
    )


def shardings(tree: dict) -> dict:
    return jax.tree.map(lambda spec: spec.sharding, tree)


def test_arrays_may_be_donated_while_the_save_runs(tmp_path: Path) -> None:
    tree = {"w": jnp.arange(1e5)}
    with Checkpoints(tmp_path, every=1) as checkpoints:
        save(checkpoints, 1, tree)
        tree = jax.jit(lambda t: jax.tree.map(jnp.negative, t), donate_argnums=0)(tree)
        restored = checkpoints.restore(1, on_one_device(tree)).train_state
    np.testing.assert_array_equal(restored["w"], np.arange(1e5, dtype=np.float32))


def test_only_multiples_of_every_are_saved_unless_forced(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, every=3, keep_last=9) as checkpoints:
        done = [step for step in range(1, 8) if save(checkpoints, step)]
        assert done == [3, 6]
        assert save(checkpoints, 7, force=True)
        assert not save(checkpoints, 7, force=True)  # it is there already
        assert checkpoints.all_steps() == [3, 6, 7]


def test_a_step_before_the_latest_is_refused_not_skipped(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, every=2) as checkpoints:
        save(checkpoints, 6)
        assert not save(checkpoints, 3)  # not due
        with pytest.raises(ValueError, match=r"Step 4 cannot be saved.*holds step 6.*--workdir"):
            save(checkpoints, 4)


def test_the_last_two_and_the_best_are_kept(tmp_path: Path) -> None:
    losses = {1: 5.0, 2: 3.0, 3: 4.0, 4: float("nan"), 5: 6.0, 6: 3.5}
    with Checkpoints(tmp_path, every=1, keep_last=2, keep_best=1) as checkpoints:
        for step, loss in losses.items():
            save(checkpoints, step, metrics={"eval/loss": loss, "eval/accuracy": 0.5})
        assert checkpoints.all_steps() == [2, 5, 6]
        assert checkpoints.best_step() == 2
    with Checkpoints(tmp_path, every=1, keep_last=2, keep_best=1) as checkpoints:
        assert checkpoints.best_step() == 2
        save(checkpoints, 7, metrics={"eval/loss": 1.0})
        assert checkpoints.all_steps() == [6, 7]
        assert checkpoints.best_step() == 7


def test_every_nth_step_is_kept_for_ever(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, every=1, keep_last=1, keep_every=3, keep_best=0) as checkpoints:
        for step in range(1, 9):
            save(checkpoints, step)
        assert checkpoints.all_steps() == [3, 6, 8]


def test_without_keep_best_only_the_last_are_kept(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, every=1, keep_last=2, keep_best=False) as checkpoints:
        for step in (1, 2, 3):
            save(checkpoints, step, metrics={"eval/loss": float(step)})
        assert checkpoints.all_steps() == [2, 3]
        assert checkpoints.best_step() == 2


def test_steps_without_the_metric_are_never_the_best(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, every=1, keep_last=1, best_metric="eval/bpb") as checkpoints:
        save(checkpoints, 1, metrics={"eval/loss": 0.0})
        save(checkpoints, 2)
        assert checkpoints.best_step() is None
        assert checkpoints.all_steps() == [2]
        save(checkpoints, 3, metrics={"eval/bpb": 2.0})
        save(checkpoints, 4)
        assert checkpoints.all_steps() == [3, 4]
        assert checkpoints.best_step() == 3


def test_partial_restore_reads_only_the_named_entries(tmp_path: Path) -> None:
    saved = state()
    wanted = {key: saved[key] for key in ("params", "router")}
    with Checkpoints(tmp_path, every=1) as checkpoints:
        save(checkpoints, 1, saved, meta={"k": 1}, data_state={"0": 1})
        with pytest.raises(
            CheckpointMismatch, match=r"opt/m: bfloat16\[8,16\] in the checkpoint, absent"
        ):
            checkpoints.restore(1, on_one_device(wanted))
        restored = checkpoints.restore(1, over_eight_devices(wanted), partial=True)
        narrow = {"params": {"layer_0": {"w": saved["params"]["layer_0"]["w"]}}}
        with pytest.raises(CheckpointMismatch, match=r"params/layer_0/b: float32"):
            checkpoints.restore(1, on_one_device(narrow), partial=True)
    chex.assert_trees_all_equal(restored.train_state, wanted)
    assert restored.data_state is None
    assert restored.meta == {"k": 1}


def test_all_differences_are_listed_before_anything_is_read(tmp_path: Path) -> None:
    other = on_one_device(state())
    other["params"]["layer_0"]["w"] = on_one_device({"w": jnp.zeros((8, 32))})["w"]
    other["router"]["load"] = on_one_device({"l": jnp.zeros(8)})["l"]
    other["params"]["extra"] = on_one_device({"e": jnp.zeros(3)})["e"]
    del other["opt"]["mask"]
    with Checkpoints(tmp_path, every=1) as checkpoints:
        save(checkpoints, 1)
        with pytest.raises(CheckpointMismatch) as caught:
            checkpoints.restore(1, other)
    assert isinstance(caught.value, ValueError)
    assert str(caught.value).splitlines() == [
        f"Step 1 in {tmp_path} holds another model than this configuration describes "
        "(4 differences):",
        "  opt/mask: bool[4] in the checkpoint, absent in this model",
        "  params/extra: absent in the checkpoint, float32[3] in this model",
        "  params/layer_0/w: float32[8,16] in the checkpoint, float32[8,32] in this model",
        "  router/load: int32[8] in the checkpoint, float32[8] in this model",
        "Use another --workdir, or the configuration that this one was made with.",
    ]


def test_an_absent_step_is_named_with_those_that_are_there(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, every=1) as checkpoints:
        with pytest.raises(FileNotFoundError, match=r"step 3 .*there are none"):
            checkpoints.restore_meta(3)
        save(checkpoints, 1)
        with pytest.raises(FileNotFoundError, match=r"step 3 .*there are \[1\]"):
            checkpoints.restore(3, on_one_device(state()))


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"opt": (jnp.ones(1),)}, "opt is tuple.*turn containers into dicts"),
        ({"opt": None}, "opt is NoneType"),
        ({"step": 3}, "step is int, not a jax.Array"),
        ({"w": np.ones(3)}, "w is ndarray"),
        ({"a.b": jnp.ones(1)}, "'a.b' under '' .*without '.' and '/'"),
        ({"a": {0: jnp.ones(1)}}, "0 under 'a/'"),
        ({"key": jax.random.key(0)}, "key has dtype key<fry>.*random.key_data"),
        ({"z": jnp.ones((0, 4))}, r"z has shape \(0, 4\)"),
        ([jnp.ones(1)], "nested dict of arrays"),
    ],
)
def test_what_is_no_nested_dict_of_arrays_is_refused(
    tmp_path: Path, tree: dict, words: str
) -> None:
    with Checkpoints(tmp_path, every=1) as checkpoints:
        with pytest.raises(ValueError, match=words):
            save(checkpoints, 1, tree)
        assert checkpoints.all_steps() == []


def test_a_position_that_json_cannot_hold_is_refused(tmp_path: Path) -> None:
    with (
        Checkpoints(tmp_path, every=1) as checkpoints,
        pytest.raises(ValueError, match="data_state must be a JSON object"),
    ):
        save(checkpoints, 1, data_state={"0": b"bytes"})


@pytest.mark.parametrize("meta", [{"a": {1, 2}}, {"loss": float("nan")}, {"p": Path("x")}])
def test_meta_that_json_cannot_hold_is_refused(tmp_path: Path, meta: dict) -> None:
    with (
        Checkpoints(tmp_path, every=1) as checkpoints,
        pytest.raises(ValueError, match="meta must be a JSON object"),
    ):
        save(checkpoints, 1, meta=meta)


def test_a_spec_without_sharding_is_refused(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, every=1) as checkpoints:
        save(checkpoints, 1, {"w": jnp.ones(2)})
        with pytest.raises(ValueError, match=r"w is ShapeDtypeStruct.*sharding"):
            checkpoints.restore(1, {"w": jax.ShapeDtypeStruct((2,), jnp.float32)})
        with pytest.raises(ValueError, match="names no array"):
            checkpoints.restore(1, {}, partial=True)


@pytest.mark.parametrize(
    "wrong", [{"every": 0}, {"keep_last": 0}, {"keep_best": -1}, {"keep_every": -1}]
)
def test_counts_out_of_range_are_refused(tmp_path: Path, wrong: dict) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name}={value} must be at least"):
        Checkpoints(tmp_path, **({"every": 1} | wrong))


def test_read_only_neither_writes_nor_cleans(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"does not exist.*--workdir"):
        Checkpoints(tmp_path / "none", every=1, read_only=True)
    assert not (tmp_path / "none").exists()
    with Checkpoints(tmp_path, every=1) as checkpoints:
        save(checkpoints, 1, metrics={"eval/loss": 1.0})
    unfinished = tmp_path / "2.orbax-checkpoint-tmp"
    unfinished.mkdir()
    with Checkpoints(tmp_path, every=1, read_only=True) as onlooker:
        assert onlooker.latest_step() == onlooker.best_step() == 1
        assert onlooker.restore(1, on_one_device(state())).data_state == {}
        with pytest.raises(ValueError, match="read_only"):
            save(onlooker, 2)
    assert unfinished.exists()


async def no_space(*args: object) -> None:
    """Stands for orbax's writing of the JSON item, which runs in the background."""
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_write_that_fails_in_the_background_is_told_and_leaves_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path, every=1, keep_last=1, keep_best=0)
    save(checkpoints, 1)
    checkpoints.wait()
    with monkeypatch.context() as broken:
        broken.setattr(ocp.JsonCheckpointHandler, "_save_fn", no_space)
        assert save(checkpoints, 2, state(1.0))
        with pytest.raises(CheckpointError) as caught:
            checkpoints.wait()
    words = str(caught.value)
    assert f"step 2 could not be written to {tmp_path}" in words
    assert "bytes free, at most 872 and a little more needed" in words
    assert "No space left on device" in words
    assert "earlier steps [1] are intact" in words
    assert "--workdir" in words
    assert checkpoints.all_steps() == [1]  # kept although keep_last=1: step 2 never arrived
    chex.assert_trees_all_equal(checkpoints.restore(1, on_one_device(state())).train_state, state())
    assert save(checkpoints, 3, state(1.0))  # the disk has space again
    assert checkpoints.all_steps() == [3]
    checkpoints.close()


def test_the_next_call_reports_a_failed_save_even_when_none_is_due(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ocp.JsonCheckpointHandler, "_save_fn", no_space)
    checkpoints = Checkpoints(tmp_path, every=10)
    save(checkpoints, 10)
    calls = (save(checkpoints, 11) for _ in range(1_000_000))
    with pytest.raises(CheckpointError, match="step 10 could not be written"):
        any(calls)
    checkpoints.close()


def test_leaving_the_context_raises_a_failed_save_but_hides_no_other_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ocp.JsonCheckpointHandler, "_save_fn", no_space)

    def run(folder: Path, error: Exception | None) -> None:
        with Checkpoints(folder, every=1) as checkpoints:
            save(checkpoints, 1)
            if error is not None:
                raise error

    with pytest.raises(CheckpointError, match="step 1 could not be written"):
        run(tmp_path / "a", None)
    with pytest.raises(KeyError, match="mine"):
        run(tmp_path / "b", KeyError("mine"))


def test_files_that_the_kernel_refuses_are_a_checkpoint_error(tmp_path: Path) -> None:
    noise = {"w": jax.random.normal(jax.random.key(0), (100_000,))}  # 400 kB, incompressible
    with Checkpoints(tmp_path, every=1) as checkpoints:
        save(checkpoints, 1, noise)
        checkpoints.wait()
        with largest_file(65_536), pytest.raises(CheckpointError, match="step 2 could not be"):
            _ = save(checkpoints, 2, noise), checkpoints.wait()
        assert checkpoints.latest_step() == 1
        save(checkpoints, 3, noise)
    with Checkpoints(tmp_path, every=1, read_only=True) as checkpoints:
        assert checkpoints.all_steps() == [1, 3]
        restored = checkpoints.restore(1, on_one_device(noise)).train_state
    chex.assert_trees_all_equal(restored, noise)


def start(source: str, *args: str) -> subprocess.Popen[str]:
    """Starts a program with two CPU devices in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(source), *args],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
        stderr=subprocess.PIPE,
        text=True,
    )


KILLED = """
    import os, sys, time
    import jax.numpy as jnp
    import orbax.checkpoint as ocp
    from emoe_jax.checkpoint import Checkpoints

    checkpoints = Checkpoints(sys.argv[1], every=1)
    checkpoints.save(1, {"w": jnp.arange(8.0)}, data_state={"0": "one"}, meta={})
    checkpoints.wait()
    async def die(*args):
        time.sleep(0.5)  # the arrays of step 2 are on the disk by now
        os._exit(9)
    ocp.JsonCheckpointHandler._save_fn = die
    checkpoints.save(2, {"w": jnp.ones(8)}, data_state={"0": "two"}, meta={})
    checkpoints.wait()
"""


def test_a_process_killed_while_it_saves_leaves_the_step_before(tmp_path: Path) -> None:
    worker = start(KILLED, str(tmp_path))
    errors = worker.communicate(timeout=120)[1]
    assert worker.returncode == 9, errors
    assert any(path.name.startswith("2") for path in tmp_path.iterdir())  # a part is there
    wanted = on_one_device({"w": jnp.arange(8.0)})
    with Checkpoints(tmp_path, every=1) as checkpoints:
        assert checkpoints.latest_step() == 1
        restored = checkpoints.restore(1, wanted)
        assert save(checkpoints, 2, {"w": jnp.ones(8)})
        assert checkpoints.all_steps() == [1, 2]
    assert restored.data_state == {"0": "one"}
    np.testing.assert_array_equal(restored.train_state["w"], np.arange(8.0))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


def test_a_step_is_never_listed_while_it_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(folder: Path, **_: object) -> None:
        """Has deleted a file when the process is killed."""
        next(path for path in Path(folder).rglob("*") if path.is_file()).unlink()

    monkeypatch.setattr(shutil, "rmtree", killed)
    with Checkpoints(tmp_path, every=1, keep_last=1) as checkpoints:
        for step in (1, 2):
            save(checkpoints, step)
        assert checkpoints.all_steps() == [2]
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".deleted", "2"]
    with Checkpoints(tmp_path, every=1, read_only=True) as onlooker:
        assert onlooker.all_steps() == [2]
    assert (tmp_path / ".deleted" / "1").exists()
    with Checkpoints(tmp_path, every=1) as checkpoints:
        assert checkpoints.all_steps() == [2]
    assert [path.name for path in tmp_path.iterdir()] == ["2"]


def test_a_directory_that_is_gone_is_a_checkpoint_error(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "ck", every=1)
    (tmp_path / "ck").rmdir()
    (tmp_path / "ck").write_text("a file where the folder was")
    with pytest.raises(CheckpointError, match=r"step 1 could not be written to .*--workdir"):
        save(checkpoints, 1)
    checkpoints.close()


def noise() -> dict:
    """An array too large and too random for the index, and a small one that lies in it."""
    return {"w": jax.random.normal(jax.random.key(0), (2000,)), "b": jnp.ones(3)}


def delete(file: Path) -> None:
    file.unlink()


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def files(folder: Path) -> dict[str, Path]:
    """Files of a step, by a name that is the same in every step."""
    there = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path for path in there}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Step 1, and step 2 of other values, both whole."""
    folder = tmp_path_factory.mktemp("saved")
    with Checkpoints(folder, every=1) as checkpoints:
        for step in (1, 2):
            tree = jax.tree.map(lambda x, n=step: x * n, noise())
            save(checkpoints, step, tree, data_state={"0": step}, metrics={"eval/loss": 1.0 / step})
    return folder


@pytest.mark.parametrize("damage", [delete, truncate, flip])
def test_whatever_file_is_damaged_what_is_restored_was_saved(
    saved: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    """Of the files of the newest step all that matter are missed, and none changes a value."""
    wanted, missed = on_one_device(noise()), set()
    for name in files(saved / "2"):
        folder = tmp_path / name.replace("/", "_")
        shutil.copytree(saved, folder)
        damage(folder / "2" / name)
        with Checkpoints(folder, every=1, read_only=True) as checkpoints:
            assert checkpoints.best_step() == (1 if name == "run/metadata" else 2)
            step, restored, damaged = checkpoints.restore_newest(wanted)
        assert list(damaged) == ([2] if step == 1 else [])
        missed |= {name} if step == 1 else set()
        expected = jax.tree.map(lambda x, n=step: x * n, noise())
        chex.assert_trees_all_equal(restored.train_state, expected)
        assert restored.data_state == {"0": step}
        shutil.rmtree(folder)
    assert {"run/metadata", "state/manifest.ocdbt"} < missed
    (values,) = stored.files_of(epath.Path(saved / "2"), "w")
    (index,) = stored.files_of(epath.Path(saved / "2"), "b")
    assert {values, index} < missed


def test_every_byte_of_the_record_counts(saved: Path, tmp_path: Path) -> None:
    file = tmp_path / "2" / "run" / "metadata"
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    whole = file.read_bytes()
    assert unseal(json.loads(whole))["data_state"] == {"0": 2}
    for place in range(len(whole)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises((ValueError, KeyError)):
            stored.read_record(epath.Path(tmp_path / "2"))


def test_damaged_steps_are_renamed_and_no_longer_counted(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    wanted = on_one_device(noise())
    with Checkpoints(tmp_path, every=1, keep_last=2, keep_best=0) as checkpoints:
        for name in ("2.damaged", "2.damaged-2"):
            flip(tmp_path / "2" / "run" / "metadata")
            _, restored, damaged = checkpoints.restore_newest(wanted)
            assert checkpoints.set_aside(damaged) == [name]
            assert checkpoints.all_steps() == [1]
            assert save(checkpoints, 2, restored.train_state)
            checkpoints.wait()
        save(checkpoints, 3, restored.train_state)
        assert checkpoints.all_steps() == [2, 3]  # two are kept, and neither is a damaged one
    with Checkpoints(tmp_path, every=1) as checkpoints:
        assert checkpoints.restore_newest(wanted).step == 3
    names = ["2", "2.damaged", "2.damaged-2", "3"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_where_no_step_is_whole_all_are_named_and_none_is_moved(
    saved: Path, tmp_path: Path
) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    flip(tmp_path / "2" / "run" / "metadata")
    delete(tmp_path / "1" / "state" / "manifest.ocdbt")
    with Checkpoints(tmp_path, every=1) as checkpoints:
        with pytest.raises(CheckpointError) as caught:
            checkpoints.restore_newest(on_one_device(noise()))
        assert checkpoints.all_steps() == [1, 2]
    first, two, one, advice = str(caught.value).splitlines()
    assert first == f"No checkpoint in {tmp_path} is whole:"
    assert two.startswith("  step 2: ")
    assert one.startswith("  step 1: ValueError: NOT_FOUND: ")
    assert advice.startswith("Nothing was moved or deleted. Put a copy")


def test_another_model_is_no_damage(saved: Path) -> None:
    wanted = on_one_device({"w": jnp.ones(4)})
    with (
        Checkpoints(saved, every=1, read_only=True) as checkpoints,
        pytest.raises(CheckpointMismatch, match="Step 2"),
    ):
        checkpoints.restore_newest(wanted)


def test_a_folder_that_cannot_be_renamed_is_told(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoints, "_rename", lambda *_: deny())
    with (
        Checkpoints(saved, every=1, read_only=True) as checkpoints,
        pytest.raises(
            CheckpointError, match=r"could not be renamed \(PermissionError.*Move 2 away"
        ),
    ):
        checkpoints.set_aside([2])


def deny() -> None:
    raise PermissionError(errno.EACCES, "Permission denied")


def test_bits_that_changed_after_the_save_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a disk does silently."""
    with Checkpoints(tmp_path, every=1) as checkpoints:
        with monkeypatch.context() as later:
            later.setattr("emoe_jax.manifest.digests", lambda arrays: dict.fromkeys(arrays, 1))
            save(checkpoints, 1, {"a": {"w": jnp.ones(3)}, "one": jnp.int32(1)})
        with pytest.raises(CheckpointError, match=r"read: other bits than were saved are in a/w"):
            checkpoints.restore(1, on_one_device({"a": {"w": jnp.ones(3)}, "one": jnp.int32(1)}))


def test_a_damaged_step_is_told_with_those_that_are_left(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    delete(tmp_path / "2" / "run" / "metadata")
    with Checkpoints(tmp_path, every=1) as checkpoints:
        words = (
            r"step 2 could not be read: FileNotFoundError: .*metadata not found\. .*--step \(1\)"
        )
        with pytest.raises(CheckpointDamaged, match=words):
            checkpoints.restore_meta(2)


TWO = """
    import json, sys
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec
    from emoe_jax.checkpoint import CheckpointError, Checkpoints

    port, process, directory = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, process)
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    w = jax.jit(lambda: jnp.arange(16.0), out_shardings=sharding)()
    # Both read shard "all"; each has one of its own, of other lengths.
    own = {"all": {"next": 4}, f"{process}": "x" * 3000 * process}
    with Checkpoints(directory, every=2) as checkpoints:
        assert not checkpoints.save(1, {"w": w}, data_state=own, meta={})
        try:
            checkpoints.save(2, {"w": w}, data_state={"all": process}, meta={})
            raise SystemExit("positions that differ were saved")
        except ValueError as error:
            assert "Processes 0 and 1 are at different positions in data shard 'all'" in str(error)
        assert checkpoints.save(2, {"w": w}, data_state=own, meta={"a": 1})
        spec = jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=sharding)
        restored = checkpoints.restore(2, {"w": spec})
        position = {"all": {"next": 4}, "0": "", "1": "x" * 3000}
        assert restored.data_state == position, restored.data_state
        if process == 1:  # the only one that sees other bits than were saved
            import emoe_jax.stored
            digests = emoe_jax.stored.digests
            other = lambda arrays: {k: v + 1 for k, v in digests(arrays).items()}
            emoe_jax.stored.digests = other
        try:
            checkpoints.restore(2, {"w": spec})
            raise SystemExit("damage was restored")
        except CheckpointError as error:
            assert "other bits than were saved are in w" in str(error), error
    for shard in restored.train_state["w"].addressable_shards:
        np.testing.assert_array_equal(shard.data, np.arange(16.0)[shard.index])
"""


def test_two_processes_save_together_and_one_process_reads_it(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    workers = [start(TWO, port, str(i), str(tmp_path)) for i in range(2)]
    try:
        errors = [worker.communicate(timeout=120)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], errors
    wanted = over_eight_devices({"w": jnp.arange(16.0)})
    with Checkpoints(tmp_path, every=2) as checkpoints:
        restored = checkpoints.restore(2, wanted)
    np.testing.assert_array_equal(restored.train_state["w"], np.arange(16.0))
    assert restored.data_state == {"all": {"next": 4}, "0": "", "1": "x" * 3000}
    assert restored.meta == {"a": 1}


def test_a_folder_that_orbax_cannot_open_is_a_checkpoint_error(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, every=1) as checkpoints:
        save(checkpoints, 1, metrics={"eval/loss": 1.0})
    (file,) = (tmp_path / "1" / "metrics").glob("metrics")
    file.write_text('{"eval/loss": 1.0')  # metrics are read from the record
    with Checkpoints(tmp_path, every=1) as checkpoints:
        assert checkpoints.best_step() == 1
    (tmp_path / "1" / "_CHECKPOINT_METADATA").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"could not be opened: RecursionError.* Move the"):
        Checkpoints(tmp_path, every=1)
