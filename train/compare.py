"""Compares routers: python -m train.compare --config=configs/NAME.py --workdir=DIR --routers=A,B.

Trains every variant (a router, or a router with options from --options=FILE.json) with every seed,
one run after another, into DIR/VARIANT/seed_N. A seed decides the initial weights and the batches,
so runs of one seed differ in the router alone. Seeds are gone through one by one, so that a study
that is stopped has whole pairs; the same command goes on where it was stopped.

Prints one table a metric: mean over seeds, and the difference to the baseline seed by seed, each
with a 95 % t-interval; from five seeds on a bootstrap interval stands beside the second. Figures
are in DIR/figures, all numbers in --json=FILE.

With --tune, trains instead a few values of one option for every variant (`variants.TUNING`) with
one seed that is not of the study, and writes those with the lowest held-out loss to DIR/tuned.json,
which the study then takes as --options=DIR/tuned.json.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import pathlib
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from absl import flags
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import config_dict, config_flags

from emoe_jax.config import require
from emoe_jax.multihost import gather_texts
from train import cli, cluster, figures, notice, outcome, tables
from train.comparison import Interval, compare, shown
from train.config import digest
from train.guards import Diverged
from train.logs import read_metrics
from train.loop import train
from train.outcome import Result
from train.run import CHECKPOINTS
from train.variants import Variant, check, choose, read_options, tuning_points, variant_tree

LOGGER = logging.getLogger(__name__)

TUNED = "tuned.json"
PRINTED = "train.txt"
"""What the training of a run printed."""

DEFAULT_BASELINE = "loss_free"


class Job(NamedTuple):
    """One run that a study needs.

    Attributes:
        folder: the run's.
        variant: what is trained.
        tree: its experiment.
    """

    folder: pathlib.Path
    variant: Variant
    tree: config_dict.ConfigDict


def study_jobs(
    base: config_dict.ConfigDict,
    workdir: pathlib.Path,
    variants: Sequence[Variant],
    seeds: Sequence[int],
) -> list[Job]:
    """The runs of a study, all variants of one seed before the next seed."""
    return [
        Job(workdir / variant.name / f"seed_{seed}", variant, variant_tree(base, variant, seed))
        for seed in seeds
        for variant in variants
    ]


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


def check_jobs(jobs: Sequence[Job]) -> None:
    """Refuses, before any training, what could not be trained or not be compared.

    Raises:
        ValueError: a configuration is impossible, or a folder holds a run of another one.
    """
    for job in jobs:
        outcome.check_unchanged(job.folder, job.tree)
    # Seeds differ in nothing that could be wrong.
    alike = {_but_seed(job): job for job in jobs}
    for job in alike.values():
        try:
            check(job.tree)
        except ValueError as error:
            raise ValueError(f"variant {job.variant.name!r}: {error}") from error


def _but_seed(job: Job) -> str:
    return repr((job.variant.name, sorted(job.variant.options.items())))


def run_jobs(jobs: Sequence[Job], *, measured: bool = True) -> list[Result]:
    """Trains and measures what is not done yet; all results, in order.

    Args:
        jobs: the runs.
        measured: whether diversity is measured and the log gathered. Otherwise a result holds the
            scalars of the last evaluation alone.
    """
    with notice.heeded(jobs[0].tree.checkpoint.grace_s), _compiled_once():
        return _run_each(jobs, measured)


def _run_each(jobs: Sequence[Job], measured: bool) -> list[Result]:
    results: list[Result] = []
    took: list[float] = []
    for number, job in enumerate(jobs, start=1):
        file = job.folder / outcome.RESULT
        if _there(file):
            results.append(outcome.read_result(file))
            continue
        left = ""
        if took:
            hours = (len(jobs) - number + 1) * sum(took) / len(took) / 3600
            left = f"; about {hours:.1f} h for what is left"
        LOGGER.info("run %d of %d: %s%s", number, len(jobs), job.folder, left)
        began = time.perf_counter()
        results.append(_run(job, measured))
        if cluster.is_first():
            outcome.write_result(file, results[-1])
        took.append(time.perf_counter() - began)
    return results


def _run(job: Job, measured: bool) -> Result:
    fresh = not _there(job.folder / CHECKPOINTS)
    began = time.perf_counter()
    try:
        with _printing_to(job.folder / PRINTED):
            scalars, rows = train(job.tree, job.folder)
    except Diverged:
        if measured:
            raise
        scalars, rows = {"eval/loss": math.nan}, []  # a point that is not chosen
    seconds = time.perf_counter() - began if fresh else None
    if measured:
        return outcome.measure(job.folder, job.variant, job.tree, scalars, rows, seconds)
    metrics = {"loss": scalars["eval/loss"], "seconds": seconds}
    return {
        "variant": job.variant.name,
        "seed": job.tree.seed,
        "config_digest": digest(job.tree),
        "metrics": metrics,
    }


@contextlib.contextmanager
def _compiled_once() -> Iterator[None]:
    """Compiles once what several runs have in common, unless JAX keeps it somewhere already.

    Runs that differ in their seed have the same programs. They are kept for this process alone:
    another machine might not be able to run them.
    """
    settings = {
        "jax_compilation_cache_dir": "",
        "jax_persistent_cache_min_compile_time_secs": 0.1,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    if before["jax_compilation_cache_dir"]:
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        for name, value in (settings | {"jax_compilation_cache_dir": folder}).items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        try:
            yield
        finally:
            for name, value in before.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()


def _there(path: pathlib.Path) -> bool:
    """Whether process 0 sees a file or a folder: all processes shall go the same way."""
    return gather_texts(str(path.exists()))[0] == "True"


@contextlib.contextmanager
def _printing_to(file: pathlib.Path) -> Iterator[None]:
    """Sends what is printed inside to a file: a study prints its own tables alone."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            yield
    finally:
        if cluster.is_first() and file.parent.is_dir():
            with file.open("a", encoding="utf-8") as out:
                out.write(printed.getvalue())


