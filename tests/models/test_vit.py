"""The Vision Transformer: both forms and poolings, padded images, refusals."""

from functools import cache

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from emoe_jax import BasisConfig, EMoEViT, MoEConfig, ViTConfig, pure

B, SIZE = 3, 4


def draw(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def make_config(**values):
    moe = MoEConfig(
        router="eigen",
        experts=3,
        hidden=4,
        dispatch="dense",
        activation="gelu",
        basis=BasisConfig(rank=4),
    )
    sizes = {"image_size": SIZE, "patch": 2, "channels": 2, "classes": 5, "width": 8, "depth": 2}
    return ViTConfig(**(sizes | {"heads": 2, "mlp_hidden": 6, "moe": moe} | values))


@cache
def run(config):
    """A jitted function of (params, images, mask): logits, aux, gradients; and the parameters."""
    split, params, router = pure.split(EMoEViT(config, rngs=nnx.Rngs(0)))

    def loss(params, images, mask):
        logits, aux = split.bind(params, router)(images, mask=mask)
        real = jnp.where(mask[:, None], logits, 0.0)
        return jnp.sum(real * draw((B, config.classes), 1)), (logits, aux)

    return jax.jit(jax.value_and_grad(loss, has_aux=True)), params


ALL = jnp.ones((B,), bool)
# Behind an adapter a second block mixes the patches into the class token.
DEPTH = {"adapter": {"depth": 2, "moe_blocks": (0,)}, "mlp": {"depth": 1}}


@pytest.mark.parametrize(("pooling", "form"), [("class", "adapter"), ("mean", "mlp")])
def test_shapes_parameters_and_gradients(pooling, form):
    step, params = run(make_config(pooling=pooling, moe_form=form, **DEPTH[form]))
    (_, (logits, aux)), gradients = step(params, draw((B, SIZE, SIZE, 2)), ALL)
    chex.assert_shape(logits, (B, 5))
    assert list(aux) == ["0"]
    # Four patches an image; the class token is never routed by the adapter.
    assert float(aux["0"].stats["tokens"][0]) == B * 4
    has_class = pooling == "class"
    assert ("class_token" in params) == has_class
    chex.assert_shape(params["position"], (4 + has_class, 8))
    block = params["blocks"]["groups"]["0"]
    assert ("alpha" in block) == ("mlp" in block) == (form == "adapter")
    # A shift of all keys moves no softmax: key biases get no gradient but rounding.
    named = jax.tree_util.tree_leaves_with_path(gradients)
    for path, leaf in named:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert np.any(leaf) or name.endswith("key/bias"), name


def test_images_that_pad_the_batch_change_nothing_and_are_counted_nowhere():
    step, params = run(make_config(pooling="mean", moe_form="mlp", **DEPTH["mlp"]))
    images, mask = draw((B, SIZE, SIZE, 2)), ALL.at[1].set(False)
    (_, (logits, aux)), gradients = step(params, images, mask)
    (_, (other, other_aux)), other_gradients = step(params, images.at[1].set(9.0), mask)
    chex.assert_trees_all_equal((aux, gradients), (other_aux, other_gradients))
    chex.assert_trees_all_equal(logits[jnp.array([0, 2])], other[jnp.array([0, 2])])
    assert float(aux["0"].stats["tokens"][0]) == 2 * 4


def test_an_adapter_after_the_last_block_cannot_change_class_logits():
    # ROUTING.md: the class token passes by the branch, and nothing mixes it in afterwards.
    step, params = run(make_config(pooling="class", moe_form="adapter", depth=1))
    images = draw((B, SIZE, SIZE, 2))
    (_, (logits, _)), gradients = step(params, images, ALL)
    moved = jax.tree.map(lambda x: x, params)
    moved["blocks"]["groups"]["0"]["alpha"] = jnp.full((1,), 50.0)
    (_, (after, _)), _ = step(moved, images, ALL)
    chex.assert_trees_all_equal(logits, after)
    assert not np.any(gradients["blocks"]["groups"]["0"]["alpha"])
    assert not np.any(gradients["blocks"]["groups"]["0"]["moe"]["experts"]["w_up"])


@pytest.mark.parametrize(
    ("values", "computed"),
    [
        ({"moe_blocks": (0,)}, 1),
        ({"moe_blocks": (0,), "distilled": True}, 2),
        ({"moe_blocks": (0,), "qk_norm": True, "layer_scale": 0.5, "registers": 2}, 1),
        ({"moe_blocks": (0, 1)}, 1),
        # Patches matter here: to the mean, to the experts of the read token, and to a scan.
        ({"moe_blocks": (0,), "pooling": "mean", "class_token": True}, 5),
        ({"moe_blocks": (0, 1), "route_class": True}, 5),
        ({"moe_blocks": (0, 1), "distilled": True}, 6),
        ({"moe_blocks": (1,), "moe_form": "mlp"}, 5),
        ({}, 5),
    ],
)
def test_the_last_block_computes_the_tokens_that_are_read_and_nothing_changes(values, computed):
    config = make_config(**{"pooling": "class", "moe_form": "adapter"} | values)
    split, params, router = pure.split(EMoEViT(config, rngs=nnx.Rngs(0)))
    images = draw((B, SIZE, SIZE, 2))
    assert _last_width(split, params, router, images) == computed
    if computed > 2:
        return  # the program is the same as under `capture`

    def loss(params, capture):
        # Under `capture` all tokens are computed, as they are part of what is asked for.
        logits, aux, *_ = split.bind(params, router)(images, capture=capture)
        return jnp.sum(logits * draw((B, config.classes), 1)), (logits, aux)

    step = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    few, whole = step(params, False), step(params, True)
    jax.tree_util.tree_map_with_path(_assert_near, few, whole)


def _assert_near(path, ours, theirs):
    # A shift of all keys moves no softmax: gradients of their biases are zero but for rounding.
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    floor = 2e-6 if name.endswith(("key/bias", "key_norm/bias")) else 1e-7
    chex.assert_trees_all_close(ours, theirs, atol=max(floor, 2e-6 * np.max(np.abs(theirs))))


def _last_width(split, params, router, images):
    """Tokens that come out of the blocks."""

    def blocks(params, images):
        model = split.bind(params, router)
        x = model._embed(images)
        order = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
        rows = jnp.arange(B, dtype=jnp.int32)
        return model.blocks(x, order, jnp.ones_like(order), order, rows, None)[0]

    return jax.eval_shape(blocks, params, images).shape[1]


def test_images_of_another_size_are_refused():
    model = EMoEViT(make_config(), rngs=nnx.Rngs(0))
    words = (
        r"images have shape \(6, 4, 2\), the model takes \(4, 4, 2\); resize them, or set"
        " image_size and channels"
    )
    with pytest.raises(ValueError, match=words):
        model(jnp.ones((B, 6, 4, 2)))
    with pytest.raises(ValueError, match=r"images have shape \(4, 4, 1\)"):
        model(jnp.ones((B, 4, 4, 1)))


def test_patch_positions_are_the_ids_of_the_hash_router():
    config = make_config(moe=MoEConfig(router="hash", experts=3, hidden=4, dispatch="dense"))
    model = EMoEViT(config, rngs=nnx.Rngs(0))
    _, aux = jax.jit(model.__call__)(draw((B, SIZE, SIZE, 2)))
    # Each of the four positions goes to one expert in every image.
    assert np.all(np.asarray(aux["0"].stats["load"]) % B == 0)
