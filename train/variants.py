"""What a comparison compares: variants, each a router and what is different with it.

A variant is the name of a router, or a name from a JSON file of options:

    {"no_offset": {"router": "whitened", "moe.routing.offset": false}}

With "like" in the place of "router" a variant has the options of another variant besides its own,
or is like a router where no other variant has that name: so a router without one of its parts is
compared at the options for which the whole was tuned.

`tuned.json`, which `python -m train.compare --tune` writes, is such a file; under `tried` it also
keeps all points that were tried, which nobody reads here.
"""

from __future__ import annotations

import dataclasses
import difflib
import pathlib
import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import config_dict

from emoe_jax import json_file, pure
from emoe_jax.config import moe_layers, require
from emoe_jax.routers import ROUTERS, router_class
from train.config import experiment, flat_keys, freeze, update
from train.run import model_maker

LOGGED_STEPS = 400
"""Steps of a run that are logged at least (all of a shorter run's): what is said of single batches
is a mean over them."""

RESERVED = ("figures", "tune")
"""Folders of a study beside those of its variants."""

COMMON_TUNING = ("optim.router_scale", (0.1, 0.3, 1.0))

TUNING: dict[str, tuple[str, tuple[float, ...]]] = {
    "eigen": ("moe.routing.temperature", (0.1, 0.3, 1.0)),
    "whitened": ("moe.routing.temperature", (0.3, 0.6, 1.0)),
    "softmax_offset": ("moe.routing.temperature", (0.3, 0.6, 1.0)),
    "softmax": COMMON_TUNING,
    "switch": ("moe.routing.balance_weight", (0.003, 0.01, 0.03)),
    "loss_free": ("moe.routing.bias_rate", (0.001, 0.003, 0.01)),
    "expert_choice": COMMON_TUNING,
    "soft": COMMON_TUNING,
}
"""What `--tune` tries: one key and three values for each router, the value that its paper gives or
our default among them. Routers without weights or options (random, hash) have nothing to tune. A
variant that sets the key itself is tuned by the common one."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """A router, and what is different with it.

    Attributes:
        name: of its folder and in tables.
        router: the router.
        options: dotted keys of the configuration to values.
    """

    name: str
    router: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def causal(self) -> bool:
        """Whether the route of a token depends on no later one."""
        return router_class(self.router).CAUSAL

    def with_options(self, options: Mapping[str, Any]) -> Variant:
        """The variant with more options."""
        return dataclasses.replace(self, options=dict(self.options) | dict(options))


def read_options(paths: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Reads files of variants; of two variants of one name the one in the later file stays.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: one is no JSON object of objects.
    """
    variants: dict[str, dict[str, Any]] = {}
    for path in paths:
        variants |= _read_options(path)
    return variants


def _read_options(path: str) -> dict[str, dict[str, Any]]:
    file = pathlib.Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"--options={path}: there is no such file")
    tree = json_file.parse(file.read_bytes(), f"--options={path}")
    wanted = 'such as {"no_offset": {"router": "whitened", "moe.routing.offset": false}}'
    require(
        isinstance(tree, dict),
        f"--options={path} holds a JSON {type(tree).__name__}, not an object; write one, {wanted}",
    )
    for name, options in tree.items():
        require(
            isinstance(options, dict),
            f"--options={path}: variant {name!r} is {reprlib.repr(options)}, not an object;"
            f" write it {wanted}",
        )
    return tree


def choose(names: Sequence[str], options: Mapping[str, Mapping[str, Any]]) -> list[Variant]:
    """The variants of the names, looked up in the options first and then among the routers.

    Raises:
        ValueError: a name is unknown, or given twice, or cannot be that of a folder; a variant
            names no router; or there are no names.
    """
    require(bool(names), f"--routers is empty; choose from {', '.join([*options, *ROUTERS])}")
    for name in names:
        require(names.count(name) == 1, f"--routers names {name!r} twice; leave one out")
    return [_variant(name, options) for name in names]


