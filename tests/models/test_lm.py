"""The language model: its loss, its cache, what it sees, what it refuses."""

from functools import cache

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from emoe_jax import EMoELM, LMConfig, MoEConfig, RouterConfig, pure

B, S, N = 2, 6, 11


def make_config(router="softmax", dispatch="dense", routing=None, **values):
    moe = MoEConfig(
        router=router,
        experts=3,
        top_k=2,
        hidden=4,
        dispatch=dispatch,
        routing=routing or RouterConfig(),
    )
    sizes = {"vocab_size": N, "width": 8, "depth": 2, "heads": 2, "mlp_hidden": 6, "moe": moe}
    return LMConfig(**(sizes | {"loss_chunk": 5} | values))


@cache
def build(config):
    return EMoELM(config, rngs=nnx.Rngs(0))


TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, N, (B, S)), jnp.int32)
BATCH = {
    "tokens": TOKENS,
    "targets": jnp.roll(TOKENS, -1, axis=1),
    "segments": jnp.array([[1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 0, 0]], jnp.int32),
    "positions": jnp.array([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 0, 0]], jnp.int32),
    "rows": jnp.arange(B, dtype=jnp.int32),
}
WEIGHTS = jnp.array([[1.0, 1.0, 0.0, 1.0, 1.0, 0.5], [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]])


@cache
def run(config):
    """Logits, the training loss with gradients, and the plain loss with gradients."""
    split, params, router = pure.split(build(config))
    context = {name: BATCH[name] for name in ("segments", "positions", "rows")}

    def logits(params):
        return split.bind(params, router)(TOKENS, **context)[0]

    def plain(params):
        logs = jax.nn.log_softmax(logits(params))
        chosen = jnp.take_along_axis(logs, BATCH["targets"][..., None], axis=-1)[..., 0]
        return -jnp.sum(WEIGHTS * chosen)

    def chunked(params):
        return split.bind(params, router).nll(BATCH, WEIGHTS)[0]

    both = jax.jit(lambda p: (jax.value_and_grad(chunked)(p), jax.value_and_grad(plain)(p)))
    return both(params)


@pytest.mark.parametrize("tie_head", [True, False])
def test_the_training_loss_is_the_log_likelihood_of_the_logits(tie_head):
    ours, expected = run(make_config(tie_head=tie_head, depth=1))
    chex.assert_trees_all_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert ("head" in ours[1]) != tie_head
    assert all(np.any(leaf) for leaf in jax.tree.leaves(ours[1]))


def test_an_untrained_model_knows_nothing():
    (loss, _), _ = run(make_config(depth=1))
    assert float(loss / jnp.sum(WEIGHTS)) == pytest.approx(np.log(N), rel=0.05)


@pytest.mark.parametrize(
    ("router", "dispatch", "values"),
    [
        ("softmax", "dropless", {"heads": 4, "kv_heads": 2}),
        ("hash", "dense", {"moe_every": 2, "qk_norm": False}),
    ],
)
def test_decoding_equals_the_forward_pass(router, dispatch, values):
    model = build(make_config(router, dispatch, **values))
    logits, _ = jax.jit(model.__call__)(TOKENS)
    decode, memory = jax.jit(model.decode), model.init_cache(B, S + 1)
    parts, start = [], 0
    for length in (3, 1, 1, 1):
        part = TOKENS[:, start : start + length]
        out, memory = decode(part, memory, jnp.int32(start))
        parts.append(out)
        start += length
    chex.assert_trees_all_close(jnp.concatenate(parts, axis=1), logits, rtol=1e-4, atol=1e-5)


def test_logits_depend_on_no_later_token_and_no_other_document():
    model = build(make_config())
    context = {name: BATCH[name] for name in ("segments", "positions", "rows")}
    forward = jax.jit(lambda tokens: model(tokens, **context)[0])
    before = np.asarray(forward(TOKENS))
    for j in (1, 3):
        after = np.asarray(forward(TOKENS.at[0, j].add(1) % N))
        changed = np.any(before != after, axis=-1)
        segments = np.asarray(BATCH["segments"][0])
        expected = (np.arange(S) >= j) & (segments == segments[j])
        np.testing.assert_array_equal(changed[0], expected)
        assert not np.any(changed[1])


def test_defaults_are_one_document_from_position_zero():
    model = build(make_config())
    plain = jax.jit(lambda t: model(t)[0])(TOKENS)
    positions = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (B, S))
    ones = jnp.ones((B, S), jnp.int32)
    given = jax.jit(lambda t: model(t, positions=positions, segments=ones)[0])(TOKENS)
    chex.assert_trees_all_close(plain, given, rtol=1e-6, atol=1e-7)
    assert plain.dtype == jnp.float32


def test_bfloat16_is_near_float32():
    high, low = build(make_config("hash")), build(make_config("hash", dtype="bfloat16"))
    expected, out = (jax.jit(lambda t, m=m: m(t)[0])(TOKENS) for m in (high, low))
    assert out.dtype == jnp.float32
    largest = float(jnp.max(jnp.abs(expected)))
    assert float(jnp.max(jnp.abs(out - expected))) < 0.05 * largest


def test_a_router_that_looks_ahead_is_refused_unless_it_is_meant():
    words = r"router='expert_choice' lets .* later tokens.*; choose another router, or set"
    with pytest.raises(ValueError, match=words):
        EMoELM(make_config("expert_choice"), rngs=nnx.Rngs(0))
    meant = make_config("expert_choice", routing=RouterConfig(acausal=True))
    logits, aux = jax.jit(build(meant).__call__)(TOKENS)
    chex.assert_shape(logits, (B, S, N))
    assert float(jnp.sum(aux["0"].stats["load"])) > 0


def test_the_random_router_asks_for_its_key():
    model = build(make_config("random"))
    with pytest.raises(ValueError, match="random router needs a random key"):
        model(TOKENS)
