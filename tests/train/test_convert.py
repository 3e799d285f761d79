"""Weights between PyTorch's files and folders of ours; nothing is written where anything is off."""

import json
import pathlib

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open

from emoe_jax import interop
from train import convert
from train.run import load_model, save_model

DATA = pathlib.Path(__file__).parents[1] / "data"


def states(path, prefix="state."):
    with safe_open(path, "np") as file:
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
        arrays = {name.removeprefix(prefix): file.get_tensor(name) for name in names}
        return arrays, file.metadata()


@pytest.fixture
def released(tmp_path):
    """A released checkpoint as a file, and its configuration."""
    state, facts = states(DATA / "parity" / "tiny_top1.safetensors")
    interop.write_safetensors(tmp_path / "released.safetensors", state)
    return state, json.loads(facts["cfg"]) | {"num_heads": 4}


def test_there_and_back_is_bit_equal(released, tmp_path):
    state, config = released
    rows = convert.to_ours(str(tmp_path / "released.safetensors"), tmp_path / "ours", config)
    assert {row["tensor"] for row in rows} == set(state)
    assert {"tensor": "vit.cls_token", "shape": "(1, 1, 32)", "array": "class_token"} in rows
    (qkv,) = (row for row in rows if row["tensor"] == "vit.blocks.2.attn.qkv.bias")
    assert qkv["array"].startswith("blocks/groups/2/attention/query/bias[0], ")
    back = convert.to_torch(tmp_path / "ours", tmp_path / "back.safetensors")
    assert back == rows
    again = interop.read_state(tmp_path / "back.safetensors")
    assert {k: v.tobytes() for k, v in again.items()} == {k: v.tobytes() for k, v in state.items()}


def test_a_plain_vision_transformer_keeps_timms_names(tmp_path):
    state, _ = states(DATA / "timm" / "registers.safetensors")
    interop.write_safetensors(tmp_path / "timm.safetensors", state)
    convert.to_ours(str(tmp_path / "timm.safetensors"), tmp_path / "ours", {"num_heads": 2})
    convert.to_torch(tmp_path / "ours", tmp_path / "back.safetensors")
    again = interop.read_state(tmp_path / "back.safetensors")
    assert set(again) == set(state)
    model = interop.load_vit(state, {"num_heads": 2})
    restored = load_model(tmp_path / "ours")
    assert restored.config == model.config
    same = jax.tree.map(np.array_equal, nnx.state(restored), nnx.state(model))
    assert all(jax.tree.leaves(same))


def test_the_way_back_of_an_export_needs_nothing_told(released, tmp_path):
    state, config = released
    told = config | {"tau": 0.25, "apply_to_patches_only": False}
    convert.to_ours(str(tmp_path / "released.safetensors"), tmp_path / "ours", told)
    (tmp_path / "out").mkdir()
    convert.to_torch(tmp_path / "ours", tmp_path / "out" / "model.safetensors")
    convert.to_ours(str(tmp_path / "out"), tmp_path / "again", {})
    first, second = (load_model(tmp_path / name).config for name in ("ours", "again"))
    assert second == first
    assert (first.moe.routing.temperature, first.moe.top_k, first.route_class) == (0.25, 1, True)
    # Written again beside itself, it stays as it is.
    written = (tmp_path / "out" / "config.json").read_bytes()
    convert.to_torch(tmp_path / "again", tmp_path / "out" / "step2.safetensors")
    assert (tmp_path / "out" / "config.json").read_bytes() == written
    again = interop.read_state(tmp_path / "out" / "step2.safetensors")
    assert {k: v.tobytes() for k, v in again.items()} == {k: v.tobytes() for k, v in state.items()}


@pytest.mark.parametrize("name", sorted(file.stem for file in (DATA / "timm").iterdir()))
def test_the_way_back_of_a_plain_export_needs_nothing_told(name, tmp_path):
    state, facts = states(DATA / "timm" / f"{name}.safetensors")
    save_model(tmp_path / "ours", interop.load_vit(state, json.loads(facts["config"])))
    convert.to_torch(tmp_path / "ours", tmp_path / "out.safetensors")
    convert.to_ours(str(tmp_path / "out.safetensors"), tmp_path / "again", {})
    first, second = (load_model(tmp_path / folder) for folder in ("ours", "again"))
    assert second.config == first.config
    same = jax.tree.map(np.array_equal, nnx.state(second), nnx.state(first))
    assert all(jax.tree.leaves(same))


def test_a_configuration_beside_the_weights_is_read(released, tmp_path):
    state, config = released
    folder = tmp_path / "hub"
    folder.mkdir()
    interop.write_safetensors(folder / "model.safetensors", state)
    moe = {key: value for key, value in config.items() if key != "num_heads"}
    tree = {"vit_model_name": "vit_large_patch4_16", "moe_config": moe}
    (folder / "config.json").write_text(json.dumps(tree))
    convert.to_ours(str(folder), tmp_path / "ours", {})
    assert load_model(tmp_path / "ours").config.heads == 16


def test_nothing_is_written_for_weights_that_do_not_fit(released, tmp_path):
    _, config = released
    with pytest.raises(ValueError, match=r"unexpected: branches\.2"):
        convert.to_ours(
            str(tmp_path / "released.safetensors"), tmp_path / "ours", config | {"blocks": "0,1"}
        )
    assert not (tmp_path / "ours").exists()


def test_nothing_is_overwritten(released, tmp_path):
    _, config = released
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not empty; nothing is overwritten"):
        convert.to_ours(str(tmp_path / "released.safetensors"), tmp_path / "ours", config)
    assert (tmp_path / "ours" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("there", ['{"task": "vit"}', "no JSON"])
def test_a_configuration_of_something_else_is_not_overwritten(released, tmp_path, there):
    _, config = released
    convert.to_ours(str(tmp_path / "released.safetensors"), tmp_path / "ours", config)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text(there)
    target = tmp_path / "out" / "model.safetensors"
    with pytest.raises(
        ValueError, match=r"config\.json exists .* nothing was written: name a file"
    ):
        convert.to_torch(tmp_path / "ours", target)
    assert not target.exists()
    assert (tmp_path / "out" / "config.json").read_text() == there


def test_nothing_is_written_where_there_is_no_folder(released, tmp_path):
    _, config = released
    convert.to_ours(str(tmp_path / "released.safetensors"), tmp_path / "ours", config)
    with pytest.raises(FileNotFoundError, match="make the folder"):
        convert.to_torch(tmp_path / "ours", tmp_path / "out" / "model.safetensors")
    assert not (tmp_path / "out").exists()


def test_another_suffix_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(ValueError, match=r"must end in .safetensors"):
        convert.to_torch(tmp_path, tmp_path / "out.pth")


def test_runs_of_language_models_have_no_counterpart(finished, tmp_path):
    with pytest.raises(ValueError, match="is a run of task='lm'; name one of task='vit'"):
        convert.to_torch(finished.workdir, tmp_path / "out.safetensors")
