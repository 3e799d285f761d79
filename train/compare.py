"""Compares routers: python -m train.compare --config=configs/NAME.py --workdir=DIR --routers=A,B.

Trains every variant (a router, or a router with options from --options=FILE.json) with every seed,
one run after another, into DIR/VARIANT/seed_N. A seed decides the initial weights and the batches,
so runs of one seed differ in the router alone. Seeds are gone through one by one, so that a study
that is stopped has whole pairs; the same command goes on where it was stopped. FILE.json names
variants, such as `{"no_offset": {"like": "whitened", "moe.routing.offset": false}}`, see
`train.variants`.

Prints one table a metric: mean over seeds, and the difference to the baseline seed by seed, each
with a 95 % t-interval; from five seeds on a bootstrap interval stands beside the second. Figures
are in DIR/figures, all numbers in --json=FILE. Such a file, given as --results, spares the runs
that are in it, and they are compared too: a study goes on in another folder, and new variants are
set beside published ones. The file of --json is written anew after every run.

With --tune, trains instead a few values of one option for every variant (`variants.TUNING`) with
one seed that is not of the study, and writes those with the lowest held-out loss to DIR/tuned.json,
which the study then takes as --options=DIR/tuned.json.
"""

from __future__ import annotations

import json
import logging
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import config_dict, config_flags

from emoe_jax.config import require
from emoe_jax.multihost import gather_texts
from emoe_jax.routers import router_class
from train import cli, cluster, figures, outcome, tables
from train.comparison import Interval, compare, shown
from train.outcome import Result
from train.study import Job, check_jobs, check_known, run_jobs, study_jobs
from train.variants import Variant, choose, read_options, tuning_points, variant_tree

LOGGER = logging.getLogger("train.compare")

TUNED = "tuned.json"

DEFAULT_BASELINE = "loss_free"


# -------------------------------------------------------------------------------------- tuning


def tuning_jobs(
    base: config_dict.ConfigDict, workdir: pathlib.Path, variants: Sequence[Variant], seed: int
) -> dict[str, list[tuple[dict[str, float], Job]]]:
    """By variant the points that are tried, each with its run."""
    jobs: dict[str, list[tuple[dict[str, float], Job]]] = {}
    for variant in variants:
        for point in tuning_points(variant):
            tried = variant.with_options(point)
            name = "_".join(f"{key}={value}" for key, value in point.items()) or "as_it_is"
            job = Job(
                workdir / "tune" / variant.name / name, tried, variant_tree(base, tried, seed)
            )
            jobs.setdefault(variant.name, []).append((point, job))
    return jobs


def tune(jobs: Mapping[str, list[tuple[dict[str, float], Job]]]) -> dict[str, dict[str, Any]]:
    """Trains all points and chooses; what `tuned.json` holds.

    Args:
        jobs: from `tuning_jobs`.

    Raises:
        ValueError: no point of a variant has a finite loss.
    """
    results = iter(run_jobs([job for tried in jobs.values() for _, job in tried], measured=False))
    chosen: dict[str, dict[str, Any]] = {}
    for name, tried in jobs.items():
        points = [point for point, _ in tried]
        losses = [next(results)["metrics"]["loss"] for _ in points]
        finite = [number for number, loss in enumerate(losses) if math.isfinite(loss)]
        require(
            bool(finite),
            f"variant {name!r} diverged at every point that was tried ({points}); lower"
            " optim.learning_rate",
        )
        best = min(finite, key=lambda number: losses[number])
        variant = tried[best][1].variant
        chosen[name] = {"router": variant.router, **variant.options} | {
            "tried": [
                point | {"loss": outcome.strict(loss)}
                for point, loss in zip(points, losses, strict=True)
            ]
        }
    return chosen


