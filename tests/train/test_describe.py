"""What a run says of itself: how tokens come to experts, and by which kernel."""

import pytest

from emoe_jax import sharding
from tests.train.tiny import lm_tree, mesh_of_one
from train import describe
from train.config import freeze


@pytest.mark.parametrize(
    ("dispatch", "expert", "told"),
    [
        ("dropless", 1, "dropless dispatch by loops"),
        ("capacity", 1, "capacity dispatch"),
        ("capacity", 4, "capacity dispatch by loops, all_to_all over 4 devices"),
        ("dense", 4, "dense dispatch"),
    ],
)
def test_the_kernel_is_named_where_there_is_one(dispatch, expert, told, monkeypatch):
    monkeypatch.setattr(describe, "resolve_backend", lambda name: "loops")
    config = freeze(lm_tree(moe={"router": "switch", "experts": 4, "dispatch": dispatch}))
    mesh = sharding.MeshConfig(expert=expert)
    mesh = mesh_of_one(mesh) if expert == 1 else sharding.make_mesh(mesh)
    assert describe._routing(config.model, mesh) == f"switch router, {told}"


def test_a_dense_kernel_is_warned_of(monkeypatch):
    monkeypatch.setattr(describe, "resolve_backend", lambda name: "ragged_dot")
    config = freeze(lm_tree(moe={"dispatch": "dropless"}))
    told = describe._routing(config.model, mesh_of_one(config.mesh))
    assert told.endswith("by ragged_dot, which XLA may lower to E times the arithmetic: time it")


def test_a_model_without_experts_says_so():
    config = freeze(lm_tree(model={"moe_every": 0}))
    assert describe._routing(config.model, mesh_of_one(config.mesh)) == "no experts"
