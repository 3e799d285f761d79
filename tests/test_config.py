"""Configurations: defaults hold together, bad values are refused with the words that help."""

import dataclasses
import re

import pytest

from emoe_jax.config import (
    BasisConfig,
    LMConfig,
    MoEConfig,
    RouterConfig,
    ViTConfig,
    moe_layers,
    require_choice,
    require_positive,
)


@pytest.mark.parametrize("make", [BasisConfig, RouterConfig, MoEConfig, LMConfig, ViTConfig])
def test_defaults_are_valid_and_frozen(make):
    config = make()
    name = dataclasses.fields(config)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, name, 1)


@pytest.mark.parametrize(
    ("make", "values", "words"),
    [
        (BasisConfig, {"rank": -1}, "basis.rank=-1 must not be negative"),
        (BasisConfig, {"method": "svd"}, "basis.method='svd' is not known; choose one of qr, "),
        (RouterConfig, {"temperature": 0.0}, "temperature=0.0 must be above zero"),
        (RouterConfig, {"temperature": float("nan")}, "temperature=nan must be above zero"),
        (RouterConfig, {"score": "tanh"}, "routing.score='tanh' is not known; choose one of soft"),
        (RouterConfig, {"balance_weight": -1.0}, "routing.balance_weight=-1.0 must not be neg"),
        (RouterConfig, {"z_weight": -1.0}, "routing.z_weight=-1.0"),
        (RouterConfig, {"bias_rate": -0.1}, "routing.bias_rate=-0.1"),
        (RouterConfig, {"orthogonality_weight": -1.0}, "routing.orthogonality_weight=-1.0"),
        (MoEConfig, {"experts": 0}, "experts=0 must be above zero"),
        (MoEConfig, {"top_k": 0}, "top_k=0 must be above zero"),
        (MoEConfig, {"hidden": -3}, "hidden=-3 must be above zero"),
        (MoEConfig, {"capacity_factor": 0.0}, "capacity_factor=0.0 must be above zero"),
        (
            MoEConfig,
            {"experts": 4, "top_k": 5},
            "top_k=5 is more than experts=4: a token can go to at most all experts; set top_k to 4"
            " or less, or experts to 5 or more",
        ),
        (MoEConfig, {"dispatch": "sparse"}, "dispatch='sparse' is not known; choose one of dense"),
        (MoEConfig, {"activation": "relu"}, "activation='relu' is not known; choose one of swiglu"),
        (MoEConfig, {"shared_hidden": -1}, "shared_hidden=-1 is below zero"),
        (LMConfig, {"vocab_size": 0}, "vocab_size=0 must be above zero"),
        (LMConfig, {"loss_chunk": 0}, "loss_chunk=0 must be above zero"),
        (LMConfig, {"mlp_hidden": 0}, "mlp_hidden=0 must be above zero"),
        (LMConfig, {"rope_base": 0.0}, "rope_base=0.0 must be above zero"),
        (LMConfig, {"heads": 0}, "heads=0 must be above zero"),
        (LMConfig, {"width": 30, "heads": 4}, "heads=4 does not divide width=30; choose a divisor"),
        (LMConfig, {"head_dim": 7}, "head_dim=7 is odd; rotary positions need an even head_dim"),
        (LMConfig, {"head_dim": -2}, "head_dim=-2 is below zero"),
        (LMConfig, {"heads": 4, "kv_heads": 3}, "kv_heads=3 does not divide heads=4; choose a div"),
        (LMConfig, {"heads": 4, "kv_heads": -2}, "kv_heads=-2 does not divide heads=4"),
        (LMConfig, {"attention": "flash"}, "attention='flash' is not known; choose one of auto"),
        (LMConfig, {"remat": "half"}, "remat='half' is not known; choose one of none, full, dots"),
        (LMConfig, {"dtype": "float16"}, "dtype='float16' is not known; choose one of float32"),
        (LMConfig, {"moe_every": -1}, "moe_every=-1 is below zero; 0 means no block has experts"),
        (LMConfig, {"depth": 4, "moe_every": 3}, "moe_every=3 does not divide depth=4; choose a d"),
        (
            LMConfig,
            {"depth": 4, "moe_blocks": (1, 4)},
            "moe_blocks names block [4], but depth=4 has blocks 0 to 3",
        ),
        (
            LMConfig,
            {"width": 64, "moe": MoEConfig(router="eigen", basis=BasisConfig(rank=65))},
            "basis.rank=65 is more than width=64: D dimensions hold at most D orthonormal"
            " directions; set basis.rank to 64 or less",
        ),
        (ViTConfig, {"image_size": 0}, "image_size=0 must be above zero"),
        (ViTConfig, {"classes": -1}, "classes=-1 is below zero; 0 means no head"),
        (ViTConfig, {"patch": 5}, "patch=5 does not divide image_size=28; choose a divisor"),
        (ViTConfig, {"pooling": "max"}, "pooling='max' is not known; choose one of class, mean"),
        (ViTConfig, {"moe_form": "x"}, "moe_form='x' is not known; choose one of mlp, adapter"),
        (ViTConfig, {"attention": "x"}, "attention='x' is not known"),
        (ViTConfig, {"head_dim": -1}, "head_dim=-1 is below zero"),
    ],
)
def test_bad_values_are_refused_with_value_limit_and_remedy(make, values, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        make(**values)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"depth": 4, "moe_every": 1}, (True, True, True, True)),
        ({"depth": 4, "moe_every": 2}, (False, True, False, True)),
        ({"depth": 4, "moe_every": 4}, (False, False, False, True)),
        ({"depth": 3, "moe_every": 0}, (False, False, False)),
        ({"depth": 4, "moe_every": 1, "moe_blocks": (0, 3)}, (True, False, False, True)),
        # A list makes a period that does not divide the depth harmless.
        ({"depth": 5, "moe_every": 2, "moe_blocks": (1,)}, (False, True, False, False, False)),
    ],
)
def test_moe_layers(values, expected):
    assert moe_layers(LMConfig(**values)) == expected
    assert moe_layers(ViTConfig(**values)) == expected


def test_a_rank_that_no_router_reads_is_not_checked():
    moe = MoEConfig(router="softmax", basis=BasisConfig(rank=1000))
    assert LMConfig(width=64, moe=moe).moe.basis.rank == 1000


def test_given_names_what_is_set_even_where_it_is_false_or_zero():
    config = RouterConfig(renormalize=False, z_weight=0.0)
    assert config.given() == {"renormalize": False, "z_weight": 0.0}
    assert RouterConfig().given() == {}


def test_require_functions_name_the_first_offender():
    with pytest.raises(ValueError, match=r"^b=0 must be above zero$"):
        require_positive(a=1, b=0, c=-1)
    with pytest.raises(ValueError, match=r"^x='q' is not known; choose one of a, b$"):
        require_choice("x", "q", ("a", "b"))
