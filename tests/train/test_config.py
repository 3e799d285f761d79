"""Experiments: unknown keys, wrong types and impossible values never reach the model."""

import json
import math
import re

import pytest

from emoe_jax.config import LMConfig, ViTConfig
from tests.train.tiny import lm_tree, vit_tree
from train.config import (
    FROM_DATA,
    TASKS,
    CheckpointConfig,
    ExperimentConfig,
    changed_keys,
    digest,
    experiment,
    filled,
    flat_keys,
    freeze,
    replaced,
    to_json,
    update,
    with_vocab,
)
from train.config_tree import unknown_key
from train.data.config import TextConfig


@pytest.mark.parametrize("task", TASKS)
def test_defaults_freeze_and_come_back_from_json(task):
    tree = experiment(task)
    config = freeze(tree)
    assert config.task == task
    assert freeze(json.loads(to_json(tree))) == config
    assert hash(config) == hash(freeze(tree))


def test_tuples_and_unset_options_survive_json():
    tree = lm_tree(
        model={"depth": 4, "moe_blocks": (1, 3)},
        moe={"routing": {"bias_rate": 0.01}},
        data={"sources": ("sotu", "shakespeare"), "weights": (2.0, 1.0)},
        optim={"warmup": 1, "trainable": ("moe", "head")},
    )
    config = freeze(tree)
    assert freeze(json.loads(to_json(tree))) == config
    assert config.model.moe_blocks == (1, 3)
    assert config.optim.trainable == ("moe", "head")
    assert config.data.sources == ("sotu", "shakespeare")
    assert config.model.moe.routing.bias_rate == 0.01
    assert config.model.moe.routing.temperature is None


@pytest.mark.parametrize("task", TASKS)
def test_what_the_data_decide_is_no_key(task):
    known = flat_keys(experiment(task))
    for name in FROM_DATA[task]:
        assert f"model.{name}" not in known
    # The experts stand at the top: moe.router, not model.moe.router.
    assert "moe.router" in known
    assert not [name for name in known if name.startswith("model.moe.")]
    promised = "steps seed batch mesh.data mesh.fsdp mesh.expert mesh.tensor checkpoint.every"
    promised += " moe.router moe.experts moe.top_k moe.dispatch"
    assert set(promised.split()) <= set(known)


