"""The training program, in the order in which things happen."""

from __future__ import annotations

import logging
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import config_dict

from emoe_jax.checkpoint import Checkpoints, Newest
from emoe_jax.config import (
    moe_layers,
    require,
)
from emoe_jax.dispatch.selfcheck import check_exchange
from emoe_jax.sharding import replicated
from train import cluster, notice, provenance, sample
from train.claim import claim
from train.config import ExperimentConfig, digest, freeze
from train.describe import count_parameters, describe
from train.evaluate import (
    Evaluator,
    Rows,
    Scalars,
    begin_evaluate,
    evaluate,
    print_evaluation,
)
from train.guards import META, RECORD, Fault, Guard, Passing, Record
from train.initial import check_frozen, initial_params, place_params
from train.logs import RunLog
from train.provenance import identity
from train.rescue import Rescue
from train.run import Run, build, open_checkpoints
from train.settle import begin_forward, calibrate, settle
from train.step import compiler_options
from train.telemetry import Meter
from train.watchdog import Watchdog

Tree = Any

LOGGER = logging.getLogger(__name__)

PROFILE = "profile"
"""Folder of the trace in the run's folder."""

PROFILE_AFTER = 10
"""Steps before the profile begins, so that it shows the steady state."""


def train(tree: config_dict.ConfigDict, workdir: pathlib.Path) -> tuple[Scalars, Rows]:
    """Trains an experiment to its end, or goes on with it from its last checkpoint.

    Every process of a run calls it with the same arguments, see `train.cluster`.

    Args:
        tree: the experiment's keys.
        workdir: the run's folder, made if absent.

    Returns:
        Scalars and routing table of the last evaluation, see `evaluate.evaluate`.

    Raises:
        ValueError: something in the input is wrong, or another training is at work in the folder;
            raised before anything is compiled.
        guards.Diverged: steps were not finite again and again.
    """
    cluster.check_same(tree.to_dict())
    config = freeze(tree)
    notice.begin()
    cluster.share_folder(workdir)
    with claim(workdir):
        return _train_here(tree, config, workdir)


def _train_here(
    tree: config_dict.ConfigDict, config: ExperimentConfig, workdir: pathlib.Path
) -> tuple[Scalars, Rows]:
    """The training, in a folder where no other one is at work."""
    # ---------------------------------------------------------------- data and model
    run = cluster.first_then_others(lambda: build(config, workdir))
    config = run.config
    # The prompt is continued at the end; whether it can be is known now.
    if config.prompt:
        sample.prompt_ids(run, config.prompt, tokens=1)
    describe(run)
    _try_exchange(run)

    # ------------------------------------------------ batches, and the state of a run that goes on
    with open_checkpoints(run, workdir) as checkpoints, cluster.Compiler() as compiler:
        guard = Guard(config, workdir, digest(identity(config)))
        given = run.data.train_iterator(config.batch, seed=config.seed, rows=run.rows(config.batch))
        batches = Passing(given, guard)
        example = _example(given)
        newest = _newest(run, checkpoints)
        resumed = None if newest is None else newest.step
        state = None
        if newest is not None:
            state = _resume(run, checkpoints, newest, batches, guard)
        elif guard.rollbacks:
            told = guard.passed(), workdir / RECORD
            LOGGER.warning("batches %s are passed over, as %s says; delete it to begin anew", *told)

        # ------------------------- programs: each is compiled while the next is traced
        start = forward = train_step = _nothing
        if newest is None:
            start = _begin_start(run, compiler)
        if resumed != config.steps:
            forward = begin_forward(run, example, compiler, resumed=resumed is not None)
            train_step = begin_train(run, example, compiler)
        evaluator = begin_evaluate(run, compiler)
        provenance.write_config(tree, workdir)
        # All of them before any runs, or processes meet: the compiler of a GPU times kernels there.
        compiler.finish()
        passes = _Passes(train_step(), forward(), evaluator())

        # ------------------------------------------------------------ training, unless it is done
        if state is None:
            state = _begin(run, start, passes.forward, batches, guard)
        result = None
        if resumed != config.steps:
            about = Record(guard, provenance.meta(tree, config, workdir))
            watchdog, rescue = Watchdog(config.guard, workdir), Rescue(checkpoints, about)
            with watchdog, rescue, _Compilations() as counter:
                parts = _Parts(
                    *(run, batches, passes, checkpoints, counter, about, guard, watchdog, rescue)
                )
                state, result = _train(parts, state, resumed)
        batches.close()
    scalars, rows = result or evaluate(run, passes.evaluator, state)

    _show(run, state, scalars, rows, workdir)
    return scalars, rows


