"""FLOPs by formula, on models small enough to count on paper."""

import math

import jax.numpy as jnp
import pytest

from emoe_jax import pure
from emoe_jax.config import BasisConfig, LMConfig, MoEConfig, ViTConfig
from train.flops import active_parameters, flops_per_token, flops_per_unit, peak_flops
from train.run import model_maker

D, F, E, K = 8, 4, 6, 2


def params_of(config):
    return pure.abstract_split(model_maker(config, 0))[1]


def lm(**changes):
    moe = MoEConfig(**({"router": "softmax", "experts": E, "top_k": K, "hidden": F} | changes))
    return LMConfig(vocab_size=10, width=D, depth=2, heads=2, kv_heads=1, mlp_hidden=5, moe=moe)


def test_active_parameters_of_a_language_model():
    attention = D * D + 2 * D * (D // 2) + D * D  # query, key and value of half the heads, out
    experts = K * 3 * D * F  # SwiGLU: three matrices, K of E
    router = D * E
    head = 10 * D
    assert active_parameters(lm(), params_of(lm())) == 2 * (attention + experts + router) + head


def test_an_untied_head_and_its_embedding_count_once():
    tied = lm()
    untied = LMConfig(
        vocab_size=10, width=D, depth=2, heads=2, kv_heads=1, tie_head=False, moe=tied.moe
    )
    assert active_parameters(untied, params_of(untied)) == active_parameters(tied, params_of(tied))


def test_an_eigenbasis_router_counts_its_basis_and_masks():
    R = 3
    plain, eigen = lm(), lm(router="eigen", basis=BasisConfig(rank=R))
    difference = active_parameters(eigen, params_of(eigen)) - active_parameters(
        plain, params_of(plain)
    )
    assert difference == 2 * (D * R + E * R - D * E)


def test_a_dense_block_counts_its_whole_mlp():
    config = LMConfig(vocab_size=10, width=D, depth=2, heads=2, mlp_hidden=5, moe_every=0)
    assert active_parameters(config, params_of(config)) == 2 * (4 * D * D + 3 * D * 5) + 10 * D


def test_attention_adds_twelve_times_layers_width_and_length():
    config, S = lm(), 16
    params = params_of(config)
    expected = 6 * active_parameters(config, params) + 12 * 2 * D * S
    assert flops_per_token(config, params, S) == expected
    assert flops_per_unit(config, params, S) == expected
    wide = LMConfig(vocab_size=10, width=D, depth=2, heads=2, head_dim=6, moe=config.moe)
    parts = flops_per_token(wide, params_of(wide), S) - flops_per_token(wide, params_of(wide), 0)
    assert parts == 12 * 2 * 2 * 6 * S


def test_an_image_passes_its_head_once():
    moe = MoEConfig(router="softmax", experts=E, top_k=1, hidden=F, activation="gelu")
    config = ViTConfig(
        image_size=4, patch=2, classes=7, width=D, depth=1, heads=2, mlp_hidden=5, moe=moe
    )
    S = 4
    block = 4 * D * D + D * E + 2 * D * F
    patches = 2 * 2 * 1 * D
    params = params_of(config)
    assert active_parameters(config, params) == patches + block
    attention = 12 * D * S
    assert flops_per_unit(config, params, S) == S * (6 * (patches + block) + attention) + 6 * 7 * D


def test_concrete_arrays_count_as_abstract_ones():
    config = lm()
    abstract = params_of(config)
    arrays = {"kernel": jnp.zeros((3, 4)), "scale": jnp.zeros((5,))}
    assert active_parameters(config, arrays) == 3 * 4 + 10 * D
    assert math.isfinite(flops_per_token(config, abstract, 1024))


def test_more_experts_cost_only_their_router():
    few, many = lm(experts=4), lm(experts=64)
    gap = active_parameters(many, params_of(many)) - active_parameters(few, params_of(few))
    assert gap == pytest.approx(2 * D * 60)


@pytest.mark.parametrize(
    ("kind", "flops"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU7x", 1153.5e12),  # half a chip of 2307
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA H100 PCIe", None),
        ("cpu", None),
    ],
)
def test_peaks(kind: str, flops: float | None) -> None:
    assert peak_flops(kind) == flops
