"""The training program, in the order in which things happen."""

from __future__ import annotations

import json
import logging
import pathlib
import time
from typing import Any

import jax
import numpy as np
from ml_collections import config_dict

from emoe_jax.checkpoint import Checkpoints
from emoe_jax.optim import schedule
from train import sample
from train.config import changed_keys, digest, freeze, to_json
from train.data.text import TextData
from train.evaluate import (
    Evaluate,
    Rows,
    Scalars,
    compile_evaluate,
    evaluate,
    print_evaluation,
    routing_rows,
)
from train.flops import active_parameters, flops_per_unit
from train.logs import RunLog, peak_flops
from train.run import CONFIG_FILE, Run, build, open_checkpoints

Tree = Any

LOGGER = logging.getLogger(__name__)

PROFILE_AFTER = 10
"""Steps before the profile begins, so that it shows the steady state."""


def train(tree: config_dict.ConfigDict, workdir: pathlib.Path) -> tuple[Scalars, Rows]:
    """Trains an experiment to its end, or goes on with it from its last checkpoint.

    Args:
        tree: the experiment's keys.
        workdir: the run's folder, made if absent.

    Returns:
        Scalars and routing table of the last evaluation, see `evaluate.evaluate`.

    Raises:
        ValueError: something in the input is wrong; raised before anything is compiled.
    """
    # ---------------------------------------------------------------- configuration and data
    config = freeze(tree)
    workdir.mkdir(parents=True, exist_ok=True)
    run = build(config, workdir)
    config = run.config
    parameters = sum(leaf.size for leaf in jax.tree.leaves(run.abstract["params"]))
    LOGGER.info(
        "%s parameters, %s active per token; mesh %s of %s",
        f"{parameters:,}",
        f"{active_parameters(config.model, run.abstract['params']):,}",
        dict(run.mesh.shape),
        jax.devices()[0].device_kind,
    )

    # ---------------------------------------------------------------- state, new or restored
    with open_checkpoints(run, workdir) as checkpoints:
        batches = run.data.train_iterator(
            config.batch,
            seed=config.seed,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        start = checkpoints.latest_step()
        if start is None:
            state, start, resumed = run.init(), 0, None
        else:
            restored = checkpoints.restore(start, run.abstract)
            state, resumed = restored.train_state, start
            assert restored.data_state is not None
            batches.set_state(json.loads(restored.data_state))
            LOGGER.info("resuming %s from step %d", workdir, start)
        _write_config(tree, workdir)

        # ------------------------------------------------------------ steps, compiled once
        position = batches.get_state()
        began = time.perf_counter()
        compiled = _compile_train(run, next(batches))
        batches.set_state(position)
        evaluator = compile_evaluate(run)
        LOGGER.info("compiled training and evaluation in %.1f s", time.perf_counter() - began)

        # ------------------------------------------------------------ training
        with RunLog(
            workdir,
            total_steps=config.steps,
            unit=run.unit,
            resume_step=resumed,
            enabled=jax.process_index() == 0,
        ) as log:
            state, result = _steps(
                run, state, start, batches, compiled, evaluator, checkpoints, log
            )
    scalars, rows = result or evaluate(run, evaluator, state)

    # ---------------------------------------------------------------- result
    print_evaluation(run, scalars, rows, config.steps)
    if isinstance(run.data, TextData) and config.prompt:
        room = run.data.config.sequence_length - 1 - len(run.data.tokenizer.encode(config.prompt))
        text = sample.continue_text(run, state, config.prompt, tokens=min(200, room))
        print(f"\nA continuation of {config.prompt!r}:\n{config.prompt}{text}\n")
    print(f"run folder: {workdir}")
    return scalars, rows


def _steps(
    run: Run,
    state: Tree,
    start: int,
    batches: Any,
    compiled: Any,
    evaluator: Evaluate,
    checkpoints: Checkpoints,
    log: RunLog,
) -> tuple[Tree, Any]:
    """Runs the optimizer steps after `start`; the result of an evaluation at the last one."""
    config, key = run.config, run.key()
    meter = _Meter(run, start)
    compilations = _Compilations()
    result = None
    for step in range(start + 1, config.steps + 1):
        if config.profile and step == start + 1 + PROFILE_AFTER:
            jax.profiler.start_trace(str(checkpoints.directory.parent / "profile"))
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            state, metrics = compiled(state, run.to_devices(next(batches)), key)
        if config.profile and step == start + PROFILE_AFTER + config.profile:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
        if step == start + 1:
            jax.block_until_ready(state)
            compilations.begin()
        last = step == config.steps
        if step % config.log_every == 0 or last or step == start + 1:
            meter.log(step, jax.device_get(metrics), log)
        measured: dict[str, float] = {}
        if step % config.eval_every == 0 or last:
            result = evaluate(run, evaluator, state)
            measured = result[0]
            log.write(step, measured)
            meter.skip()
        checkpoints.save(
            step,
            state,
            data_state=json.dumps(batches.get_state()).encode(),
            meta={"task": config.task, "seed": config.seed, "batch": config.batch},
            metrics=measured,
            force=last,
        )
    checkpoints.wait()
    LOGGER.info(
        "the training step is one executable, compiled before step %d; other compilations after"
        " it: %d (checkpoint digests)",
        start + 1,
        compilations.count,
    )
    return state, result


class _Compilations:
    """Counts compilations of this process from `begin` on."""

    def __init__(self) -> None:
        self.count = 0

    def begin(self) -> None:
        """Starts to count."""
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.count += 1


class _Meter:
    """Turns the metrics of a step into scalars and progress."""

    def __init__(self, run: Run, step: int) -> None:
        self.run = run
        self.rate_of = schedule(run.config.optim, run.config.steps)
        length = run.units_per_step // run.config.batch if run.unit == "tokens" else _tokens(run)
        self.flops = flops_per_unit(run.config.model, run.abstract["params"], length)
        peak = peak_flops(jax.devices()[0].device_kind)
        self.peak = None if peak is None else peak * jax.device_count()
        self.step, self.time = step, time.perf_counter()

    def skip(self) -> None:
        """Leaves the time since the last call out of the rate."""
        self.time = time.perf_counter()

    def log(self, step: int, metrics: Tree, log: RunLog) -> None:
        """Writes scalars, histograms and progress of a step."""
        now = time.perf_counter()
        rate = (step - self.step) * self.run.units_per_step / max(now - self.time, 1e-9)
        self.step, self.time = step, now
        mfu = None if self.peak is None else rate * self.flops / self.peak
        rows = routing_rows(self.run, metrics["router"])
        scalars = {
            "train/loss": metrics["loss"],
            "train/penalty": metrics["penalty"],
            "train/grad_norm": metrics["grad_norm"],
            "train/learning_rate": self.rate_of(step - 1),
            f"train/{self.run.unit}_per_second": rate,
        }
        if "accuracy" in metrics:
            scalars["train/accuracy"] = metrics["accuracy"]
        if mfu is not None:
            scalars["train/mfu"] = mfu
        for row in rows:
            named = {k: v for k, v in row.items() if k not in ("layer", "load")}
            scalars |= {f"router/{row['layer']}/{k}": v for k, v in named.items()}
        log.write(step, {name: float(value) for name, value in scalars.items()})
        log.histograms(step, {f"router/{r['layer']}/load": np.asarray(r["load"]) for r in rows})
        worst = max((row["max_vio"] for row in rows), default=None)
        log.progress(step, loss=float(metrics["loss"]), rate=rate, mfu=mfu, max_vio=worst)


def _tokens(run: Run) -> int:
    """Tokens of one image."""
    return int(run.abstract["params"]["position"].shape[0])


def _compile_train(run: Run, example: dict[str, np.ndarray]) -> Any:
    """The training step, compiled ahead of time: it cannot be compiled again by accident."""
    places = jax.tree.map(lambda leaf: leaf.sharding, run.abstract)
    step = jax.jit(run.steps.train, donate_argnums=0, out_shardings=(places, None))
    return step.lower(
        run.abstract, run.abstract_batch(example), jax.eval_shape(run.key)
    ).compile()


def _write_config(tree: config_dict.ConfigDict, workdir: pathlib.Path) -> None:
    """Writes config.json; says what changed since the run was started."""
    if jax.process_index():
        return
    file = workdir / CONFIG_FILE
    if file.is_file():
        for line in changed_keys(json.loads(file.read_text()), tree.to_dict()):
            LOGGER.warning("the configuration changed since this run began: %s", line)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(to_json(tree))
    temporary.replace(file)
    LOGGER.info("configuration %s in %s", digest(tree), file)
