"""Sharding: the table of rules, what does not fit, and the numbers of a sharded model."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from emoe_jax import BasisConfig, EMoELM, EMoEViT, LMConfig, MoEConfig, ViTConfig, pure
from emoe_jax.sharding import (
    AXES,
    MeshConfig,
    ambient_mesh,
    batch_sharding,
    check_batch,
    in_mesh,
    make_mesh,
    replicated,
    rows_here,
    shardings,
    spec,
)

MOE = MoEConfig(router="eigen", experts=4, top_k=2, hidden=4, bias=True, basis=BasisConfig(rank=4))
CONFIG = LMConfig(
    vocab_size=12,
    width=8,
    depth=4,
    heads=4,
    kv_heads=2,
    mlp_hidden=6,
    moe_every=2,
    loss_chunk=6,
    tie_head=False,
    moe=MOE,
)


def specs_of(tree):
    """Name of each leaf to its spec, as a tuple."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(spec(path, leaf.ndim))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def test_rules_of_a_language_model():
    _, params, router = pure.abstract_split(lambda: EMoELM(CONFIG, rngs=nnx.Rngs(0)))
    specs = specs_of(params)
    dense, experts = "blocks/groups/0", "blocks/groups/1"
    # The first dimension of blocks is the repeats'.
    expected = {
        "embedding": ("tensor", "fsdp"),
        "head": ("tensor", "fsdp"),
        "norm/scale": (),
        f"{dense}/norm_mlp/scale": (),
        f"{dense}/attention/query/kernel": (None, "fsdp", "tensor"),
        f"{dense}/attention/key/kernel": (None, "fsdp", "tensor"),
        f"{dense}/attention/value/kernel": (None, "fsdp", "tensor"),
        f"{dense}/attention/out/kernel": (None, "tensor", "fsdp"),
        f"{dense}/attention/query_norm/scale": (),
        f"{dense}/mlp/gate/kernel": (None, "fsdp", "tensor"),
        f"{dense}/mlp/up/kernel": (None, "fsdp", "tensor"),
        f"{dense}/mlp/down/kernel": (None, "tensor", "fsdp"),
        f"{experts}/moe/experts/w_gate": (None, "expert", "fsdp", "tensor"),
        f"{experts}/moe/experts/w_up": (None, "expert", "fsdp", "tensor"),
        f"{experts}/moe/experts/w_down": (None, "expert", "tensor", "fsdp"),
        f"{experts}/moe/experts/b_gate": (None, "expert", "tensor"),
        f"{experts}/moe/experts/b_up": (None, "expert", "tensor"),
        f"{experts}/moe/experts/b_down": (None, "expert", None),
        f"{experts}/moe/router/basis": (),
        f"{experts}/moe/router/masks": (),
        f"{experts}/moe/router/bias": (),
    }
    assert {name: specs[name] for name in expected} == expected
    assert not router


def test_a_vision_transformers_head_and_linear_routers_are_replicated():
    moe = MoEConfig(router="loss_free", experts=4, hidden=4)
    config = ViTConfig(image_size=4, patch=2, width=8, depth=1, heads=2, mlp_hidden=4, moe=moe)
    _, params, router = pure.abstract_split(lambda: EMoEViT(config, rngs=nnx.Rngs(0)))
    specs = specs_of(params)
    for name in ("head/kernel", "patches/kernel", "position"):
        assert specs[name] == ()
    assert specs["blocks/groups/0/moe/router/kernel"] == ()
    assert specs["blocks/groups/0/attention/query/bias"] == ()
    assert set(specs_of(router).values()) == {()}


