"""Writing LLVM IR from Python: loops, pointers and vectors over llvmlite's builder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir

F32 = ir.FloatType()
I1 = ir.IntType(1)
I32 = ir.IntType(32)
I64 = ir.IntType(64)
POINTER = ir.PointerType()
VOID = ir.VoidType()

Value = Any

FLOAT_BYTES = 4
# Lets a product and a sum become one fused instruction where the machine has it.
_FUSE = ("contract",)


def integer(value: int) -> Value:
    """A 64-bit constant."""
    return ir.Constant(I64, value)


class Code:
    """The body of one function, written statement by statement.

    Attributes:
        function: what is written; its arguments are `function.args`.
        builder: llvmlite's, for what is said here in no shorter way.
    """

    def __init__(
        self,
        module: ir.Module,
        name: str,
        arguments: Sequence[ir.Type],
        returns: ir.Type = VOID,
    ) -> None:
        """Begins a function."""
        self.function = ir.Function(module, ir.FunctionType(returns, list(arguments)), name)
        self._entry = self.function.append_basic_block("entry")
        self.builder = ir.IRBuilder(self._entry)

    @property
    def args(self) -> Sequence[Value]:
        """The arguments."""
        return self.function.args

    def local(self, of: ir.Type, value: Value = None) -> Value:
        """A pointer to a variable of the function, which LLVM keeps in registers if it can."""
        with self.builder.goto_block(self._entry):
            # In the entry, so that a loop does not take more stack at each turn.
            self.builder.position_at_start(self._entry)
            place = self.builder.alloca(of)
        place.type = POINTER  # llvmlite's own still names what it points to
        if value is not None:
            self.builder.store(value, place)
        return place

    def load(self, place: Value, of: ir.Type, align: int | None = None) -> Value:
        """What a pointer points to."""
        return self.builder.load(place, typ=of, align=align)

    @contextmanager
    def loop(self, stop: Value, step: int = 1, start: Value = None) -> Iterator[Value]:
        """`for i in range(start, stop, step)`, start 0 by default."""
        builder = self.builder
        place = self.local(I64, integer(0) if start is None else start)
        head, body, after = (builder.append_basic_block(name) for name in ("head", "body", "after"))
        builder.branch(head)
        builder.position_at_end(head)
        index = self.load(place, I64)
        builder.cbranch(builder.icmp_signed("<", index, stop), body, after)
        builder.position_at_end(body)
        yield index
        builder.store(builder.add(index, integer(step)), place)
        builder.branch(head)
        builder.position_at_end(after)

    @contextmanager
    def forever(self) -> Iterator[Any]:
        """A loop that is left by `builder.branch` to the block that it yields, or by returning."""
        builder = self.builder
        body, after = (builder.append_basic_block(name) for name in ("forever", "left"))
        builder.branch(body)
        builder.position_at_end(body)
        yield after
        if not builder.block.is_terminated:
            builder.branch(body)
        builder.position_at_end(after)

    def index(self, *terms: Value) -> Value:
        """A sum of integers and of products, the latter as pairs."""
        builder = self.builder
        values = [builder.mul(*term) if isinstance(term, tuple) else term for term in terms]
        total = values[0]
        for value in values[1:]:
            total = builder.add(total, value)
        return total

    def at(self, pointer: Value, *terms: Value, of: ir.Type = F32) -> Value:
        """The pointer moved by so many elements; terms as those of `index`."""
        return self.builder.gep(pointer, [self.index(*terms)], source_etype=of)

    def smaller(self, a: Value, b: Value) -> Value:
        """The smaller of two integers."""
        return self.builder.select(self.builder.icmp_signed("<", a, b), a, b)

    def larger(self, a: Value, b: Value) -> Value:
        """The larger of two integers."""
        return self.builder.select(self.builder.icmp_signed(">", a, b), a, b)

    def ceiling(self, a: Value, b: int) -> Value:
        """A / b, rounded up."""
        return self.builder.sdiv(self.builder.add(a, integer(b - 1)), integer(b))

    def field(self, record: Value, of: ir.LiteralStructType, number: int) -> Value:
        """A pointer to a field of the record that a pointer points to."""
        where = [ir.Constant(I32, 0), ir.Constant(I32, number)]
        return self.builder.gep(record, where, source_etype=of)

    def read(self, record: Value, of: ir.LiteralStructType, number: int) -> Value:
        """A field of the record that a pointer points to."""
        return self.load(self.field(record, of, number), of.elements[number])

    def write(self, record: Value, of: ir.LiteralStructType, number: int, value: Value) -> None:
        """Sets a field of the record that a pointer points to."""
        self.builder.store(value, self.field(record, of, number))

    def prefetch(self, pointer: Value, *, write: bool = False) -> None:
        """Asks for a cache line before it is needed; no pointer is wrong, not even past the end."""
        module = self.function.module
        name = "llvm.prefetch.p0"
        function = module.globals.get(name)
        if function is None:
            kind = ir.FunctionType(VOID, [POINTER, I32, I32, I32])
            function = ir.Function(module, kind, name)
        # To the first-level cache where it is written next, else to the second.
        how = (1, 3, 1) if write else (0, 2, 1)
        values = [ir.Constant(I32, value) for value in how]
        self.builder.call(function, [pointer, *values])

    def splat(self, scalar: Value, lanes: int) -> Value:
        """A vector of equal numbers."""
        empty = ir.Constant(ir.VectorType(F32, lanes), ir.Undefined)
        first = self.builder.insert_element(empty, scalar, ir.Constant(I32, 0))
        return self.shuffle(first, first, [0] * lanes)

    def shuffle(self, a: Value, b: Value, lanes: Sequence[int]) -> Value:
        """The named lanes of a, followed by b."""
        mask = ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes))
        return self.builder.shuffle_vector(a, b, mask)

    def multiply_add(self, a: Value, b: Value, c: Value) -> Value:
        """A·b + c, of numbers or vectors."""
        product = self.builder.fmul(a, b, flags=_FUSE)
        return self.builder.fadd(product, c, flags=_FUSE)
