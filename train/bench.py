"""Benchmarks: `python -m train.bench NAME [--json=FILE] [--repeats=N] [...]`.

`grouped` times an expert MLP (sort by expert, gather, two grouped products around a GELU, combine)
with each backend of the grouped product, against one dense MLP over the same T*K rows, and against
`batched`: a batched product over equal groups that are in place already. That one moves and pads
nothing, and so shows what E matrices cost whatever the method.

`adapter` times the paper's adapter branch and a training step of its recipe, see
`train.bench_adapter`.

`exchange` counts the bytes that the experts' exchange moves between devices and times the layer on
several devices (virtual ones on CPU) against one, see `train.bench_exchange`.

`router` times routers and their upkeep as a share of the layer, see `train.bench_router`.

`checkpoints` times training with and without asynchronous checkpoints, see
`train.bench_checkpoints`.

Runs are interleaved: each round runs every kernel once, and a ratio is the median over rounds of a
kernel's time over the dense time of the same round, so that a load on the machine that comes and
goes falls on both.
"""

import itertools
import runpy
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from emoe_jax.dispatch import dropless
from emoe_jax.grouped import grouped_matmul, native
from emoe_jax.routers import Routing
from train import bench_checkpoints, timing
from train.bench_adapter import adapter
from train.bench_exchange import Shape, exchanges
from train.bench_router import routers
from train.config import freeze
from train.tables import check_json_path, print_table, write_json
from train.timing import Row, Step, interleave

