"""What `python -m train.plan` can be asked: each mode gives tables, notes and a figure."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax

from emoe_jax.checkpoint import Checkpoints
from emoe_jax.config import require
from emoe_jax.sharding import MeshConfig
from train.config import ExperimentConfig, freeze
from train.planning import calibrate, curve, figures, hlo, operations, report
from train.planning.compiler import Compiled, compile_step
from train.planning.cost import Rates
from train.planning.memory import weigh
from train.planning.program import planned, step_on
from train.planning.search import Candidate, judge, search, smallest_change
from train.planning.topology import Topology, abstract_shape
from train.provenance import MADE
from train.run import CHECKPOINTS, choose_step, read_run_config

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Asked:
    """What the command line asks.

    Attributes:
        config: the experiment as it would be on the topology.
        topology: the devices.
        rates: of the chip's peaks.
        max_vio: the router's imbalance.
        keep: see `compiler.compile_step`.
        model_only: whether nothing is compiled.
        whole: see `compiler.compile_step`.
    """

    config: ExperimentConfig
    topology: Topology
    rates: Rates
    max_vio: float
    keep: pathlib.Path | None
    model_only: bool
    whole: bool


@dataclasses.dataclass(frozen=True)
class Found:
    """What is printed, written and drawn.

    Attributes:
        tables: rows by title.
        notes: lines below them.
        draw: draws the figure, if there is one.
        refusal: why the program ends with an error, empty if it does not.
    """

    tables: dict[str, list[Row]]
    notes: Sequence[str] = ()
    draw: Callable[[pathlib.Path], None] | None = None
    refusal: str = ""


PROJECTED = (
    "Times, MFU and rates are projected from formulas and published peaks; nothing was measured."
)


def plan(asked: Asked) -> Found:
    """One configuration on one topology.

    Raises:
        ValueError: the mesh does not divide the model or the batch, or there is no compiler.
    """
    config, place = asked.config, asked.topology
    mesh = abstract_shape(place, config.mesh)
    config = dataclasses.replace(config, mesh=MeshConfig(**mesh))
    weights = weigh(config)
    judged = judge(config, weights, place, asked.rates, asked.max_vio)
    compiled, found, counted = None, None, None
    if not asked.model_only:
        traced = step_on(config, place)
        compiled = compile_step(traced, config, place, keep=asked.keep, whole=asked.whole)
        found = hlo.collectives(compiled.schedule, mesh)
        counted = operations.products(traced.jaxpr)
    hidden = report.hidden_share(found or [])
    memory = report.memory_rows(judged.memory, compiled)
    times = report.time_rows(judged, asked.rates)
    shown = {
        f"Plan for {place.name} (projected)": report.summary(
            judged, weights, compiled, asked.rates, hidden
        ),
        "Memory of a device": memory,
        "Operations": report.operation_rows(judged, counted, compiled),
        "Collectives of a device in a step": report.flow_rows(judged, found, asked.rates),
        "Links": report.link_rows(judged),
        "Where the projected step goes": times,
    }
    notes = [PROJECTED]
    if found is not None:
        notes.append(
            f"Of the collectives' bytes the compiled schedule hides {hidden:.0%} behind work."
        )
    fits = report.fits(judged, compiled)
    title = f"{place.name}: projected {judged.cost.seconds(asked.rates, hidden):.3g} s a step"
    return Found(
        shown,
        notes,
        lambda file: figures.plan(file, title, memory, times, place.chip.memory),
        "" if fits else _refusal(asked, config, compiled, judged),
    )


def _refusal(
    asked: Asked, config: ExperimentConfig, compiled: Compiled | None, judged: Candidate
) -> str:
    """Why a plan does not fit, and the smallest change that does."""
    place = asked.topology
    need = compiled.total if compiled else judged.memory.total
    text = (
        f"{need / 1e9:.1f} GB a device do not fit the {place.chip.memory / 1e9:.1f} GB of"
        f" {place.chip.name}"
    )
    best = smallest_change(config, place, search(config, place, asked.rates, asked.max_vio))
    if best is None:
        state = (judged.memory.parameters + judged.memory.optimizer) * place.devices
        return (
            f"{text}, and no mesh, microbatch, remat, exchange or buffer makes it fit by the model;"
            f" take more devices: parameters and optimizer alone are {state / 1e12:.2f} TB on this"
            f" mesh, and {place.name} has {place.devices * place.chip.memory / 1e12:.2f} TB"
        )
    keys, way = best
    change = " ".join(f"--config.{key}={value}" for key, value in keys.items())
    return (
        f"{text}; the smallest change that fits by the model, with"
        f" {way.memory.total / 1e9:.1f} GB and a projected step of {way.seconds:.3g} s: {change}"
    )


def search_plan(asked: Asked, best: int) -> Found:
    """Every way on a topology, ranked; the best compiled."""
    place = asked.topology
    ways = search(asked.config, place, asked.rates, asked.max_vio)
    require(
        bool(ways),
        f"nothing fits {place.name} by the model; take more devices, or a smaller model",
    )
    rows = []
    compiled = 0
    for number, way in enumerate(ways[:20]):
        row: Row = {"rank": number + 1, **_short(way), "formula_GB": way.memory.total / 1e9}
        row |= {"projected_s": way.seconds, "projected_mfu": way.cost.mfu(way.seconds)}
        row["bound_by"] = way.cost.bound(asked.rates)
        if compiled < best and not asked.model_only:
            traced = step_on(way.config, place)
            done = compile_step(traced, way.config, place, keep=asked.keep, whole=asked.whole)
            row |= {"compiled_GB": done.total / 1e9, "fits": report.fits(way, done)}
            compiled += row["fits"]
        rows.append(row)
    title = f"Best ways on {place.name} of {len(ways)} that fit by the model (projected)"
    return Found({title: rows}, [PROJECTED])


def _short(way: Candidate) -> Row:
    """The keys that a search varies, without their prefixes."""
    return {name.rpartition(".")[2]: value for name, value in way.settings().items()}


def curve_plan(asked: Asked) -> Found:
    """Weak and strong scaling."""
    rows = curve.scaling(asked.config, asked.topology, asked.rates)
    lines: dict[str, list[Row]] = {}
    for row in rows:
        lines.setdefault(f"{row['kind']}, MaxVio {row['max_vio']:g}", []).append(row)
    title = f"Scaling over slices of {asked.topology.chip.name} (projected)"
    return Found({title: rows}, [PROJECTED], lambda file: figures.curve(file, title, lines))


def calibrate_plan(asked: Asked, workdir: pathlib.Path, file: str) -> Found:
    """The model against a run's measured rate; one run fits one number, a factor of all times.

    The configuration is the run's own, whatever is asked for.
    """
    config = planned(freeze(read_run_config(workdir)), asked.topology.chip.platform, 1)
    _check_devices(workdir, asked.topology)
    mesh = MeshConfig(**abstract_shape(asked.topology, config.mesh))
    config = dataclasses.replace(config, mesh=mesh)
    judged = judge(config, weigh(config), asked.topology, Rates(), asked.max_vio)
    unit = "tokens" if config.task == "lm" else "images"
    rate, spread = calibrate.measured_steps(workdir, unit)
    measured = judged.cost.units / rate
    factor = measured / judged.seconds
    rates = calibrate.scaled(Rates(), factor)
    target = pathlib.Path(file) if file else workdir / "rates.json"
    calibrate.write_rates(target, rates, asked.topology.name)
    row: Row = {"projected_s": judged.seconds, "measured_s": measured, "ratio": factor}
    row |= {f"measured_{unit}_per_second": rate, "median_deviation": spread}
    return Found({f"{workdir} on {asked.topology.name}": [row]}, [f"rates kept in {target}"])


def _check_devices(workdir: pathlib.Path, place: Topology) -> None:
    """Refuses a topology of another number of devices than the run had, if the run tells.

    Raises:
        FileNotFoundError: the folder holds no checkpoint.
        ValueError: the numbers differ.
    """
    with Checkpoints(workdir / CHECKPOINTS, every=1, read_only=True) as checkpoints:
        meta = checkpoints.restore_meta(choose_step(checkpoints, "newest"))
    used = meta.get(MADE, {}).get("devices", place.devices)
    require(
        used == place.devices,
        f"--topology={place.name} has {place.devices} devices, and the run in {workdir} had {used};"
        " name the topology that it ran on",
    )


def validate_plan(asked: Asked, rounds: int) -> Found:
    """Orders meshes by projected time and by measured time, on the devices at hand.

    Rates are fitted on twice the experts' hidden width and half the batch; ranked is the
    configuration as it is.
    """
    config, place = asked.config, asked.topology
    require(
        place.chip.platform == "cpu" or jax.default_backend() != "cpu",
        f"--validate runs on devices that are there, and {place.name} is not; take cpu:8",
    )
    ranked, fitted = calibrate.split(config, place)
    measured = calibrate.measure([*fitted, *ranked], place, rounds)
    rates = calibrate.fit(measured[: len(fitted)])
    rows = calibrate.compare(measured[len(fitted) :], rates)
    order = calibrate.spearman(rows)
    shown = {
        "Fitted on these": calibrate.compare(measured[: len(fitted)], rates),
        "Ranked": sorted(rows, key=lambda row: float(row["projected_s"])),
        "Rates": [dataclasses.asdict(rates)],
        "Order": [{"meshes": len(rows), "spearman": order, "bar": 0.8, "met": order >= 0.8}],
    }
    return Found(shown)
