"""The runs of a study: which there are, which are done, and the training of those that are not."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import config_dict

from emoe_jax.multihost import gather_texts
from train import cluster, notice, outcome
from train.guards import Diverged
from train.loop import train
from train.outcome import Result
from train.run import CHECKPOINTS
from train.variants import Variant, check, choose, variant_tree

LOGGER = logging.getLogger(__name__)

PRINTED = "train.txt"
"""What the training of a run printed."""


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

    @property
    def key(self) -> tuple[str, int]:
        """Variant and seed, which name the run within its study."""
        return self.variant.name, self.tree.seed


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


def check_known(
    base: config_dict.ConfigDict, jobs: Sequence[Job], known: Sequence[Result]
) -> dict[tuple[str, int], Result]:
    """Results that were made elsewhere, by variant and seed; refuses what cannot be compared.

    Args:
        base: the study's experiment.
        jobs: the runs that it asks for.
        known: results, also of variants and seeds that it does not ask for.

    Raises:
        ValueError: one is of another configuration than the study's.
    """
    trees = {job.key: job.tree for job in jobs}
    found = {(result["variant"], result["seed"]): result for result in known}
    for (name, seed), result in found.items():
        (variant,) = choose([name], {name: {"router": result["router"], **result["options"]}})
        tree = trees.get((name, seed)) or variant_tree(base, variant, seed)
        outcome.check_same(result, tree)
    return found


def _but_seed(job: Job) -> str:
    return repr((job.variant.name, sorted(job.variant.options.items())))


def run_jobs(
    jobs: Sequence[Job],
    known: Mapping[tuple[str, int], Result] | None = None,
    *,
    measured: bool = True,
    made: Callable[[Sequence[Result]], None] = lambda _: None,
) -> list[Result]:
    """Trains and measures what is not done yet; all results, in order.

    Args:
        jobs: the runs.
        known: results of runs that were made elsewhere, and are not repeated.
        measured: whether diversity is measured and the log gathered. Otherwise a result holds the
            scalars of the last evaluation alone.
        made: is given what is there so far after every run that was made.
    """
    found = [_found(job, known or {}, measured) for job in jobs]
    left = [number for number, result in enumerate(found) if result is None]
    there = sum(job.key in (known or {}) for job in jobs)
    if len(left) < len(jobs):
        other = len(jobs) - len(left) - there
        LOGGER.info("%d runs are in --results, %d in their folders already", there, other)
    with notice.heeded(jobs[0].tree.checkpoint.grace_s), _compiled_once():
        took: list[float] = []
        for done, number in enumerate(left):
            job, rest = jobs[number], len(left) - done
            time_left = f"; about {rest * statistics.fmean(took) / 60:.0f} min left" if took else ""
            LOGGER.info("run %d of %d: %s%s", done + 1, len(left), job.folder, time_left)
            began = time.perf_counter()
            found[number] = result = _run(job, measured)
            if cluster.is_first():
                outcome.write_result(job.folder / outcome.RESULT, result)
            made([result for result in found if result is not None])
            took.append(time.perf_counter() - began)
    return [result for result in found if result is not None]


def _found(job: Job, known: Mapping[tuple[str, int], Result], measured: bool) -> Result | None:
    """The result of a run, made elsewhere or in its folder; None where there is none yet."""
    if job.key in known:
        return known[job.key]
    file = job.folder / outcome.RESULT
    return outcome.read_result(file, measured=measured) if _there(file) else None


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
