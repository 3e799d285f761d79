"""The program that looks at checkpoints: on one device, at runs of any mesh, without data."""

import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from emoe_jax import pure, stored
from emoe_jax.checkpoint import CheckpointError, Checkpoints
from emoe_jax.manifest import flatten
from tests.train.tiny import vit_tree
from train import checkpoints, convert, weights
from train.checkpoint_diff import Side, compare, moved, principal_angles
from train.config import freeze
from train.guards import META
from train.initial import initial_params
from train.provenance import MADE
from train.run import build, load_model, model_maker, save_model

ROOT = pathlib.Path(__file__).parents[2]


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def start(*arguments):
    """The program in a process of its own, with one device."""
    done = subprocess.run(
        [sys.executable, "-m", "train.checkpoints", *map(str, arguments)],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def copy(finished, tmp_path):
    """The finished run without its data, tokenizer or logs."""
    workdir = tmp_path / "run"
    shutil.copytree(finished.workdir / "checkpoints", workdir / "checkpoints")
    shutil.copy(finished.workdir / "config.json", workdir)
    return workdir


# ---------------------------------------------------------------------------------- list and verify


def test_list_tells_what_is_there(copy):
    (copy / "checkpoints/24").rename(copy / "checkpoints/24.damaged")
    shutil.copytree(copy / "checkpoints/24.damaged", copy / "checkpoints/24")
    flip(copy / "checkpoints/16/run/metadata")
    first, second, aside = checkpoints.listed(str(copy))
    assert (first["step"], first["state"], first["best"]) == (16, "damaged", "")
    assert (second["step"], second["state"], second["best"]) == (24, "whole", "best")
    assert second.keys() > {"eval/loss", "eval/bits_per_byte", "saved"}
    assert not any(name.startswith("eval/router") for name in second)
    size = sum(path.stat().st_size for path in (copy / "checkpoints/24").rglob("*"))
    assert second["MB"] == pytest.approx(size / 1e6, rel=0.5)  # folders have a size of their own
    assert (aside["step"], aside["state"]) == (24, "set aside")
    assert [row["state"] for row in checkpoints.listed(str(copy), read=False)[:2]] == [
        "not read"
    ] * 2


def test_verify_names_array_and_file_and_ends_with_code_1(copy, tmp_path):
    assert checkpoints.verified(str(copy)) == []
    step = epath.Path(copy / "checkpoints/24")
    file = stored.files_of(step, "params/embedding")[-1]
    (copy / "checkpoints/24" / file).unlink()
    code, out, err = start("verify", copy, f"--json={tmp_path / 'damage.json'}")
    assert code == 1, err
    assert "params/embedding" in out
    rows = json.loads((tmp_path / "damage.json").read_text())["rows"]
    (row,) = [row for row in rows if row["array"] == "params/embedding"]
    assert row["step"] == 24
    assert file in row["file"]
    assert file in row["reason"] or "params.embedding/" in row["reason"]
    assert {row["step"] for row in checkpoints.verified(str(copy), "24")} == {24}
    assert checkpoints.verified(str(copy), "16") == []


def test_a_step_that_the_run_removes_meanwhile_is_left_out(copy, monkeypatch):
    def examine(folder):
        shutil.rmtree(folder)
        return [stored.Damage("", [], "gone")]

    monkeypatch.setattr(stored, "examine", examine)
    assert checkpoints.listed(str(copy)) == []


def test_looking_writes_nothing(copy):
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    (copy / "checkpoints/32.orbax-checkpoint-tmp").mkdir()  # the run is at its next
    before |= {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    assert [row["step"] for row in checkpoints.listed(str(copy))] == [16, 24]
    assert checkpoints.verified(str(copy / "checkpoints")) == []
    compare(*(Side(epath.Path(copy / "checkpoints" / step)) for step in ("16", "24")))
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["look", "DIR"], "error: give list DIR, verify DIR, diff"),
        (["list"], "error: give list DIR"),
        (["list", "DIR", "DIR"], "error: list takes one DIR"),
        (["diff", "DIR"], "error: diff takes DIR STEP STEP, or DIR DIR"),
        (["export", "DIR"], "error: export needs --to=FILE.safetensors"),
        (["list", "/"], "error: / holds no checkpoints; name the folder of a run"),
        (["diff", "DIR", "16", "17"], r"holds no step 17; there are [16, 24]"),
        (["verify", "DIR", "--step=last"], "error: step='last' must be newest, best or a number"),
    ],
)
def test_bad_input_is_refused_in_words(copy, monkeypatch, capsys, arguments, words):
    given = [str(copy) if argument == "DIR" else argument for argument in arguments]
    options = {"step": "", "to": "", "fast": False, "top": 30, "json": ""}
    options |= {a[2:].split("=")[0]: a.split("=")[1] for a in given if a.startswith("--")}
    monkeypatch.setattr(checkpoints.flags, "FLAGS", type("Flags", (), options))
    positional = [a for a in given if not a.startswith("--")]
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        checkpoints.main(["checkpoints", *positional])
    assert words.removeprefix("error: ") in str(caught.value)


