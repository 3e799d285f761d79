"""What a handler is given by XLA and may ask of it: the typed FFI's C API, version 0.3.

The records are those of xla/ffi/api/c_api.h, which is among jaxlib's headers. XLA lets handlers of
older versions run for twelve months at least, and asks each for its version before the first call.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from llvmlite import ir

from emoe_jax.grouped.llvm.code import I32, I64, POINTER, Code, integer

Value = Any

API_VERSION = (0, 3)
"""Major and minor."""

_HEAD = (I64, POINTER)  # size of the record; its extensions
_VERSION = ir.LiteralStructType([*_HEAD, I32, I32])
_ARGS = ir.LiteralStructType([*_HEAD, I64, POINTER, POINTER])
_ATTRS = ir.LiteralStructType([*_HEAD, I64, POINTER, POINTER, POINTER])
_FRAME = ir.LiteralStructType([*_HEAD, POINTER, POINTER, I32, _ARGS, _ARGS, _ATTRS, POINTER])
_FRAME_EXTENSIONS, _FRAME_API, _FRAME_CONTEXT, _FRAME_ARGS, _FRAME_RESULTS = 1, 2, 3, 5, 6
_ARGS_VALUES = 4
_BUFFER = ir.LiteralStructType([*_HEAD, I32, POINTER, I64, POINTER])
_BUFFER_DATA, _BUFFER_SHAPE = 3, 5
_EXTENSION = ir.LiteralStructType([I64, I32, POINTER, POINTER])
_EXTENSION_KIND, _EXTENSION_METADATA = 1, 3
_METADATA_KIND = 1
_METADATA = ir.LiteralStructType([I64, _VERSION, I32, I64])
_METADATA_VERSION, _METADATA_TRAITS = 1, 2
_VERSION_MAJOR, _VERSION_MINOR = 2, 3
_API = ir.LiteralStructType([*_HEAD, _VERSION, POINTER] + [POINTER] * 13)
_API_ERROR_CREATE, _API_ERROR_DESTROY, _API_SCHEDULE, _API_THREADS = 4, 6, 15, 16
_SCHEDULE = ir.LiteralStructType([*_HEAD, POINTER, POINTER, POINTER])
_THREADS = ir.LiteralStructType([*_HEAD, POINTER, POINTER])
_DESTROY = ir.LiteralStructType([*_HEAD, POINTER])
_CREATE = ir.LiteralStructType([*_HEAD, POINTER, I32])
_RESOURCE_EXHAUSTED = 8

_API_FUNCTION = ir.FunctionType(POINTER, [POINTER]).as_pointer()
"""Of the API's functions: a record of arguments to an error, null for none."""


class Buffer(NamedTuple):
    """An array of the call.

    Attributes:
        data: pointer to its first number.
        extents: pointer to its shape, 64-bit integers.
    """

    data: Value
    extents: Value


