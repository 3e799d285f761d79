"""Watches what a reader does: where it writes, and whether it starts programs or calls others.

Python's audit events tell of everything that Python code does. What native libraries write shows in
the folders around the input, whose content is compared.
"""

import contextlib
import os
import pathlib
import sys
import types
from collections.abc import Iterator
from typing import Any

# Events whose first arguments are paths that are written.
_WRITES = {
    "os.chmod": 1,
    "os.chown": 1,
    "os.link": 2,
    "os.mkdir": 1,
    "os.remove": 1,
    "os.rename": 2,
    "os.rmdir": 1,
    "os.symlink": 2,
    "os.truncate": 1,
    "os.utime": 1,
}
_FORBIDDEN = (
    *("os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "subprocess.Popen"),
    *("socket.bind", "socket.connect", "socket.getaddrinfo", "socket.sendto", "urllib.Request"),
    *("pickle.find_class", "code.__new__", "ctypes.dlopen"),
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Guard:
    """One audit hook for the life of the process, as Python cannot take one off."""

    def __init__(self) -> None:
        self._inside: str | None = None
        self._found: list[str] = []
        # Code that is run belongs to Python, an installed package or this checkout.
        here = str(pathlib.Path(__file__).parents[2])
        self._trusted = (sys.prefix, sys.base_prefix, here, "<frozen ")
        sys.addaudithook(self._hear)

    @contextlib.contextmanager
    def watch(self, inside: pathlib.Path) -> Iterator[list[str]]:
        """Lists what is done meanwhile that no reader may do; writes are fine in one folder."""
        self._inside, self._found = str(inside), []
        try:
            yield self._found
        finally:
            self._inside = None

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if self._inside is None:
            return
        if event == "open":
            path, _, flags = args
            if isinstance(flags, int) and flags & _WRITING:
                self._note_path(event, path)
        elif event in _WRITES:
            for path in args[: _WRITES[event]]:
                self._note_path(event, path)
        elif event in _FORBIDDEN:
            self._found.append(f"{event}{args!r:.300}")
            raise PermissionError(f"the fuzzer does not let a reader do {event}")
        elif event == "exec":
            code = args[0]
            # The standard library makes classes from text.
            made = isinstance(code, types.CodeType) and code.co_filename == "<string>"
            if not made and not str(code.co_filename).startswith(self._trusted):
                self._found.append(f"exec of {code.co_filename}")

    def _note_path(self, event: str, path: Any) -> None:
        if not isinstance(path, str | bytes | os.PathLike):
            return  # a file that is open already
        whole = os.path.realpath(os.fsdecode(path))
        if whole != os.devnull and not (whole + os.sep).startswith(str(self._inside) + os.sep):
            self._found.append(f"{event} {whole}")


def listing(folder: pathlib.Path, but: pathlib.Path) -> dict[str, tuple[int, int]]:
    """Size and time of everything in a folder, without one folder in it."""
    found = {}
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if pathlib.Path(root, name) != but]
        for name in (*folders, *files):
            status = os.lstat(os.path.join(root, name))
            found[os.path.join(root, name)] = (status.st_size, status.st_mtime_ns)
    return found