# --------------------------------------------------------------------------------------------- diff


def eight(values):
    """An array whose first axis but one lies on eight devices."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    return jax.device_put(values, NamedSharding(mesh, PartitionSpec(None, "x")))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two steps whose differences are known; eight devices saved the experts of the second."""
    folder = tmp_path_factory.mktemp("two")
    draw = np.random.default_rng(0)
    w = draw.normal(size=(2, 8, 4, 3)).astype(np.float32)
    swapped = w.copy()
    swapped[1, [2, 5]] = w[1, [5, 2]]
    basis = np.stack([np.eye(4, 2), np.eye(4, 2)]).astype(np.float32)
    turned = basis.copy()
    turned[1, :, 1] = [0, np.cos(0.1), np.sin(0.1), 0]

    def tree(w, basis, offset, extra):
        layer = {"experts": {"w_up": w}, "router": {"basis": jnp.array(basis)}}
        blocks = {"groups": {"0": {"moe": layer}, "1": {"scale": jnp.array([3.0, 4.0]) * offset}}}
        state = {"groups": {"0": {"moe": {"router": {"offset": jnp.full((2, 8), offset)}}}}}
        params = {"blocks": blocks, "zero": jnp.zeros(2), "head": jnp.ones(extra)}
        return {"params": params, "router": {"blocks": state}, "step": jnp.int32(offset)}

    with Checkpoints(folder, every=1) as saver:
        trees = tree(jnp.array(w), basis, 1.0, 2), tree(eight(swapped), turned, 2.0, 3)
        for step, arrays in enumerate(trees, start=1):
            # What is no configuration differs as well.
            meta = {"model": {"a": step}, MADE: {"rows": step}, META: {"rollbacks": step}}
            saver.save(step, arrays, data_state={}, meta=meta)
    return folder


@pytest.fixture(scope="module")
def difference(two):
    return compare(Side(epath.Path(two / "1")), Side(epath.Path(two / "2")))


def test_arrays_are_ordered_by_relative_norm(difference):
    *common, other = difference.params
    relative = {row["array"]: row["relative"] for row in common}
    assert list(relative.values()) == sorted(relative.values(), reverse=True)
    assert relative["params/zero"] == 0
    assert relative["params/blocks/groups/1/scale"] == 1.0  # twice itself
    assert other == {"array": "params/head", "shape": "[2] in A, [3] in B"}
    (row,) = difference.router
    assert (row["relative"], row["largest"], row["mean A"], row["mean B"]) == (1.0, 1.0, 1.0, 2.0)
    assert [row["array"] for row in difference.others] == ["step"]


def test_bases_are_compared_by_angle_not_by_their_columns(difference):
    same, turned = difference.bases
    # Two places in the period: repeat 1 of place 0 is block 2.
    assert (same["layer"], turned["layer"]) == ("layer_00", "layer_02")
    assert same["largest angle"] == pytest.approx(0, abs=1e-5)
    assert turned["largest angle"] == pytest.approx(np.degrees(0.1), rel=1e-5)
    assert turned["mean angle"] == pytest.approx(np.degrees(0.05), rel=1e-5)


def test_angles_are_right_at_both_ends():
    q = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))[0]
    angles = np.array([1e-9, 0.3, np.pi / 2])
    turned = q[:, :3] * np.cos(angles) + q[:, 3:] * np.sin(angles)
    mixed = turned @ np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
    np.testing.assert_allclose(principal_angles(q[:, :3], mixed), angles, rtol=1e-6, atol=1e-15)


def test_experts_that_changed_places_are_found(difference):
    still, swapped = difference.experts
    assert (still["layer"], still["moved"]) == ("layer_00", "none")
    assert still["same expert"] == pytest.approx(1)
    assert (swapped["layer"], swapped["moved"]) == ("layer_02", "2>5 5>2")
    assert swapped["change"] == pytest.approx(0, abs=1e-6)  # the same experts, so as alike
    assert moved(np.array([[0.1, 0.9], [0.8, 0.2]])) == "0>1 1>0"


def test_what_cannot_be_compared_is_refused(two, tmp_path):
    with Checkpoints(tmp_path / "a", every=1) as saver:
        saver.save(1, {"other": jnp.ones(2)}, data_state={}, meta={})
    with pytest.raises(ValueError, match="have no array of the same name and shape"):
        compare(Side(epath.Path(two / "1")), Side(epath.Path(tmp_path / "a/1")))
    shutil.copytree(two, tmp_path / "b")
    (tmp_path / "b/1/state/manifest.ocdbt").unlink()
    with pytest.raises(CheckpointError, match=r"is damaged: .*compare other steps: diff DIR"):
        compare(Side(epath.Path(tmp_path / "b/1")), Side(epath.Path(two / "2")))