def test_moments_of_the_optimizer_follow_their_parameters():
    params = {"embedding": jnp.zeros((4, 2)), "moe": {"experts": {"w_up": jnp.zeros((2, 2, 2))}}}
    state = {"adam": {"mu": params, "count": jnp.zeros(())}}
    specs = specs_of(state)
    assert specs["adam/mu/embedding"] == ("tensor", "fsdp")
    assert specs["adam/mu/moe/experts/w_up"] == ("expert", "fsdp", "tensor")
    assert specs["adam/count"] == ()


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(), (8, 1, 1, 1)),
        (MeshConfig(fsdp=2, tensor=2), (2, 2, 1, 2)),
        (MeshConfig(data=1, expert=8), (1, 1, 8, 1)),
    ],
)
def test_meshes_have_all_axes(config, shape):
    mesh = make_mesh(config)
    assert mesh.axis_names == AXES
    assert tuple(mesh.shape.values()) == shape
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert batch_sharding(mesh).spec == PartitionSpec(("data", "fsdp", "expert"))
    assert replicated(mesh).spec == PartitionSpec()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            MeshConfig(fsdp=3),
            "mesh data=-1 fsdp=3 expert=1 tensor=1 does not multiply to the 8 devices at hand; set"
            " mesh.data to -1 and choose fsdp, expert and tensor so that their product, 3 now,"
            " divides 8",
        ),
        (MeshConfig(data=2, fsdp=2), "mesh data=2 fsdp=2 expert=1 tensor=1 does not multiply"),
        (MeshConfig(tensor=16), "tensor=16 does not multiply to the 8 devices at hand"),
    ],
)
def test_meshes_that_do_not_fit_the_devices_are_refused(config, words):
    with pytest.raises(ValueError, match=words):
        make_mesh(config)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"data": 0}, "mesh.data=0 must be at least 1"),
        ({"data": -2}, "mesh.data=-2 must be at least 1"),
        ({"fsdp": -1}, "mesh.fsdp=-1 must be at least 1"),
        ({"tensor": 0}, "mesh.tensor=0 must be at least 1"),
    ],
)
def test_mesh_sizes_are_checked(values, words):
    with pytest.raises(ValueError, match=words):
        MeshConfig(**values)


def test_all_dimensions_that_a_mesh_does_not_divide_are_listed():
    tree = {
        "embedding": jax.ShapeDtypeStruct((9, 8), jnp.float32),
        "moe": {"experts": {"w_up": jax.ShapeDtypeStruct((3, 8, 5), jnp.float32)}},
        "norm": {"scale": jax.ShapeDtypeStruct((7,), jnp.float32)},
    }
    mesh = make_mesh(MeshConfig(expert=2, tensor=2))
    with pytest.raises(ValueError, match="change the mesh axis or the model's size") as error:
        shardings(mesh, tree)
    lines = str(error.value).splitlines()[1:]
    assert [line.strip() for line in lines] == [
        "embedding (9, 8): mesh.tensor=2 vs 9",
        "moe/experts/w_up (3, 8, 5): mesh.expert=2 vs 3",
        "moe/experts/w_up (3, 8, 5): mesh.tensor=2 vs 5",
    ]


@pytest.mark.parametrize(
    ("batch", "accumulate", "suggestion"), [(12, 1, 16), (3, 1, 8), (17, 2, 16), (40, 2, 32)]
)
def test_batches_that_shards_and_microbatches_do_not_divide_are_refused(
    batch, accumulate, suggestion
):
    mesh = make_mesh(MeshConfig(fsdp=2, expert=2))
    parts = 8 * accumulate
    words = rf"batch={batch} is not a multiple of {parts} .*; set batch to {suggestion}$"
    with pytest.raises(ValueError, match=words):
        check_batch(mesh, batch, accumulate)
    check_batch(mesh, suggestion, accumulate)


def test_the_tensor_axis_does_not_split_the_batch():
    check_batch(make_mesh(MeshConfig(data=1, tensor=8)), 3, 3)


def test_one_process_holds_all_rows_in_order():
    for config in (MeshConfig(), MeshConfig(fsdp=2, expert=2), MeshConfig(data=1, tensor=8)):
        assert rows_here(make_mesh(config), 16).tolist() == list(range(16))


