"""Which PyTorch tensor is which array of ours: one table, read in both directions.

Names on the PyTorch side are those of the release (EMoE, github.com/Belis0811/EMoE at 5453639):
`vit.*` in timm's names, `branches.<block>.*` the expert branches. The table follows from a tree of
arrays alone, so that it maps parameters and gradients alike: every transform is a permutation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from emoe_jax.config import require

Tree = Any
Path = tuple[str, ...]
Arrays = Sequence[np.ndarray]


class Piece(NamedTuple):
    """Part of a leaf: `leaf[at]`, where `at` leads into stacked layers and experts."""

    path: Path
    at: tuple[int, ...]


class Entry(NamedTuple):
    """One PyTorch tensor.

    Attributes:
        name: in the release's state dict.
        pieces: the arrays that it is made of.
        layout: the name of its transform in `LAYOUTS`.
    """

    name: str
    pieces: tuple[Piece, ...]
    layout: str


class Layout(NamedTuple):
    """A transform of arrays, and its inverse.

    Attributes:
        to_torch: our pieces to a tensor.
        from_torch: a tensor to our pieces.
    """

    to_torch: Callable[[Arrays], np.ndarray]
    from_torch: Callable[[np.ndarray], Arrays]


LAYOUTS = {
    "same": Layout(lambda pieces: pieces[0], lambda tensor: [tensor]),
    # torch's linear maps hold [out,in].
    "linear": Layout(lambda pieces: pieces[0].T, lambda tensor: [tensor.T]),
    "batched": Layout(lambda pieces: pieces[0][None], lambda tensor: [tensor[0]]),
    # [D,channels,height,width] of a convolution to [height,width,channels,D].
    "patches": Layout(
        lambda pieces: pieces[0].transpose(3, 2, 0, 1),
        lambda tensor: [tensor.transpose(2, 3, 1, 0)],
    ),
    "qkv": Layout(
        lambda pieces: np.concatenate([piece.T for piece in pieces]),
        lambda tensor: [part.T for part in np.split(tensor, 3)],
    ),
    "qkv_bias": Layout(np.concatenate, lambda tensor: np.split(tensor, 3)),
}

_TOP: dict[Path, tuple[str, str]] = {
    ("patches", "kernel"): ("patch_embed.proj.weight", "patches"),
    ("patches", "bias"): ("patch_embed.proj.bias", "same"),
    ("position",): ("pos_embed", "batched"),
    ("class_token",): ("cls_token", "batched"),
    ("distillation_token",): ("dist_token", "batched"),
    ("registers",): ("reg_token", "batched"),
    ("norm", "scale"): ("norm.weight", "same"),
    ("norm", "bias"): ("norm.bias", "same"),
    ("norm_pooled", "scale"): ("fc_norm.weight", "same"),
    ("norm_pooled", "bias"): ("fc_norm.bias", "same"),
    ("head", "kernel"): ("head.weight", "linear"),
    ("head", "bias"): ("head.bias", "same"),
    ("head_distilled", "kernel"): ("head_dist.weight", "linear"),
    ("head_distilled", "bias"): ("head_dist.bias", "same"),
}

_BLOCK: dict[Path, tuple[str, str]] = {
    ("norm_attention", "scale"): ("norm1.weight", "same"),
    ("norm_attention", "bias"): ("norm1.bias", "same"),
    ("attention", "query_norm", "scale"): ("attn.q_norm.weight", "same"),
    ("attention", "query_norm", "bias"): ("attn.q_norm.bias", "same"),
    ("attention", "key_norm", "scale"): ("attn.k_norm.weight", "same"),
    ("attention", "key_norm", "bias"): ("attn.k_norm.bias", "same"),
    ("attention", "out", "kernel"): ("attn.proj.weight", "linear"),
    ("attention", "out", "bias"): ("attn.proj.bias", "same"),
    ("scale_attention",): ("ls1.gamma", "same"),
    ("norm_mlp", "scale"): ("norm2.weight", "same"),
    ("norm_mlp", "bias"): ("norm2.bias", "same"),
    ("mlp", "up", "kernel"): ("mlp.fc1.weight", "linear"),
    ("mlp", "up", "bias"): ("mlp.fc1.bias", "same"),
    ("mlp", "down", "kernel"): ("mlp.fc2.weight", "linear"),
    ("mlp", "down", "bias"): ("mlp.fc2.bias", "same"),
    ("scale_mlp",): ("ls2.gamma", "same"),
}

# Three of our leaves to one tensor.
_QKV: dict[str, tuple[str, str]] = {
    "kernel": ("attn.qkv.weight", "qkv"),
    "bias": ("attn.qkv.bias", "qkv_bias"),
}

_BRANCH: dict[Path, str] = {
    ("alpha",): "alpha",
    ("moe", "router", "basis"): "router.basis.Q",
    ("moe", "router", "companion"): "router.basis.P",
    ("moe", "router", "log_lambda"): "router.basis.log_lambda",
    ("moe", "router", "masks"): "router.masks",
    ("moe", "router", "gamma"): "router.gamma",
    ("moe", "router", "bias"): "router.bias",
}

# The adapter's first map, D to F, is called "down" there and `w_up` here.
_EXPERTS: dict[Path, str] = {
    ("moe", "experts", "w_up"): "down.weight",
    ("moe", "experts", "w_down"): "up.weight",
}


def table(tree: Tree) -> list[Entry]:
    """The entries of a tree of an `EMoEViT`: parameters, router state, gradients, or parts of them.

    Args:
        tree: nested dict as of `pure.plain`; the leaves need a shape.

    Raises:
        ValueError: leaves that the release has no place for, all of them named.
    """
    entries: list[Entry] = []
    unknown: list[str] = []
    groups = tree.get("blocks", {}).get("groups", {})
    top = {key: value for key, value in tree.items() if key != "blocks"}
    for path in traverse_util.flatten_dict(top):
        if path in _TOP:
            name, layout = _TOP[path]
            entries.append(Entry(f"vit.{name}", (Piece(path, ()),), layout))
        else:
            unknown.append("/".join(path))
    for place, group in groups.items():
        for path, leaf in traverse_util.flatten_dict(group).items():
            found = list(_block_entries(int(place), len(groups), path, leaf.shape))
            entries.extend(found)
            if not found and path[:2] not in (("attention", "key"), ("attention", "value")):
                unknown.append("/".join(("blocks", place, *path)))
    require(
        not unknown,
        "these arrays have no place in a checkpoint of the release, which holds a Vision"
        " Transformer with eigenbasis branches after its blocks (moe_form='adapter',"
        f" router='eigen', activation='gelu', no biases): {', '.join(unknown)}",
    )
    return entries


def _block_entries(place: int, period: int, path: Path, shape: tuple[int, ...]) -> Iterator[Entry]:
    """Entries of one stacked leaf of the blocks at a place in the period."""
    lead: Path = ("blocks", "groups", str(place))
    for repeat in range(shape[0]):
        block, at = repeat * period + place, (repeat,)
        piece = Piece((*lead, *path), at)
        if path in _BLOCK:
            name, layout = _BLOCK[path]
            yield Entry(f"vit.blocks.{block}.{name}", (piece,), layout)
        elif path[:2] == ("attention", "query") and path[2] in _QKV:
            name, layout = _QKV[path[2]]
            parts = tuple(
                Piece((*lead, "attention", part, path[2]), at) for part in ("query", "key", "value")
            )
            yield Entry(f"vit.blocks.{block}.{name}", parts, layout)
        elif path in _BRANCH:
            yield Entry(f"branches.{block}.{_BRANCH[path]}", (piece,), "same")
        elif path in _EXPERTS:
            for e in range(shape[1]):
                name = f"branches.{block}.experts.{e}.{_EXPERTS[path]}"
                yield Entry(name, (Piece(piece.path, (repeat, e)),), "linear")


def leaf_at(tree: Tree, path: Path) -> Any:
    """The leaf of nested dicts at a path."""
    for key in path:
        tree = tree[key]
    return tree


def to_torch(tree: Tree) -> dict[str, np.ndarray]:
    """The PyTorch tensors of a tree of arrays; bit-equal numbers, contiguous copies."""
    leaves = traverse_util.flatten_dict(tree)
    arrays = {path: np.asarray(leaf) for path, leaf in leaves.items()}
    state = {}
    for entry in table(tree):
        pieces = [arrays[piece.path][piece.at] for piece in entry.pieces]
        # ascontiguousarray would make a scalar a vector.
        state[entry.name] = np.array(LAYOUTS[entry.layout].to_torch(pieces), order="C")
    return state


def torch_shape(tree: Tree, entry: Entry) -> tuple[int, ...]:
    """The shape of a tensor, from the shapes in our tree."""
    pieces = [
        np.broadcast_to(np.float32(0), leaf_at(tree, piece.path).shape[len(piece.at) :])
        for piece in entry.pieces
    ]
    return LAYOUTS[entry.layout].to_torch(pieces).shape


def from_torch(state: Mapping[str, np.ndarray], tree: Tree, entries: Sequence[Entry]) -> Tree:
    """Our arrays from PyTorch tensors.

    Args:
        state: tensors, of the shapes that `torch_shape` gives.
        tree: nested dict of leaves with shapes and dtypes.
        entries: those of `table(tree)` that are to be read.

    Returns:
        Nested dict of numpy arrays, of the leaves that the entries name.
    """
    filled: dict[str, Any] = {}
    for entry in entries:
        parts = LAYOUTS[entry.layout].from_torch(state[entry.name])
        for piece, part in zip(entry.pieces, parts, strict=True):
            node = filled
            for key in piece.path[:-1]:
                node = node.setdefault(key, {})
            leaf = leaf_at(tree, piece.path)
            array = node.setdefault(piece.path[-1], np.zeros(leaf.shape, leaf.dtype))
            array[piece.at] = part
    return filled


def problems(state: Mapping[str, np.ndarray], tree: Tree, entries: Sequence[Entry]) -> list[str]:
    """Every missing, unexpected, misshapen and integer tensor, one line each."""
    expected = {entry.name: torch_shape(tree, entry) for entry in entries}
    found = [f"missing: {name} {shape}" for name, shape in expected.items() if name not in state]
    found += [
        f"unexpected: {name} {tensor.shape}"
        for name, tensor in state.items()
        if name not in expected
    ]
    found += [
        f"shape: {name} is {state[name].shape}, expected {shape}"
        for name, shape in expected.items()
        if name in state and state[name].shape != shape
    ]
    # Quantised weights, say, whose scales are somewhere else.
    found += [
        f"dtype: {name} is {state[name].dtype}, expected a floating one"
        for name in expected
        if name in state and not np.issubdtype(state[name].dtype, np.floating)
    ]
    return found
