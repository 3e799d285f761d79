"""What all programs share on the command line: flags, and errors that a user can act on."""

from __future__ import annotations

import ast
import logging
import os
import pathlib
import reprlib
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
from absl import app, flags
from absl import logging as absl_logging

from train import cluster, tables
from train.config import flat_keys, update
from train.config_tree import unknown_key


def run(main: Callable[[list[str]], Any]) -> None:
    """Parses flags and runs a program.

    Errors that say what to do (impossible values, missing or unwritable files, damaged checkpoints)
    are printed without a stack trace and end the program with code 2; `--trace` shows the trace.
    Of several processes the first prints, and others what went wrong in them alone.
    """
    _log_to_stderr()
    flags.DEFINE_bool("trace", False, "Show stack traces of errors in the input.")

    def guarded(argv: list[str]) -> None:
        # absl has just set its own level to INFO, at which orbax tells of every file it writes.
        if not flags.FLAGS["verbosity"].present:
            absl_logging.set_verbosity(absl_logging.WARNING)
            for logger in (absl_logging.get_absl_logger(), logging.getLogger("asyncio")):
                logger.addFilter(_is_news)
        if not flags.FLAGS.trace:
            sys.unraisablehook = _without_late_writes(sys.unraisablehook)
        try:
            if "coordinator" in flags.FLAGS:
                cluster.join(os.environ)
            if jax.distributed.is_initialized():
                _run_on_several(main, argv)
            else:
                _check_json_path()
                main(argv)
        except cluster.INPUT_ERRORS as error:
            if flags.FLAGS.trace:
                raise
            refuse(str(error))

    app.run(guarded, flags_parser=_parse)


def _run_on_several(main: Callable[[list[str]], Any], argv: list[str]) -> None:
    """Runs a program on one of several processes, none of which waits long for one that failed."""
    if not cluster.is_first():
        logging.getLogger("train").setLevel(logging.ERROR)
        absl_logging.set_verbosity(absl_logging.ERROR)
    try:
        cluster.together(_check_json_path if cluster.is_first() else lambda: None)
        main(argv)
    except cluster.INPUT_ERRORS as error:
        if flags.FLAGS.trace:
            traceback.print_exc()
        text = cluster.failed_alike(str(error))
        if text is None:
            who = f"process {jax.process_index()} of {jax.process_count()}"
            print(f"{who}: error: {error}", file=sys.stderr)
            cluster.leave(2)
        if cluster.is_first():
            refuse(text)
        sys.exit(2)
    except (Exception, KeyboardInterrupt):
        traceback.print_exc()
        print(
            f"process {jax.process_index()} of {jax.process_count()} ends. If another one was"
            " lost, all end; the same command on all goes on from the last checkpoint",
            file=sys.stderr,
        )
        cluster.leave(1)


def _is_news(record: logging.LogRecord) -> bool:
    """False for what orbax says whenever a run is only read, as it was asked to.

    Of its errors, and of those of the event loops it writes in, the line stays, without the stack:
    threads log one when they get to it, perhaps after the last words of the program, which is told
    the error and says what to do about it.
    """
    writes = {"orbax", "asyncio"} & set(pathlib.Path(record.pathname).parts)
    if writes and not flags.FLAGS.trace:
        record.exc_info = None
    return "Given directory is read only" not in record.getMessage()


def _without_late_writes(
    tell: Callable[[sys.UnraisableHookArgs], Any],
) -> Callable[[sys.UnraisableHookArgs], None]:
    """A `sys.unraisablehook` that keeps still about writes that end after a save has failed.

    The first array that cannot be written ends the event loop of orbax's save. TensorStore's
    threads, as each comes to the end of another array, find it closed and would print a trace for
    each, dozens of them, in pieces, through the last words of the program.
    """

    def hook(given: sys.UnraisableHookArgs) -> None:
        late = isinstance(given.exc_value, RuntimeError)
        if not (late and str(given.exc_value) == "Event loop is closed"):
            tell(given)

    return hook


