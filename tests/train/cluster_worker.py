"""What test_cluster.py runs in each of two processes: python -m tests.train.cluster_worker ...

Everything that only several processes show and that needs no start of its own. Writes what it has
seen to seen_<process>.json, and the parameters that it has restored to params.npz. Then process 1
fails alone, in the middle of what process 0 does.
"""

import contextlib
import json
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import flags
from flax import traverse_util
from jax.experimental import multihost_utils

import emoe_jax.checkpoint
from emoe_jax.checkpoint import CheckpointError, Checkpoints
from emoe_jax.sharding import MeshConfig, make_mesh, rows_here
from tests.train.tiny import lm_tree
from train import cli, cluster
from train.config import freeze
from train.evaluate import compile_evaluate, evaluate
from train.loop import train
from train.run import build
from train.sample import continue_text

MESH = {"expert": 4, "tensor": 2}
"""Four devices of each process: experts 0 and 1 live in the first, 2 and 3 in the second."""


def main(port: str, process: str, folder: str, one: str) -> None:
    """Looks at a run of one process from two.

    Args:
        port: of the coordinator.
        process: this one.
        folder: to write to.
        one: the folder of the run, beside the folder `text` of its documents.
    """
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(process))
    run_folder, out = pathlib.Path(one), pathlib.Path(folder)
    seen = restored(run_folder, out) | refusals(run_folder, out)
    seen["rows"] = rows()
    (out / f"seen_{process}.json").write_text(json.dumps(seen))
    different(run_folder, out)
    cluster.FAILED_MS = 500
    cli._run_on_several(fail_in_second, [])


def restored(run_folder: pathlib.Path, out: pathlib.Path) -> dict[str, Any]:
    """What two processes read of a checkpoint of one."""
    tree = json.loads((run_folder / "config.json").read_text())
    changed = {"mesh": tree["mesh"] | MESH, "moe": tree["moe"] | {"dispatch": "dropless"}}
    run = build(freeze(tree | changed), run_folder)
    with Checkpoints(run_folder / "checkpoints", every=1, read_only=True) as checkpoints:
        step = checkpoints.latest_step()
        assert step is not None
        found = checkpoints.restore(step, run.abstract)
        damage = damaged(lambda: checkpoints.restore(step, run.abstract))
    state = found.train_state
    arrays = multihost_utils.process_allgather(state["params"], tiled=True)
    if cluster.is_first():
        np.savez(out / "params.npz", **traverse_util.flatten_dict(arrays, sep="|"))
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
        "tokens": tokens,
        "shards": shards,
        "scalars": evaluate(run, compile_evaluate(run), state)[0],
        "text": continue_text(run, state, "the ", tokens=8, temperature=0),
    }


def damaged(restore: Callable[[], Any]) -> str:
    """The error where only process 1 reads other bits than were saved."""
    digests = emoe_jax.checkpoint.digests

    def other(arrays: Any) -> dict[str, int]:
        found = digests(arrays)
        return found | ({} if cluster.is_first() else {"step": found["step"] + 1})

    emoe_jax.checkpoint.digests = other
    try:
        return message(restore)
    finally:
        emoe_jax.checkpoint.digests = digests


def refusals(run_folder: pathlib.Path, out: pathlib.Path) -> dict[str, str]:
    """What the program says to bad input, of which process 1 has some alone."""
    second = not cluster.is_first()
    source = f"files:{run_folder.parent}/text/*.txt"
    good = lm_tree(source)
    cluster.SHARED_S = 0.3
    told = {
        "batch": message(lambda: train(lm_tree(source, batch=12), out / "b")),
        "folder": message(lambda: train(good, out / f"own_{int(second)}")),
    }
    os.chdir(run_folder.parent if cluster.is_first() else out)
    told["data"] = message(lambda: train(lm_tree("files:text/*.txt"), out / "c"))
    return told


def different(run_folder: pathlib.Path, out: pathlib.Path) -> None:
    """Ends the program as the command line does where configurations differ."""
    source = f"files:{run_folder.parent}/text/*.txt"
    tree = lm_tree(source, steps=24 if cluster.is_first() else 25)
    with contextlib.suppress(SystemExit):
        cli._run_on_several(lambda argv: train(tree, out / "d"), [])
    assert not (out / "d").exists()


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
    flags.DEFINE_bool("trace", False, "As in train.cli.run.")
    flags.FLAGS(["cluster_worker"])
    main(*sys.argv[1:])