# Its own flags, so that several programs can be imported in one process.
FLAGS = flags.FlagValues()
flags.DEFINE_string("json", None, "Also write the table to this file.", flag_values=FLAGS)
flags.DEFINE_integer("repeats", 10, "Timed rounds.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer(
    "ragged_repeats",
    1,
    "Rounds that include ragged_dot where it is dense (on CPU); 0 leaves it out there.",
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
    "dtype", "float32", ["float32", "bfloat16"], "Of rows and weights.", flag_values=FLAGS
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
flags.DEFINE_string(
    "config", "configs/lm_sotu.py", "checkpoints: the experiment.", flag_values=FLAGS
)
flags.DEFINE_integer(
    "every", 50, "checkpoints: steps between two.", lower_bound=1, flag_values=FLAGS
)
flags.DEFINE_integer("rank", 0, "router: R; 0: see BasisConfig.", flag_values=FLAGS)
flags.DEFINE_boolean("help", False, "Print this help.", short_name="h", flag_values=FLAGS)


def main(argv: Sequence[str]) -> int:
    """Runs the benchmarks that the command line names; returns the exit status."""
    try:
        FLAGS.unparse_flags()
        names = FLAGS(list(argv))[1:]
        if FLAGS.help:
            print(f"{__doc__}\nBenchmarks: {', '.join(BENCHMARKS)}.\n{FLAGS.get_help()}")
            return 0
        benchmarks = select(names)
        if FLAGS.json:
            check_json_path(FLAGS.json)
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


def _shape(names: Sequence[str]) -> str:
    if names == ["adapter"]:
        return ""
    if names == ["checkpoints"]:
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
        raise ValueError(f"{said}; choose from {', '.join(BENCHMARKS)}.")
    return [BENCHMARKS[name] for name in names]


# --- grouped ----------------------------------------------------------------------------------


def grouped() -> list[Row]:
    """Times the grouped product's backends in an expert MLP, for each load and number of experts.

    Returns:
        One row for each load, E and kernel: milliseconds (median, least, most) and ratios to the
        dense MLP, forward alone (`forward_`) and with the gradients of tokens, gates and weights
        (`step_`); seconds to compile; how many rounds were timed.

    Raises:
        ValueError: K is above E.
    """
    numbers = _numbers("experts", "8,32,64")
    low = [E for E in numbers if FLAGS.chosen > E]
    if low:
        raise ValueError(
            f"--chosen={FLAGS.chosen} experts a token needs at least as many in --experts; "
            f"got {low[0]}."
        )
    return [row for load in FLAGS.load for E in numbers for row in _grouped_rows(load, E)]


def _numbers(name: str, example: str) -> list[int]:
    texts = list(FLAGS[name].value or ())
    if not texts or not all(text.isdigit() and int(text) > 0 for text in texts):
        raise ValueError(f"--{name}={','.join(texts)} must be positive integers, as in {example}.")
    return [int(text) for text in texts]


def _grouped_rows(load: str, E: int) -> list[Row]:
    T, D, F, K = FLAGS.tokens, FLAGS.width, FLAGS.hidden, FLAGS.chosen
    operands = _operands(T, D, F, K, E, load)
    rounds = _rounds()
    calls: dict[tuple[str, str], Step] = {}
    seconds: dict[str, float] = {}
    for kernel in rounds:
        arrays = operands.get(kernel, operands["experts"])
        start = time.perf_counter()
        for part, program in _programs(kernel).items():
            calls[kernel, part] = partial(jax.jit(program).lower(*arrays).compile(), *arrays)
        seconds[kernel] = time.perf_counter() - start
    times = interleave(calls, {key: rounds[key[0]] for key in calls})

    rows = []
    for kernel, count in rounds.items():
        row: Row = {"load": load, "E": E, "kernel": kernel, "rounds": count}
        for part in ("forward", "step"):
            row |= timing.against(part, times[kernel, part], times["dense", part])
        rows.append(row | {"compile_s": seconds[kernel]})
    return rows


def _rounds() -> dict[str, int]:
    """How many rounds each kernel is timed for: those for CPU only where they are meant to run."""
    rounds = {"dense": FLAGS.repeats, "batched": FLAGS.repeats}
    if jax.default_backend() != "cpu":
        return rounds | {"ragged_dot": FLAGS.repeats}
    if not native.missing():
        rounds["native"] = FLAGS.repeats
    rounds["loops"] = FLAGS.repeats
    ragged = min(FLAGS.ragged_repeats, FLAGS.repeats)
    return rounds | ({"ragged_dot": ragged} if ragged else {})


def _shown(row: Row) -> Row:
    """A row as printed: milliseconds as median (least-most)."""
    if "moved_bytes" in row:
        return {name.replace("_", " "): value for name, value in row.items()}
    names = ("load", "exchange", "router", "X", "E", "R", "kernel", "model", "dtype")
    cells = {name: row[name] for name in (*names, "images", "rounds") if name in row}
    for part in ("forward", "step", "layer", "router", "plain", "saving"):
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
    if "compile_s" in row:
        cells["compile s"] = f"{row['compile_s']:.1f}"
    return cells


def _operands(
    T: int, D: int, F: int, K: int, E: int, load: str
) -> dict[str, tuple[jax.Array, ...]]:
    """Arrays for the kernels: K times the tokens for those that do not route."""
    random = np.random.default_rng(0)
    dtype = jnp.dtype(FLAGS.dtype)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(random.standard_normal(shape, np.float32) / shape[-2] ** 0.5, dtype)

    share = np.ones(E) if load == "balanced" else 1 / np.arange(1, E + 1)
    # The K largest of log(share) + Gumbel noise: K different experts drawn by their shares.
    scores = np.log(share) + random.gumbel(size=(T, E))
    indices = jnp.asarray(np.argsort(-scores, axis=1)[:, :K], jnp.int32)
    matrices = normal(E, D, F), normal(E, F, D)
    return {
        "experts": (normal(T, D), jnp.full((T, K), 1 / K, dtype), *matrices, indices),
        "batched": (normal(E, -(-T * K // E), D), *matrices),
        "dense": (normal(T * K, D), normal(D, F), normal(F, D)),
    }


def _programs(kernel: str) -> dict[str, Step]:
    plain = {"dense": _dense_mlp, "batched": _dense_mlp}
    forward = plain.get(kernel) or partial(_expert_mlp, kernel)
    arguments = (0, 1, 2) if kernel in plain else (0, 1, 2, 3)

    def loss(*operands: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(forward(*operands)), dtype=jnp.float32)

    return {"forward": forward, "step": jax.value_and_grad(loss, arguments)}


def _dense_mlp(rows: jax.Array, w_in: jax.Array, w_out: jax.Array) -> jax.Array:
    """[M,D] by [D,F] and [F,D], or the same with a leading E everywhere; exact GELU."""
    return jax.nn.gelu(rows @ w_in, approximate=False) @ w_out


def _expert_mlp(
    kernel: str,
    tokens: jax.Array,
    gates: jax.Array,
    w_in: jax.Array,
    w_out: jax.Array,
    indices: jax.Array,
) -> jax.Array:
    """The library's own dropless path, with the routing given."""
    T, E = tokens.shape[0], w_in.shape[0]
    none = jnp.zeros((), jnp.float32)
    probs = jnp.zeros((T, E), jnp.float32)
    routing = Routing(indices, gates.astype(jnp.float32), probs, none, {}, {})
    groups = dropless.dispatch(tokens, routing, jnp.ones((T,), bool), 1.0)
    hidden = grouped_matmul(groups.rows, w_in, groups.sizes, backend=kernel)
    hidden = jax.nn.gelu(hidden, approximate=False)
    return dropless.combine(grouped_matmul(hidden, w_out, groups.sizes, backend=kernel), groups)


def exchange() -> list[Row]:
    """Counts and times exchanges, see `train.bench_exchange.exchanges`.

    Raises:
        ValueError: shapes that the devices do not divide, or too few devices.
    """
    sizes = FLAGS.tokens, FLAGS.width, FLAGS.hidden, FLAGS.chosen
    shapes = [
        Shape(*sizes, E, X, dtype, FLAGS.buffer_factor)
        for E in _numbers("experts", "8,64")
        for X in _numbers("devices", "2,4,8")
        for dtype in ("float32", "bfloat16")
    ]
    return exchanges(shapes, FLAGS.dtype, FLAGS.repeats)


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
    if not Path(FLAGS.config).is_file():
        raise FileNotFoundError(f"--config={FLAGS.config}: there is no such file.")
    config = freeze(runpy.run_path(FLAGS.config)["get_config"]())
    return bench_checkpoints.checkpoints(config, FLAGS.every, FLAGS.repeats)


BENCHMARKS: dict[str, Callable[[], list[Row]]] = {
    "grouped": grouped,
    "adapter": lambda: adapter(FLAGS.images, FLAGS.repeats, FLAGS.model, FLAGS.dtype),
    "exchange": exchange,
    "router": router,
    "checkpoints": checkpoints,
}

if __name__ == "__main__":
    sys.exit(main(sys.argv))
