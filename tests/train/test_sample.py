"""Continuations: the cache changes nothing, the document's end ends them, bad input is refused."""

import functools
import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.train.tiny import S, lm_tree, vit_tree
from train import sample
from train.config import freeze
from train.run import build, load_trained


@functools.cache
def loaded(workdir):
    return load_trained(workdir, {})


@pytest.fixture
def trained_run(finished, one_device):
    """A trained run and its state."""
    return loaded(finished.workdir)[:2]


def greedy_without_cache(run, state, ids, tokens):
    """The argmax of the full forward pass, again and again, on rows padded to one length."""

    @jax.jit
    def best(row, length):
        segments = (jnp.arange(row.shape[0]) < length).astype(jnp.int32)
        model = run.model.bind(state["params"], state["router"])
        logits, _ = model(row[None], segments=segments[None])
        return jnp.argmax(logits[0, length - 1])

    row = np.zeros((len(ids) + tokens,), np.int32)
    row[: len(ids)] = ids
    for length in range(len(ids), len(row)):
        row[length] = best(row, length)
    return row[len(ids) :].tolist()


def drawer(run, state, prompt, **keys):
    """Draws 20 tokens after a prompt as a function of the seed, compiled once."""

    @jax.jit
    def draw(key):
        ids = jnp.array(prompt, jnp.int32)
        return sample.generate(run.model, state, ids, tokens=20, key=key, **keys)

    return lambda seed: draw(jax.random.key(seed)).tolist()


def test_decoding_with_the_cache_equals_the_full_forward_pass(trained_run):
    run, state = trained_run
    ids = sample.prompt_ids(run, "the ", 20)
    assert ids == [256, *b"the "]
    expected = greedy_without_cache(run, state, ids, 20)
    assert drawer(run, state, ids, temperature=0.0, top_k=0)(0) == expected
    # Among the likeliest one alone, whatever the temperature.
    assert drawer(run, state, ids, temperature=5.0, top_k=1)(0) == expected


def test_seeds_decide_and_only_the_likeliest_are_drawn(trained_run):
    run, state = trained_run
    ids = sample.prompt_ids(run, "the ", 20)
    draw = drawer(run, state, ids, temperature=100.0, top_k=2)
    first, other = draw(1), draw(2)
    assert draw(1) == first
    assert other != first
    # The first draw of either seed is one of the two likeliest tokens after the prompt.
    model = run.model.bind(state["params"], state["router"])
    logits = jax.jit(lambda row: model(row)[0][0, -1])(jnp.array([ids]))
    likeliest = set(np.argsort(np.asarray(logits))[-2:].tolist())
    assert {draw(seed)[0] for seed in range(20)} == likeliest


def always(token):
    """Stands in for `generate`: draws "ab", then one token without end."""

    def generate(model, state, prompt, *, tokens, **_):
        assert prompt.ndim == 1
        return jnp.array([97, 98, *[token] * (tokens - 2)], jnp.int32)

    return generate


def test_the_end_of_the_document_ends_the_text(trained_run, monkeypatch):
    run, state = trained_run
    monkeypatch.setattr(sample, "generate", always(run.data.tokenizer.eos_id))
    assert sample.continue_text(run, state, "the ", tokens=6) == "ab"
    monkeypatch.setattr(sample, "generate", always(99))
    assert sample.continue_text(run, state, "the ", tokens=6) == "abcccc"


@pytest.mark.parametrize(
    ("prompt", "keys", "words"),
    [
        ("the ", {"tokens": 0}, "tokens=0 must be at least 1"),
        ("the ", {"temperature": -1.0}, "temperature=-1.0 is below zero"),
        ("the ", {"temperature": float("nan")}, "temperature=nan is below zero"),
        (
            "the ",
            {"tokens": 4, "top_k": -1},
            "top_k=-1 must lie between 0 and the vocabulary's 258",
        ),
        ("the ", {"tokens": 4, "top_k": 259}, "top_k=259 must lie between 0 and"),
        (
            "the ",
            {"tokens": 28},
            "the prompt's 5 tokens and tokens=28 are more than the 32 positions that the model was"
            " trained on; shorten the prompt, or set tokens to 27 or less",
        ),
        ("x" * S, {"tokens": 1}, "the prompt's 33 tokens and tokens=1 are more than the 32"),
    ],
)
def test_what_cannot_be_drawn_is_refused(trained_run, prompt, keys, words):
    run, state = trained_run
    keys = {"tokens": 4} | keys
    with pytest.raises(ValueError, match=re.escape(words)):
        sample.continue_text(run, state, prompt, **keys)


def test_the_longest_prompt_leaves_room_for_one_token(trained_run):
    run, _ = trained_run
    assert len(sample.prompt_ids(run, "x" * (S - 2), 1)) == S - 1


def test_image_runs_continue_no_text(tmp_path, one_device):
    run = build(freeze(vit_tree()), tmp_path)
    with pytest.raises(ValueError, match="only language models continue texts; this run trains on"):
        sample.prompt_ids(run, "the", 1)


def test_routers_that_see_later_tokens_cannot_generate(finished, tmp_path, one_device):
    tree = lm_tree(finished.source, moe={"router": "expert_choice", "routing": {"acausal": True}})
    run = build(freeze(tree), tmp_path)
    with pytest.raises(ValueError, match="router='expert_choice' routes by later tokens"):
        sample.prompt_ids(run, "the", 1)


def test_the_program_prints_prompt_and_continuation(
    finished, one_device, tmp_path, monkeypatch, capsys
):
    class Flags:
        workdir, prompt = str(finished.workdir), "the "
        override, step = ["accumulate=2"], "24"
        tokens, temperature, top_k, seed = 6, 0.8, 0, 0
        json = str(tmp_path / "text.json")

    monkeypatch.setattr(sample, "flags", types.SimpleNamespace(FLAGS=Flags))
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "train.sample"])
    monkeypatch.setattr(sample, "generate", always(99))
    sample.main([])
    assert capsys.readouterr().out == "the abcccc\n"
    assert '"text": "abcccc"' in (tmp_path / "text.json").read_text()
