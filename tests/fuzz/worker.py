"""The process that reads damaged inputs, one after the other, until one of them kills it.

It takes cases as JSON lines and answers each with a verdict. Processor time is bounded, as the
clock on the wall would tell of other work on the machine, and memory: what is used at the peak, and
the address space, so that an allocation by a length from a header fails rather than being swapped.
"""

import faulthandler
import importlib
import json
import os
import pathlib
import resource
import shutil
import signal
import sys
import traceback

from tests.fuzz.guard import Guard, listing
from tests.fuzz.reader import Reader

ADDRESS_SPACE = 2 * 2**30
LONGEST = 4000
"""Characters of a message, besides twice those of the input that it quotes."""


def write_input(folder: pathlib.Path, files: dict[str, bytes]) -> None:
    """Makes the folder anew, with the files of an input."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def judge(
    reader: Reader, files: dict[str, bytes], folder: pathlib.Path, guard: Guard
) -> dict[str, str]:
    """Reads an input; what came of it, and what is wrong with that ("" where nothing is)."""
    os.chdir(folder)
    around = listing(folder.parent, folder)
    before = _reset_peak()
    # Its signal ends the process, after a stack trace.
    signal.setitimer(signal.ITIMER_PROF, reader.seconds)
    with guard.watch(folder) as done:
        error = _error_of(reader, folder)
    signal.setitimer(signal.ITIMER_PROF, 0)
    peak = _status("VmHWM") - before
    os.chdir(folder.parent)
    wrong = _wrong(reader, error, files)
    wrong += [f"did {what}" for what in done]
    if listing(folder.parent, folder) != around:
        wrong.append("wrote outside its folder")
    if peak > reader.peak:
        wrong.append(f"took {peak / 2**20:.0f} MiB")
    trace = "".join(traceback.format_exception(error)) if wrong and error else ""
    return {
        "came": "valid" if error is None else type(error).__name__,
        "wrong": _printable("; ".join(wrong)),
        "trace": _printable(trace[-6000:]),
    }


def _printable(text: str) -> str:
    """The text without lone surrogates, which no pipe takes."""
    return text.encode("utf-8", "backslashreplace").decode()


def _error_of(reader: Reader, folder: pathlib.Path) -> BaseException | None:
    try:
        reader.read(folder)
    # Whatever it is, it is what is judged: panics of native libraries are no `Exception`.
    except BaseException as error:
        return error
    return None


def _wrong(reader: Reader, error: BaseException | None, files: dict[str, bytes]) -> list[str]:
    """What is wrong with an exception."""
    if error is None:
        return []
    if not isinstance(error, reader.raises):
        return [f"{type(error).__name__} is not documented: {error!s:.300}"]
    text = str(error)
    named = [pathlib.Path(name).name for name in files] + list(reader.words())
    if not text.strip():
        return [f"{type(error).__name__} without words"]
    if not any(any(name in line for name in named) for line in text.splitlines()):
        return [f"{type(error).__name__} names neither file nor key: {text:.300}"]
    if len(text) > LONGEST + 2 * sum(map(len, files.values())):
        return [f"{type(error).__name__} of {len(text)} characters: {text:.300}"]
    return []


def _status(name: str) -> int:
    """A size of this process, in bytes."""
    with open("/proc/self/status", encoding="ascii") as file:
        (line,) = (line for line in file if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def _reset_peak() -> int:
    """Lets the peak of memory begin anew; what is used now."""
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")
    return _status("VmRSS")


def warm_up(reader: Reader, folder: pathlib.Path) -> None:
    """Reads the inputs undamaged, which imports what the reader needs; then bounds the memory.

    Raises:
        Exception: one of them cannot be read.
    """
    unbounded = resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_AS, (unbounded, unbounded))
    for files in reader.corpus():
        write_input(folder, files)
        os.chdir(folder)
        reader.read(folder)
        os.chdir(folder.parent)
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + ADDRESS_SPACE, unbounded))


def main(sandbox: pathlib.Path, readers: str) -> None:
    """Answers cases of a module's `READERS` in `sandbox`/case until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    printed = (sandbox.parent / "printed.txt").open("w+", encoding="utf-8")
    for stream in (1, 2):
        os.dup2(printed.fileno(), stream)
    faulthandler.enable()
    faulthandler.register(signal.SIGPROF, all_threads=False, chain=True)
    known = importlib.import_module(readers).READERS
    guard, warm, folder = Guard(), set(), sandbox / "case"
    for line in sys.stdin:
        name, seed, case = json.loads(line)
        if name not in warm:
            warm_up(known[name], folder)
            warm.add(name)
        files = known[name].case(name, seed, case)
        write_input(folder, files)
        printed.seek(0)
        printed.truncate()
        verdict = judge(known[name], files, folder, guard)
        answers.write(json.dumps(verdict) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), sys.argv[2])