# -------------------------------------------------------------------------------------- tuning


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


def notes(variants: Sequence[Variant], task: str) -> dict[str, str]:
    """What is to be said of a variant wherever its numbers stand."""
    if task != "lm":
        return {}
    return {variant.name: "not causal" for variant in variants if not variant.causal}


def check_same_start(results: Sequence[Result]) -> None:
    """Warns where runs of one seed did not begin with the same weights."""
    starts: dict[int, dict[str, str]] = {}
    for result in results:
        starts.setdefault(result["seed"], {})[result["variant"]] = result["initial_weights"]
    for seed, by_variant in starts.items():
        if len(set(by_variant.values())) > 1:
            LOGGER.warning(
                "seed %d: the variants began with different weights beside their routers', so"
                " their differences are not paired: %s",
                seed,
                by_variant,
            )


def draw(
    jobs: Sequence[Job], results: Sequence[Result], rows: Sequence[Any], to: pathlib.Path
) -> None:
    """Writes the figures of a study into a folder."""
    found = {(row["variant"], row["metric"]): row for row in rows}
    names = list(dict.fromkeys(job.variant.name for job in jobs))

    def interval(name: str, metric: str) -> Interval:
        row = found[name, metric]
        return Interval(row["mean"], row["low"], row["high"])

    points = {name: (interval(name, "max_vio"), interval(name, "loss")) for name in names}
    figures.loss_against_balance(to / "loss_against_balance.png", points)
    curves: dict[str, list[dict[int, float]]] = {}
    for job in jobs:
        curve = outcome.violations(read_metrics(job.folder))
        curves.setdefault(job.variant.name, []).append(curve)
    floor = results[0]["metrics"]["batch_max_vio_floor"]
    figures.balance_over_training(to / "balance_over_training.png", curves, floor)
    seed = results[0]["seed"]
    loads = {result["variant"]: result["load"] for result in results if result["seed"] == seed}
    figures.load_per_expert(to / "load_per_expert.png", loads, seed)


# -------------------------------------------------------------------------------------- program


def choose_baseline(given: str, names: Sequence[str]) -> str:
    """The variant that differences are to: loss_free, or the first, where none is given.

    Raises:
        ValueError: it is not among the variants.
    """
    if not given:
        return DEFAULT_BASELINE if DEFAULT_BASELINE in names else names[0]
    require(
        given in names,
        f"--baseline={given} is not among the variants that are compared, {', '.join(names)}; add"
        " it to --routers, or name one of them",
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
    baseline = choose_baseline(args.baseline, [variant.name for variant in variants])
    jobs = study_jobs(base, workdir, variants, range(base.seed, base.seed + args.seeds))
    cluster.together(lambda: check_jobs(jobs))
    results = run_jobs(jobs)
    check_same_start(results)
    if not cluster.is_first():
        return
    rows = compare(results, baseline)
    for table in shown(rows, baseline, notes(variants, base.task)):
        tables.print_table(table["title"], table["rows"])
    draw(jobs, results, rows, workdir / "figures")
    print(f"figures: {workdir / 'figures'}")
    if args.json:
        listed = [{"table": "runs"} | result for result in results]
        summary = [row | {"baseline": baseline} for row in rows]
        tables.write_json(args.json, outcome.strict(summary + listed))


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
    flags.DEFINE_integer("seeds", 5, "Seeds, from the configuration's seed on.", lower_bound=1)
    flags.DEFINE_string("options", "", "JSON file of variants: name to router and dotted keys.")
    flags.DEFINE_string(
        "baseline", "", "Variant that differences are to; loss_free, or else the first."
    )
    flags.DEFINE_bool("tune", False, "Tune each variant; writes tuned.json for --options.")
    flags.DEFINE_integer("tune_seed", 1000, "Seed of --tune, not one of the study's.")
    flags.DEFINE_string("json", "", "File to write all numbers to.")
    cluster.define_flags()
    flags.mark_flag_as_required("config")
    cli.run(main)
