"""What one run of a study has come to: its result.json.

Measured on the trained model, and gathered from the lines that the run logged.
"""

from __future__ import annotations

import hashlib
import json
import math
import pathlib
import re
import reprlib
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from ml_collections import config_dict

from emoe_jax import json_file
from emoe_jax.config import ViTConfig, require
from emoe_jax.sharding import replicated
from train import cluster
from train.comparison import noise_floor
from train.config import changed_keys, filled, to_json
from train.data.text import TextData
from train.diversity import compile_similarity, expert_similarity, mean_similarity, swap_cost
from train.evaluate import Rows, Scalars, compile_evaluate
from train.flops import image_tokens
from train.initial import initial_params, place_params
from train.logs import read_metrics
from train.run import CONFIG_FILE, Run, load_trained, read_config
from train.tables import run_facts
from train.variants import Variant

Tree = Any
Result = dict[str, Any]

RESULT = "result.json"

RUNS = "runs"
"""`table` of those rows of a study's JSON that are results."""

CURVE_POINTS = 60
"""Points of a curve at most: single batches are noisy."""

SIMILARITY = "similarity.npz"
"""Similarity matrices [E,E] by layer, of the trained model."""

SHOWN = 8
"""Keys in which configurations differ that an error names."""

SETTLED = 50
"""Step that ends a run's beginning."""

_ROUTING = re.compile(r"(eval/)?router/(layer_\d+)/(\w+)")


def measure(
    workdir: pathlib.Path,
    variant: Variant,
    tree: config_dict.ConfigDict,
    scalars: Scalars,
    rows: Rows,
    seconds: float | None,
) -> Result:
    """The result of a finished run; similarity matrices go to `similarity.npz` beside it.

    Args:
        workdir: the run's folder.
        variant: what was trained.
        tree: its experiment.
        scalars: of the last evaluation.
        rows: routing table of the last evaluation.
        seconds: of training; None where the run was resumed.
    """
    run, state, step = load_trained(workdir, {})
    require(
        step == tree.steps,
        f"{workdir} holds a checkpoint of step {step}, not of the last, {tree.steps}; give the"
        " same command again, which trains the rest",
    )
    evaluator, program = compile_evaluate(run), compile_similarity(run)
    untrained = initial_state(run)
    matrices = expert_similarity(run, state, program=program)
    before = expert_similarity(run, untrained, program=program)
    similarities = [mean_similarity(matrix) for matrix in matrices.values()]
    measured = {
        "similarity": statistics.fmean(similarities),
        "similarity_worst": max(similarities),
        "similarity_untrained": statistics.fmean(map(mean_similarity, before.values())),
        "swap_cost": swap_cost(run, evaluator, state),
        "swap_cost_untrained": swap_cost(run, evaluator, untrained),
    }
    history = read_metrics(workdir)
    if cluster.is_first():
        arrays: dict[str, Any] = {k: v.astype(np.float32) for k, v in matrices.items()}
        np.savez(workdir / SIMILARITY, **arrays)
    final = {name.removeprefix("eval/"): value for name, value in scalars.items()}
    task = {name: final.get(name) for name in ("loss", "bits_per_byte", "accuracy")}
    return {
        "variant": variant.name,
        "router": variant.router,
        "options": dict(variant.options),
        "causal": variant.causal,
        "seed": tree.seed,
        "config": json.loads(to_json(tree)),
        "initial_weights": fingerprint(run, untrained["params"]),
        "metrics": task
        | from_history(history)
        | from_scalars(scalars)
        | floors(run)
        | measured
        | {"seconds": seconds, "rate": rate(history, run.unit)},
        "load": {row["layer"]: [round(share, 6) for share in row["load"]] for row in rows},
        "batch_max_vio": curve(violations(history), tree.steps),
        "made_by": run_facts(),
    }


def initial_state(run: Run) -> Tree:
    """`params` and `router` from which the training of a run began (before any calibration)."""
    state = cluster.compile_together(run.init.lower())()
    params = state["params"]
    if run.config.init_from:
        params = place_params(params, initial_params(run)[0])
    return {"params": params, "router": state["router"]}


def fingerprint(run: Run, params: Tree) -> str:
    """Hash of all parameters but the routers': equal where two runs begin with the same weights.

    Of each array its sum and its sum of squares are hashed, so that no array has to be gathered.
    """
    leaves = traverse_util.flatten_dict(params)
    compared = [leaves[path] for path in sorted(leaves) if "router" not in path]

    def sums(arrays: Sequence[jax.Array]) -> jax.Array:
        return jnp.stack([jnp.stack([jnp.sum(a), jnp.sum(jnp.square(a))]) for a in arrays])

    values = jax.jit(sums, out_shardings=replicated(run.mesh))(compared)
    return hashlib.sha256(np.asarray(values, np.float32).tobytes()).hexdigest()[:16]