def test_the_data_decide_sizes_of_the_model():
    vit = freeze(vit_tree(data={"image_size": 16, "channels": 3, "classes": 7}))
    assert isinstance(vit.model, ViTConfig)
    assert (vit.model.image_size, vit.model.channels, vit.model.classes) == (16, 3, 7)
    lm = freeze(lm_tree())
    assert isinstance(lm.model, LMConfig)
    assert lm.model.vocab_size == 258
    other = with_vocab(lm, 300)
    assert other.model.vocab_size == 300
    assert with_vocab(other, 258) == lm


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"moe": {"experst": 4}}, "config key 'moe.experst' does not exist; did you mean 'moe.exp"),
        ({"step": 4}, "config key 'step' does not exist; did you mean 'steps'?"),
        ({"moe": {"routing": {"bias": 1.0}}}, "did you mean 'moe.routing.bias_rate'?"),
        ({"model": {"vocab_size": 9}}, "config key 'model.vocab_size' does not exist; did you mea"),
        ({"mesh": {"dat": 9}}, "did you mean 'mesh.data'?"),
        ({"steps": "many"}, "config key 'steps' cannot be 'many'"),
        ({"steps": 1.5}, "config key 'steps' cannot be 1.5"),
        ({"optim": {"learning_rate": "x"}}, "config key 'optim.learning_rate' cannot be 'x'"),
        ({"moe": {"routing": {"bias_rate": "x"}}}, "'moe.routing.bias_rate' cannot be 'x'"),
        ({"moe": 3}, "config key 'moe' does not exist; did you mean"),
    ],
)
def test_unknown_keys_and_wrong_types_name_the_key(overrides, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        experiment("lm", **overrides)


def test_an_unknown_key_that_resembles_none_lists_all():
    assert unknown_key("qqqq", ["steps", "seed"]) == (
        "config key 'qqqq' does not exist; there are: steps, seed"
    )


@pytest.mark.parametrize(
    ("task", "overrides", "words"),
    [
        ("lm", {"steps": 0}, "steps=0 must be above zero"),
        ("lm", {"batch": -8}, "batch=-8 must be above zero"),
        ("lm", {"accumulate": 0}, "accumulate=0 must be above zero"),
        ("lm", {"log_every": 0}, "log_every=0 must be above zero"),
        ("lm", {"eval_every": 0}, "eval_every=0 must be above zero"),
        ("lm", {"profile": -1}, "profile=-1 is below zero"),
        ("lm", {"seed": -1}, "seed=-1 is below zero"),
        ("lm", {"steps": 5, "optim": {"warmup": 5}}, "optim.warmup=5 is not below steps=5; set op"),
        ("lm", {"checkpoint": {"every": 0}}, "every=0 must be above zero"),
        ("lm", {"checkpoint": {"keep_last": 0}}, "keep_last=0 must be above zero"),
        ("lm", {"checkpoint": {"keep_best": -1}}, "checkpoint.keep_best=-1 is below zero"),
        ("lm", {"checkpoint": {"keep_every": -1}}, "checkpoint.keep_every=-1 is below zero"),
        (
            "lm",
            {"checkpoint": {"every": 200, "keep_every": 500}},
            "is no multiple of checkpoint.every=200, so those steps are not all saved; set"
            " checkpoint.keep_every to 600",
        ),
        ("lm", {"mesh": {"tensor": 0}}, "mesh.tensor=0 must be at least 1"),
        ("lm", {"moe": {"experts": 4, "top_k": 5}}, "top_k=5 is more than experts=4"),
        ("lm", {"model": {"width": 30, "heads": 4}}, "heads=4 does not divide width=30"),
        (
            "lm",
            {"model": {"width": 64}, "moe": {"router": "eigen", "basis": {"rank": 65}}},
            "basis.rank=65 is more than width=64",
        ),
        ("lm", {"data": {"sources": ()}}, "data.sources is empty"),
        ("lm", {"init_from": "runs/a"}, "init_from='runs/a' starts a Vision Transformer from wei"),
        ("lm", {"optim": {"trainable": "moe"}}, "config key 'optim.trainable' cannot be 'moe'"),
        ("lm", {"data": {"sources": ("sotus",)}}, "unknown data source 'sotus'"),
        ("vit", {"model": {"patch": 3}}, "patch=3 does not divide image_size=8"),
        ("vit", {"data": {"source": "cifar"}}, "unknown data source 'cifar'; use 'digits'"),
    ],
)
def test_impossible_values_say_what_would_do(task, overrides, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        freeze(experiment(task, **overrides))


def test_unknown_tasks_are_refused():
    with pytest.raises(ValueError, match="task='audio' is not known; choose one of lm, vit"):
        experiment("audio")
    tree = json.loads(to_json(lm_tree()))
    with pytest.raises(ValueError, match="task='audio' is not known"):
        freeze(tree | {"task": "audio"})


def test_a_key_of_another_version_is_named():
    tree = json.loads(to_json(lm_tree()))
    with pytest.raises(ValueError, match="config key 'epochs' does not exist"):
        freeze(tree | {"epochs": 3})
    del tree["profile"]
    assert freeze(tree).profile == 0


def test_update_sets_dotted_keys():
    tree = lm_tree()
    update(tree, {"moe.experts": 8, "optim.learning_rate": 1, "model.dtype": "bfloat16"})
    config = freeze(tree)
    assert config.model.moe.experts == 8
    assert config.optim.learning_rate == 1.0
    assert config.model.dtype == "bfloat16"


def test_changed_keys_and_digest_tell_trees_apart():
    before, after = lm_tree(), lm_tree(moe={"experts": 8}, data={"sources": ("shakespeare",)})
    assert changed_keys(before, before) == []
    assert changed_keys(json.loads(to_json(before)), before) == []
    assert changed_keys(before, after) == [
        "data.sources: ['sotu'] -> ['shakespeare']",
        "moe.experts: 4 -> 8",
    ]
    assert digest(before) == digest(lm_tree())
    assert digest(before) != digest(after)


def test_configurations_are_frozen_values():
    assert CheckpointConfig() == CheckpointConfig(every=200)
    with pytest.raises(ValueError, match="is not below steps=5"):
        ExperimentConfig("lm", LMConfig(), TextConfig(), steps=5)


def test_younger_keys_have_their_defaults():
    whole = experiment("lm", moe={"experts": 16}).to_dict()
    old = experiment("lm", moe={"experts": 16}).to_dict()
    del old["moe"]["exchange"], old["mesh"], old["accumulate"]
    assert filled(old) == whole
    assert "mesh" not in old


def test_replaced_sets_dotted_keys_of_a_copy():
    tree = {"a": {"b": 1}, "c": 2}
    assert replaced(tree, {"a.b": 3}) == {"a": {"b": 3}, "c": 2}
    assert tree == {"a": {"b": 1}, "c": 2}
    with pytest.raises(ValueError, match=r"'a.d' does not exist; did you mean 'a.b'"):
        replaced(tree, {"a.d": 3})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"steps": "many"}, "config key 'steps' cannot be 'many': it takes a whole number below 2"),
        (
            {"steps": 2**31},
            "config key 'steps' cannot be 2147483648: it takes a whole number below",
        ),
        ({"steps": True}, "config key 'steps' cannot be True"),
        ({"moe.experts": 2.5}, "config key 'moe.experts' cannot be 2.5"),
        (
            {"moe.routing.bias_rate": "x"},
            "'moe.routing.bias_rate' cannot be 'x': it takes a number",
        ),
        ({"optim.b1": math.nan}, "config key 'optim.b1' cannot be nan: it takes a number"),
        (
            {"model.moe_blocks": [1, "2"]},
            "config key 'model.moe_blocks' cannot be [1, '2']: it tak",
        ),
        (
            {"data.sources": "sotu"},
            "config key 'data.sources' cannot be 'sotu': it takes a list, e",
        ),
        ({"prompt": None}, "config key 'prompt' cannot be None: it takes text"),
        ({"prompt": "x" * 5000}, ""),
    ],
)
def test_values_of_a_config_file_have_their_types(values, words):
    """config.json and --override say nothing of types; each value is checked against its field."""
    tree = replaced(json.loads(to_json(lm_tree())), values)
    if not words:
        assert freeze(tree).prompt == values["prompt"]
        return
    with pytest.raises(ValueError, match=re.escape(words)):
        freeze(tree)


@pytest.mark.parametrize("name", ["model", "data", "moe", "optim", "mesh"])
@pytest.mark.parametrize("value", [3, None, "x", [1]])
def test_a_group_of_keys_that_is_none_is_named(name, value):
    tree = json.loads(to_json(lm_tree())) | {name: value}
    with pytest.raises(ValueError, match=f"config key '{name}' is .*, and holds a group of keys"):
        filled(tree)


@pytest.mark.parametrize("task", [None, ["lm"], {}])
def test_a_task_that_is_no_text_is_unknown(task):
    with pytest.raises(ValueError, match=r"task=.* is not known; choose one of lm, vit"):
        filled({"task": task})