class Call:
    """One call by XLA; beginning it, `code` answers XLA's question for the version and returns.

    Args:
        code: the handler, a function of the call's frame to an error.
    """

    def __init__(self, code: Code) -> None:
        self._code, self._frame = code, code.args[0]
        self._answer_metadata()
        self._api = code.read(self._frame, _FRAME, _FRAME_API)
        self._context = code.read(self._frame, _FRAME, _FRAME_CONTEXT)

    def operand(self, number: int) -> Buffer:
        """An operand."""
        return self._buffer(_FRAME_ARGS, number)

    def result(self, number: int) -> Buffer:
        """A result."""
        return self._buffer(_FRAME_RESULTS, number)

    def extent(self, buffer: Buffer, axis: int) -> Value:
        """The extent of an array along an axis."""
        return self._code.load(self._code.at(buffer.extents, integer(axis), of=I64), I64)

    def threads(self) -> Value:
        """Threads of XLA's pool; one where it has none."""
        code = self._code
        count = code.local(I64, integer(1))
        refused = self._ask(_API_THREADS, _THREADS, (self._context, count))
        with code.builder.if_then(refused, likely=False):
            code.builder.store(integer(1), count)
        return code.load(count, I64)

    def schedule(self, task: Value, data: Value) -> Value:
        """Has a thread of XLA's pool call task(data) some time; whether that was refused."""
        return self._ask(_API_SCHEDULE, _SCHEDULE, (self._context, task, data))

    def fail(self, message: str) -> None:
        """Returns an error: something is exhausted."""
        code = self._code
        data = bytearray(message.encode() + b"\0")
        kind = ir.ArrayType(ir.IntType(8), len(data))
        module = code.function.module
        name = module.get_unique_name(f"{code.function.name}.error")
        text = ir.GlobalVariable(module, kind, name)
        text.initializer = ir.Constant(kind, data)
        text.global_constant = True
        values = text, ir.Constant(I32, _RESOURCE_EXHAUSTED)
        code.builder.ret(self._call(_API_ERROR_CREATE, _CREATE, values))

    def _answer_metadata(self) -> None:
        """XLA's first call asks with an extension, which comes alone, for the API's version."""
        code, builder = self._code, self._code.builder
        none = ir.Constant(POINTER, None)
        extension = code.read(self._frame, _FRAME, _FRAME_EXTENSIONS)
        kind = code.local(I32, ir.Constant(I32, 0))
        with builder.if_then(builder.icmp_unsigned("!=", extension, none), likely=False):
            builder.store(code.read(extension, _EXTENSION, _EXTENSION_KIND), kind)
        asked = builder.icmp_signed("==", code.load(kind, I32), ir.Constant(I32, _METADATA_KIND))
        with builder.if_then(asked, likely=False):
            metadata = code.read(extension, _EXTENSION, _EXTENSION_METADATA)
            version = code.field(metadata, _METADATA, _METADATA_VERSION)
            major, minor = (ir.Constant(I32, number) for number in API_VERSION)
            code.write(version, _VERSION, _VERSION_MAJOR, major)
            code.write(version, _VERSION, _VERSION_MINOR, minor)
            code.write(metadata, _METADATA, _METADATA_TRAITS, ir.Constant(I32, 0))
            builder.ret(none)

    def _buffer(self, which: int, number: int) -> Buffer:
        code = self._code
        values = code.read(code.field(self._frame, _FRAME, which), _ARGS, _ARGS_VALUES)
        record = code.load(code.at(values, integer(number), of=POINTER), POINTER)
        data = code.read(record, _BUFFER, _BUFFER_DATA)
        return Buffer(data, code.read(record, _BUFFER, _BUFFER_SHAPE))

    def _ask(self, number: int, of: ir.LiteralStructType, values: tuple[Value, ...]) -> Value:
        """Calls a function of the API; whether it gave an error, which is destroyed."""
        builder = self._code.builder
        error = self._call(number, of, values)
        refused = builder.icmp_unsigned("!=", error, ir.Constant(POINTER, None))
        with builder.if_then(refused, likely=False):
            self._call(_API_ERROR_DESTROY, _DESTROY, (error,))
        return refused

    def _call(self, number: int, of: ir.LiteralStructType, values: tuple[Value, ...]) -> Value:
        """Calls a function of the API with a record: its size, no extensions, the values."""
        code = self._code
        record = code.local(of)
        for i, value in enumerate((integer(record_bytes(of)), ir.Constant(POINTER, None), *values)):
            code.write(record, of, i, value)
        function = code.load(code.field(self._api, _API, number), _API_FUNCTION)
        return code.builder.call(function, [record])


def record_bytes(record: ir.LiteralStructType) -> int:
    """Size of a record whose fields are at most 8 bytes, on a 64-bit machine."""
    offset = 0
    for field in record.elements:
        size = _field_bytes(field)
        step = min(size, 8)
        offset = -(-offset // step) * step + size
    return -(-offset // 8) * 8


def _field_bytes(field: ir.Type) -> int:
    if isinstance(field, ir.LiteralStructType):
        return record_bytes(field)
    return field.width // 8 if isinstance(field, ir.IntType) else 8
