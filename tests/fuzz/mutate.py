"""Damage to inputs: to bytes, to JSON, and to the formats whose checksums would hide it.

Every function takes a `random.Random` and returns a damaged copy, so that a seed gives the same
damage again. An input is a folder: bytes by relative path.
"""

import gzip
import io
import json
import random
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Sequence
from typing import Any

Input = dict[str, bytes]
Mutator = Callable[[random.Random, bytes, Sequence[bytes]], bytes]

# Lengths, counts and offsets at which readers err.
INTEGERS = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF) + (
    *(2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1),
)

# Written into JSON as this text, as no writer of JSON would.
RAW = {
    "@nan@": "NaN",
    "@infinity@": "-Infinity",
    "@overflow@": "1e999",
    "@digits@": "9" * 5000,
    "@deep@": "[" * 300 + "]" * 300,
    "@deeper@": "[" * 200_000 + "]" * 200_000,
    "@deep objects@": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "@open@": "[[[{",
    "@surrogate@": '"\\ud800"',
}
HOSTILE: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 0.5, -0.0, 1e308, 1e-320, 3.0, 2**31, 2**32, 2**63, 10**30),
    *("", " ", "a", "0", "-1", "None", "\0", "\ufeff", "漢字", "x" * 5000, "1e5", "bool"),
    *("../../outside/x", "/tmp/fuzz_outside", "~/x", "file:///etc/passwd", "gs://none/x", "C:\\x"),
    *([], {}, [[]], [{}], {"": 1}, {"a": {"a": {}}}, [0] * 50, ["a", 1, None]),
    *RAW,
)


def damage_bytes(draw: random.Random, data: bytes, others: Sequence[bytes] = ()) -> bytes:
    """One to four changes of the kinds that disks, networks and attackers make."""
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        data = draw.choice(_BYTES)(draw, data, others)
    return data


def _place(draw: random.Random, data: bytes) -> int:
    """An offset: as likely in the first or last 64 bytes, where headers are, as anywhere."""
    end = max(len(data), 1)
    return draw.choice(
        (draw.randrange(end), draw.randrange(min(end, 64)), end - 1 - draw.randrange(min(end, 64)))
    )


