"""The parts of a report that look at the experts: how they differ, and which tokens they take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from train import report_figures as figures
from train import report_page as page
from train import routes
from train.data.tokenizer import Tokenizer
from train.diversity import mean_similarity
from train.report_page import Block, Section
from train.report_training import Album
from train.routes import Routes

Rows = list[dict[str, Any]]

WRITTEN = 6
"""Tokens or classes that a table lists for each expert."""

CLASSES = 40
"""Most classes of which every one is a column of a figure."""

RARE = 20
"""Fewest assignments of a kind of token that the figure shows."""

PASSAGE = 160
"""Most tokens of the tinted passage."""


def diversity(
    similarity: Mapping[str, np.ndarray], swap_cost: float | None, album: Album
) -> Section:
    """Similarity of what experts say about the same tokens.

    Args:
        similarity: cosines [E,E] by layer.
        swap_cost: see `diversity.swap_cost`; None where it was not measured.
        album: draws.
    """
    if not similarity:
        return Section("diversity", "Diversity", [page.absent("This model has no expert layers.")])
    shown = {}
    for name, matrix in similarity.items():
        shown[name] = np.where(np.eye(len(matrix), dtype=bool), np.nan, matrix)
    draw = partial(figures.maps, shown, label="mean cosine of outputs", xlabel="expert", center=0.0)
    mean = np.mean([mean_similarity(matrix) for matrix in similarity.values()])
    caption = (
        "Every expert is applied to the same held-out tokens; a cell is the mean cosine between the"
        " outputs of two experts. 0: they say unrelated things; 1: the same. The mean over all"
        f" pairs is {mean:.3f}. Good: pale, with no red blocks; but untrained experts are near 0 as"
        " well, so a low value alone proves nothing."
    )
    blocks = [album.add("similarity", draw, caption)]
    if swap_cost is not None:
        blocks.append(
            page.paragraph(
                f"If every expert did its neighbour's work, held-out loss would grow by"
                f" {swap_cost:.4g} nats. This is about 0 for interchangeable or untrained experts;"
                " good: clearly above 0."
            )
        )
    return Section("diversity", "Diversity of experts", blocks)


def specialisation(
    found: Routes | None, why: str | None, album: Album, tokenizer: Tokenizer | None
) -> Section:
    """Which tokens each expert takes.

    Args:
        found: of `routes.collect`; None where there are none.
        why: then the reason.
        album: draws.
        tokenizer: of texts; None for images.
    """
    title = "What each expert takes"
    if found is None:
        return Section("routes", title, [page.absent(str(why))])
    blocks = [
        page.paragraph(
            f"From {found.tokens:,} tokens of held-out data. Explained: the share of the choice of"
            " the expert that is known once the token's class, place or identity is known (mutual"
            " information over the entropy of the experts). 0: nothing; 1: all. “Chance” is what a"
            " random assignment with the same sums would show, so only the excess over it counts."
        ),
        page.table(routes.summary(found.counts), "How much of the routing is explained, by layer"),
    ]
    if tokenizer is None:
        blocks += _image_blocks(found, album)
    else:
        blocks += _text_blocks(found, album, tokenizer)
    return Section("routes", title, blocks)


def _text_blocks(found: Routes, album: Album, tokenizer: Tokenizer) -> list[Block]:
    kinds = {layer: tables["kind"] for layer, tables in found.counts.items()}
    frequent = next(iter(kinds.values())).sum(axis=0) >= RARE
    lifts = {layer: shown_lift(counts)[:, frequent] for layer, counts in kinds.items()}
    names = [name for name, kept in zip(routes.KINDS, frequent, strict=True) if kept]
    draw = partial(figures.maps, lifts, label="lift", xlabel="", xticks=names)
    caption = (
        "How much more often an expert gets a kind of token than tokens in general do: 1 is no"
        " preference, 2 twice as often, 0 never. Good: rows that differ, which says that experts"
        " have fields of their own. Rare kinds are left out."
    )
    labels = [routes.token_label(tokenizer, i) for i in range(tokenizer.vocab_size)]
    blocks = [album.add("token_kinds", draw, caption), page.heading("A held-out passage")]
    blocks.append(
        page.paragraph(
            "Each token has the colour of its first expert; point at one to read its number. Good:"
            " colours that follow something, such as word beginnings, and more than one of them."
        )
    )
    blocks += _passages(found, labels)
    blocks.append(page.heading("Top tokens of each expert"))
    blocks.append(
        page.paragraph(
            "Most: the share of the expert's assignments. Typical: the largest lift among tokens it"
            f" got at least {routes.LEAST} times. ␣ is a space, ⏎ a line end, # the number of an id"
            " without letters."
        )
    )
    tables = {layer: tables["token"] for layer, tables in found.counts.items()}
    return blocks + [expert_table(layer, counts, labels) for layer, counts in tables.items()]


def _image_blocks(found: Routes, album: Album) -> list[Block]:
    tables = {layer: tables["class"] for layer, tables in found.counts.items()}
    E, N = next(iter(tables.values())).shape
    labels = [str(n) for n in range(N)]
    blocks = []
    if N <= CLASSES:
        lifts = {layer: shown_lift(counts) for layer, counts in tables.items()}
        draw = partial(figures.maps, lifts, label="lift", xlabel="class", xticks=labels)
        caption = (
            "How much more often an expert gets patches of a class than patches in general: 1 is no"
            " preference, 2 twice as often, 0 never. Good: contrast in later layers, where features"
            " know of classes; all 1 means that routes ignore what the image shows."
        )
        blocks.append(album.add("classes", draw, caption))
    side = round(found.patches**0.5)
    lifts = {}
    for layer, counts in found.counts.items():
        patches = counts["position"][:, -found.patches :]
        lifts[layer] = shown_lift(patches).reshape(E, side, side)
    caption = (
        "Where in the image each expert's patches lie: a row a layer, a column an expert, red is"
        " more than its share of patches at that place. Good: not the same few places for all; an"
        " expert with one bright spot routes by place and not by content."
    )
    blocks.append(album.add("positions", partial(figures.positions, lifts), caption))
    chosen = {
        layer: experts[: len(found.examples["images"]), -found.patches :].reshape(-1, side, side)
        for layer, experts in found.chosen.items()
    }
    draw = partial(figures.tinted, found.examples["images"], chosen, E)
    caption = (
        "Held-out images, and below them every patch in the colour of its first expert, layer by"
        " layer. Good: colours that follow strokes and objects; the same pattern for every image"
        " means routing by place."
    )
    blocks.append(album.add("tinted_images", draw, caption))
    blocks.append(page.heading("Top classes of each expert"))
    return blocks + [expert_table(layer, counts, labels) for layer, counts in tables.items()]


def shown_lift(counts: np.ndarray) -> np.ndarray:
    """`routes.lift` [E,N], NaN where the expert or the category has no token."""
    some = (counts.sum(axis=1) > 0)[:, None] & (counts.sum(axis=0) > 0)
    return np.where(some, routes.lift(counts), np.nan)


def expert_table(layer: str, counts: np.ndarray, labels: Sequence[str]) -> Block:
    """A table of one layer: experts with their load and what they take most.

    Args:
        layer: its name.
        counts: [E,N].
        labels: N.
    """
    lifts = routes.lift(counts)
    rows = []
    for k, own in enumerate(counts):
        shares = own / max(own.sum(), 1)
        most = routes.top(counts, k, WRITTEN, by="count")
        typical = routes.top(counts, k, WRITTEN, by="lift")
        rows.append(
            {
                "expert": k,
                "load": float(own.sum() / max(counts.sum(), 1)),
                "most (share)": "   ".join(f"{labels[n]} {shares[n]:.0%}" for n in most),
                "typical (lift)": "   ".join(f"{labels[n]} {lifts[k, n]:.1f}" for n in typical),
            }
        )
    return page.folded(layer, [page.table(rows)])


def _passages(found: Routes, labels: Sequence[str]) -> list[Block]:
    """The first example's tokens for the first, a middle and the last layer."""
    names = list(found.chosen)
    picked = sorted({0, len(names) // 2, len(names) - 1})
    ids, blocks = found.examples["tokens"][0], []
    experts = next(iter(found.counts.values()))["token"].shape[0]
    palette = (255 * figures.expert_colors(experts)).astype(int)
    for name in [names[i] for i in picked]:
        chosen = found.chosen[name][0]
        pieces = []
        for token, expert in zip(ids[:PASSAGE], chosen[:PASSAGE], strict=True):
            red, green, blue = palette[expert]
            color = f"rgba({red},{green},{blue},.4)" if expert >= 0 else "transparent"
            pieces.append((labels[token], color, f"expert {expert}" if expert >= 0 else "unscored"))
        blocks += [page.paragraph(name), page.tinted_text(pieces)]
    return blocks