def _log_to_stderr() -> None:
    """Shows what the programs log from level INFO on."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("train")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def refuse(message: str) -> NoReturn:
    """Prints an error and ends the program with code 2."""
    # In one write: `print` makes two, and other threads may print between them.
    sys.stderr.write(f"error: {message}\n")
    sys.exit(2)


def _check_json_path() -> None:
    """Refuses a --json that cannot be written before the time is spent that its content takes."""
    if "json" in flags.FLAGS and flags.FLAGS.json:
        tables.check_json_path(flags.FLAGS.json)


def define_trained_run() -> None:
    """Flags of the programs that read a run: which one, where, and what is different here."""
    cluster.define_flags()
    flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
    flags.DEFINE_multi_string(
        "override", [], "KEY=VALUE of its configuration, for example mesh.fsdp=1; repeatable."
    )
    flags.DEFINE_string("step", "newest", "Checkpoint: newest, best (lowest loss), or its step.")


def overrides(texts: Sequence[str], flag: str = "override") -> dict[str, Any]:
    """What --override gives: dotted keys to Python values, to text where a value is none.

    Args:
        texts: each of the form KEY=VALUE.
        flag: the flag's name, for the error.

    Raises:
        ValueError: not of the form KEY=VALUE.
    """
    values: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--{flag}={text} is not of the form KEY=VALUE")
        try:
            values[name] = ast.literal_eval(value)
        # All that the function is documented to raise.
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            values[name] = value
    return values


def _parse(argv: Sequence[str]) -> list[str]:
    try:
        _check_config(argv)
        # A flag of a number does not parse None; the option is unset once the others are parsed.
        unset = [arg for arg in argv if arg.startswith("--config.") and arg.endswith("=None")]
        rest = flags.FLAGS([arg for arg in argv if arg not in unset])
        if unset:
            keys = (arg[len("--config.") : -len("=None")] for arg in unset)
            update(flags.FLAGS.config, dict.fromkeys(keys))
        return rest
    except (flags.Error, ValueError) as error:
        refuse(str(error))


def _check_config(argv: Sequence[str]) -> None:
    """Refuses a config file that is not there and overrides of keys that it does not have.

    ml_collections would tell of both late, in words of its inner workings.

    Raises:
        ValueError: says which file or key, and what there is instead.
    """
    path = _value(argv, "config")
    if path is None or "config" not in flags.FLAGS:
        return
    file = pathlib.Path(path.partition(":")[0])  # what follows a colon is get_config's argument
    if not file.is_file():
        there = ", ".join(sorted(str(other) for other in file.parent.glob("[!_]*.py")))
        raise ValueError(f"--config={path}: there is no such file; there are: {there or 'none'}")
    known = flat_keys(flags.FLAGS["config"].parser.parse(path))
    for arg, following in zip(argv, [*argv[1:], ""], strict=True):
        if not arg.startswith("--config."):
            continue
        name, equals, value = arg[len("--config.") :].partition("=")
        if not any(key == name or key.startswith(f"{name}.") for key in known):
            raise ValueError(unknown_key(name, known))
        _check_depth(name, value if equals else following)


def _check_depth(name: str, value: str) -> None:
    """Refuses what Python's parser cannot read, as brackets stand too deep in each other.

    Raises:
        ValueError: says so.
    """
    try:
        ast.literal_eval(value)
    except (RecursionError, MemoryError) as error:
        raise ValueError(
            f"--config.{name} is given {reprlib.repr(value)}, which is nested too deeply to be"
            " read; a value is a number, a word, or a tuple of them"
        ) from error
    except (ValueError, SyntaxError, TypeError):
        return


def _value(argv: Sequence[str], name: str) -> str | None:
    """What the command line gives for a flag, written --name=value or --name value."""
    for arg, following in zip(argv, [*argv[1:], None], strict=True):
        if arg.startswith(f"--{name}="):
            return arg.partition("=")[2]
        if arg == f"--{name}":
            return following
    return None
