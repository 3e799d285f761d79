"""Reads tensors from a file of `torch.save` without torch, and without running anything in it.

Since torch 1.6 such a file is a zip archive: NAME/data.pkl is a pickle of the saved object in
which every tensor names a storage, NAME/data/KEY holds the bytes of one storage, and NAME/byteorder
(since torch 2.1) says "little" or "big". See the note "Serialization semantics" of torch's manual.

A pickle is a program: it may ask for any importable object and call it. Here it gets the few names
of `_GLOBALS` and nothing else. What it gets are stand-ins of this module that a pickle cannot
change (no attributes, no state), and calling them only notes where a tensor lies. The tensors are
built afterwards, each checked against the size of its storage.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import pathlib
import pickle
import pickletools
import reprlib
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from emoe_jax.config import require

# The entries under which checkpoints hold their state dict, as the paper's code accepts them.
WRAPPERS = ("state_dict", "model_state_dict", "model")

_DTYPES: dict[str, np.dtype[Any]] = {
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "DoubleStorage": np.dtype(np.float64),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}

# What zipfile raises for damaged archives: wrong structure, data, names, versions, flags, offsets.
_ZIP_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    ValueError,
    NotImplementedError,
    RuntimeError,
    OSError,
)

# Elements of a tensor that repeats those of its storage (`expand`): state dicts hold few such, and
# small ones.
_EXPANDED = 2**20

_ZIP = b"PK\x03\x04"
# torch.serialization.MAGIC_NUMBER, pickled: how files without an archive begin.
_LEGACY = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)[:-1]
_DAMAGED = "Copy or download it again, or save it again."
_RESAVE = "Save the weights alone, with torch.save(model.state_dict(), ...) or as safetensors."


class _Storage(NamedTuple):
    """One storage: the entry that holds it, the name of its torch class, its number of elements."""

    key: str
    kind: str
    numel: int


class _Tensor(NamedTuple):
    """Where a tensor lies, as the file says; nothing is checked yet. Lengths in elements."""

    storage: Any
    offset: Any
    shape: Any
    strides: Any


class _Ordered(dict[Any, Any]):
    """Stands in for OrderedDict: the attributes of a state dict (`_metadata`) are dropped."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        """Takes no attributes."""


class _Callable:
    """Stands in for a function or class; a pickle can call it, and cannot change it."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: object) -> None:
        """Refuses the opcode BUILD, which would set attributes."""
        raise TypeError("a function has no state")


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: object) -> _Tensor:
    """torch._utils._rebuild_tensor_v2; requires_grad, hooks and metadata are dropped."""
    return _Tensor(storage, offset, shape, strides)


def _rebuild_parameter(data: Any, *_: object) -> Any:
    """torch._utils._rebuild_parameter; requires_grad and hooks are dropped."""
    return data


def _ordered(items: Iterable[Any] = ()) -> _Ordered:
    """collections.OrderedDict."""
    return _Ordered(items)


# Everything that a file may name.
_GLOBALS: dict[tuple[str, str], _Callable | str] = {
    ("collections", "OrderedDict"): _Callable(_ordered),
    ("torch", "Size"): _Callable(tuple),
    ("torch._utils", "_rebuild_tensor_v2"): _Callable(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): _Callable(_rebuild_parameter),
    **{("torch", kind): kind for kind in _DTYPES},
}


class _RefusedError(ValueError):
    """The file asks for something that is not read; carries its own message."""


