"""Trains: python -m train --config=configs/NAME.py --workdir=DIR [--config.KEY=VALUE ...]."""

from __future__ import annotations

import pathlib

from absl import flags
from ml_collections import config_flags

from emoe_jax.config import require
from train import cli, cluster, notice, tables
from train.loop import train


def main(argv: list[str]) -> None:
    """Trains an experiment and prints its result.

    Ends with code 0 when the last step is done, 75 when a signal has ended it in order (see
    `train.notice`: the same command goes on), 2 when something must be changed first, 1 otherwise.
    """
    args = flags.FLAGS
    require(
        "://" not in args.workdir,
        f"--workdir={args.workdir} is not a local folder; runs write to a mounted file system",
    )
    with notice.heeded(args.config.checkpoint.grace_s):
        scalars, rows = train(args.config, pathlib.Path(args.workdir))
    if args.json and cluster.is_first():
        tables.write_json(args.json, [{"layer": "all"} | scalars, *rows])


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "Experiment.", lock_config=True)
    flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
    flags.DEFINE_string("json", "", "File to write the result to.")
    cluster.define_flags()
    flags.mark_flag_as_required("config")
    cli.run(main)
