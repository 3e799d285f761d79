"""Benchmarks: `python -m train.bench NAME [--json=FILE] [--repeats=N] [...]`.

`grouped` times the backends of the grouped product in an expert MLP, see `train.bench_grouped`.

`router` times routers, their upkeep and their whole layers, against a dense MLP with the same
multiply-adds, see `train.bench_router`.

`peers` times the layer against what one would take instead: blocks of transformers in PyTorch, and
a plain layer around `jax.lax.ragged_dot` or tokamax, see `train.bench_peers`.

`adapter` times the paper's adapter branch and a training step of its recipe, see
`train.bench_adapter`.

`exchange` counts the bytes that the experts' exchange moves between devices and times the layer on
several devices (virtual ones on CPU) against one, see `train.bench_exchange`.

`step` times the whole training step of an experiment, its telemetry and its data, and compares its
memory with what is counted, see `train.bench_step`.

`start` times how long `python -m train` takes to its first step, see `train.bench_start`.

`checkpoints` times training with and without asynchronous checkpoints, see
`train.bench_checkpoints`.

`all` runs all of them with the flags given, each in a process of its own, see `train.bench_all`.

Runs are interleaved: each round runs every kernel once, and a ratio is the median over rounds of a
kernel's time over the base's time of the same round, so that a load on the machine that comes and
goes falls on both.
"""

import itertools
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags

from train import bench_checkpoints, bench_exchange, bench_grouped, bench_peers, bench_step, timing
from train.bench_adapter import adapter
from train.bench_all import measure_all
from train.bench_router import routers
from train.bench_start import starts
from train.cli import overrides
from train.config import ExperimentConfig, freeze, update
from train.tables import check_json_path, print_table, write_json
from train.timing import Row

