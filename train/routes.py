"""Which tokens each expert takes: counts over held-out batches, and what they say.

Every number here comes from tables of counts [E,N]: how many assignments expert k got of tokens of
category n. Categories are the token's id, its kind and its position for texts, and the image's
class and the patch's position for images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from emoe_jax.config import LMConfig, moe_layers, require
from emoe_jax.models.stack import layer_names
from emoe_jax.moe import Aux, MoE
from emoe_jax.sharding import in_mesh, replicated
from train import cluster
from train.data.text import TextData
from train.data.tokenizer import Tokenizer
from train.data.vision import VisionData
from train.evaluate import heldout
from train.observe import observe
from train.run import Run

Array = jax.Array
Tree = Any
Counts = dict[str, np.ndarray]

EXAMPLES = 6
"""Images or sequences of the first batch of which every route is kept, to be shown."""

LEAST = 5
"""Assignments that an expert must have of a category before its lift is listed: the lift of what is
seen once is noise."""

KINDS = (
    "begins a word",
    "goes on with letters",
    "digits",
    "punctuation",
    "white space",
    "part of a character",
    "document's begin or end",
)
"""Kinds of text tokens, see `token_kinds`."""


@dataclasses.dataclass(frozen=True)
class Routes:
    """Which experts took which tokens of some held-out batches.

    Attributes:
        counts: for each expert layer by name, by category ("token", "kind" and "position" of
            texts, "class" and "position" of images) assignments [E,N] int64.
        tokens: how many tokens were counted, in each layer.
        examples: of the first `EXAMPLES` rows of the first batch: `tokens` [B,S] int32, or `images`
            [B,height,width,C] in [0,1].
        chosen: for each layer the best expert [B,S] of the examples' tokens, -1 for padding. The
            class token is left out where it is not routed.
        patches: patches of an image, the last so many positions; 0 for texts.
    """

    counts: dict[str, Counts]
    tokens: int
    examples: Counts
    chosen: Counts
    patches: int = 0


def no_routes(run: Run) -> str | None:
    """Why a model has no table of routes, as a sentence; None if it has."""
    moe = run.config.model.moe
    if not any(moe_layers(run.config.model)):
        return "This model has no expert layers."
    if moe.router == "expert_choice":
        return (
            "The router expert_choice lets each expert choose its tokens, so there is no list of"
            " the experts of a token."
        )
    if moe.router == "soft" or moe.top_k == moe.experts:
        return f"The router {moe.router} sends every token to every expert, so no expert is chosen."
    return None


def collect(run: Run, state: Tree, *, batches: int = 16) -> Routes:
    """Routes held-out tokens through the model and counts who took them.

    Of texts every position is counted once, where it is scored (windows overlap). Every choice of
    a token's K experts counts as one assignment.

    Args:
        run: the run.
        state: holds `params` and `router`.
        batches: how many held-out batches are read, from the first; all if there are fewer.

    Raises:
        ValueError: `batches` is below one, or the model has no routes, see `no_routes`.
    """
    require(batches >= 1, f"batches={batches} must be at least 1")
    why = no_routes(run)
    require(why is None, str(why))
    batch = run.abstract_batch(next(heldout(run)), run.eval_batch)
    inputs = run.abstract["params"], run.abstract["router"], batch, jax.eval_shape(run.key)
    step = in_mesh(run.mesh, lambda *given: _captured(run, *given))
    lowered = jax.jit(step, out_shardings=replicated(run.mesh)).lower(*inputs)
    program = cluster.compile_together(lowered)
    kinds = token_kinds(run.data.tokenizer) if isinstance(run.data, TextData) else None
    first: Tree = None
    counts: dict[str, Counts] = {}
    tokens = 0
    for part in islice(heldout(run), batches):
        placed = run.to_devices(part, run.eval_batch)
        seen = jax.device_get(program(state["params"], state["router"], placed, run.key()))
        first = seen if first is None else first
        tokens += int(seen["real"].sum())
        for name, indices in seen["indices"].items():
            new = _count_layer(run, seen, indices)
            old = counts.get(name, {})
            counts[name] = {key: new[key] + old.get(key, 0) for key in new}
    if kinds is not None:
        for layer in counts.values():
            layer["kind"] = merged(layer["token"], kinds, len(KINDS))
    return Routes(
        counts=dict(sorted(counts.items())),
        tokens=tokens,
        examples=_examples(run, first),
        chosen={
            name: np.where(first["real"], indices[..., 0], -1)[:EXAMPLES]
            for name, indices in sorted(first["indices"].items())
        },
        patches=_patches(run),
    )


class _Capture(nnx.Module):
    """An expert layer that is asked for its routes, whoever calls it."""

    def __init__(self, moe: MoE) -> None:
        self.moe = moe

    def __call__(self, tokens: Array, **context: Any) -> tuple[Array, Aux]:
        out, aux = self.moe(tokens, **(context | {"capture": True}))
        # Of all that is captured the indices alone: the rest is as large as the activations.
        return out, aux._replace(captured={"indices": (aux.captured or {})["indices"]})


def _captured(run: Run, params: Tree, router: Tree, batch: Tree, key: Array) -> Tree:
    """`indices` [B,S,K] by layer, `real` [B,S], and what the counts need of the batch."""
    config = run.config.model
    captured = observe(run, params, router, batch, key, _Capture)
    if isinstance(config, LMConfig):
        kept = {"tokens": batch["tokens"], "positions": batch["positions"], "real": batch["scored"]}
    else:
        kept = {
            "labels": jnp.argmax(batch["labels"], axis=-1),
            "images": batch["images"][:EXAMPLES],
        }
    indices = {
        name: captured[place]["indices"][repeat]
        for place, names in layer_names(config).items()
        for repeat, name in enumerate(names)
    }
    if not isinstance(config, LMConfig):
        shape = next(iter(indices.values())).shape[:2]
        kept["real"] = jnp.broadcast_to(batch["scored"][:, None], shape)
    return kept | {"indices": indices}


def _count_layer(run: Run, seen: Tree, indices: np.ndarray) -> Counts:
    """Tables of counts of one layer and batch, see `Routes.counts`."""
    config, E = run.config.model, run.config.model.moe.experts
    S = indices.shape[1]
    if isinstance(config, LMConfig):
        labels = {
            "token": (seen["tokens"], config.vocab_size),
            "position": (seen["positions"], S),
        }
    else:
        classes = np.broadcast_to(seen["labels"][:, None], indices.shape[:2])
        places = np.broadcast_to(np.arange(S), indices.shape[:2])
        labels = {"class": (classes, config.classes), "position": (places, S)}
    real = seen["real"]
    return {
        name: count(indices[real], category[real], experts=E, categories=N)
        for name, (category, N) in labels.items()
    }


def _examples(run: Run, seen: Tree) -> Counts:
    """What the first rows of a batch show."""
    if not isinstance(run.data, VisionData):
        return {"tokens": seen["tokens"][:EXAMPLES]}
    shown = seen["images"] * np.array(run.data.std) + np.array(run.data.mean)
    real = seen["real"][:EXAMPLES, 0]
    return {"images": np.clip(shown, 0.0, 1.0)[real], "labels": seen["labels"][:EXAMPLES][real]}


def _patches(run: Run) -> int:
    config = run.config.model
    return 0 if isinstance(config, LMConfig) else (config.image_size // config.patch) ** 2


# ------------------------------------------------------------------------------ counts to numbers


def count(
    indices: np.ndarray, category: np.ndarray, *, experts: int, categories: int
) -> np.ndarray:
    """Assignments [E,N] int64 of tokens of each category to each expert.

    Args:
        indices: [n,K], the experts of each token.
        category: [n], in [0,N).
        experts: E.
        categories: N.
    """
    cells = indices.astype(np.int64) * categories + category[:, None]
    return np.bincount(cells.ravel(), minlength=experts * categories).reshape(experts, categories)


def merged(counts: np.ndarray, groups: np.ndarray, size: int) -> np.ndarray:
    """Counts [E,G] of groups of categories, from counts [E,N] and the group [N] of each."""
    return np.stack([np.bincount(groups, weights=row, minlength=size) for row in counts]).astype(
        np.int64
    )


def entropy(counts: np.ndarray) -> float:
    """-Σ p ln p in nats of counts [n]; 0 where nothing was counted."""
    p = counts[counts > 0] / max(counts.sum(), 1)
    return float(-(p * np.log(p)).sum()) + 0.0


def mutual_information(counts: np.ndarray) -> float:
    """Σ p(k,n) ln(p(k,n) / (p(k) p(n))) in nats of counts [E,N]: what one tells of the other."""
    both = entropy(counts.ravel())
    return max(entropy(counts.sum(axis=1)) + entropy(counts.sum(axis=0)) - both, 0.0)


def explained(counts: np.ndarray) -> float:
    """Mutual information over the entropy of the experts, in [0,1] (Theil's uncertainty U).

    0: the category says nothing of the expert. 1: it says all. With K > 1 experts a token 1 cannot
    be reached: K equally likely experts of a known category leave ln K of ln E open. 0 where there
    is but one expert in use.
    """
    whole = entropy(counts.sum(axis=1))
    return mutual_information(counts) / whole if whole > 0 else 0.0


def explained_by_chance(counts: np.ndarray, seed: int = 0) -> float:
    """`explained` of a random table with the same sums of rows and columns.

    Counts of many rare categories look informative for want of data; this is by how much. Each
    assignment is drawn on its own.

    Args:
        counts: [E,N].
        seed: of the drawn table.
    """
    draw = np.random.default_rng(seed)
    left, rows = counts.sum(axis=0), []
    for total in counts.sum(axis=1):
        row = draw.multivariate_hypergeometric(left, int(total), method="marginals")
        left = left - row
        rows.append(row)
    return explained(np.stack(rows))


def lift(counts: np.ndarray) -> np.ndarray:
    """Share of a category among an expert's tokens over its share among all tokens, [E,N].

    1: as often as elsewhere; 0 where the expert or the category has no token.
    """
    counts = counts.astype(np.float64)
    own = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1.0)
    overall = counts.sum(axis=0) / max(counts.sum(), 1.0)
    return np.divide(own, overall, out=np.zeros_like(own), where=overall > 0)


def top(counts: np.ndarray, expert: int, most: int, *, by: str) -> list[int]:
    """Categories that an expert takes most, the first first.

    Args:
        counts: [E,N].
        expert: which.
        most: how many at most.
        by: "count", or "lift" (of which it has at least `LEAST`).

    Raises:
        ValueError: `by` is another word.
    """
    require(by in ("count", "lift"), f"by={by!r} must be 'count' or 'lift'")
    own = counts[expert]
    score = own.astype(np.float64) if by == "count" else lift(counts)[expert]
    taken = own >= (1 if by == "count" else LEAST)
    order = np.argsort(-np.where(taken, score, -np.inf), kind="stable")
    return [int(n) for n in order[: min(most, int(taken.sum()))]]


def summary(counts: Mapping[str, Counts]) -> list[dict[str, Any]]:
    """One row a layer: `explained` by each category, and the same by chance."""
    rows = []
    for layer, tables in counts.items():
        row: dict[str, Any] = {"layer": layer}
        for name, table in tables.items():
            row[f"by {name}"] = explained(table)
            row[f"by {name}, chance"] = explained_by_chance(table)
        rows.append(row)
    return rows


# ------------------------------------------------------------------------------ tokens of texts


def token_kinds(tokenizer: Tokenizer) -> np.ndarray:
    """The kind [N] of every id, as a place in `KINDS`."""
    special = {tokenizer.bos_id, tokenizer.eos_id}
    return np.array(
        [
            len(KINDS) - 1 if i in special else KINDS.index(_kind(tokenizer.decode([i])))
            for i in range(tokenizer.vocab_size)
        ]
    )


def _kind(text: str) -> str:
    if not text:
        return KINDS[-1]
    if "\ufffd" in text:
        return "part of a character"
    if text.isspace():
        return "white space"
    core = text.strip()
    if any(letter.isalpha() for letter in core):
        return "begins a word" if text[0].isspace() else "goes on with letters"
    return "digits" if any(letter.isdigit() for letter in core) else "punctuation"


def token_label(tokenizer: Tokenizer, token: int) -> str:
    """A token as a reader can see it: spaces and line ends as signs, the rest as its number."""
    if token == tokenizer.bos_id:
        return "⟨begin⟩"
    if token == tokenizer.eos_id:
        return "⟨end⟩"
    text = tokenizer.decode([token])
    if not text or "\ufffd" in text:
        return f"#{token}"
    signs = {" ": "␣", "\n": "⏎", "\r": "␍", "\t": "⇥"}
    return "".join(signs.get(c, c if c.isprintable() else f"\\x{ord(c):02x}") for c in text)
