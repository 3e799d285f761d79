"""Timm's Vision Transformers, every supported variant; other variants refused by name."""

import json
import pathlib

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open

from emoe_jax import interop
from emoe_jax.interop import vit

FOLDER = pathlib.Path(__file__).parents[1] / "data" / "timm"
CASES = sorted(path.stem for path in FOLDER.glob("*.safetensors"))


def read(name):
    with safe_open(FOLDER / f"{name}.safetensors", "np") as file:
        arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["config"])
    state = {k.removeprefix("state."): v for k, v in arrays.items() if k.startswith("state.")}
    return arrays, state, config


def test_the_variants_are_all_there():
    assert len(CASES) == 12


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_timm_and_the_way_back_is_bit_equal(name):
    arrays, state, config = read(name)
    model = interop.load_vit(state, config)
    graph, variables = nnx.split(model)
    logits, aux = jax.jit(lambda v, x: nnx.merge(graph, v)(x))(variables, arrays["images"])
    scale = np.max(np.abs(arrays["logits"]))
    np.testing.assert_allclose(logits, arrays["logits"], rtol=0, atol=1e-5 * scale)
    assert aux == {}
    out = interop.export_vit(model)
    assert set(out) == set(state)
    resized = {"pos_embed"} if "img_size" in config else set()
    for key in set(state) - resized:
        assert out[key].shape == state[key].shape
        assert out[key].tobytes() == state[key].tobytes()


@pytest.fixture(scope="module")
def plain():
    return read("class_token")[1]


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ("norm_pre.weight", "pre_norm"),
        ("attn_pool.q.weight", "attention pooling"),
        ("patch_embed.backbone.conv.weight", "hybrid"),
        ("blocks.1.mlp.fc1_g.weight", "SwiGLU"),
        ("blocks.0.mlp.norm.weight", "scale_mlp_norm"),
        ("blocks.0.attn.norm.weight", "scale_attn_norm"),
        ("blocks.0.attn.relative_position_bias_table", "relative positions"),
        ("blocks.0.attns.0.qkv.weight", "parallel blocks"),
    ],
)
def test_other_variants_are_refused_by_name(plain, added, message):
    with pytest.raises(ValueError, match=message):
        interop.load_vit(plain | {added: np.zeros(1, np.float32)}, {"num_heads": 2})


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ("pos_embed", "no learned positions"),
        ("patch_embed.proj.bias", "no bias in the patch embedding"),
        ("blocks.0.norm1.weight", "post-norm"),
        ("blocks.0.attn.proj.bias", "proj_bias=False"),
        ("norm.weight", "final_norm=False"),
    ],
)
def test_missing_parts_are_refused_by_name(plain, removed, message):
    state = {key: value for key, value in plain.items() if key != removed}
    with pytest.raises(ValueError, match=message):
        interop.load_vit(state, {"num_heads": 2})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "give num_heads in the configuration"),
        ({"num_heads": 2, "heads": 2}, "unknown key 'heads'; did you mean 'num_heads'"),
        ({"num_heads": 2, "global_pool": "map"}, "global_pool='map' is not supported"),
        ({"num_heads": 2, "img_size": 9}, "patch=4 does not divide image_size=9"),
        ({"num_heads": 2, "act_layer": "gelu_tanh"}, "act_layer='gelu_tanh' is not supported"),
        ({"num_heads": 2, "img_size": (8, 12)}, r"img_size=\(8, 12\) is no square"),
        ({"num_heads": 2, "num_classes": 4}, "num_classes=4, but the checkpoint has 3"),
    ],
)
def test_facts_are_checked(plain, config, message):
    with pytest.raises(ValueError, match=message):
        interop.load_vit(plain, config)


def test_image_sizes_may_be_pairs(plain):
    assert interop.load_vit(plain, {"num_heads": 2, "img_size": (8, 8)}).config.image_size == 8


def test_heads_are_read_off_query_norms():
    _, state, _ = read("qk_norm")
    assert interop.load_vit(state, {}).config.heads == 2
    with pytest.raises(ValueError, match="num_heads=4, but the norms of queries tell 2"):
        interop.load_vit(state, {"num_heads": 4})


def test_resized_positions_keep_constants_and_the_prefix():
    positions = np.ones((1, 1 + 4, 3), np.float32)
    positions[0, 0] = 7.0
    resized = vit.resize_positions(positions, 1, 5)
    assert resized.shape == (1, 26, 3)
    np.testing.assert_array_equal(resized[0, 0], [7.0, 7.0, 7.0])
    np.testing.assert_allclose(resized[0, 1:], 1.0, atol=1e-6)
