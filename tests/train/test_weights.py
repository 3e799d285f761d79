"""Weights of ours: what describes them is read, or refused with the file's and the key's name."""

import json

import pytest

from train import weights

DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (json.dumps({"format": "emoe_jax"}), "the key 'task' is None, and must be text"),
        (
            json.dumps({"task": ["lm"], "model": {}}),
            r"the key 'task' is \['lm'\], and must",
        ),
        (json.dumps({"task": "lm"}), "the key 'model' is None, and must be a group of keys"),
        (json.dumps({"task": "lm", "model": []}), "the key 'model' is .*a group of keys"),
        (json.dumps({"task": "rnn", "model": {}}), "task='rnn' is not known; choose one of lm"),
        (json.dumps({"task": "lm", "model": {"widht": 1}}), "'widht' does not exist.*'width'"),
        (json.dumps({"task": "lm", "model": {"moe": 1}}), "'moe' cannot be 1"),
        ("[]", "no JSON object"),
        ("{", "is no JSON"),
        (DEEP, "is no JSON .*recursion"),
    ],
)
def test_a_damaged_description_is_refused_in_words(tmp_path, text, words):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"config\.json.*{words}"):
        weights.read_weights(tmp_path / "model.safetensors")


@pytest.mark.parametrize(("text", "ours"), [('{"format": "emoe_jax"}', True), (DEEP, False)])
def test_ours_are_told_by_their_format(tmp_path, text, ours):
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").write_text(text)
    assert weights.is_ours(tmp_path) == ours