def _variant(name: str, options: Mapping[str, Mapping[str, Any]]) -> Variant:
    require(
        bool(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]*", name)) and name not in RESERVED,
        f"variant {name!r} cannot be a folder's name beside {', '.join(RESERVED)}; take another, of"
        " letters, digits and _ . + -",
    )
    if name in options:
        given = _given(name, options)
        router = given.pop("router", None)
        require(
            isinstance(router, str) and router in ROUTERS,
            f"variant {name!r} has router={reprlib.repr(router)}; choose one of"
            f" {', '.join(ROUTERS)}",
        )
        for key in given:
            require(key != "seed", f"variant {name!r} sets 'seed', which the study decides")
        return Variant(name, str(router), given)
    known = [*options, *ROUTERS]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(known)}"
    require(name in ROUTERS, f"--routers: {name!r} is neither a variant nor a router; {hint}")
    return Variant(name, name)


def _given(
    name: str, options: Mapping[str, Mapping[str, Any]], below: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The router and the dotted keys of a variant, those of the one that it is like included."""
    given = {key: _plain(value) for key, value in options[name].items() if key != "tried"}
    if "like" not in given:
        return given
    like = given.pop("like")
    require("router" not in given, f"variant {name!r} has both 'router' and 'like'; leave one out")
    require(isinstance(like, str), f"variant {name!r} is like {reprlib.repr(like)}, no name")
    require(like not in below, f"variant {name!r} is like {like!r}, which is like {name!r}")
    if like == name or like not in options:
        known = [*(other for other in options if other != name), *ROUTERS]
        require(
            like in ROUTERS,
            f"variant {name!r} is like {like!r}, which is neither a variant nor a router; choose"
            f" from {', '.join(known)}",
        )
        return {"router": like} | given
    return _given(like, options, (*below, name)) | given


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def variant_tree(
    base: config_dict.ConfigDict, variant: Variant, seed: int
) -> config_dict.ConfigDict:
    """The experiment of one run of a study.

    Options of the router in `base` stay where the variant has the same router, and are unset where
    it has another. There is no continuation at the end, and at least `LOGGED_STEPS` steps are
    logged.

    Args:
        base: the study's experiment; it is not changed.
        variant: what is different.
        seed: of initial weights, order of the data, and random choices.

    Raises:
        ValueError: a key is unknown, or its value of another type.
    """
    tree = experiment(**base.to_dict())
    if variant.router != base.moe.router:
        unset = [key for key in flat_keys(tree) if key.startswith("moe.routing.")]
        update(tree, dict.fromkeys(unset))
    changes: dict[str, Any] = {"moe.router": variant.router, "seed": seed, "prompt": ""}
    changes["log_every"] = max(1, min(tree.log_every, tree.steps // LOGGED_STEPS))
    if not variant.causal:
        # The one dispatcher that takes experts' choices. That it is not causal is meant: it is
        # only compared, and the tables say so.
        changes["moe.dispatch"] = "capacity"
        changes |= {"moe.routing.acausal": True} if tree.task == "lm" else {}
    update(tree, changes)
    for key, value in variant.options.items():
        require(
            not isinstance(value, Mapping),
            f"variant {variant.name!r}: {key!r} is an object; write its keys with dots, such as"
            ' "moe.routing.bias_rate": 0.01',
        )
    try:
        update(tree, variant.options)
    except ValueError as error:
        raise ValueError(f"variant {variant.name!r}: {error}") from error
    return tree


def check(tree: config_dict.ConfigDict) -> None:
    """Refuses, without reading data or compiling, an experiment that could not be trained.

    Raises:
        ValueError: says what is wrong.
    """
    config = freeze(tree)
    require(
        any(moe_layers(config.model)),
        "the model has no block with experts, so there are no routers to compare; set"
        " model.moe_every to 1",
    )
    require(
        config.model.moe.experts >= 2,
        "moe.experts=1 leaves nothing to route; set moe.experts to 2 or more",
    )
    pure.abstract_split(model_maker(config.model, config.seed))


def tuning_points(variant: Variant) -> list[dict[str, float]]:
    """The values that `--tune` tries for a variant; one without options where nothing is tuned."""
    if variant.router not in TUNING:
        return [{}]
    for key, values in (TUNING[variant.router], COMMON_TUNING):
        if key not in variant.options:
            return [{key: value} for value in values]
    return [{}]
