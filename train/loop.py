"""The training program, in the order in which things happen."""

from __future__ import annotations

import dataclasses
import json
import logging
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import config_dict

from emoe_jax.checkpoint import Checkpoints
from emoe_jax.config import (
    BASIS_ROUTERS,
    BasisConfig,
    LMConfig,
    MoEConfig,
    ViTConfig,
    moe_layers,
    require,
)
from emoe_jax.dispatch.exchange import choose_exchange
from emoe_jax.dispatch.selfcheck import check_exchange
from emoe_jax.grouped import resolve_backend
from emoe_jax.optim import partition
from emoe_jax.sharding import replicated
from train import cluster, sample
from train.config import ExperimentConfig, changed_keys, digest, freeze, merged, to_json
from train.data.text import TextData
from train.evaluate import (
    Evaluator,
    Rows,
    Scalars,
    compile_evaluate,
    evaluate,
    print_evaluation,
)
from train.flops import active_parameters
from train.guards import META, Fault, Guard, Passing
from train.initial import check_frozen, initial_params, place_params
from train.logs import RunLog
from train.run import CONFIG_FILE, Run, build, open_checkpoints, read_config
from train.settle import calibrate, compile_forward, settle
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
        ValueError: something in the input is wrong; raised before anything is compiled.
        guards.Diverged: steps were not finite again and again.
    """
    # ---------------------------------------------------------------- configuration and data
    cluster.check_same(tree.to_dict())
    config = freeze(tree)
    cluster.share_folder(workdir)
    run = cluster.first_then_others(lambda: build(config, workdir))
    config = run.config
    # The prompt is continued at the end; whether it can be is known now.
    if config.prompt:
        sample.prompt_ids(run, config.prompt, tokens=1)
    _describe(run)
    _try_exchange(run)

    # ---------------------------------------------------------------- state, new or restored
    with open_checkpoints(run, workdir) as checkpoints:
        guard = Guard(config, workdir, digest(identity(config)))
        given = run.data.train_iterator(config.batch, seed=config.seed, rows=run.rows(config.batch))
        batches = Passing(given, guard)
        example = _example(given)
        resumed = checkpoints.latest_step()
        forward = None
        if resumed != config.steps:
            forward = compile_forward(run, example, resumed=resumed is not None)
        state = _begin(run, forward, checkpoints, resumed, batches, guard)
        _write_config(tree, workdir)

        # ------------------------------------------------------------ training, unless it is done
        evaluator, result = compile_evaluate(run), None
        if resumed != config.steps:
            compiled = _compile_train(run, example)
            with Watchdog(config.guard, workdir) as watchdog, _Compilations() as counter:
                passes = compiled, forward, evaluator
                parts = _Parts(run, batches, *passes, checkpoints, counter, guard, watchdog)
                state, result = _train(parts, state, resumed)
        batches.close()
    scalars, rows = result or evaluate(run, evaluator, state)

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


def _describe(run: Run) -> None:
    """Logs the model's size, the mesh, and the kernel of the experts' products."""
    params = run.abstract["params"]
    trained, frozen = partition(params, run.config.optim.trainable)
    processes = jax.process_count()
    LOGGER.info(
        "%s parameters%s, %s active per token; mesh %s of %s%s; %s",
        f"{_count(params):,}",
        f", {_count(trained):,} of them trained" if frozen else "",
        f"{active_parameters(run.config.model, params):,}",
        dict(run.mesh.shape),
        jax.devices()[0].device_kind,
        f" in {processes} processes" if processes > 1 else "",
        _routing(run.config.model, run.mesh),
    )
    if run.config.data.shards % processes:
        LOGGER.info(
            "data.shards=%d is no multiple of the %d processes: some parts of the data are read by"
            " several of them",
            run.config.data.shards,
            processes,
        )
    data = run.data
    epoch = data.train_targets if isinstance(data, TextData) else data.train_images
    passes = run.config.steps * run.units_per_step / max(epoch, 1)
    if epoch:
        LOGGER.info("%s training %s; %.2f passes over them", f"{epoch:,}", run.unit, passes)


def _try_exchange(run: Run) -> None:
    """Tries what is not to be trusted: the ragged kernel of an accelerator."""
    moe, spread = run.config.model.moe, run.mesh.shape["expert"] > 1
    used = spread and moe.dispatch != "dense" and any(moe_layers(run.config.model))
    if used and moe.exchange == "ragged_all_to_all" and jax.default_backend() != "cpu":
        check_exchange(moe, run.mesh)


def _count(params: Tree) -> int:
    """Number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _routing(model: LMConfig | ViTConfig, mesh: Mesh) -> str:
    """How tokens come to experts, if there are any."""
    if not any(moe_layers(model)):
        return "no experts"
    moe = model.moe
    return f"{moe.router} router, {moe.dispatch} dispatch{_kernel(moe.dispatch)}{_way(moe, mesh)}"