def test_a_sharded_model_has_the_loss_and_gradients_of_one_device():
    moe = dataclasses.replace(MOE, bias=False, activation="gelu")
    config = dataclasses.replace(CONFIG, depth=2, moe_every=1, moe=moe)
    split, params, router = pure.split(EMoELM(config, rngs=nnx.Rngs(0)))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 12, (4, 6)), jnp.int32)
    batch = {
        "tokens": tokens,
        "targets": tokens[:, ::-1],
        "segments": jnp.ones((4, 6), jnp.int32).at[3, 4:].set(0),
        "positions": jnp.broadcast_to(jnp.arange(6, dtype=jnp.int32), (4, 6)),
        "rows": jnp.arange(4, dtype=jnp.int32),
    }

    def loss(params, batch):
        weights = (batch["segments"] > 0).astype(jnp.float32)
        total, aux = split.bind(params, router).nll(batch, weights)
        return total + jnp.sum(aux["0"].loss), aux

    alone = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, batch)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    where = shardings(mesh, params)
    sharded = jax.jit(
        jax.value_and_grad(loss, has_aux=True),
        in_shardings=(where, batch_sharding(mesh)),
        out_shardings=(replicated(mesh), where),
    )(jax.device_put(params, where), jax.device_put(batch, batch_sharding(mesh)))
    up = sharded[1]["blocks"]["groups"]["0"]["moe"]["experts"]["w_up"]
    assert up.addressable_shards[0].data.shape == (2, 4, 4, 2)

    def check(path, a, b):
        a, b = np.asarray(a), np.asarray(b)
        # The orthonormality error is zero but for rounding.
        floor = 0.1 if "orthonormality_error" in jax.tree_util.keystr(path) else 1e-2
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(np.abs(b).max(), floor))

    chex.assert_trees_all_equal_structs(sharded, alone)
    jax.tree_util.tree_map_with_path(check, sharded, alone)


def other_mesh(names):
    axes = (AxisType.Auto,) * 2
    return jax.make_mesh((2, 4), names, axis_types=axes, devices=jax.devices()[:8])


def test_the_ambient_mesh_is_that_of_the_context():
    assert ambient_mesh() is None
    mesh = make_mesh(MeshConfig(data=1, expert=8), jax.devices()[:8])
    with jax.set_mesh(mesh):
        assert ambient_mesh() == mesh.abstract_mesh
        assert jax.eval_shape(lambda: jnp.zeros(ambient_mesh().shape["expert"])).shape == (8,)
    assert ambient_mesh() is None


def test_in_mesh_gives_a_function_its_mesh_and_keeps_its_name():
    mesh = make_mesh(MeshConfig(data=1, expert=8), jax.devices()[:8])

    def devices(x, *, more):
        """How many there are."""
        return x + more * ambient_mesh().size

    run = in_mesh(mesh, devices)
    assert (run.__name__, run.__doc__) == ("devices", "How many there are.")
    assert int(jax.jit(run)(1, more=2)) == 17
    assert ambient_mesh() is None


def test_meshes_that_are_not_ours_are_no_ambient_mesh():
    one = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    for mesh in (one, other_mesh(("data", "expert"))):
        with jax.set_mesh(mesh):
            assert ambient_mesh() is None


def test_inside_a_shard_map_there_is_no_ambient_mesh():
    mesh = make_mesh(MeshConfig(data=1, expert=8), jax.devices()[:8])
    seen = []

    def body(x):
        seen.append(ambient_mesh())
        return x

    rows = PartitionSpec("expert")
    mapped = jax.shard_map(body, mesh=mesh, in_specs=rows, out_specs=rows)
    with jax.set_mesh(mesh):
        jax.eval_shape(mapped, jnp.zeros(8))
        assert ambient_mesh() == mesh.abstract_mesh
    assert seen == [None] * len(seen)
    assert seen
