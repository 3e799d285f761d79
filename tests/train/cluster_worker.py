"""What test_cluster.py runs in each of two processes: python -m tests.train.cluster_worker FLAGS.

Everything that only several processes show and that needs no start of its own. In --folder lie
`text`, the documents, and the runs `one` and `two`. Goes on with `two`, reads a checkpoint of
`one`, writes what it has seen to seen_<process>.json and the restored state to state.npz. At
the end process 1 fails alone, in the middle of what process 0 does.
"""

import contextlib
import itertools
import json
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import flags
from flax import traverse_util
from jax.experimental import multihost_utils

import emoe_jax.stored
from emoe_jax.checkpoint import CheckpointError, Checkpoints
from emoe_jax.sharding import MeshConfig, make_mesh, rows_here
from tests.train.tiny import lm_tree
from train import cli, cluster, loop
from train.config import freeze
from train.evaluate import compile_evaluate, evaluate
from train.loop import train
from train.run import build
from train.sample import continue_text

MESH = {"expert": 4, "tensor": 2}
"""Four devices of each process: experts 0 and 1 live in the first, 2 and 3 in the second."""


def main(folder: pathlib.Path) -> None:
    """Does all of it."""
    tree = json.loads((folder / "one/config.json").read_text())
    resumed = lm_tree(tree["data"]["sources"][0])
    guard = tree["guard"] | {"stall_s": 1.0}
    resumed.update(tree | {"mesh": tree["mesh"] | MESH, "guard": guard})
    loop.begin_train = troubled(loop.begin_train)
    cli._run_on_several(lambda argv: train(resumed, folder / "two"), [])
    seen = restored(folder, tree) | refusals(folder) | {"rows": rows()}
    (folder / f"seen_{jax.process_index()}.json").write_text(json.dumps(seen))
    different(folder)
    cluster.FAILED_MS = 500
    cli._run_on_several(fail_in_second, [])


def troubled(begin_train: Callable[..., Any]) -> Callable[..., Any]:
    """Makes the second step get a routers' state that is lost, and the third hang in process 1."""

    def begin_and_count(*given: Any) -> Callable[..., Any]:
        wait, calls = begin_train(*given), itertools.count(1)

        def step(state: Any, *rest: Any) -> Any:
            call = next(calls)
            if call == 2:
                router = state["router"]["blocks"]["groups"]["0"]["moe"]["router"]
                router["offset"] = jax.jit(lambda b: b.at[0, 3].set(np.nan))(router["offset"])
            if call == 3 and not cluster.is_first():
                time.sleep(3)
            return wait()(state, *rest)

        return lambda: step

    return begin_and_count


def restored(folder: pathlib.Path, tree: dict[str, Any]) -> dict[str, Any]:
    """What two processes read of a checkpoint of one; its experts exchange tokens between them."""
    changed = {"mesh": tree["mesh"] | MESH, "moe": tree["moe"] | {"dispatch": "dropless"}}
    run = build(freeze(tree | changed), folder / "one")
    with Checkpoints(folder / "one/checkpoints", every=1, read_only=True) as checkpoints:
        step = checkpoints.latest_step()
        assert step is not None
        found = checkpoints.restore(step, run.abstract)
        damage = damaged(lambda: checkpoints.restore(step, run.abstract))
    state = found.train_state
    arrays = multihost_utils.process_allgather(state, tiled=True)
    if cluster.is_first():
        np.savez(folder / "state.npz", **traverse_util.flatten_dict(arrays, sep="|"))
    assert found.data_state is not None
    batches = run.data.train_iterator(
        run.config.batch, seed=run.config.seed, rows=run.rows(run.config.batch)
    )
    batches.set_state(found.data_state)
    tokens = next(batches)["tokens"].tolist()
    shards = sorted(batches.get_state())
    batches.close()
    return {
        "damage": damage,
        "fallback": fallback(folder, run.abstract),
        "tokens": tokens,
        "shards": shards,
        "scalars": evaluate(run, compile_evaluate(run), state)[0],
        "text": continue_text(run, state, "the ", tokens=8, temperature=0),
    }


def fallback(folder: pathlib.Path, abstract: Any) -> list[Any]:
    """What both say and do where process 1 alone cannot read the newest checkpoint of a copy."""
    source, target = folder / "one/checkpoints", folder / "three"
    cluster.first_then_others(lambda: target.exists() or shutil.copytree(source, target))
    read = emoe_jax.stored.read_arrays

    def failing(step: Any, wanted: Any) -> Any:
        if step.name == "26" and not cluster.is_first():
            raise OSError("the disk of process 1 is gone")
        return read(step, wanted)

    emoe_jax.stored.read_arrays = failing
    try:
        with Checkpoints(target, every=1) as checkpoints:
            step, _, bad = checkpoints.restore_newest(abstract)
            names = checkpoints.set_aside(bad)
            return [step, bad, names, checkpoints.latest_step()]
    finally:
        emoe_jax.stored.read_arrays = read


def damaged(restore: Callable[[], Any]) -> str:
    """The error where only process 1 reads other bits than were saved."""
    digests = emoe_jax.stored.digests

    def other(arrays: Any) -> dict[str, int]:
        found = digests(arrays)
        return found | ({} if cluster.is_first() else {"step": found["step"] + 1})

    emoe_jax.stored.digests = other
    try:
        return message(restore)
    finally:
        emoe_jax.stored.digests = digests


def refusals(folder: pathlib.Path) -> dict[str, str]:
    """What the program says to bad input, of which process 1 has some alone."""
    source = f"files:{folder}/text/*.txt"
    own = folder / f"own_{jax.process_index()}"
    cluster.SHARED_S = 0.3
    told = {
        "batch": message(lambda: train(lm_tree(source, batch=12), folder / "b")),
        "folder": message(lambda: train(lm_tree(source), own)),
    }
    os.chdir(folder if cluster.is_first() else folder / "one")
    told["data"] = message(lambda: train(lm_tree("files:text/*.txt"), folder / "c"))
    return told


def different(folder: pathlib.Path) -> None:
    """Ends the program as the command line does where configurations differ."""
    tree = lm_tree(f"files:{folder}/text/*.txt", steps=24 if cluster.is_first() else 25)
    with contextlib.suppress(SystemExit):
        cli._run_on_several(lambda argv: train(tree, folder / "d"), [])
    assert not (folder / "d").exists()


def message(call: Callable[[], Any]) -> str:
    """What a call raises."""
    try:
        call()
    except (ValueError, CheckpointError) as error:
        return str(error)
    return "nothing was raised"


def rows() -> list[list[int]]:
    """Rows of a batch of 8 that this process holds, on several meshes."""
    meshes = [MeshConfig(), MeshConfig(expert=4, tensor=2), MeshConfig(data=2, tensor=4)]
    meshes.append(MeshConfig(data=1, tensor=8))
    return [rows_here(make_mesh(mesh), 8).tolist() for mesh in meshes]


def fail_in_second(argv: list[str]) -> None:
    """Process 0 waits for process 1, which ends."""
    if not cluster.is_first():
        raise ValueError("the disk of process 1 is gone")
    cluster.together(lambda: None)


if __name__ == "__main__":
    cli._log_to_stderr()
    cluster.define_flags()
    flags.DEFINE_bool("trace", False, "As in train.cli.run.")
    flags.DEFINE_string("folder", None, "See above.", required=True)
    flags.FLAGS(sys.argv)
    cluster.join(os.environ)
    main(pathlib.Path(flags.FLAGS.folder))