def _show(run: Run, state: Tree, scalars: Scalars, rows: Rows, workdir: pathlib.Path) -> None:
    """Prints the result of a run; every process takes part in continuing the prompt."""
    prompt, text = run.config.prompt, ""
    if prompt:
        text = sample.continue_text(run, state, prompt)
    if not cluster.is_first():
        return
    print_evaluation(run, scalars, rows, run.config.steps)
    if prompt:
        print(f"\nA continuation of {prompt!r}:\n{prompt}{text}\n")
    print(f"run folder: {workdir}")


def _example(batches: Any) -> dict[str, np.ndarray]:
    """The next batch, which stays the next."""
    position = batches.get_state()
    batch: dict[str, np.ndarray] = next(batches)
    batches.set_state(position)
    return batch


def _try_exchange(run: Run) -> None:
    """Tries what is not to be trusted: the ragged kernel of an accelerator."""
    moe, spread = run.config.model.moe, run.mesh.shape["expert"] > 1
    used = spread and moe.dispatch != "dense" and any(moe_layers(run.config.model))
    if used and moe.exchange == "ragged_all_to_all" and jax.default_backend() != "cpu":
        check_exchange(moe, run.mesh, _compiler_options(run))


def _nothing() -> None:
    """Waits for no program: there is none."""


def _begin_start(run: Run, compiler: cluster.Compiler) -> Callable[[], Tree]:
    """Begins to compile what makes the training state of step 0; returns what makes it, once.

    It has the weights that `init_from` names.
    """
    # Read before anything is compiled.
    taken = _initial(run) if run.config.init_from else {}
    if run.config.optim.trainable and not run.config.init_from:
        LOGGER.warning("what optim.trainable leaves out stays as it is drawn: init_from is empty")
    program = compiler.begin(run.init.lower())

    def start() -> Tree:
        state = program()()
        params = place_params(state["params"], taken)
        taken.clear()
        return state | {"params": params}

    return start


def _initial(run: Run) -> Tree:
    """The parameters that are taken from `init_from`."""
    taken, notes = initial_params(run)
    for note in notes:
        LOGGER.info("init_from: %s", note)
    check_frozen(run, taken)
    LOGGER.info("%s parameters start from %s", f"{count_parameters(taken):,}", run.config.init_from)
    return taken


def _newest(run: Run, checkpoints: Checkpoints) -> Newest | None:
    """The newest whole checkpoint, None where there are none at all.

    Raises:
        ValueError: it is of another run than the configuration's; before its arrays are read.
    """
    workdir = checkpoints.directory.parent

    def check(step: int, meta: Tree) -> None:
        require(
            run.config.steps >= step,
            f"steps={run.config.steps}, but {workdir} is at step {step} already; set steps to"
            f" {step} or more, or use another --workdir",
        )
        facts = {name: value for name, value in meta.items() if name != META}
        provenance.check(run.config, facts, workdir)

    return checkpoints.restore_newest(run.abstract, check)


def _begin(
    run: Run, start: Callable[[], Tree], forward: Any, batches: Passing, guard: Guard
) -> Tree:
    """The training state of the start; batches and guard go there too."""
    guard.restore({}, 0)
    batches.seek(0, None)
    return calibrate(run, forward, start())


