"""A handler under a made-up XLA, whose pool of threads helps now, later or not at all."""

import ctypes
import threading
from ctypes import POINTER, Structure, addressof, c_char_p, c_int32, c_int64, c_void_p, cast, sizeof

import numpy as np
import pytest
from llvmlite import binding

from emoe_jax.grouped.llvm.build import compile_module, write_module

HANDLER = ctypes.CFUNCTYPE(c_void_p, c_void_p)
TASK = ctypes.CFUNCTYPE(None, c_void_p)
CONTEXT, ERROR = 77, 1234
EXHAUSTED = 8
HEAD = [("size", c_int64), ("extensions", c_void_p)]


class Version(Structure):
    _fields_ = [*HEAD, ("major", c_int32), ("minor", c_int32)]


class Arrays(Structure):
    _fields_ = [*HEAD, ("count", c_int64), ("types", c_void_p), ("values", POINTER(c_void_p))]


class Attributes(Structure):
    _fields_ = [*HEAD, ("count", c_int64), *((name, c_void_p) for name in "abc")]


class Frame(Structure):
    _fields_ = [
        *HEAD,
        ("api", c_void_p),
        ("context", c_void_p),
        ("stage", c_int32),
        ("operands", Arrays),
        ("results", Arrays),
        ("attributes", Attributes),
        ("future", c_void_p),
    ]


class Buffer(Structure):
    _fields_ = [
        *HEAD,
        ("dtype", c_int32),
        ("data", c_void_p),
        ("rank", c_int64),
        ("shape", POINTER(c_int64)),
    ]


class Api(Structure):
    _fields_ = [
        *HEAD,
        ("version", Version),
        ("internal", c_void_p),
        *((f"f{i}", c_void_p) for i in range(13)),
    ]


class Schedule(Structure):
    _fields_ = [*HEAD, ("context", c_void_p), ("task", c_void_p), ("data", c_void_p)]


class Threads(Structure):
    _fields_ = [*HEAD, ("context", c_void_p), ("count", POINTER(c_int64))]


class Error(Structure):
    _fields_ = [*HEAD, ("message", c_char_p), ("code", c_int32)]


class Metadata(Structure):
    _fields_ = [("size", c_int64), ("version", Version), ("traits", c_int32), ("state", c_int64)]


class Extension(Structure):
    _fields_ = [
        ("size", c_int64),
        ("kind", c_int32),
        ("next", c_void_p),
        ("metadata", c_void_p),
    ]


class Memory:
    """malloc and free that count, and refuse the requests of given numbers."""

    def __init__(self):
        libc = ctypes.CDLL(None)
        libc.malloc.restype, libc.malloc.argtypes = c_void_p, [ctypes.c_size_t]
        libc.free.restype, libc.free.argtypes = None, [c_void_p]
        self.libc, self.lock = libc, threading.Lock()
        self.malloc = ctypes.CFUNCTYPE(c_void_p, ctypes.c_size_t)(self.take)
        self.free = ctypes.CFUNCTYPE(None, c_void_p)(self.give)
        self.begin(())

    def begin(self, refused):
        self.asked, self.refused, self.held = 0, refused, []

    def take(self, size):
        with self.lock:
            self.asked += 1
            if self.asked in self.refused:
                return None
            self.held.append(self.libc.malloc(size))
            return self.held[-1]

    def give(self, pointer):
        with self.lock:
            if pointer is not None:
                self.held.remove(pointer)  # fails where it was freed before
                self.libc.free(pointer)


