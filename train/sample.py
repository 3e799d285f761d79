"""Continues a text: python -m train.sample --workdir=DIR --prompt=... [--tokens=N].

Uses a key-value cache: the prompt is read once, then each new token is one step.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from emoe_jax import pure
from emoe_jax.basis import prepare_bases
from emoe_jax.config import LMConfig, require
from emoe_jax.routers import router_class
from emoe_jax.sharding import in_mesh, replicated
from train import cli, cluster, tables
from train.data.text import TextData
from train.run import Run, load_trained, model_maker

Array = jax.Array
Tree = Any


TOKENS = 200
"""How many tokens are drawn where nobody says."""


def generate(
    model: pure.Pure,
    state: Tree,
    prompt: Array,
    *,
    tokens: int,
    temperature: float,
    top_k: int,
    key: Array,
) -> Array:
    """Draws a continuation.

    Args:
        model: an `EMoELM` without its arrays.
        state: `params` (bases prepared) and `router`.
        prompt: [P] int32, the beginning of the document included.
        tokens: how many to draw.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: draws among that many likeliest tokens; 0 among all.
        key: random key.

    Returns:
        [tokens] int32.
    """
    P = prompt.shape[0]
    lm = model.bind(state["params"], state["router"])
    first_key, key = jax.random.split(key)
    cache = lm.init_cache(1, P + tokens)
    logits, cache = lm.decode(prompt[None], cache, jnp.int32(0), first_key)

    def choose(logits: Array, key: Array) -> Array:
        if temperature == 0:
            return jnp.argmax(logits).astype(jnp.int32)
        if top_k:
            floor = jax.lax.top_k(logits, top_k)[0][-1]
            logits = jnp.where(logits < floor, -jnp.inf, logits)
        return jax.random.categorical(key, logits / temperature).astype(jnp.int32)

    def step(carry: Any, index: Array) -> Any:
        cache, logits = carry
        draw_key, route_key = jax.random.split(jax.random.fold_in(key, index))
        token = choose(logits, draw_key)
        # Bound here: modules made outside of a scan cannot be used inside it.
        lm = model.bind(state["params"], state["router"])
        logits, cache = lm.decode(token[None, None], cache, P + index, route_key)
        return (cache, logits[0, -1]), token

    carry = (cache, logits[0, -1])
    return jax.lax.scan(step, carry, jnp.arange(tokens, dtype=jnp.int32))[1]


def continue_text(
    run: Run,
    state: Tree,
    prompt: str,
    *,
    tokens: int | None = None,
    temperature: float = 0.8,
    top_k: int = 0,
    seed: int = 0,
) -> str:
    """The text that a run's language model draws after a prompt, up to the document's end.

    Experts are dispatched without a capacity limit: a slot count that suits a training batch would
    drop a single token at random.

    Args:
        run: the run.
        state: holds `params` and `router`.
        prompt: the beginning.
        tokens: how many to draw; `TOKENS`, or what there is room for, where omitted.
        temperature: divides the logits.
        top_k: draws among that many likeliest tokens; 0 among all.
        seed: of the draws.

    Raises:
        ValueError: as `prompt_ids`, or the temperature or top_k is out of range.
    """
    ids = prompt_ids(run, prompt, 1 if tokens is None else tokens)
    room = run.units_per_step // run.config.batch - len(ids)
    tokens = min(TOKENS, room) if tokens is None else tokens
    config, tokenizer = run.config.model, run.data.tokenizer  # type: ignore[union-attr]
    N = config.vocab_size  # type: ignore[union-attr]
    require(temperature >= 0, f"temperature={temperature} is below zero")
    require(0 <= top_k <= N, f"top_k={top_k} must lie between 0 and the vocabulary's {N}")
    free = dataclasses.replace(config, moe=dataclasses.replace(config.moe, dispatch="dropless"))
    model, _, _ = pure.abstract_split(model_maker(free, run.config.seed))
    prepared = prepare_bases(state["params"], config.moe.basis.method)

    @functools.partial(jax.jit, out_shardings=replicated(run.mesh))
    @functools.partial(in_mesh, run.mesh)
    def draw(state: Tree, ids: Array, key: Array) -> Array:
        return generate(
            model, state, ids, tokens=tokens, temperature=temperature, top_k=top_k, key=key
        )

    inputs = {"params": prepared, "router": state["router"]}
    given = inputs, jnp.asarray(ids, jnp.int32), jax.random.key(seed)
    drawn = cluster.compile_together(draw.lower(*given))(*given).tolist()
    end = tokenizer.eos_id
    return tokenizer.decode(drawn[: drawn.index(end)] if end in drawn else drawn)


def prompt_ids(run: Run, prompt: str, tokens: int) -> list[int]:
    """The ids of a prompt, the beginning of the document first, if it can be continued.

    Raises:
        ValueError: not a language model, one that cannot generate, or the prompt and its
            continuation are longer than the rows that the model was trained on.
    """
    config, data = run.config.model, run.data
    if not isinstance(config, LMConfig) or not isinstance(data, TextData):
        raise ValueError("only language models continue texts; this run trains on images")
    require(
        router_class(config.moe.router).CAUSAL,
        f"router={config.moe.router!r} routes by later tokens, so this model cannot continue the"
        f" prompt {prompt!r}; leave the prompt empty",
    )
    require(tokens >= 1, f"tokens={tokens} must be at least 1")
    S = data.config.sequence_length
    ids = [data.tokenizer.bos_id, *data.tokenizer.encode(prompt).tolist()]
    require(
        len(ids) + tokens <= S,
        f"the prompt's {len(ids)} tokens and tokens={tokens} are more than the {S} positions that"
        " the model was trained on; shorten the prompt"
        + (f", or set tokens to {S - len(ids)} or less" if len(ids) < S else ""),
    )
    return ids


def main(argv: list[str]) -> None:
    """Prints a continuation."""
    args = flags.FLAGS
    drawn = ("prompt", "tokens", "temperature", "top_k", "seed")
    cluster.check_same({name: getattr(args, name) for name in drawn})
    run, state, step = load_trained(
        pathlib.Path(args.workdir), cli.overrides(args.override), args.step
    )
    text = continue_text(
        run,
        state,
        args.prompt,
        tokens=args.tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        seed=args.seed,
    )
    if not cluster.is_first():
        return
    print(args.prompt + text)
    if args.json:
        tables.write_json(args.json, [{"step": step, "prompt": args.prompt, "text": text}])


if __name__ == "__main__":
    cli.define_trained_run()
    flags.DEFINE_string("prompt", "", "Beginning of the text.")
    flags.DEFINE_integer(
        "tokens", None, f"Tokens to draw; {TOKENS} or what there is room for.", lower_bound=1
    )
    flags.DEFINE_float("temperature", 0.8, "Divides the logits; 0 takes the likeliest token.")
    flags.DEFINE_integer("top_k", 0, "Draw among this many likeliest tokens; 0: among all.")
    flags.DEFINE_integer("seed", 0, "Of the draws.")
    flags.DEFINE_string("json", "", "File to write the text to.")
    cli.run(main)