def test_diff_prints_tables_and_the_configuration_that_changed(two, tmp_path):
    code, out, err = start("diff", two, 1, 2, f"--json={tmp_path / 'diff.json'}", "--top=1")
    assert code == 0, err
    told = [line for line in out.splitlines() if line.startswith("configuration:")]
    assert told == ["configuration: model.a: 1 -> 2"]
    assert "Experts, cosines of their weights (the first 1 of 2; --top for more)" in out
    rows = json.loads((tmp_path / "diff.json").read_text())["rows"]
    tables = [row["table"] for row in rows]
    counts = {"params": 5, "bases": 2, "experts": 2, "router": 1, "others": 1}
    assert {name: tables.count(name) for name in counts} == counts


# ------------------------------------------------------------------------------------------- export


def arrays_of(folder, prefix):
    record = stored.read_record(folder)
    names = [name for name in record["arrays"] if name.startswith(prefix)]
    arrays = stored.each_array(folder, record, names)
    return {name.removeprefix(prefix): np.asarray(array) for name, array in arrays}


def content(arrays):
    return {name: array.tobytes() for name, array in arrays.items()}


def test_a_language_model_is_exported_and_read_back_to_the_bit(copy, tmp_path):
    target = tmp_path / "model.safetensors"
    rows = checkpoints.export(str(copy), "best", target)
    config, params = weights.read_weights(target)
    assert config == freeze(json.loads((copy / "config.json").read_text())).model
    expected = arrays_of(epath.Path(copy / "checkpoints/24"), "params/")
    found = flatten(params, lambda *_: None)
    assert [row["tensor"] for row in rows] == list(expected)
    assert content(found) == content(expected)


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    """A Vision Transformer of a router that the released format has no place for."""
    config = freeze(vit_tree(moe={"router": "whitened", "basis": {"rank": 8}})).model
    folder = tmp_path_factory.mktemp("vision") / "ours"
    make = model_maker(config, 1)
    params, router = jax.jit(pure.initializer(make))()
    save_model(folder, pure.abstract_split(make)[0].bind(params, router))
    return folder, config


def test_a_vision_transformer_is_converted_back_to_the_bit(vision, tmp_path):
    folder, config = vision
    target = tmp_path / "out.safetensors"
    checkpoints.export(str(folder), "newest", target)
    rows = convert.to_ours(str(target), tmp_path / "again", {})
    again = load_model(tmp_path / "again")
    assert again.config == config
    _, expected, _ = pure.split(load_model(folder))
    _, found, _ = pure.split(again)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert len(rows) == len(jax.tree.leaves(expected))
    with pytest.raises(ValueError, match="leave out --set"):
        convert.to_ours(str(target), tmp_path / "third", {"num_heads": 2})


def test_a_run_starts_from_an_export(vision, tmp_path, one_device):
    folder, _ = vision
    (tmp_path / "out").mkdir()
    checkpoints.export(str(folder), "newest", tmp_path / "out/model.safetensors")
    moe = {"router": "whitened", "basis": {"rank": 8}}
    taken = {}
    for name, source in (("folder", folder), ("export", tmp_path / "out")):
        run = build(freeze(vit_tree(moe=moe, init_from=str(source))), tmp_path / name)
        taken[name], _ = initial_params(run)
    jax.tree.map(np.testing.assert_array_equal, taken["export"], taken["folder"])
    assert "experts" in taken["export"]["blocks"]["groups"]["0"]["moe"]


def test_exports_of_something_else_are_refused(vision, copy, tmp_path, one_device):
    target = tmp_path / "model.safetensors"
    checkpoints.export(str(copy), "newest", target)
    with pytest.raises(ValueError, match=r"is a language model; train.convert and init_from"):
        convert.to_ours(str(target), tmp_path / "ours", {})
    run = build(freeze(vit_tree(init_from=str(target))), tmp_path / "run")
    with pytest.raises(ValueError, match="is a language model; name one of images"):
        initial_params(run)
    with pytest.raises(ValueError, match=r"exists, and --to=.* needs another there"):
        checkpoints.export(str(vision[0]), "newest", tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"must end in .safetensors"):
        checkpoints.export(str(copy), "newest", tmp_path / "model.pth")
    config, params = weights.read_weights(target)
    flat = flatten(params, lambda *_: None)
    del flat["embedding"]
    weights.write_weights(target, "lm", dataclasses.asdict(config), flat)
    with pytest.raises(ValueError, match="missing or too many are embedding; export it again"):
        weights.read_weights(target)


def test_a_damaged_step_is_not_exported(copy, tmp_path):
    step = copy / "checkpoints/24"
    (step / stored.files_of(epath.Path(step), "params/embedding")[-1]).unlink()
    with pytest.raises(CheckpointError, match=r"is damaged .* nothing was written: export another"):
        checkpoints.export(str(copy), "24", tmp_path / "model.safetensors")
    assert not list(tmp_path.glob("*.safetensors"))