def _resume(
    run: Run, checkpoints: Checkpoints, newest: Newest, batches: Passing, guard: Guard
) -> Tree:
    """The training state of a checkpoint; moves the batches to its position.

    Newer ones, which are damaged, are set aside once it is clear that the run goes on without them.
    """
    step, restored, damaged = newest
    workdir = checkpoints.directory.parent
    guard.restore(restored.meta.pop(META, {}), step)
    for (bad, why), name in zip(damaged.items(), checkpoints.set_aside(damaged), strict=True):
        LOGGER.warning("the checkpoint of step %d is damaged, now named %s: %s", bad, name, why)
    assert restored.data_state is not None
    batches.seek(step, restored.data_state)
    if step == run.config.steps:
        LOGGER.info("step %d is the last: %s is trained already; it is evaluated", step, workdir)
    else:
        LOGGER.info("resuming %s from step %d", workdir, step)
    return restored.train_state


class _Compilations:
    """Counts the compilations of this process; a context manager."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> _Compilations:
        """Starts to count."""
        jax.monitoring.register_event_duration_secs_listener(self._on_event)
        return self

    def __exit__(self, *error: object) -> None:
        """Stops."""
        jax.monitoring.unregister_event_duration_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.count += 1


class _Passes(NamedTuple):
    """Compiled programs."""

    train: Any
    forward: Any
    evaluator: Evaluator


class _Parts(NamedTuple):
    """What the training steps work with."""

    run: Run
    batches: Any
    passes: _Passes
    checkpoints: Checkpoints
    compilations: _Compilations
    about: Record
    guard: Guard
    watchdog: Watchdog
    rescue: Rescue


def _train(parts: _Parts, state: Tree, resumed: int | None) -> tuple[Tree, Any]:
    """Runs all steps, from the last checkpoint again wherever the guard finds that needed."""
    run, guard = parts.run, parts.guard
    while True:
        with RunLog(
            parts.checkpoints.directory.parent,
            total_steps=run.config.steps,
            unit=run.unit,
            resume_step=resumed,
            enabled=cluster.is_first(),
        ) as log:
            state, result, fault = _steps(parts, log, state, resumed or 0)
        if fault is None:
            return state, result
        with parts.watchdog.during("the way back to a checkpoint"):
            # Not beside what is read now: it may be all the memory there is.
            parts.rescue.drop()
            newest = _newest(run, parts.checkpoints)
            resumed = None if newest is None else newest.step
            guard.go_back(fault, resumed)
            notice.consult()
            state = _go_to(parts, newest)


def _go_to(parts: _Parts, newest: Newest | None) -> Tree:
    """The training state of a checkpoint, or of the start, in the middle of a training."""
    run, batches, guard = parts.run, parts.batches, parts.guard
    if newest is not None:
        return _resume(run, parts.checkpoints, newest, batches, guard)
    with cluster.Compiler() as compiler:
        return _begin(run, _begin_start(run, compiler), parts.passes.forward, batches, guard)


def _steps(parts: _Parts, log: RunLog, state: Tree, start: int) -> tuple[Tree, Any, Fault | None]:
    """Runs the optimizer steps after `start`.

    Returns:
        The state; the result of the evaluation at the last step; and None. Or, where the run must
        go back, twice None and why.
    """
    run, checkpoints, guard, watchdog = parts.run, parts.checkpoints, parts.guard, parts.watchdog
    config, key = run.config, run.key()
    profiled = _profiled(config, start)
    meter = Meter(run, start, state)
    after_first = in_saves = 0
    result = None
    for step in range(start + 1, config.steps + 1):
        if profiled and step == profiled[0] and cluster.is_first():
            jax.profiler.start_trace(str(checkpoints.directory.parent / PROFILE))
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            batch = run.to_devices(next(parts.batches), config.batch)
            state, metrics = parts.passes.train(state, batch, key)
        position, last = parts.batches.get_state(), step == config.steps
        if not last:
            parts.rescue.hold(step, state, position)
        watchdog.see(step, metrics["skipped"])
        guard.see(step, metrics)
        meter.see(step, metrics)
        stop = notice.reached(step) and not last
        is_logged = step % config.log_every == 0 or last or step == start + 1
        fault = guard.look(step, state) if is_logged or stop or guard.looks(step) else None
        if step in profiled and (fault or step == profiled[-1]) and cluster.is_first():
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
        if fault:
            return None, None, fault
        if is_logged:
            meter.log(step, metrics | guard.counts(), state, log)
        if step == start + 1:
            after_first = parts.compilations.count
        measured: dict[str, float] = {}
        if (step % config.eval_every == 0 and not stop) or last:
            jax.block_until_ready(state)
            with meter.left_out(), watchdog.during("the evaluation"):
                if last:  # only what has settled is the state of the last step
                    state = settle(run, parts.passes.forward, state)
                    parts.rescue.hold(step, state, position)
                result, stop = _evaluate(parts, state)
            if result is not None:
                measured = result[0]
                log.write(step, measured)
        before = parts.compilations.count
        force = last or stop or guard.owes
        if guard.may_save(step) and _save(parts, step, state, position, measured, force):
            guard.owes = False
            meter.saved(state)
        in_saves += parts.compilations.count - before
        if stop:
            checkpoints.wait()
            notice.end(step, checkpoints.latest_step())
    with watchdog.during("the last checkpoint"):
        checkpoints.wait()
    LOGGER.info(
        "the training step is one executable, compiled before step %d; compilations after that"
        " step: %d for the digests of checkpoints, %d others",
        start + 1,
        in_saves,
        parts.compilations.count - after_first - in_saves,
    )
    return state, result, None


def _save(
    parts: _Parts,
    step: int,
    state: Tree,
    position: Tree,
    measured: dict[str, float],
    force: bool,
) -> bool:
    """Starts to write a checkpoint if one is due, and tells whether."""
    with parts.watchdog.during("the checkpoint"):
        return parts.checkpoints.save(
            step,
            state,
            data_state=position,
            meta=parts.about.meta(),
            metrics=measured,
            force=force,
        )


def _evaluate(parts: _Parts, state: Tree) -> tuple[tuple[Scalars, Rows] | None, bool]:
    """The result of an evaluation, and whether the run is to end instead."""
    try:
        return evaluate(parts.run, parts.passes.evaluator, state), False
    except notice.Interrupted:
        return None, True


def _profiled(config: ExperimentConfig, start: int) -> range:
    """The steps to profile: `PROFILE_AFTER` steps on, earlier where fewer steps are left."""
    first = min(start + 1 + PROFILE_AFTER, config.steps + 1 - config.profile)
    return range(max(first, start + 1), min(first + config.profile, config.steps + 1))


def compile_train(run: Run, example: dict[str, np.ndarray]) -> Any:
    """The training step, compiled ahead of time: it cannot be compiled again by accident."""
    with cluster.Compiler() as compiler:
        return begin_train(run, example, compiler)()


def begin_train(
    run: Run, example: dict[str, np.ndarray], compiler: cluster.Compiler
) -> Callable[[], Any]:
    """Begins to compile the training step; returns what waits for it."""
    places = jax.tree.map(lambda leaf: leaf.sharding, run.abstract)
    step = jax.jit(run.steps.train, donate_argnums=0, out_shardings=(places, replicated(run.mesh)))
    batch = run.abstract_batch(example, run.config.batch)
    lowered = step.lower(run.abstract, batch, jax.eval_shape(run.key))
    return compiler.begin(lowered, _compiler_options(run))


def _compiler_options(run: Run) -> dict[str, str | bool]:
    """Those of the training step."""
    return compiler_options(run.config.model, jax.default_backend(), run.mesh.shape["expert"])
