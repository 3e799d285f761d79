"""The release's MoEConfig: what is told, what the weights tell, and what has to be told."""

import numpy as np
import pytest

from emoe_jax import ViTConfig
from emoe_jax.config import BasisConfig, MoEConfig, RouterConfig
from emoe_jax.interop import released

STATE = {
    "vit.cls_token": np.zeros((1, 1, 8)),
    "branches.1.router.masks": np.zeros((4, 6)),
    "branches.1.experts.0.down.weight": np.zeros((5, 8)),
    "branches.11.alpha": np.zeros(()),
}


def adapter(top_k=2, **changes):
    """A model of ours with branches after blocks 1 and 3."""
    routing = RouterConfig(temperature=0.25, orthogonality_weight=0.0)
    moe = MoEConfig(
        router="eigen",
        experts=4,
        top_k=top_k,
        hidden=5,
        activation="gelu",
        basis=BasisConfig(6),
        routing=routing,
    )
    keys = {"width": 8, "depth": 4, "heads": 2, "moe_form": "adapter", "moe_every": 2}
    return ViTConfig(**keys | {"pooling": "class", "moe": moe} | changes)


def test_blocks_as_the_release_names_them():
    blocks = released.released_blocks
    assert blocks("all", 3) == (0, 1, 2)
    assert blocks("last6", 8) == (2, 3, 4, 5, 6, 7)
    assert blocks("last4", 3) == (0, 1, 2)
    assert blocks("1, 3,9", 4) == (1, 3)
    # As the command line's --set blocks=1,3 and --set blocks=1 give them.
    assert blocks((1, 3), 4) == (1, 3)
    assert blocks(1, 4) == (1,)
    with pytest.raises(ValueError, match="blocks='first' must be 'all'"):
        blocks("first", 4)


def test_what_is_told_comes_before_the_weights_and_the_defaults_last():
    whole = released.complete({"router_mode": "top1", "r": 3, "num_heads": 2}, STATE)
    assert whole == released.DEFAULTS | {
        "router_mode": "top1",
        "r": 3,  # told; the masks have 6 directions
        "experts": 4,
        "bottleneck": 5,
        "blocks": [1, 11],
    }


def test_how_tokens_are_routed_has_to_be_told():
    # The release's default is another in each of its programs.
    with pytest.raises(ValueError, match=r"router_mode cannot be read off .*: soft, top1, top2"):
        released.complete({"tau": 0.5}, STATE)
    with pytest.raises(ValueError, match="router_mode='top3' is not known"):
        released.complete({"router_mode": "top3"}, STATE)
    # Without a branch nothing is routed.
    assert released.complete({}, {"vit.cls_token": np.zeros(1)}) == released.DEFAULTS


def test_branches_are_numbered():
    with pytest.raises(ValueError, match="has branches all, last; those of the release are numb"):
        released.sizes({"branches.last.alpha": np.zeros(()), "branches.all.alpha": np.zeros(())})


@pytest.mark.parametrize(("top_k", "mode"), [(1, "top1"), (2, "top2"), (4, "soft")])
def test_a_model_of_ours_described_is_read_as_it_was(top_k, mode):
    told = released.describe(adapter(top_k))
    assert told["router_mode"] == mode
    assert told["blocks"] == "1,3"
    assert told["apply_to_patches_only"]
    ours = released.moe_config(told, 8)
    assert (ours.experts, ours.top_k, ours.hidden, ours.basis.rank) == (4, top_k, 5, 6)
    assert (ours.routing.temperature, ours.routing.orthogonality_weight) == (0.25, 0.0)
    assert not released.describe(adapter(route_class=True))["apply_to_patches_only"]


def test_what_a_router_takes_where_nothing_is_set_is_told():
    bare = MoEConfig(router="eigen", activation="gelu", basis=BasisConfig(4))
    told = released.describe(adapter(moe=bare))
    assert (told["tau"], told["ortho_lambda"]) == (1.0, 5e-4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"head_dim": 3}, "head_dim=3 is not width / heads"),
        ({"moe_form": "mlp"}, "the release has no moe_form='mlp', only adapter"),
        ({"pooling": "mean"}, "no class_token=False, only True"),
        ({"registers": 2}, "no registers=2, only 0"),
        ({"top_k": 3}, "no moe.top_k=3, only 1, 2, 4"),
    ],
)
def test_what_the_release_has_no_place_for(changes, words):
    with pytest.raises(ValueError, match=words):
        released.check_exportable(adapter(**changes))


@pytest.mark.parametrize(
    ("key", "value"), [("experts", [4]), ("r", None), ("tau", "1"), ("router_mode", ["top1"])]
)
def test_values_have_the_types_of_the_release(key, value):
    with pytest.raises(ValueError, match=rf"{key}=.* in the release's configuration is no "):
        released.complete({"router_mode": "top1", key: value}, STATE)
