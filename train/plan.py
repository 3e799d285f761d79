"""Plans a run on devices that nobody holds: python -m train.plan --config=... --topology=v5p:8x8x8.

Compiles the exact training step for the topology from shapes alone, reads memory and collectives
off the compiler's schedule, and projects the time of a step from the chip's published rates. No
data, no tokenizer, no network and no accelerator are needed. docs/planning.md has the formulas.

    --model_only       the formulas alone, in seconds
    --whole            compile to machine code too, for the compiler's own count of FLOPs
    --search           every mesh, microbatch, remat, exchange and buffer; the best are compiled
    --curve            scaling over slices of the topology's chip
    --calibrate        compare with a measured run (--workdir) and keep the fitted rates (--rates)
    --validate         on the devices at hand: the order of meshes, projected and measured
"""

from __future__ import annotations

import os
import pathlib

import jax
from absl import flags
from ml_collections import config_flags

from emoe_jax.config import require
from train import cli, tables
from train.config import freeze
from train.planning import modes, topology
from train.planning.calibrate import read_rates
from train.planning.cost import PEAK
from train.planning.program import planned

MODES = ("search", "curve", "calibrate", "validate")


def main(argv: list[str]) -> None:
    """Plans, and prints and writes the tables."""
    args = flags.FLAGS
    chosen = [name for name in MODES if args[name].value]
    require(len(chosen) <= 1, f"--{' and --'.join(chosen)} are different things; give one")
    place = topology.parse(args.topology)
    _start(place)
    config = planned(freeze(args.config), place.chip.platform, place.devices)
    given = args.rates and "calibrate" not in chosen
    rates = read_rates(pathlib.Path(args.rates)) if given else PEAK
    keep = pathlib.Path(args.keep) if args.keep else None
    asked = modes.Asked(config, place, rates, args.max_vio, keep, args.model_only, args.whole)
    if "search" in chosen:
        found = modes.search_plan(asked, args.best)
    elif "curve" in chosen:
        found = modes.curve_plan(asked)
    elif "calibrate" in chosen:
        require(bool(args.workdir), "--calibrate needs --workdir, the folder of a measured run")
        found = modes.calibrate_plan(asked, pathlib.Path(args.workdir), args.rates)
    elif "validate" in chosen:
        found = modes.validate_plan(asked, args.rounds)
    else:
        found = modes.plan(asked)
    for title, rows in found.tables.items():
        tables.print_table(title, rows)
    for line in found.notes:
        print(line)
    if args.json:
        rows = [{"table": title, **row} for title, part in found.tables.items() for row in part]
        tables.write_json(args.json, rows)
    if args.png and found.draw is not None:
        found.draw(pathlib.Path(args.png))
    require(found.refusal == "", found.refusal)


def _start(place: topology.Topology) -> None:
    """Starts JAX on this machine's processor, with as many devices as a "cpu" topology has."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    jax.config.update("jax_platforms", "cpu")
    if place.chip.platform == "cpu" and "host_platform_device_count" not in os.environ.get(
        "XLA_FLAGS", ""
    ):
        jax.config.update("jax_num_cpu_devices", place.devices)


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "Experiment.", lock_config=True)
    flags.DEFINE_string(
        "topology", None, "Devices, such as v5p:8x8x8, h100:8x4 or cpu:8.", required=True
    )
    flags.DEFINE_string("json", "", "File to write the tables to.")
    flags.DEFINE_string("png", "", "File to draw the plan to.")
    flags.DEFINE_string("keep", "", "Folder that keeps what the compiler told.")
    flags.DEFINE_string("rates", "", "File of fitted rates, which --calibrate writes.")
    flags.DEFINE_string("workdir", "", "Folder of a measured run, for --calibrate.")
    flags.DEFINE_float("max_vio", 0.0, "MaxVio of the router: fullest expert / mean - 1.")
    flags.DEFINE_integer("best", 3, "How many of a search are compiled.", lower_bound=0)
    flags.DEFINE_integer("rounds", 5, "Steps of each, for --validate.", lower_bound=1)
    flags.DEFINE_bool("model_only", False, "Formulas alone: compile nothing.")
    flags.DEFINE_bool("whole", False, "Compile to the end, for the count of FLOPs.")
    for mode in MODES:
        flags.DEFINE_bool(mode, False, f"See the top: --{mode}.")
    flags.mark_flag_as_required("config")
    cli.run(main)