class Xla:
    """XLA's side of a call; `way` is what becomes of a task that is scheduled."""

    def __init__(self, way):
        self.way, self.tasks, self.ran, self.destroyed, self.errors = way, [], 0, 0, []
        functions = {0: self.create, 2: self.destroy, 11: self.schedule, 12: self.threads}
        self.kept = {number: HANDLER(function) for number, function in functions.items()}
        self.api = Api(size=sizeof(Api))
        for number, function in self.kept.items():
            setattr(self.api, f"f{number}", cast(function, c_void_p))

    def create(self, record):
        given = cast(record, POINTER(Error)).contents
        self.errors.append((given.message.decode(), given.code))
        return ERROR

    def destroy(self, record):
        assert cast(record, POINTER(Threads)).contents.context == ERROR
        self.destroyed += 1

    def threads(self, record):
        given = cast(record, POINTER(Threads)).contents
        assert (given.size, given.context) == (sizeof(Threads), CONTEXT)
        if self.way == "no pool":
            return ERROR
        given.count[0] = 4

    def schedule(self, record):
        given = cast(record, POINTER(Schedule)).contents
        assert (given.size, given.context) == (sizeof(Schedule), CONTEXT)
        if self.way == "refused":
            return ERROR
        task, data = TASK(given.task), given.data
        self.tasks.append(lambda: task(data))
        if self.way == "at once":
            self.run()
        if self.way == "threads":
            thread = threading.Thread(target=self.tasks.pop())
            thread.start()
            self.ran += 1
            self.tasks.append(thread.join)

    def run(self):
        while self.tasks:
            self.tasks.pop()()
            self.ran += 1

    def call(self, handler, operands, result):
        kept = []

        def described(array):
            shape = (c_int64 * array.ndim)(*array.shape)
            data = array.ctypes.data
            buffer = Buffer(size=sizeof(Buffer), data=data, rank=array.ndim, shape=shape)
            kept.extend([shape, buffer])
            return addressof(buffer)

        frame = Frame(size=sizeof(Frame), api=addressof(self.api), context=CONTEXT, stage=3)
        for name, arrays in (("operands", operands), ("results", [result])):
            values = (c_void_p * len(arrays))(*map(described, arrays))
            kept.append(values)
            setattr(frame, name, Arrays(size=sizeof(Arrays), count=len(arrays), values=values))
        return handler(addressof(frame))


@pytest.fixture(scope="module")
def compiled():
    """The handler of rows times matrices with memory that is counted, and that memory."""
    memory = Memory()
    module = write_module()
    text = {"malloc": memory.malloc, "free": memory.free}
    for name, function in text.items():
        module.globals[name].name = f"counted_{name}"
        binding.add_symbol(f"counted_{name}", cast(function, c_void_p).value)
    engine = compile_module(module)
    handler = HANDLER(engine.get_function_address("emoe_grouped_matrix"))
    yield handler, memory
    del engine


def example():
    random = np.random.default_rng(0)
    rows = random.standard_normal((2048, 64), np.float32)
    weights = random.standard_normal((8, 64, 600), np.float32)
    sizes = np.full((8,), 250, np.int32)
    expected = np.zeros((2048, 600), np.float32)
    for e in range(8):
        part = slice(250 * e, 250 * e + 250)
        expected[part] = rows[part] @ weights[e]
    return [rows, weights, sizes], expected


@pytest.mark.parametrize("way", ["threads", "at once", "late", "refused", "no pool"])
@pytest.mark.parametrize("refused", [(), (3,)], ids=["memory", "none for a helper"])
def test_the_product_is_whole_whoever_helps(compiled, way, refused):
    handler, memory = compiled
    operands, expected = example()
    out = np.full_like(expected, np.nan)
    xla = Xla(way)
    memory.begin(refused)
    assert xla.call(handler, operands, out) is None
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-4)
    # Three helpers beside the caller; a late one finds the state there and nothing to do.
    assert xla.destroyed == {"refused": 3, "no pool": 1}.get(way, 0)
    if way == "late":
        assert len(memory.held) == 1
    xla.run()
    assert xla.ran >= (3 if way in ("threads", "at once", "late") else 0)
    assert memory.held == []


@pytest.mark.parametrize("refused", [(1,), (2,), (1, 2)])
def test_without_memory_it_says_so(compiled, refused):
    handler, memory = compiled
    operands, expected = example()
    xla = Xla("threads")
    memory.begin(refused)
    assert xla.call(handler, operands, expected) == ERROR
    assert xla.errors == [("emoe_grouped_matrix: no memory", EXHAUSTED)]
    assert memory.held == []


def test_it_answers_which_version_it_knows(compiled):
    handler, _ = compiled
    metadata = Metadata(size=sizeof(Metadata))
    extension = Extension(size=sizeof(Extension), kind=1, metadata=addressof(metadata))
    frame = Frame(size=sizeof(Frame), extensions=addressof(extension))
    assert handler(addressof(frame)) is None
    assert (metadata.version.major, metadata.version.minor) == (0, 3)
