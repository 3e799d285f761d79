"""Every file in configs/ describes an experiment that can be built."""

import ast
import dataclasses
import importlib
import pathlib
import re

import chex
import jax
import numpy as np
import pytest

from emoe_jax import pure, sharding
from emoe_jax.optim import make_optimizer, partition
from tests.train.tiny import mesh_of_one
from train.config import TASKS, freeze
from train.initial import matching
from train.run import model_maker
from train.step import make_steps

ROOT = pathlib.Path(__file__).parents[1]
NAMES = sorted(file.stem for file in (ROOT / "configs").glob("[!_]*.py"))


def config_of(name):
    return freeze(importlib.import_module(f"configs.{name}").get_config())


def test_the_promised_configs_are_there():
    promised = "lm_tiny lm_sotu lm_sotu_eigen lm_shakespeare lm_c4 vit_digits vit_digits_eigen"
    promised += " vit_fashion_mnist vit_cifar100 vit_imagenet"
    promised += " vit_digits_backbone vit_digits_adapter vit_b16_emoe_adapter"
    assert set(promised.split()) <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_config_builds_a_model_with_a_place_for_every_array(name):
    config = config_of(name)
    assert isinstance(config.model, TASKS[config.task][0])
    optimizer = make_optimizer(config.optim, config.steps, config.model.moe.basis.method)
    model, params, router = pure.abstract_split(model_maker(config.model, config.seed))
    trained, _ = partition(params, config.optim.trainable)
    opt_state = jax.eval_shape(optimizer.init, trained)
    mesh = mesh_of_one(config.mesh)
    make_steps(config, mesh, model, optimizer, opt_state)
    places = sharding.shardings(mesh, {"params": params, "router": router})
    assert len(jax.tree.leaves(places)) == len(jax.tree.leaves((params, router)))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) > 1000


@pytest.mark.parametrize("name", NAMES)
def test_the_mesh_of_every_config_divides_its_model_and_batch(name):
    """On an abstract mesh of as many devices as the config names, times those it leaves open."""
    config = config_of(name)
    sizes = dataclasses.asdict(config.mesh)
    shape = [1 if size == -1 else size for size in sizes.values()]
    mesh = jax.sharding.AbstractMesh(tuple(shape), tuple(sizes))
    sharding.check_batch(mesh, config.batch, config.accumulate)
    _, params, _ = pure.abstract_split(model_maker(config.model, config.seed))
    sharding.shardings(mesh, params)


def test_the_adapter_of_the_paper_trains_branches_and_head_alone():
    config = config_of("vit_b16_emoe_adapter")
    _, params, _ = pure.abstract_split(model_maker(config.model, config.seed))
    trained, frozen = partition(params, config.optim.trainable)
    # Matrices down and up [E,D,F]; basis [D,R], masks [E,R], gamma [R], bias [E], alpha; the head.
    branch = 2 * 8 * 768 * 192 + 768 * 128 + 8 * 128 + 128 + 8 + 1
    assert sum(leaf.size for leaf in jax.tree.leaves(trained)) == 6 * branch + 768 * 100 + 100
    # timm counts 86,567,656 in vit_base_patch16_224, 769,000 of them in the head of 1000 classes.
    assert sum(leaf.size for leaf in jax.tree.leaves(frozen)) == 86_567_656 - 769_000


def test_the_small_adapter_starts_from_the_backbone_that_is_its_own():
    backbone, adapter = config_of("vit_digits_backbone"), config_of("vit_digits_adapter")
    assert adapter.init_from == "runs/vit_digits_backbone"
    found, wanted = (
        pure.abstract_split(model_maker(config.model, 0))[1] for config in (backbone, adapter)
    )
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), found)
    taken, notes = matching(zeros, wanted)
    _, frozen = partition(wanted, ("moe", "alpha"))
    chex.assert_trees_all_equal_shapes(taken, frozen)
    (note,) = notes
    assert note.startswith("not in the source, start anew: blocks/1,2,3/alpha, blocks/1,2,3/moe/")


@pytest.mark.parametrize("name", NAMES)
def test_every_docstring_gives_data_hardware_and_its_own_command(name):
    text = ast.get_docstring(ast.parse((ROOT / "configs" / f"{name}.py").read_text()))
    assert text is not None
    assert f"python -m train --config=configs/{name}.py" in text
    assert "Data:" in text
    assert "Hardware:" in text
    # What was measured, or that nobody has.
    assert re.search(r"[Rr]esult|not run|Not run", text)