def _way(moe: MoEConfig, mesh: Mesh) -> str:
    """How tokens travel between devices, if they do."""
    X = mesh.shape["expert"]
    exchanges = X > 1 and moe.dispatch != "dense"
    return f", {choose_exchange(moe)} over {X} devices" if exchanges else ""


def _kernel(dispatch: str) -> str:
    """The kernel of the grouped products, and a warning where it may do E times the work."""
    if dispatch != "dropless":
        return ""
    kernel = resolve_backend("auto")
    dense = jax.default_backend() == "gpu"
    return f" by {kernel}" + (", which XLA may lower densely on GPU: time it" if dense else "")


def _start(run: Run) -> Tree:
    """The training state of step 0, with the weights that `init_from` names."""
    if not run.config.init_from:
        if run.config.optim.trainable:
            LOGGER.warning(
                "what optim.trainable leaves out stays as it is drawn: init_from is empty"
            )
        return cluster.compile_together(run.init.lower())()
    # Read before `init` is compiled.
    taken, notes = initial_params(run)
    for note in notes:
        LOGGER.info("init_from: %s", note)
    check_frozen(run, taken)
    LOGGER.info("%s parameters start from %s", f"{_count(taken):,}", run.config.init_from)
    state = cluster.compile_together(run.init.lower())()
    return state | {"params": place_params(state["params"], taken)}


def _begin(
    run: Run,
    forward: Any,
    checkpoints: Checkpoints,
    step: int | None,
    batches: Passing,
    guard: Guard,
) -> Tree:
    """The training state of a checkpoint, or of the start; batches and guard go there too."""
    if step is not None:
        return _resume(run, checkpoints, step, batches, guard)
    guard.restore({})
    batches.seek(0, None)
    return calibrate(run, forward, _start(run))


def _resume(run: Run, checkpoints: Checkpoints, step: int, batches: Passing, guard: Guard) -> Tree:
    """The training state of a checkpoint; moves the batches to its position."""
    workdir = checkpoints.directory.parent
    require(
        run.config.steps >= step,
        f"steps={run.config.steps}, but {workdir} is at step {step} already; set steps to {step} or"
        " more, or use another --workdir",
    )
    restored = checkpoints.restore(step, run.abstract)
    # A key that did not exist when the run began has the value that changes nothing, its default.
    plain = dataclasses.replace(
        run.config, model=type(run.config.model)(), data=type(run.config.data)()
    )
    guard.restore(restored.meta.pop(META, {}))
    before = _settled(merged(_whole_identity(plain), restored.meta))
    changed = changed_keys(before, identity(run.config))
    require(
        not changed,
        f"{workdir} holds a run of another model or of other data, in which its weights and its"
        f" position in the data mean something else ({'; '.join(changed)}); set these keys back,"
        " or use another --workdir",
    )
    assert restored.data_state is not None
    batches.seek(step, restored.data_state)
    if step == run.config.steps:
        LOGGER.info("step %d is the last: %s is trained already; it is evaluated", step, workdir)
    else:
        LOGGER.info("resuming %s from step %d", workdir, step)
    return restored.train_state


FREE_OF_MODEL = (
    *("attention", "remat", "dtype", "loss_chunk", "dispatch", "capacity_factor"),
    *("exchange", "buffer_factor", "on_overflow", "exchange_chunks"),
)
"""Keys of the model that may change between starts of a run: what they mean for weights and data
stays the same, though dispatch, its room and precision may change numbers."""


