"""What all programs share on the command line: flags, and errors that a user can act on."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import app, flags

from emoe_jax.checkpoint import CheckpointError
from train.config import flat_keys, unknown_key


def run(main: Callable[[list[str]], Any]) -> None:
    """Parses flags and runs a program.

    Errors that say what to do (impossible values, missing files, damaged checkpoints) are printed
    without a stack trace and end the program with code 2; `--trace` shows the trace.
    """
    _log_to_stderr()
    flags.DEFINE_bool("trace", False, "Show stack traces of errors in the input.")

    def guarded(argv: list[str]) -> None:
        try:
            main(argv)
        except (ValueError, FileNotFoundError, ModuleNotFoundError, CheckpointError) as error:
            if flags.FLAGS.trace:
                raise
            refuse(str(error))

    app.run(guarded, flags_parser=_parse)


def _log_to_stderr() -> None:
    """Shows what the programs log from level INFO on; libraries stay at absl's level, WARNING."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("train")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logging.getLogger("absl").setLevel(logging.WARNING)


def refuse(message: str) -> NoReturn:
    """Prints an error and ends the program with code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def _parse(argv: Sequence[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except (AttributeError, KeyError) as error:
        # ml_collections raises these, deep inside, for overrides of keys that do not exist.
        refuse(_unknown_override(argv, error))
    except flags.Error as error:
        refuse(str(error))


def _unknown_override(argv: Sequence[str], error: Exception) -> str:
    """Names the first override whose key does not exist, and the nearest key that does."""
    tree = flags.FLAGS["config"].value if "config" in flags.FLAGS else None
    if tree is None:
        return str(error)
    known = flat_keys(tree)
    given = [a[len("--config.") :].split("=")[0] for a in argv if a.startswith("--config.")]
    wrong = [name for name in given if name not in known]
    return unknown_key(wrong[0], known) if wrong else str(error)
