"""JSON of others: read, or refused with the file's name."""

import pathlib

import pytest

from emoe_jax import json_file


def test_what_is_read(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('{"é": [1, null]}', encoding="utf-8")
    assert json_file.read_object(file) == json_file.read(file) == {"é": [1, None]}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", r"a\.json is no JSON \(Expecting value"),
        (b'{"a"', r"a\.json is no JSON \(Expecting ':'"),
        (b'"\xff"', r"a\.json is no JSON \('utf-8' codec can't decode"),
        (b"[" * 100_000, r"a\.json is no JSON \(maximum recursion depth"),
        (b"9" * 5000, r"a\.json is no JSON \(Exceeds the limit"),
        (b"[1]", r"a\.json holds \[1\], no JSON object"),
        (b'"' + b"x" * 5000 + b'"', r"a\.json holds '.{,60}', no JSON object"),
    ],
)
def test_what_is_refused(tmp_path: pathlib.Path, data: bytes, words: str) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(data)
    with pytest.raises(ValueError, match=words):
        json_file.read_object(file)
