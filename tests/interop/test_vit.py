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
        ("blocks.0.in_proj.weight", "parallel blocks"),
        ("blocks.0.attn.gate.weight", "gated attention"),
        ("blocks.0.attn.lambda_q1", "differential attention"),
        ("blocks.0.attn.q_bias", "biases of queries and values alone"),
        ("blocks.0.gamma_1", "BEiT"),
        ("patch_embed.norm.weight", "embed_norm_layer"),
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
        ("blocks.0.norm1.bias", "RMSNorm"),
        ("blocks.0.mlp.fc2.weight", "no MLP of two matrices"),
        ("blocks.0.attn.proj.bias", "proj_bias=False"),
        ("norm.weight", "final_norm=False"),
    ],
)
def test_missing_parts_are_refused_by_name(plain, removed, message):
    state = {key: value for key, value in plain.items() if key != removed}
    with pytest.raises(ValueError, match=message):
        interop.load_vit(state, {"num_heads": 2})


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        # timm's SwiGLUPacked, as in DINOv2's giant: fc1 gives both halves of what fc2 takes.
        ("blocks.0.mlp.fc2.weight", (16, 16), r"gated MLP .* gives 32 features and .* takes 16"),
        ("pos_embed", (1, 2, 2, 16), r"pos_embed has shape \(1, 2, 2, 16\), not 3 axes"),
        ("patch_embed.proj.weight", (16, 48), r"shape \(16, 48\), not 4 axes"),
        ("patch_embed.proj.weight", (16, 3, 4, 2), "patches of 4 by 2 pixels are not square"),
        ("pos_embed", (1, 7, 16), "7 positions less 1 for other tokens are no square"),
    ],
)
def test_other_shapes_are_refused_by_name(plain, name, shape, message):
    with pytest.raises(ValueError, match=message):
        interop.load_vit(plain | {name: np.zeros(shape, np.float32)}, {"num_heads": 2})


def test_integers_are_no_weights(plain):
    packed = plain | {"norm.weight": np.ones(16, np.int8)}
    with pytest.raises(ValueError, match=r"dtype: vit\.norm\.weight is int8, expected a floating"):
        interop.load_vit(packed, {"num_heads": 2})


def test_features_of_two_tokens_are_not_computed():
    state = {key: value for key, value in read("distilled")[1].items() if "head" not in key}
    with pytest.raises(ValueError, match=r"a distillation token and no head: .* of two tokens"):
        interop.load_vit(state, {"num_heads": 2})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "give num_heads in the configuration"),
        ({"num_heads": 2, "heads": 2}, "unknown key 'heads'; did you mean 'num_heads'"),
        ({"num_heads": [2]}, r"num_heads=\[2\] is no int"),
        ({"num_heads": 2, "global_pool": ["avg"]}, r"global_pool=\['avg'\] is no str"),
        ({"num_heads": 2, "mlp_ratio": "4"}, "mlp_ratio='4' is no float"),
        ({"num_heads": 2, "mlp_ratio": float("inf")}, "mlp_ratio=inf is no float"),
        ({"num_heads": 2, "img_size": [[8]]}, r"img_size=\[\[8\]\] is no square of whole pixels"),
        ({"num_heads": 2, "img_size": 2**31}, "img_size=2147483648 is no square of whole pixels"),
        ({"num_heads": 2, "global_pool": "map"}, "global_pool='map' is not supported"),
        ({"num_heads": 2, "img_size": 9}, "patch=4 does not divide image_size=9"),
        ({"num_heads": 2, "act_layer": "gelu_tanh"}, "act_layer='gelu_tanh' is not supported"),
        ({"num_heads": 2, "img_size": (8, 12)}, r"img_size=\(8, 12\) is no square"),
        ({"num_heads": 2, "num_classes": 4}, "num_classes=4, but the checkpoint has 3"),
        ({"num_heads": 2, "patch_size": [8, 8]}, r"patch_size=\[8, 8\] \(8\), but the checkpo"),
        ({"num_heads": 2, "mlp_ratio": 4.0}, r"mlp_ratio=4.0 \(64\), but the checkpoint has 32"),
        ({"num_heads": 2, "init_values": 0.1}, r"init_values=0.1 \(True\), but .* has False"),
        ({"num_heads": 2, "fc_norm": True}, "fc_norm=True, but the checkpoint has False"),
        ({"num_heads": 2, "global_pool": "avgmax"}, "global_pool='avgmax' is not supported"),
        ({"num_heads": 2, "global_pool": ""}, "global_pool='' is not supported"),
        ({"num_heads": 2, "block_fn": "ResPostBlock"}, "EMoEViT computes block_fn='Block' alone"),
        ({"num_heads": 2, "pool_include_prefix": True}, "pool_include_prefix=True is not supp"),
        ({"num_heads": 2, "pre_norm": True}, "pre_norm=True is not supported"),
    ],
)
def test_facts_are_checked(plain, config, message):
    with pytest.raises(ValueError, match=message):
        interop.load_vit(plain, config)


def test_facts_that_say_the_same_as_the_weights_change_nothing(plain):
    same = {"mlp_ratio": 2.0, "init_values": None, "fc_norm": False, "patch_size": (4, 4)}
    same |= {"act_layer": "gelu", "pre_norm": False, "pos_embed": "learn", "norm_layer": None}
    told = interop.load_vit(plain, {"num_heads": 2} | same)
    assert told.config == interop.load_vit(plain, {"num_heads": 2}).config


def test_timms_configuration_beside_the_file_is_read(plain, tmp_path):
    interop.write_safetensors(tmp_path / "model.safetensors", plain)
    with pytest.raises(ValueError, match=r"there is no .*config\.json; give"):
        interop.load(tmp_path)
    tree = {"architecture": "vit_large_patch4_8", "model_args": {"depth": 2, "drop_rate": 0.1}}
    (tmp_path / "config.json").write_text(json.dumps(tree))
    assert interop.load(tmp_path).config.heads == 16
    # What is given goes before what is written there.
    assert interop.load_vit(tmp_path, {"num_heads": 2}).config.heads == 2
    for args, words in (
        ({"depth": 3}, "depth=3, but the checkpoint has 2"),
        ({"act_layer": "quick_gelu"}, "act_layer='quick_gelu' is not supported"),
        ({"num_reg": 4}, "unknown key 'num_reg'"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(tree | {"model_args": args}))
        with pytest.raises(ValueError, match=words):
            interop.load(tmp_path)


def test_weights_cannot_tell_a_norm_behind_the_block_but_their_name_does(tmp_path):
    state = read("mean_fc_norm")[1]
    interop.write_safetensors(tmp_path / "model.safetensors", state)
    tree = {"architecture": "vit_base_patch16_rpn_224", "model_args": {"num_heads": 2}}
    (tmp_path / "config.json").write_text(json.dumps(tree))
    with pytest.raises(ValueError, match="block_fn='ResPostBlock' is not supported"):
        interop.load(tmp_path)


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