def floors(run: Run) -> dict[str, float]:
    """What MaxVio would be if chance alone decided, see `comparison.noise_floor`."""
    model, data = run.config.model, run.data
    E, K = model.moe.experts, model.moe.top_k
    if isinstance(data, TextData):
        heldout, batch = data.heldout_targets, run.units_per_step
    else:
        assert isinstance(model, ViTConfig)
        length = image_tokens(model)
        heldout, batch = data.heldout_images * length, run.config.batch * length
    return {
        "max_vio_floor": noise_floor(E, K, heldout),
        "batch_max_vio_floor": noise_floor(E, K, batch),
    }


def from_scalars(scalars: Scalars) -> dict[str, float | None]:
    """Metrics of the last evaluation's routing: means over layers, and the worst layer."""
    vio = _of_layers(scalars, "max_vio", evaluation=True)
    return {
        "max_vio": _mean(vio),
        "max_vio_worst": max(vio),
        "drop_at_capacity": _mean(_of_layers(scalars, "drop_at_capacity", evaluation=True)),
        "drop_fraction": _mean(_of_layers(scalars, "drop_fraction", evaluation=True)),
    }


def from_history(history: Sequence[Mapping[str, float]]) -> dict[str, float | None]:
    """Metrics of the logged steps, and of all evaluations from step `SETTLED` on.

    Args:
        history: from `logs.read_metrics`.

    Returns:
        None where no step tells: in runs of fewer steps, or from before a scalar was logged.
    """
    late = [line for line in history if line["step"] >= SETTLED]
    early = [line for line in history if line["step"] <= SETTLED]

    def values(lines: Iterable[Mapping[str, float]], name: str) -> list[float]:
        return [value for line in lines for value in _of_layers(line, name)]

    def most(name: str, evaluation: bool) -> float | None:
        """The largest sum over layers of any step."""
        sums = [values for line in late if (values := _of_layers(line, name, evaluation))]
        return max(map(sum, sums), default=None)

    return {
        "dead": most("dead", evaluation=True),
        "batch_dead": most("dead", evaluation=False),
        "batch_max_vio": _mean(values(late, "max_vio")),
        "early_max_vio": _mean(values(early, "max_vio")),
        "batch_drop_at_capacity": _mean(values(late, "drop_at_capacity")),
    }


def violations(history: Sequence[Mapping[str, float]]) -> dict[int, float]:
    """MaxVio of single batches, mean over layers, by logged step."""
    means = {int(line["step"]): _mean(_of_layers(line, "max_vio")) for line in history}
    return {step: value for step, value in means.items() if value is not None}


def curve(values: Mapping[int, float], steps: int, points: int = CURVE_POINTS) -> list[list[float]]:
    """A curve of at most so many points, each the mean over an equal part of the steps.

    Args:
        values: by step.
        steps: of the run. Runs of as many have their points at the same places.
        points: how many; there is none where no step of a part has a value.

    Returns:
        The middle of each part, and the mean over it.
    """
    width = max(1.0, steps / points)
    parts: dict[int, list[float]] = {}
    for step in sorted(values):
        parts.setdefault(int((step - 1) / width), []).append(values[step])
    middles = [(part + 0.5) * width + 0.5 for part in parts]
    return [middles, [statistics.fmean(part) for part in parts.values()]]


def rate(history: Sequence[Mapping[str, float]], unit: str) -> float | None:
    """Median of the logged rates."""
    name = f"train/{unit}_per_second"
    rates = [line[name] for line in history if name in line]
    return statistics.median(rates) if rates else None


def _of_layers(scalars: Mapping[str, float], name: str, evaluation: bool = False) -> list[float]:
    """The values of a routing metric in all layers; none where it was not logged."""
    found = []
    for key, value in scalars.items():
        match = _ROUTING.fullmatch(key)
        if match and match[3] == name and bool(match[1]) == evaluation:
            found.append(value)
    return found


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


# ------------------------------------------------------------------------------------ as a file


def write_result(file: pathlib.Path, result: Result) -> None:
    """Writes a result so that there is a whole one or none; numbers that are not finite as text."""
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(strict(result), indent=2, allow_nan=False) + "\n")
    temporary.replace(file)