def tuning_rows(chosen: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each point that was tried."""
    rows = []
    for name, options in chosen.items():
        for point in options["tried"]:
            for key in [key for key in point if key != "loss"] or [""]:
                taken = key == "" or options[key] == point[key]
                value = {"variant": name, "key": key, "value": point.get(key)}
                rows.append(value | {"loss": point["loss"], "chosen": "yes" if taken else ""})
    return rows


# ------------------------------------------------------------------------------------- results


def notes(results: Sequence[Result], task: str) -> dict[str, str]:
    """What is to be said of a variant wherever its numbers stand."""
    if task != "lm":
        return {}
    acausal = (result for result in results if not router_class(result["router"]).CAUSAL)
    return {result["variant"]: "not causal" for result in acausal}


def check_same_start(results: Sequence[Result]) -> None:
    """Warns where runs of one seed did not begin with the same weights, or on other machines."""
    starts: dict[int, dict[str, str]] = {}
    for result in results:
        starts.setdefault(result["seed"], {})[result["variant"]] = result["initial_weights"]
    for seed, by_variant in starts.items():
        if len(set(by_variant.values())) > 1:
            LOGGER.warning(
                "seed %d: the variants began with different weights beside their routers' (or were"
                " made by processors that round differently), so their differences may not be"
                " paired: %s",
                seed,
                by_variant,
            )
    for fact in ("device", "commit", "versions"):
        made = {json.dumps(result["made_by"].get(fact)) for result in results}
        if len(made) > 1:
            LOGGER.warning(
                "runs differ in %s, and their cost is not to be compared: %s", fact, sorted(made)
            )


def draw(results: Sequence[Result], rows: Sequence[Any], to: pathlib.Path) -> None:
    """Writes the figures of a study into a folder."""
    found = {(row["variant"], row["metric"]): row for row in rows}
    names = list(dict.fromkeys(result["variant"] for result in results))

    def interval(name: str, metric: str) -> Interval:
        row = found[name, metric]
        return Interval(row["mean"], row["low"], row["high"])

    points = {name: (interval(name, "max_vio"), interval(name, "loss")) for name in names}
    figures.loss_against_balance(to / "loss_against_balance.png", points)
    curves: dict[str, list[dict[float, float]]] = {}
    for result in results:
        curve = dict(zip(*result["batch_max_vio"], strict=True))
        curves.setdefault(result["variant"], []).append(curve)
    floor = results[0]["metrics"]["batch_max_vio_floor"]
    figures.balance_over_training(to / "balance_over_training.png", curves, floor)
    seed = results[0]["seed"]
    loads = {result["variant"]: result["load"] for result in results if result["seed"] == seed}
    figures.load_per_expert(to / "load_per_expert.png", loads, seed)


# -------------------------------------------------------------------------------------- program


def choose_baseline(given: str, names: Sequence[str]) -> str:
    """The variant that differences are to: loss_free, or else the first, where none is given.

    Raises:
        ValueError: it is not among the variants.
    """
    if not given:
        return DEFAULT_BASELINE if DEFAULT_BASELINE in names else names[0]
    require(
        given in names,
        f"--baseline={given} is not among the variants that are compared, {', '.join(names)}; add"
        " it to --routers, or name one of these",
    )
    return given


def main(argv: list[str]) -> None:
    """Compares, or tunes."""
    args = flags.FLAGS
    base, workdir = args.config, pathlib.Path(args.workdir)
    variants = cluster.together(lambda: choose(args.routers, read_options(args.options)))
    if args.tune:
        seeds = range(base.seed, base.seed + args.seeds)
        require(
            args.tune_seed not in seeds,
            f"--tune_seed={args.tune_seed} is one of the study's seeds, {seeds.start} to"
            f" {seeds.stop - 1}; tune with another, such as {seeds.stop + 1000}",
        )
        points = tuning_jobs(base, workdir, variants, args.tune_seed)
        cluster.together(lambda: check_jobs([job for tried in points.values() for _, job in tried]))
        _tell_tuned(tune(points), workdir, args.json)
        return
    require(
        args.seeds >= 2,
        f"--seeds={args.seeds} leaves no interval: it takes 2 seeds or more; for a single run of"
        " one router use python -m train",
    )
    jobs = study_jobs(base, workdir, variants, range(base.seed, base.seed + args.seeds))
    cluster.together(lambda: check_jobs(jobs))
    there = cluster.together(lambda: outcome.read_results(args.results))
    # Processes may see a file's new content late: all take what the first one sees.
    there = json.loads(gather_texts(json.dumps(there))[0])
    known = check_known(base, jobs, there)
    names = dict.fromkeys([*(variant.name for variant in variants), *(name for name, _ in known)])
    baseline = choose_baseline(args.baseline, list(names))
    results = run_jobs(jobs, known, made=lambda so_far: _keep(args.json, so_far, known))
    results = _with_known(results, known)
    check_same_start(results)
    if not cluster.is_first():
        return
    rows = compare(results, baseline)
    if args.json:
        _keep(args.json, results, known, [row | {"baseline": baseline} for row in rows])
    for table in shown(rows, baseline, notes(results, base.task)):
        tables.print_table(table["title"], table["rows"])
    draw(results, rows, workdir / "figures")
    print(f"figures: {workdir / 'figures'}")


def _with_known(results: Sequence[Result], known: Mapping[tuple[str, int], Result]) -> list[Result]:
    """Results, and behind them those that are known besides: a study only grows."""
    have = {(result["variant"], result["seed"]) for result in results}
    return [*results, *(result for key, result in known.items() if key not in have)]


def _keep(
    path: str,
    results: Sequence[Result],
    known: Mapping[tuple[str, int], Result],
    summary: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Writes what there is to --json, after every run: the rest of a study needs no more."""
    if path and cluster.is_first():
        listed = [{"table": outcome.RUNS} | result for result in _with_known(results, known)]
        tables.write_json(path, outcome.strict([*summary, *listed]))


def _tell_tuned(chosen: Mapping[str, Mapping[str, Any]], workdir: pathlib.Path, path: str) -> None:
    if not cluster.is_first():
        return
    file = workdir / TUNED
    file.write_text(json.dumps(chosen, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    rows = tuning_rows(chosen)
    tables.print_table("Tuning: one seed, lowest held-out loss", rows)
    print(f"chosen options, for --options: {file}")
    if path:
        tables.write_json(path, rows)


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "Experiment.", lock_config=True)
    flags.DEFINE_string("workdir", None, "Folder of the study.", required=True)
    flags.DEFINE_list("routers", None, "Routers, or names from --options.", required=True)
    flags.DEFINE_integer(
        "seeds",
        5,
        "Seeds, from the configuration's seed on; 2 or more but with --tune.",
        lower_bound=1,
    )
    flags.DEFINE_list("options", [], "JSON files of variants: name to router and dotted keys.")
    flags.DEFINE_string("results", "", "File that --json has written: its runs are not repeated.")
    flags.DEFINE_string(
        "baseline", "", "Variant that differences are to; loss_free, or else the first."
    )
    flags.DEFINE_bool("tune", False, "Tune each variant; writes tuned.json for --options.")
    flags.DEFINE_integer("tune_seed", 1000, "Seed of --tune, not one of the study's.")
    flags.DEFINE_string("json", "", "File to write all numbers to.")
    cluster.define_flags()
    flags.mark_flag_as_required("config")
    cli.run(main)