def identity(config: ExperimentConfig) -> Tree:
    """What the weights and the position in the data depend on, as a JSON object."""
    return _settled(_whole_identity(config))


def _whole_identity(config: ExperimentConfig) -> Tree:
    """All keys that `identity` chooses from."""
    tree = json.loads(json.dumps(dataclasses.asdict(config)))
    return {name: tree[name] for name in ("seed", "batch", "data", "model")}


def _settled(tree: Tree) -> Tree:
    """The part of such a tree that counts, with numbers in place of "whatever fits"."""
    data = {
        name: value
        for name, value in tree["data"].items()
        if not name.endswith("_dir")  # where the data lie may differ between machines
    }
    model = {k: v for k, v in tree["model"].items() if k not in FREE_OF_MODEL}
    moe = {k: v for k, v in model["moe"].items() if k not in FREE_OF_MODEL}
    basis = moe.pop("basis")
    if moe["router"] in BASIS_ROUTERS:
        moe["basis"] = basis | {"rank": BasisConfig(**basis).rank_of(model["width"])}
    return tree | {"data": data, "model": model | {"moe": moe}}


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


class _Parts(NamedTuple):
    """What the training steps work with."""

    run: Run
    batches: Any
    compiled: Any
    forward: Any
    evaluator: Evaluator
    checkpoints: Checkpoints
    compilations: _Compilations
    guard: Guard
    watchdog: Watchdog


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
            resumed = parts.checkpoints.latest_step()
            guard.go_back(fault, resumed)
            forward = parts.forward
            state = _begin(run, forward, parts.checkpoints, resumed, parts.batches, guard)


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
            state, metrics = parts.compiled(state, batch, key)
        watchdog.see(step, metrics["skipped"])
        guard.see(step, metrics)
        meter.see(step, metrics)
        last = step == config.steps
        is_logged = step % config.log_every == 0 or last or step == start + 1
        fault = guard.look(step, state) if is_logged or guard.looks(step) else None
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
        if step % config.eval_every == 0 or last:
            jax.block_until_ready(state)
            with meter.left_out(), watchdog.during("the evaluation"):
                state = settle(run, parts.forward, state) if last else state
                result = evaluate(run, parts.evaluator, state)
            measured = result[0]
            log.write(step, measured)
        before = parts.compilations.count
        with watchdog.during("the checkpoint"):
            was_saved = guard.may_save(step) and checkpoints.save(
                step,
                state,
                data_state=parts.batches.get_state(),
                meta=identity(config) | {META: guard.meta()},
                metrics=measured,
                force=last or guard.owes,
            )
        in_saves += parts.compilations.count - before
        if was_saved:
            guard.owes = False
            meter.saved(state)
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


def _profiled(config: ExperimentConfig, start: int) -> range:
    """The steps to profile: `PROFILE_AFTER` steps on, earlier where fewer steps are left."""
    first = min(start + 1 + PROFILE_AFTER, config.steps + 1 - config.profile)
    return range(max(first, start + 1), min(first + config.profile, config.steps + 1))


def _compile_train(run: Run, example: dict[str, np.ndarray]) -> Any:
    """The training step, compiled ahead of time: it cannot be compiled again by accident."""
    places = jax.tree.map(lambda leaf: leaf.sharding, run.abstract)
    step = jax.jit(run.steps.train, donate_argnums=0, out_shardings=(places, replicated(run.mesh)))
    batch = run.abstract_batch(example, run.config.batch)
    return cluster.compile_together(step.lower(run.abstract, batch, jax.eval_shape(run.key)))


def _write_config(tree: config_dict.ConfigDict, workdir: pathlib.Path) -> None:
    """Writes config.json; says what changed since the run was started."""
    if not cluster.is_first():
        return
    file = workdir / CONFIG_FILE
    if file.is_file():
        for line in changed_keys(read_config(file), tree.to_dict()):
            LOGGER.warning("the configuration changed since this run began: %s", line)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(to_json(tree))
    temporary.replace(file)
    LOGGER.info("configuration %s in %s", digest(tree), file)
