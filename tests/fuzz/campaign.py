"""Sends cases to a worker, starts another where one dies, and repeats what failed.

python -m tests.fuzz.campaign READER SEED CASE         one case again, with its stack trace
python -m tests.fuzz.campaign READER SEED FIRST-LAST   many, of one reader or of "all"
"""

import collections
import json
import os
import pathlib
import selectors
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[2]
PATIENCE_S = 120.0
"""Seconds on the wall after which a worker that uses no processor is taken to hang."""

TRACE = 6000
"""Characters of a stack trace that are shown."""


class Verdict(NamedTuple):
    """What came of a case.

    Attributes:
        reader: its name.
        seed: of the campaign.
        case: the number of the case.
        came: "valid", the type of an exception, or "death".
        wrong: what is wrong with that; "" where nothing is.
        trace: where it went wrong.
    """

    reader: str
    seed: int
    case: int
    came: str
    wrong: str
    trace: str

    def __str__(self) -> str:
        again = f"python -m tests.fuzz.campaign {self.reader} {self.seed} {self.case}"
        return f"{again}\n  {self.wrong}\n{self.trace}"


class Campaign:
    """A worker process and its sandbox; a context manager.

    Args:
        folder: an empty folder.
        readers: the module whose `READERS` are tried.
    """

    def __init__(self, folder: pathlib.Path, readers: str = "tests.fuzz.readers") -> None:
        self._folder, self._readers = folder, readers
        self._worker: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Campaign":
        return self

    def __exit__(self, *error: object) -> None:
        if self._worker is not None:
            self._worker.kill()
            self._worker.communicate()

    def run(self, reader: str, seed: int, case: int) -> Verdict:
        """The verdict of one case."""
        worker = self._start() if self._worker is None else self._worker
        assert worker.stdin is not None
        worker.stdin.write(json.dumps([reader, seed, case]).encode() + b"\n")
        worker.stdin.flush()
        line = self._answer(worker)
        if line:
            return Verdict(reader, seed, case, **json.loads(line))
        how = self._end(worker, hangs=line is None)
        printed = (self._folder / "printed.txt").read_text(encoding="utf-8", errors="replace")
        return Verdict(reader, seed, case, "death", how, printed[-TRACE:])

    def _end(self, worker: subprocess.Popen[bytes], hangs: bool) -> str:
        """Waits for a worker that has ended, or ends it; says which."""
        self._worker = None
        if hangs:
            worker.kill()
        worker.communicate()
        if hangs:
            return f"hangs: no answer in {PATIENCE_S:.0f} s"
        code = worker.returncode
        return f"ended the process: {signal.strsignal(-code) if code < 0 else f'exit {code}'}"

    def _start(self) -> subprocess.Popen[bytes]:
        sandbox = self._folder / "sandbox"
        for name in ("case", "home", "outside"):
            (sandbox / name).mkdir(parents=True, exist_ok=True)
        environment = os.environ | {
            "HOME": str(sandbox / "home"),
            "JAX_PLATFORMS": "cpu",
            "MALLOC_ARENA_MAX": "2",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONPATH": str(ROOT),
            "TMPDIR": str(sandbox / "case"),
            "XDG_CACHE_HOME": str(sandbox / "case" / "cache"),
            "XLA_FLAGS": "",
        }
        self._worker = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.worker", str(sandbox), self._readers],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        return self._worker

    def _answer(self, worker: subprocess.Popen[bytes]) -> bytes | None:
        """The worker's next line; nothing if it ends, None if it does not answer in time."""
        assert worker.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(worker.stdout, selectors.EVENT_READ)
            if not selector.select(PATIENCE_S):
                return None
        return worker.stdout.readline()


def tell(verdicts: Iterable[Verdict]) -> int:
    """Prints how often each thing came, and everything that is wrong; how much is."""
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    failed = 0
    for verdict in verdicts:
        counts[verdict.reader, verdict.came] += 1
        if verdict.wrong:
            failed += 1
            print(verdict, flush=True)
    for (reader, came), count in sorted(counts.items()):
        print(f"{reader:12} {came:24} {count}")
    return failed


def main(arguments: list[str]) -> int:
    """Runs cases by hand."""
    from tests.fuzz.readers import READERS

    name, seed, cases = arguments
    first, _, last = cases.partition("-")
    numbers = range(int(first), int(last or first) + 1)
    names = list(READERS) if name == "all" else [name]
    with tempfile.TemporaryDirectory() as folder, Campaign(pathlib.Path(folder)) as campaign:

        def verdicts() -> Iterable[Verdict]:
            for reader in names:
                for case in numbers:
                    yield campaign.run(reader, int(seed), case)

        return int(tell(verdicts()) > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
