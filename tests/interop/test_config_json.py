"""The config.json beside weights: others' are read, ours tells everything."""

import dataclasses
import json

import pytest

from emoe_jax import ViTConfig
from emoe_jax.config import BasisConfig, MoEConfig
from emoe_jax.interop import config_json
from emoe_jax.interop.vit import FACTS

PLAIN = ViTConfig(
    image_size=8,
    channels=3,
    width=12,
    depth=3,
    heads=2,
    mlp_hidden=31,
    class_token=True,
    registers=2,
    embed_prefix=False,
    norm_after_pooling=True,
    layer_scale=0.5,
    qk_norm=True,
    qkv_bias=False,
    moe_every=0,
)
BASE = ViTConfig(
    image_size=224,
    patch=16,
    channels=3,
    classes=7,
    width=768,
    depth=12,
    heads=12,
    mlp_hidden=3072,
    pooling="class",
    moe_every=0,
)
BRANCHES = {
    "moe_form": "adapter",
    "moe_blocks": (2,),
    "moe": MoEConfig(router="eigen", activation="gelu", basis=BasisConfig(4)),
}


def written(folder, tree):
    file = folder / "config.json"
    file.write_text(tree if isinstance(tree, str) else json.dumps(tree))
    return config_json.read(file)


# ---------------------------------------------------------------------------------- those of others


def test_the_releases_file_tells_experts_and_heads(tmp_path):
    moe = {"router_mode": "top1", "tau": 0.5}
    tree = {"vit_model_name": "vit_base_patch16_224", "num_classes": 3, "moe_config": moe}
    assert written(tmp_path, tree) == (moe, {"num_heads": 12})


def test_timms_file_tells_heads_pooling_and_arguments(tmp_path):
    args = {"init_values": 1e-5, "img_size": 98, "dynamic_img_size": True, "fc_norm": None}
    tree = {
        "architecture": "vit_small_patch14_dinov2.lvd142m",
        "num_classes": 0,
        "global_pool": "token",
        "model_args": args,
    }
    facts = {"num_heads": 6, "global_pool": "token", "init_values": 1e-5, "img_size": 98}
    assert written(tmp_path, tree) == ({}, facts)


@pytest.mark.parametrize(
    "tree",
    [
        {"architectures": ["ViTForImageClassification"], "num_attention_heads": 12},
        {"task": "vit", "model": {"heads": 4}, "moe": {}},
        {"model_args": {"num_heads": 3}},
        ["vit_base_patch16_224"],
    ],
)
def test_files_of_others_tell_nothing(tmp_path, tree):
    assert written(tmp_path, tree) == ({}, {})


def test_no_file_tells_nothing(tmp_path):
    assert config_json.read(tmp_path / "config.json") == ({}, {})


def test_damaged_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json is no JSON .*; mend it, or take it away"):
        written(tmp_path, '{"moe_config": ')
    with pytest.raises(ValueError, match=r"moe_config='top1' in config\.json is no object"):
        written(tmp_path, {"moe_config": "top1"})


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("vit_tiny_patch16_384", {"num_heads": 3}),
        ("deit_base_distilled_patch16_224.fb_in1k", {"num_heads": 12}),
        ("deit3_huge_patch14_224", {"num_heads": 16}),
        ("vit_huge_patch14_224_in21k", {"num_heads": 16}),
        ("vit_large_patch14_reg4_dinov2", {"num_heads": 16}),
        # Sizes in whose names the heads are others: 16, 14, 8.
        ("vit_base_patch16_gap_224", {}),
        ("vit_base_patch16_plus_240", {}),
        ("aimv2_large_patch14_224", {}),
        # What the weights do not give away.
        ("vit_base_patch16_rpn_224.sw_in1k", {"block_fn": "ResPostBlock"}),
        ("vit_so400m_patch16_siglip_gap_256.v2_webli", {"act_layer": "gelu_tanh"}),
        ("vit_large_patch16_siglip_gap_512", {"act_layer": "gelu_tanh"}),
        ("vit_large_patch16_siglip_gap_384", {}),
    ],
)
def test_what_names_tell(name, facts):
    assert config_json.told_by_name(name) == facts


# --------------------------------------------------------------------------------------------- ours


def test_a_plain_model_is_told_whole_in_timms_form(tmp_path):
    tree = config_json.describe(PLAIN)
    assert tree["architecture"] == "vit_base_patch16_224"  # the class; the sizes are in model_args
    assert tree["pretrained_cfg"]["input_size"] == [3, 8, 8]
    moe, facts = written(tmp_path, tree)
    assert moe == {}
    assert facts == {
        "img_size": 8,
        "patch_size": 4,
        "in_chans": 3,
        "num_classes": 10,
        "embed_dim": 12,
        "depth": 3,
        "num_heads": 2,
        "mlp_ratio": 31 / 12,
        "qkv_bias": False,
        "qk_norm": True,
        "init_values": 0.5,
        "class_token": True,
        "no_embed_class": True,
        "reg_tokens": 2,
        "global_pool": "avg",
        "fc_norm": True,
    }
    assert facts.keys() <= set(FACTS)


@pytest.mark.parametrize("width", [12, 49])
def test_the_hidden_width_survives_timms_rounding_down(width):
    for hidden in range(1, 5 * width):
        changed = dataclasses.replace(PLAIN, width=width, heads=1, mlp_hidden=hidden)
        assert int(width * config_json.model_args(changed)["mlp_ratio"]) == hidden


def test_a_model_with_branches_is_told_whole_in_the_releases_form(tmp_path):
    config = dataclasses.replace(BASE, heads=6, **BRANCHES)
    tree = config_json.describe(config)
    # timm has no such model of 6 heads.
    assert "vit_model_name" not in tree
    moe, facts = written(tmp_path, tree)
    assert (moe["blocks"], moe["router_mode"], moe["experts"]) == ("2", "top1", 8)
    assert facts == {k: v for k, v in config_json.model_args(config).items() if v is not None}
    # The arguments of the release's class for the Hub, and ours.
    named = config_json.describe(dataclasses.replace(BASE, **BRANCHES))
    assert named.keys() - {"model_args"} == {
        "vit_model_name",
        "num_classes",
        "backbone_pretrained",
        "moe_config",
    }


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "vit_base_patch16_224"),
        ({"image_size": 384, "patch": 32}, "vit_base_patch32_384"),
        ({"distilled": True}, "deit_base_distilled_patch16_224"),
        ({"width": 192, "heads": 3, "mlp_hidden": 768}, "vit_tiny_patch16_224"),
        ({"heads": 16}, ""),
        ({"mlp_hidden": 3000}, ""),
        ({"channels": 1}, ""),
        ({"layer_scale": 1.0}, ""),
        ({"pooling": "mean", "class_token": True}, ""),
    ],
)
def test_names_are_given_to_just_that_model(changes, name):
    config = dataclasses.replace(BASE, **changes)
    assert config_json.timm_name(config) == name
    assert config_json.describe(config)["architecture"] == (name or "vit_base_patch16_224")
    assert config_json.told_by_name(name).get("num_heads", config.heads) == config.heads


def test_what_the_release_cannot_compute_is_not_described():
    with pytest.raises(ValueError, match="the release has no moe_form='mlp'"):
        config_json.describe(dataclasses.replace(BASE, moe_every=2))
