"""What an exchange needs in memory, read from compiled programs that never run."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from emoe_jax import MoEConfig
from emoe_jax.dispatch import exchange
from emoe_jax.experts import apply_experts
from emoe_jax.sharding import MeshConfig, batch_sharding, in_mesh, make_mesh, replicated, shardings

K = 2


def gradient_of(mesh, config, T, D, layers):
    """The gradient of a scan over layers, and the abstract arrays that it takes."""
    E, F = config.experts, config.hidden
    abstract = jax.ShapeDtypeStruct
    weights = {
        "w_up": abstract((layers, E, D, F), jnp.float32),
        "w_down": abstract((layers, E, F, D), jnp.float32),
    }

    def loss(tokens, gates, weights, experts):
        def layer(tokens, weights):
            done = exchange(
                tokens, experts, gates, weights, apply_experts, config, mesh.abstract_mesh
            )
            return tokens + done.out, None

        return jnp.sum(jax.lax.scan(layer, tokens, weights)[0])

    arrays = (abstract((T, D), jnp.float32), abstract((T, K), jnp.float32), weights)
    gradient = in_mesh(mesh, jax.value_and_grad(loss, (0, 1, 2)))
    return gradient, (*arrays, abstract((T, K), jnp.int32))


def scratch(mesh, config, T, D, layers):
    """Bytes of temporary memory that it takes on one device."""
    gradient, arrays = gradient_of(mesh, config, T, D, layers)
    rows, where = batch_sharding(mesh), shardings(mesh, arrays[2])
    jitted = jax.jit(
        gradient,
        in_shardings=(rows, rows, where, rows),
        out_shardings=(replicated(mesh), (rows, rows, where)),
    )
    return jitted.lower(*arrays).compile().memory_analysis().temp_size_in_bytes


def kept(mesh, config, T, D, layers):
    """Shapes of what the layers leave for the backward pass, without the leading layers."""
    gradient, arrays = gradient_of(mesh, config, T, D, layers)
    equations = jax.make_jaxpr(gradient)(*arrays).jaxpr.eqns
    forward = next(e for e in equations if e.primitive.name == "scan" and not e.params["reverse"])
    return [leaf.aval.shape[1:] for leaf in forward.outvars if leaf.aval.shape[0] == layers]


@pytest.mark.parametrize("layers", [1, 4, 16])
def test_the_exact_fallback_needs_tokens_and_gradients_but_no_buffer(layers):
    assert len(jax.devices()) >= 8
    mesh = make_mesh(MeshConfig(data=1, expert=8), jax.devices()[:8])
    config = MoEConfig(experts=16, top_k=K, hidden=128, activation="gelu", exchange="all_to_all")
    drop = dataclasses.replace(config, on_overflow="drop")
    exact, fast = (scratch(mesh, c, 4096, 64, layers) for c in (config, drop))
    # One buffer of the fast path: 8 peers times 160 slots, 1.25 · 1024 / 8, of F floats.
    buffer = 8 * 160 * 128 * 4
    assert fast > layers * buffer
    # A layer's tokens, 512 of 64 floats here, which a router would keep as well. Besides them once,
    # while rounds add to them, the gradients of tokens and weights: less than such a buffer.
    assert exact - fast < layers * 512 * 64 * 4 + buffer


@pytest.mark.parametrize("name", ["all_to_all", "ragged_all_to_all"])
def test_an_exact_layer_keeps_no_weights_and_its_tokens_once(name):
    # First rounds keep what they need, further rounds their inputs: what is both is kept once, and
    # the parameters, which are there anyway, not again.
    mesh = make_mesh(MeshConfig(data=1, expert=8), jax.devices()[:8])
    config = MoEConfig(experts=16, top_k=K, hidden=48, activation="gelu", exchange=name)
    shapes = kept(mesh, config, 40, 64, 3)
    assert shapes.count((40, 64)) == 1
    assert (16, 64, 48) not in shapes
    assert (16, 48, 64) not in shapes


@pytest.mark.parametrize("overflow", ["exact", "drop"])
@pytest.mark.parametrize(
    "sizes", [{"data": 4}, {"expert": 4}, {"data": 2, "fsdp": 2}, {"fsdp": 2, "expert": 2}], ids=str
)
def test_an_activation_keeps_its_arguments_alone_on_every_mesh(sizes, overflow):
    mesh = make_mesh(MeshConfig(**({"data": 1} | sizes)), jax.devices()[:4])
    config = MoEConfig(
        experts=16,
        top_k=K,
        hidden=48,
        activation="gelu",
        exchange="all_to_all",
        on_overflow=overflow,
    )
    # Of width F: what goes into the activation and what comes out, which the next product needs.
    wide = [shape for shape in kept(mesh, config, 40, 64, 3) if shape[-1] == 48 and len(shape) == 2]
    assert len(wide) == 2


def test_weights_gathered_over_fsdp_are_not_kept_for_the_backward_pass():
    # Gathered, a layer's weights are 8 · 64 · 256 floats twice, 1 MiB. Four more layers would keep
    # four more; they keep their shards, an eighth of that, and what 8 tokens and 16 rows leave.
    mesh = make_mesh(MeshConfig(data=1, fsdp=8), jax.devices()[:8])
    config = MoEConfig(experts=8, top_k=K, hidden=256, activation="gelu")
    gathered = 2 * 8 * 64 * 256 * 4
    four, eight = (scratch(mesh, config, 64, 64, layers) for layers in (4, 8))
    assert gathered < four  # one layer's are there, while it runs
    assert eight - four < 4 * gathered / 4
    assert eight < 5 * gathered