def _span(draw: random.Random, data: bytes) -> slice:
    start = _place(draw, data)
    return slice(start, start + draw.choice((1, 2, 4, 8, 16, 100, len(data) // 2 + 1)))


def _flip(draw: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    at = _place(draw, data)
    return data[:at] + bytes(b ^ 1 << draw.randrange(8) for b in data[at : at + 1]) + data[at + 1 :]


def _overwrite(draw: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    at = _place(draw, data)
    new = draw.randbytes(draw.choice((1, 2, 8)))
    return data[:at] + new + data[at + len(new) :]


def _truncate(draw: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    return data[: draw.choice((0, 1, _place(draw, data), len(data) - 1))]


def _extend(draw: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    more = draw.choice((b"\0" * 16, b"\n", draw.randbytes(64), data, b"\xff" * 4096))
    return draw.choice((data + more, more + data))


def _remove(draw: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    cut = _span(draw, data)
    return data[: cut.start] + data[cut.stop :]


def _duplicate(draw: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    cut = _span(draw, data)
    return data[: cut.stop] + data[cut] * draw.choice((1, 1, 50)) + data[cut.stop :]


def _swap(draw: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    first, second = sorted(draw.randrange(len(data) + 1) for _ in range(2))
    return data[second:] + data[first:second] + data[:first]


def _splice(draw: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    other = draw.choice(others) if others else data
    return data[: _place(draw, data)] + other[_place(draw, other) :]


def _integer(draw: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    at, size = _place(draw, data), draw.choice((1, 2, 4, 8))
    order = draw.choice(("little", "big"))
    number = draw.choice(INTEGERS) % 256**size
    new = number.to_bytes(size, "little" if order == "little" else "big")
    return data[:at] + new + data[at + size :]


_BYTES = (_flip, _flip, _overwrite, _truncate, _extend, _remove, _duplicate, _swap, _splice) + (
    *(_integer, _integer),
)


# ---------------------------------------------------------------------------------------- JSON


def damage_json(draw: random.Random, data: bytes, others: Sequence[bytes] = ()) -> bytes:
    """Mostly a JSON of the same grammar with wrong values in it, otherwise damaged bytes."""
    try:
        tree = json.loads(data)
    except ValueError:
        return damage_bytes(draw, data, others)
    if draw.random() < 0.2:
        return damage_bytes(draw, data, others)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        tree = _damage_tree(draw, tree)
    text = json.dumps(tree)
    for name, raw in RAW.items():
        text = text.replace(json.dumps(name), raw)
    return text.encode("utf-8", errors="surrogatepass")


def damage_lines(draw: random.Random, data: bytes, others: Sequence[bytes] = ()) -> bytes:
    """One JSON object a line: one of them, or the whole, is damaged."""
    if draw.random() < 0.3:
        return damage_bytes(draw, data, others)
    lines = data.split(b"\n")
    number = draw.randrange(len(lines))
    lines[number] = damage_json(draw, lines[number], others)
    return draw.choice((b"\n", b"\n", b"\n", b"\r\n", b"\n\n")).join(lines)


def _nodes(tree: Any) -> list[tuple[Any, Any]]:
    """Every container of a tree with each of its keys."""
    found: list[tuple[Any, Any]] = []
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node))
        for key in keys:
            found.append((node, key))
            if isinstance(node[key], dict | list) and node[key]:
                waiting.append(node[key])
    return found


def _damage_tree(draw: random.Random, tree: Any) -> Any:
    nodes = _nodes(tree) if isinstance(tree, dict | list) else []
    if not nodes or draw.random() < 0.03:
        return draw.choice(HOSTILE)
    tree = json.loads(json.dumps(tree))
    node, key = draw.choice(_nodes(tree))
    kind = draw.randrange(7)
    if kind == 0:
        del node[key]
    elif kind == 1:
        node[key] = [node[key]]
    elif kind == 2 and isinstance(node, dict):
        node[draw.choice(("unknown", key + "s", "", "../" + key, "a.b", "\ud800"))] = node.pop(key)
    elif kind == 3:
        other, there = draw.choice(_nodes(tree))
        node[key] = json.loads(json.dumps(other[there]))
    elif kind == 4 and type(node[key]) in (int, float):
        node[key] = draw.choice((-node[key], node[key] * 1000, node[key] + 1, float(node[key])))
    else:
        node[key] = draw.choice(HOSTILE)
    return tree


# ------------------------------------------------------------------- formats with a frame around


def damage_gzip(draw: random.Random, data: bytes, others: Sequence[bytes] = ()) -> bytes:
    """Damages what is compressed, so that its checksum is right again; or the file itself."""
    if draw.random() < 0.3 or not data.startswith(b"\x1f\x8b"):
        return damage_bytes(draw, data, others)
    inside = damage_bytes(draw, gzip.decompress(data), ())
    if draw.random() < 0.1:
        inside = inside[:16] + b"\0" * 2**29
    return gzip.compress(inside, compresslevel=1, mtime=0)


def damage_safetensors(draw: random.Random, data: bytes, others: Sequence[bytes] = ()) -> bytes:
    """Damages the JSON of the header and mends its length; or the file itself."""
    if draw.random() < 0.3:
        return damage_bytes(draw, data, others)
    (size,) = struct.unpack("<Q", data[:8])
    header = damage_json(draw, data[8 : 8 + size])
    claimed = len(header) if draw.random() < 0.9 else draw.choice(INTEGERS)
    return struct.pack("<Q", claimed) + header + data[8 + size :]


# What a pickle may ask for: calls, imports, allocations and lengths.
OPCODES = (
    *(b"cposix\nsystem\n(X\x04\0\0\0truetR", b"(X\x04\0\0\0trueiposix\nsystem\n"),
    *(b"\x8c\x08builtins\x8c\x04eval\x93", b"cos\nsystem\n", b"c__main__\nx\n"),
    *(b"\x82\x01", b"\x84\xff\xff\xff\x7f", b"r\xff\xff\xff\x7f", b"j\xff\xff\xff\x7f"),
    *(b"\x8e" + b"\xff" * 7 + b"\x7f", b"\x95" + b"\xff" * 8, b"\x8b\xff\xff\xff\x7f"),
    *(b"(" * 1000, b"]" * 100_000, b"b", b"R", b"Q", b"0", b"t", b"}", b"s", b"\x85" * 100_000),
    *(b"X\xff\xff\xff\xff", b"L" + b"9" * 5000 + b"L\n", b"F1e999\n", b"I-1\n", b"\x81", b"\x92"),
)


def damage_pickle(draw: random.Random, data: bytes) -> bytes:
    """Puts an opcode somewhere into a pickle, or damages its bytes."""
    if draw.random() < 0.5:
        return damage_bytes(draw, data)
    at = draw.choice((2, draw.randrange(len(data) + 1), len(data) - 1))
    return data[:at] + draw.choice(OPCODES) + data[at:]


def damage_zip(draw: random.Random, data: bytes, others: Sequence[bytes] = ()) -> bytes:
    """Damages an entry of the archive, so that its checksum is right again; or the file itself."""
    if draw.random() < 0.3:
        return damage_bytes(draw, data, others)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    number = draw.randrange(len(entries)) if draw.random() < 0.4 else 0
    name, content = entries[number]
    kind = draw.randrange(8)
    if kind == 0:
        del entries[number]
    elif kind == 1:
        moved = draw.choice(("../../outside/x", "/tmp/x", "", name + "/", "a" * 70000))
        entries[number] = (moved, content)
    elif kind == 2:
        entries.append((name, damage_bytes(draw, content)))
    else:
        damage = damage_pickle if name.endswith(".pkl") else damage_bytes
        entries[number] = (name, damage(draw, content))
    file = io.BytesIO()
    method = zipfile.ZIP_DEFLATED if draw.random() < 0.1 else zipfile.ZIP_STORED
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w", method) as archive:
        warnings.simplefilter("ignore", UserWarning)  # a name twice is damage that is meant
        for name, content in entries:
            info = zipfile.ZipInfo(name[:65535])
            info.compress_type = method
            archive.writestr(info, content)
    return file.getvalue()


def damage_png(draw: random.Random, data: bytes, others: Sequence[bytes] = ()) -> bytes:
    """Damages a chunk of a PNG and mends its checksum; or the bytes of any image."""
    if draw.random() < 0.5 or not data.startswith(b"\x89PNG"):
        return damage_bytes(draw, data, others)
    chunks, at = [], 8
    while at < len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    number = draw.randrange(len(chunks)) if draw.random() < 0.5 else 0
    kind, content = chunks[number]
    if kind == b"IHDR" and draw.random() < 0.5:
        sides = [draw.choice((0, 1, 5000, 9000, 20000, 2**31 - 1)) for _ in range(2)]
        content = struct.pack(">II", *sides) + content[8:]
    else:
        content = damage_bytes(draw, content)
    chunks[number] = (kind, content)
    return data[:8] + b"".join(
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )


# -------------------------------------------------------------------------------------- folders


def damage_folder(
    mutators: dict[str, Mutator], draw: random.Random, files: Input, corpus: Sequence[Input]
) -> Input:
    """Damages one file of an input, by the mutator of its ending; rarely removes or moves it.

    Args:
        mutators: by ending of the file's name, the first that fits; files without one stay.
        draw: random numbers.
        files: the input.
        corpus: all inputs, for splices.
    """
    chosen = {
        name: mutator
        for name in sorted(files)
        for mutator in [next((mutators[end] for end in mutators if name.endswith(end)), None)]
        if mutator is not None
    }
    name, other = draw.choice(list(chosen)), draw.choice(list(chosen))
    if len(chosen) > 1 and draw.random() < 0.05:
        return {kept: data for kept, data in files.items() if kept != name}
    if len(chosen) > 1 and draw.random() < 0.05:
        return files | {name: files[other], other: files[name]}
    others = [each[name] for each in corpus if name in each and each is not files]
    return files | {name: chosen[name](draw, files[name], others)}


# ---------------------------------------------------------------------------------- command line

TEXTS = (
    *("", " ", "0", "-1", "1", "2", "3", "0.5", "-0.5", "1e400", "-1e400", "nan", "inf", "None"),
    *("True", "False", "none", "many", "()", "(1,)", "('a',)", "(0,1)", "(1.5,'a',None)", "[1]"),
    *("{}", "{1:2}", "{[]:1}", "{{}}", "((('a',),),)", "'a'", '"a', "(", ")", "1_000", "0x10"),
    *("2147483647", "2147483648", "4294967296", "9223372036854775807", "1" + "0" * 40, "9" * 5000),
    *("1e-320", "1e308", "1e30", "1j", "b'a'", "...", "a b", "a,b", "=", "==1", "\\", "$HOME", "~"),
    *(
        "../../outside/x",
        "/tmp/fuzz_outside",
        "gs://none/x",
        "\udcff",
        "\ufeff",
        "漢字",
        "\n",
        "x" * 5000,
    ),
    *("(" * 150 + ")" * 150, "(" * 5000, "-" * 5000 + "1", "[" * 90 + "]" * 90, "lambda: 1"),
    *("__import__('os').system('true')", "open('x','w')", "9**9**9", "'a'*10**9", "(1,)*10**9"),
)


def damage_arguments(keys: Sequence[str], form: str) -> Mutator:
    """A mutator of a JSON list of command line arguments: values of keys are set, or their names.

    Args:
        keys: dotted names.
        form: of an argument, such as "--config.{}={}".
    """

    def damage(draw: random.Random, data: bytes, others: Sequence[bytes] = ()) -> bytes:
        arguments = list(json.loads(data))
        for _ in range(draw.choice((1, 1, 1, 1, 2, 5))):
            key, value = draw.choice(keys), draw.choice(TEXTS)
            kind = draw.randrange(12)
            if kind == 0:
                key = draw.choice((key + "s", key.partition(".")[0], "", ".", key + ".a", key[1:]))
            argument = form.format(key, value)
            if kind == 1:
                garbled = damage_bytes(draw, argument.encode("utf-8", "surrogateescape"))
                # As the system gives what is no UTF-8; it never gives a zero byte.
                argument = garbled.replace(b"\0", b"").decode("utf-8", "surrogateescape")
            arguments.append(argument)
        return json.dumps(arguments).encode()

    return damage