class _Unpickler(pickle.Unpickler):
    """Unpickles with the names of `_GLOBALS` only."""

    def __init__(self, data: bytes, path: pathlib.Path) -> None:
        super().__init__(io.BytesIO(data))
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        """Looks a name up in the table; imports nothing."""
        if (module, name) not in _GLOBALS:
            raise _RefusedError(
                f"{self._path} was refused: it asks to run `{module}.{name}` when it is unpickled, "
                f"and only tensors and plain values are read. Nothing of it was run. {_RESAVE}"
            )
        return _GLOBALS[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        """Notes a storage; `pid` is ("storage", class, key, device, number of elements)."""
        tag, kind, key, _, numel = pid
        known = tag == "storage" and isinstance(kind, str) and kind in _DTYPES
        if not known or type(key) is not str or type(numel) is not int:
            raise TypeError(f"{reprlib.repr(pid)} is no storage")
        return _Storage(key, kind, numel)


def read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads the tensors of a state dict saved by `torch.save` in torch 1.6 or later.

    Args:
        path: the file. It holds a state dict, or a dict with one under one of `WRAPPERS`. Entries
            that are no tensors are left out.

    Returns:
        The tensors by name, in the file's order, with the file's shapes and dtypes, bit for bit;
        each C-contiguous with memory of its own.

    Raises:
        ValueError: the file asks to run something, is no such file, is damaged, or has no tensors.
    """
    path = pathlib.Path(path)
    _check_start(path)
    with _explain(path):
        archive = zipfile.ZipFile(path)
    with archive:
        root = _root(archive, path)
        checkpoint = _unpickle(_entry(archive, f"{root}/data.pkl", path), path)
        return _build(archive, root, _select(checkpoint, path), path)


@contextlib.contextmanager
def _explain(path: pathlib.Path) -> Iterator[None]:
    """Says which file an error of zipfile is about."""
    try:
        yield
    except _ZIP_ERRORS as error:
        raise ValueError(
            f"{path} is cut short or damaged ({type(error).__name__}: {error}). {_DAMAGED}"
        ) from error


def _entry(archive: zipfile.ZipFile, name: str, path: pathlib.Path) -> bytes:
    """The bytes of one entry; zipfile compares its checksum.

    torch stores entries as they are. A compressed one may unpack to far more than the file holds.
    """
    require(
        archive.getinfo(name).compress_type == zipfile.ZIP_STORED,
        f"{path} has a compressed entry {name}, which torch.save does not write. {_RESAVE}",
    )
    with _explain(path):
        return archive.read(name)


def _check_start(path: pathlib.Path) -> None:
    """Raises unless the file begins as a zip archive does."""
    with path.open("rb") as file:
        start = file.read(len(_LEGACY))
    require(
        start != _LEGACY,
        f"{path} has the format of torch before 1.6, which is not read. Open it with torch and save"
        " it again: torch.save(torch.load(path, weights_only=True), path).",
    )
    require(
        start.startswith(_ZIP),
        f"{path} is no file of torch.save: it does not begin as a zip archive does (it begins with"
        f" {start[:8]!r}). {_DAMAGED}",
    )


def _root(archive: zipfile.ZipFile, path: pathlib.Path) -> str:
    """The folder of the archive that holds everything, after a look at the byte order."""
    names = archive.namelist()
    roots = [name.removesuffix("/data.pkl") for name in names if name.endswith("/data.pkl")]
    require(
        len(roots) == 1,
        f"{path} is a zip archive but no file of torch.save: it has {len(roots)} entries"
        f" NAME/data.pkl, not one. {_RESAVE}",
    )
    order = f"{roots[0]}/byteorder"
    stored = _entry(archive, order, path) if order in names else b"little"
    require(
        stored == b"little",
        f"{path} has byte order {stored!r}; only b'little' is read. Open it with torch on a"
        " little-endian machine and save it again.",
    )
    return roots[0]


def _unpickle(data: bytes, path: pathlib.Path) -> Any:
    """Unpickles with the names of `_GLOBALS` only; tensors come as `_Tensor`."""
    try:
        _check_opcodes(data)
        return _Unpickler(data, path).load()
    except _RefusedError:
        raise
    # A malformed pickle leads the unpickler, and the stand-ins, into any kind of error.
    except Exception as error:
        raise ValueError(
            f"{path} is no file of torch.save, or damaged: its pickle cannot be read"
            f" ({type(error).__name__}: {error}). {_DAMAGED}"
        ) from error


def _check_opcodes(data: bytes) -> None:
    """Raises for what `find_class` never sees.

    EXT opcodes fetch objects that a program registered with copyreg, from a cache of pickle's own.
    A PUT of a large index has pickle allocate that much memory; writers count from 0.
    """
    for opcode, argument, _ in pickletools.genops(data):
        require(not opcode.name.startswith("EXT"), f"it uses opcode {opcode.name}")
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            require(int(argument or 0) <= len(data), f"it uses memo index {argument}")


def _select(checkpoint: Any, path: pathlib.Path) -> dict[str, _Tensor]:
    """The tensors of the state dict that a checkpoint is, or holds under one of `WRAPPERS`."""
    require(
        isinstance(checkpoint, dict),
        f"{path} holds a {type(checkpoint).__name__.lstrip('_').lower()}, not a state dict."
        f" {_RESAVE}",
    )
    for state in (*map(checkpoint.get, WRAPPERS), checkpoint):
        if isinstance(state, dict):
            found = {k: v for k, v in state.items() if isinstance(v, _Tensor)}
            names = {k: v for k, v in found.items() if isinstance(k, str)}
            if names:
                return names
    raise ValueError(
        f"{path} holds no named tensors, at its top or under {', '.join(WRAPPERS)}; its entries are"
        f" {', '.join(map(reprlib.repr, list(checkpoint)[:5])) or 'none'}. {_RESAVE}"
    )


def _build(
    archive: zipfile.ZipFile, root: str, found: dict[str, _Tensor], path: pathlib.Path
) -> dict[str, np.ndarray]:
    """Reads each storage once, and copies the tensors that lie in it."""
    names: dict[_Storage, list[str]] = {}
    for name, tensor in found.items():
        _check_tensor(f"{path}: tensor {name!r}", tensor)
        names.setdefault(tensor.storage, []).append(name)
    arrays: dict[str, np.ndarray] = {}
    for storage, tenants in names.items():
        data = _storage(archive, root, storage, path)
        arrays.update({name: _copy(data, found[name]) for name in tenants})
    return {name: arrays[name] for name in found}


def _check_tensor(name: str, tensor: _Tensor) -> None:
    """Raises unless every element lies within the storage."""
    storage, offset, shape, strides = tensor
    numbers = isinstance(shape, tuple) and isinstance(strides, tuple)
    numbers = numbers and all(type(n) is int and n >= 0 for n in (offset, *shape, *strides))
    require(
        isinstance(storage, _Storage) and numbers and len(shape) == len(strides) <= 64,
        f"{name} has no valid storage, offset, shape and strides (offset {reprlib.repr(offset)},"
        f" shape {reprlib.repr(shape)}, strides {reprlib.repr(strides)}). {_DAMAGED}",
    )
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    require(
        0 in shape or last < storage.numel,
        f"{name} of shape {shape}, strides {strides} and offset {offset} ends at element {last},"
        f" outside its storage of {storage.numel}. {_DAMAGED}",
    )
    # Elements may share memory (expand), so the storage's size does not bound the tensor's.
    count = math.prod(max(n, 1) for n in shape)
    limit = max(storage.numel, _EXPANDED)
    require(
        count <= limit,
        f"{name} expands {storage.numel} stored elements to {count}, more than {limit}. {_DAMAGED}",
    )


def _storage(
    archive: zipfile.ZipFile, root: str, storage: _Storage, path: pathlib.Path
) -> np.ndarray:
    """The elements [N] of one storage."""
    entry, dtype = f"{root}/data/{storage.key}", _DTYPES[storage.kind]
    require(entry in archive.NameToInfo, f"{path} lacks its entry {entry}. {_DAMAGED}")
    size = archive.getinfo(entry).file_size
    require(
        size == storage.numel * dtype.itemsize,
        f"{path}: entry {entry} has {size} bytes, not {storage.numel} of {dtype}. {_DAMAGED}",
    )
    return np.frombuffer(_entry(archive, entry, path), dtype)


def _copy(data: np.ndarray, tensor: _Tensor) -> np.ndarray:
    """A C-contiguous copy of one checked tensor."""
    shape = tensor.shape
    if 0 in shape:
        return np.empty(shape, data.dtype)
    # A dimension of size one may have any stride, also one that overflows.
    steps = [s * data.itemsize if n > 1 else 0 for n, s in zip(shape, tensor.strides, strict=True)]
    return np.array(np.lib.stride_tricks.as_strided(data[tensor.offset :], shape, steps), order="C")