def strict(tree: Any) -> Any:
    """A tree for JSON, which has no NaN and no infinities: they become text, as in `logs`."""
    if isinstance(tree, Mapping):
        return {name: strict(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [strict(value) for value in tree]
    if isinstance(tree, float) and not math.isfinite(tree):
        return "NaN" if math.isnan(tree) else ("Infinity" if tree > 0 else "-Infinity")
    return tree


def read_result(file: pathlib.Path, *, measured: bool = True) -> Result:
    """Reads a result.

    Args:
        file: of a run.
        measured: whether it is one of `measure`, or that of a point of a tuning.

    Raises:
        ValueError: the file is damaged, or lacks what results had not at its time.
    """
    try:
        result = json_file.read_object(file)
        return _whole(result) if measured else _with_numbers(result)
    except _DAMAGED as error:
        raise ValueError(
            f"{file} is damaged or of an earlier version ({_said(error)}); delete it: the same"
            " command then measures the run again"
        ) from error


def read_results(path: str) -> list[Result]:
    """The results in a file that `python -m train.compare --json` wrote.

    Args:
        path: of the file; "" gives none.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is another kind of file, damaged, or of an earlier version.
    """
    if not path:
        return []
    file = pathlib.Path(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"--results={path} is no file; give the one that --json=FILE has written"
        )
    try:
        rows = json_file.read_object(file)["rows"]
        results = [_whole(row) for row in rows if row["table"] == RUNS]
        names = [(result["variant"], result["seed"]) for result in results]
        require(len(set(names)) == len(names), "a run is there twice")
        return results
    except _DAMAGED as error:
        raise ValueError(
            f"--results={path} holds no results of this version: {_said(error)}; give a file that"
            " python -m train.compare --json=FILE has written"
        ) from error


_DAMAGED = (ValueError, TypeError, KeyError, AttributeError, OverflowError)


def _said(error: Exception) -> str:
    return f"there is no {error}" if isinstance(error, KeyError) else str(error)


def _with_numbers(result: Result) -> Result:
    """A result whose metrics are numbers or None, a loss among them."""
    metrics = {k: None if v is None else float(v) for k, v in result["metrics"].items()}
    require(metrics["loss"] is not None, "its loss is null")
    return result | {"metrics": metrics}


def _whole(result: Result) -> Result:
    """A result that has all that a comparison reads."""
    result = _with_numbers(result)
    for name in ("max_vio", "batch_max_vio_floor"):
        require(result["metrics"][name] is not None, f"its {name} is null")
    steps, values = ([float(value) for value in part] for part in result["batch_max_vio"])
    require(len(steps) == len(values), f"{len(steps)} steps with {len(values)} values")
    require(type(result["seed"]) is int, f"its seed is {reprlib.repr(result['seed'])}")
    words = {name: str(result[name]) for name in ("variant", "router", "initial_weights")}
    load = {k: [float(share) for share in shares] for k, shares in result["load"].items()}
    rest = {"options": dict(result["options"]), "made_by": dict(result["made_by"])}
    config = filled(result["config"])
    return (
        result | words | rest | {"load": load, "batch_max_vio": [steps, values], "config": config}
    )


def check_unchanged(workdir: pathlib.Path, tree: config_dict.ConfigDict) -> None:
    """Refuses a folder that holds a run of another configuration; where data lie may differ.

    Raises:
        ValueError: names the keys that differ.
    """
    file = workdir / CONFIG_FILE
    if not file.is_file():
        return
    _refuse_changes(
        f"{workdir} holds a run of",
        read_config(file),
        tree,
        "set these keys back, or use another --workdir",
    )


def check_same(result: Result, tree: config_dict.ConfigDict) -> None:
    """Refuses a result, from `read_results`, of another configuration.

    Data may lie elsewhere, and evaluations before the last, which change no weights, may have been
    more or fewer.

    Raises:
        ValueError: names the keys that differ.
    """
    _refuse_changes(
        f"--results has {result['variant']}, seed {result['seed']}, of",
        dict(result["config"]) | {"eval_every": tree.eval_every},
        tree,
        "set these keys back, or leave --results out",
    )


def _refuse_changes(what: str, before: Tree, tree: config_dict.ConfigDict, remedy: str) -> None:
    changed = changed_keys(before, tree.to_dict())
    changed = [line for line in changed if not line.partition(":")[0].endswith("_dir")]
    more = f"; and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
    require(
        not changed,
        f"{what} another configuration ({'; '.join(changed[:SHOWN])}{more}), and a study compares"
        f" runs of one; {remedy}",
    )