# Its own flags, so that several programs can be imported in one process.
FLAGS = flags.FlagValues()
flags.DEFINE_string("json", None, "Also write the table to this file.", flag_values=FLAGS)
flags.DEFINE_integer("repeats", 10, "Timed rounds.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer(
    "ragged_repeats",
    1,
    "Rounds that include ragged_dot where it is dense (not on TPU); 0 leaves it out there.",
    lower_bound=0,
    flag_values=FLAGS,
)
flags.DEFINE_integer("tokens", 4096, "T.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("width", 512, "D.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("hidden", 1024, "F.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("chosen", 2, "K, experts per token.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_list("experts", ["8", "32", "64"], "The values of E.", flag_values=FLAGS)
flags.DEFINE_multi_enum(
    "load",
    ["balanced", "skewed"],
    ["balanced", "skewed"],
    "Expert loads: balanced random, or falling as 1/rank.",
    flag_values=FLAGS,
)
flags.DEFINE_enum(
    "dtype",
    "float32",
    ["float32", "bfloat16"],
    "Of rows; peers: of weights too.",
    flag_values=FLAGS,
)
flags.DEFINE_integer("images", 16, "adapter: images in a batch.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_multi_enum(
    "model", ["branch", "vit"], ["branch", "vit"], "adapter: what to time.", flag_values=FLAGS
)
flags.DEFINE_list(
    "devices",
    ["2", "4", "8"],
    "exchange: the values of X whose bytes are counted; the largest is timed.",
    flag_values=FLAGS,
)
flags.DEFINE_float(
    "buffer_factor", 1.25, "exchange: see MoEConfig.", lower_bound=0.01, flag_values=FLAGS
)
flags.DEFINE_list(
    "routers",
    ["whitened", "softmax_offset", "eigen", "softmax", "loss_free"],
    "router: which are timed.",
    flag_values=FLAGS,
)
flags.DEFINE_integer("rank", 0, "router: R; 0: see BasisConfig.", flag_values=FLAGS)
flags.DEFINE_list("peers", list(bench_peers.PEERS), "peers: which are timed.", flag_values=FLAGS)
flags.DEFINE_string(
    "config", "configs/lm_sotu.py", "start, step, checkpoints: the experiment.", flag_values=FLAGS
)
flags.DEFINE_multi_string(
    "override",
    [],
    "start, step, checkpoints: a key of the experiment and its value, such as model.width=256.",
    flag_values=FLAGS,
)
flags.DEFINE_integer(
    "every", 50, "checkpoints: steps between two.", lower_bound=1, flag_values=FLAGS
)
flags.DEFINE_boolean("help", False, "Print this help.", short_name="h", flag_values=FLAGS)


def main(argv: Sequence[str]) -> int:
    """Runs the benchmarks that the command line names; returns the exit status."""
    try:
        FLAGS.unparse_flags()
        names = FLAGS(list(argv))[1:]
        if FLAGS.help:
            print(f"{__doc__}\nBenchmarks: {', '.join(BENCHMARKS)}, all.\n{FLAGS.get_help()}")
            return 0
        benchmarks = [] if names == ["all"] else select(names)
        if FLAGS.json:
            check_json_path(FLAGS.json)
        if names == ["all"]:
            return _all()
        rows = [row for benchmark in benchmarks for row in benchmark()]
    except (flags.Error, ValueError, FileNotFoundError) as error:
        print(f"train.bench: {error}", file=sys.stderr)
        return 2
    # Rows of one kind stand together: a table each.
    for _, table in itertools.groupby(map(_shown, rows), key=tuple):
        print_table(f"{' '.join(names)}{_shape(names)}", list(table))
    if FLAGS.json:
        write_json(FLAGS.json, rows)
    return 0


def _all() -> int:
    flags_of = (FLAGS[name] for name in FLAGS if name not in ("json", "help"))
    words = [word for flag in flags_of if flag.present for word in flag.serialize().splitlines()]
    rows = measure_all(list(BENCHMARKS), words)
    if FLAGS.json:
        write_json(FLAGS.json, rows)
    return 0


def _shape(names: Sequence[str]) -> str:
    if names[0] == "adapter":
        return ""
    if names[0] in ("step", "start", "checkpoints"):
        return f": {FLAGS.config}"
    return f": T={FLAGS.tokens} D={FLAGS.width} F={FLAGS.hidden} K={FLAGS.chosen} {FLAGS.dtype}"


def select(names: Sequence[str]) -> list[Callable[[], list[Row]]]:
    """Looks the benchmarks up.

    Raises:
        ValueError: no name, or one that is not in the table.
    """
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown or not names:
        said = f"unknown benchmark {unknown[0]!r}" if unknown else "no benchmark named"
        raise ValueError(f"{said}; choose from {', '.join(BENCHMARKS)}, or all of them by all.")
    return [BENCHMARKS[name] for name in names]


def _numbers(name: str, example: str) -> list[int]:
    texts = list(FLAGS[name].value or ())
    if not texts or not all(text.isdigit() and int(text) > 0 for text in texts):
        raise ValueError(f"--{name}={','.join(texts)} must be positive integers, as in {example}.")
    return [int(text) for text in texts]


def _shown(row: Row) -> Row:
    """A row as printed: milliseconds as median (least-most)."""
    if "moved_bytes" in row:
        return {name.replace("_", " "): value for name, value in row.items()}
    names = ("load", "exchange", "router", "layer", "start", "X", "E", "R", "kernel")
    cells = {
        name: row[name] for name in (*names, "model", "dtype", "images", "rounds") if name in row
    }
    for part in ("forward", "step", "layer", "router", "start", "plain", "saving", "data"):
        if f"{part}_ms" not in row:
            continue
        cells[f"{part} ms"] = timing.shown(row, part)
        for end in ("ratio", "images_per_s"):
            if f"{part}_{end}" in row:
                cells[f"{part} {end.replace('_', ' ')}"] = f"{row[f'{part}_{end}']:.2f}"
    if "share" in row:
        spread = f"{row['share_min']:.3f}-{row['share_max']:.3f}"
        cells["router / layer"] = f"{row['share']:.3f} ({spread})"
    if "overhead" in row:
        cells = {"every": row["every"], "bytes": row["bytes"]} | cells
        for name in ("overhead", "processor_overhead"):
            middle, least, most = (100 * row[f"{name}{end}"] for end in ("", "_min", "_max"))
            cells[f"{name.replace('_', ' ')} %"] = f"{middle:.1f} ({least:.1f} to {most:.1f})"
        cells["save call ms"] = f"{row['call_ms']:.1f}"
    if "telemetry" in row:
        cells["telemetry %"] = f"{100 * row['telemetry']:.2f}"
        cells |= {f"{row['unit']}/s": f"{row['per_second']:,.0f}"}
        cells |= {"MFU": f"{row['mfu']:.3f}"} if "mfu" in row else {}
        cells["step / data"] = f"{row['data_factor']:.0f}"
        if "memory_ratio" in row:
            cells["memory / counted"] = f"{row['memory_ratio']:.2f}"
    if "apart" in row:
        cells["apart"] = f"{row['apart']:.1e}"
    if "compile_s" in row:
        cells["compile s"] = f"{row['compile_s']:.1f}"
    return cells


def grouped() -> list[Row]:
    """Times grouped products, see `train.bench_grouped.grouped`.

    Raises:
        ValueError: K is above E.
    """
    shapes = _shapes("8,32,64")
    return bench_grouped.grouped(shapes, FLAGS.load, _rounds())


def _rounds() -> bench_grouped.Rounds:
    return bench_grouped.Rounds(FLAGS.repeats, FLAGS.ragged_repeats)


def _shapes(example: str) -> list[bench_grouped.Shape]:
    sizes = FLAGS.tokens, FLAGS.width, FLAGS.hidden, FLAGS.chosen
    return [bench_grouped.Shape(*sizes, E, FLAGS.dtype) for E in _numbers("experts", example)]


def peers() -> list[Row]:
    """Times the layer against others' layers, see `train.bench_peers.peers`.

    Raises:
        ValueError: an unknown peer, or one whose package is missing.
    """
    return bench_peers.peers(_shapes("8,64"), FLAGS.peers, _rounds())


def exchange() -> list[Row]:
    """Counts and times exchanges, see `train.bench_exchange.exchanges`.

    Raises:
        ValueError: shapes that the devices do not divide, or too few devices.
    """
    sizes = FLAGS.tokens, FLAGS.width, FLAGS.hidden, FLAGS.chosen
    shapes = [
        bench_exchange.Shape(*sizes, E, X, dtype, FLAGS.buffer_factor)
        for E in _numbers("experts", "8,64")
        for X in _numbers("devices", "2,4,8")
        for dtype in ("float32", "bfloat16")
    ]
    return bench_exchange.exchanges(shapes, FLAGS.dtype, FLAGS.repeats)


def router() -> list[Row]:
    """Times routers, see `train.bench_router.routers`.

    Raises:
        ValueError: a router or a number does not fit.
    """
    shape = {"T": FLAGS.tokens, "D": FLAGS.width, "F": FLAGS.hidden}
    shape |= {"K": FLAGS.chosen, "R": FLAGS.rank}
    experts = _numbers("experts", "8,32")
    return routers(list(FLAGS.routers), experts, shape, FLAGS.dtype, FLAGS.repeats)


def checkpoints() -> list[Row]:
    """Times checkpoints, see `train.bench_checkpoints.checkpoints`.

    Raises:
        ValueError: the experiment is impossible.
        FileNotFoundError: there is no such configuration.
    """
    return bench_checkpoints.checkpoints(_experiment(), FLAGS.every, FLAGS.repeats)


def step() -> list[Row]:
    """Times whole training steps, see `train.bench_step.step`.

    Raises:
        ValueError: the experiment is impossible.
        FileNotFoundError: there is no such configuration.
    """
    return bench_step.step(_experiment(), FLAGS.repeats)


def start() -> list[Row]:
    """Times starts, see `train.bench_start.starts`.

    Raises:
        ValueError: a run ended before its first step.
        FileNotFoundError: there is no such configuration.
    """
    _experiment()
    words = [f"--config.{word}" for word in FLAGS.override]
    return starts(FLAGS.config, words, FLAGS.repeats)


def _experiment() -> ExperimentConfig:
    """What --config and --override name."""
    path, _, argument = FLAGS.config.partition(":")  # as `python -m train` takes it
    if not Path(path).is_file():
        raise FileNotFoundError(f"--config={FLAGS.config}: there is no such file.")
    tree = runpy.run_path(path)["get_config"](*([argument] if argument else []))
    update(tree, overrides(FLAGS.override))
    return freeze(tree)


BENCHMARKS: dict[str, Callable[[], list[Row]]] = {
    "grouped": grouped,
    "router": router,
    "peers": peers,
    "adapter": lambda: adapter(FLAGS.images, FLAGS.repeats, FLAGS.model, FLAGS.dtype),
    "exchange": exchange,
    "checkpoints": checkpoints,
    "step": step,
    "start": start,
}

if __name__ == "__main__":
    sys.exit(main(sys.argv))
