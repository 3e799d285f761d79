"""Variants: which keys each run of a study has, what is refused, what is tuned."""

import json
import re

import pytest

from emoe_jax.routers import ROUTERS
from tests.train.tiny import lm_tree, vit_tree
from train.config import flat_keys
from train.variants import (
    TUNING,
    Variant,
    check,
    choose,
    read_options,
    tuning_points,
    variant_tree,
)


def options_file(folder, text):
    file = folder / "options.json"
    file.write_text(text if isinstance(text, str) else json.dumps(text))
    return str(file)


def test_names_are_looked_up_in_the_options_first_and_among_the_routers_then(tmp_path):
    path = options_file(
        tmp_path,
        {
            "slow": {"router": "loss_free", "moe.routing.bias_rate": 1e-4},
            "switch": {"router": "switch", "moe.routing.balance_weight": 0.1, "tried": [{}]},
        },
    )
    slow, switch, softmax = choose(["slow", "switch", "softmax"], read_options([path]))
    assert (slow.router, slow.options) == ("loss_free", {"moe.routing.bias_rate": 1e-4})
    assert (switch.router, switch.options) == ("switch", {"moe.routing.balance_weight": 0.1})
    assert softmax == Variant("softmax", "softmax")
    assert read_options([]) == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1]", "holds a JSON list, not an object; write one, such as"),
        ("{", "is no JSON"),
        ({"a": 3}, "variant 'a' is 3, not an object"),
        ({"a": {}}, "variant 'a' has router=None; choose one of "),
        ({"a": {"router": ["eigen"]}}, "variant 'a' has router=('eigen',); choose one of "),
        ({"a": {"router": "eigne"}}, "variant 'a' has router='eigne'; choose one of "),
        ({"a": {"router": "eigen", "like": "b"}}, "variant 'a' has both 'router' and 'like'"),
        ({"a": {"like": 3}}, "variant 'a' is like 3, no name"),
        ({"a": {"like": "b"}, "b": {"like": "a"}}, "variant 'b' is like 'a', which is like 'b'"),
        ({"a": {"like": "c"}, "b": {}}, "'a' is like 'c', which is neither a variant nor a router"),
        ({"a": {"router": "eigen", "seed": 3}}, "sets 'seed', which the study decides"),
    ],
)
def test_options_that_are_none_are_refused(text, said, tmp_path):
    with pytest.raises(ValueError, match=re.escape(said)):
        choose(["a"], read_options([options_file(tmp_path, text)]))


def test_a_variant_that_is_like_another_has_its_options(tmp_path):
    parts = {
        "whitened": {"like": "whitened", "moe.basis.rank": 2},
        "bare": {"like": "whitened", "moe.routing.offset": False},
        "barer": {"like": "bare", "moe.routing.whitening": 0.0},
    }
    tuned = {"whitened": {"router": "whitened", "moe.routing.temperature": 0.3, "tried": []}}
    plain = options_file(tmp_path, parts)
    (bare,) = choose(["bare"], read_options([plain]))
    assert bare.router == "whitened"
    assert bare.options == {"moe.basis.rank": 2, "moe.routing.offset": False}
    (tmp_path / "tuned.json").write_text(json.dumps(tuned))
    both = read_options([plain, str(tmp_path / "tuned.json")])
    (barer,) = choose(["barer"], both)
    assert barer.options == {
        "moe.routing.temperature": 0.3,
        "moe.routing.offset": False,
        "moe.routing.whitening": 0.0,
    }


def test_of_two_files_the_later_one_decides(tmp_path):
    files = []
    for number in (1, 2):
        (tmp_path / f"{number}.json").write_text(
            json.dumps({"a": {"router": "eigen", "steps": number}})
        )
        files.append(str(tmp_path / f"{number}.json"))
    assert choose(["a"], read_options(files))[0].options == {"steps": 2}


def test_names_that_are_none_are_refused():
    with pytest.raises(FileNotFoundError, match="--options=absent: there is no such file"):
        read_options(["absent"])
    with pytest.raises(ValueError, match="'swich' is neither a variant nor a router; did you mean"):
        choose(["swich"], {})
    with pytest.raises(ValueError, match="names 'eigen' twice"):
        choose(["eigen", "eigen"], {})
    with pytest.raises(ValueError, match="--routers is empty; choose from "):
        choose([], {})
    for name in ("tune", "../up", ""):
        with pytest.raises(ValueError, match="cannot be a folder's name"):
            choose([name], {name: {"router": "eigen"}})


def test_options_of_another_router_are_unset_and_its_own_kept():
    base = lm_tree(moe={"router": "loss_free", "routing": {"bias_rate": 0.02}}, prompt="The ")
    same = variant_tree(base, Variant("loss_free", "loss_free"), seed=3)
    assert (same.moe.routing.bias_rate, same.seed, same.prompt) == (0.02, 3, "")
    other = variant_tree(base, Variant("hot", "softmax", {"moe.routing.temperature": 2.0}), seed=3)
    assert other.moe.routing.bias_rate is None
    assert (other.moe.router, other.moe.routing.temperature) == ("softmax", 2.0)
    assert base.moe.routing.bias_rate == 0.02
    differing = [k for k in flat_keys(same) if _value(same, k) != _value(other, k)]
    assert differing == ["moe.router", "moe.routing.bias_rate", "moe.routing.temperature"]


def _value(tree, key):
    for part in key.split("."):
        tree = tree[part]
    return tree


@pytest.mark.parametrize(("steps", "given", "logged"), [(24, 1, 1), (500, 10, 1), (2000, 50, 5)])
def test_enough_steps_are_logged(steps, given, logged):
    base = lm_tree(steps=steps, log_every=given)
    assert variant_tree(base, Variant("eigen", "eigen"), 0).log_every == logged


def test_expert_choice_gets_the_dispatcher_that_takes_it():
    variant = Variant("expert_choice", "expert_choice")
    assert not variant.causal
    text = variant_tree(lm_tree(), variant, 0)
    assert (text.moe.dispatch, text.moe.routing.acausal) == ("capacity", True)
    images = variant_tree(vit_tree(), variant, 0)
    assert (images.moe.dispatch, images.moe.routing.acausal) == ("capacity", None)
    check(text)
    check(images)


def test_impossible_variants_are_refused_without_data():
    with pytest.raises(ValueError, match=r"variant 'a': config key 'moe\.routing\.tau' does not"):
        variant_tree(lm_tree(), Variant("a", "eigen", {"moe.routing.tau": 1.0}), 0)
    with pytest.raises(ValueError, match=r"variant 'a': 'moe' is an object; write .* with dots"):
        variant_tree(lm_tree(), Variant("a", "eigen", {"moe": {"top_k": 1}}), 0)
    unread = Variant("a", "random", {"moe.routing.temperature": 1.0})
    with pytest.raises(
        ValueError, match=r"temperature=1\.0 is set, but the router 'random' does not"
    ):
        check(variant_tree(lm_tree(), unread, 0))
    eigen = Variant("eigen", "eigen")
    with pytest.raises(ValueError, match="no block with experts"):
        check(variant_tree(lm_tree(model={"moe_every": 0}), eigen, 0))
    with pytest.raises(ValueError, match="experts=1 leaves nothing to route"):
        check(variant_tree(lm_tree(moe={"experts": 1, "top_k": 1}), eigen, 0))


def test_every_router_with_something_to_tune_has_as_many_values():
    assert {len(values) for _, values in TUNING.values()} == {3}
    assert set(ROUTERS) - set(TUNING) == {"random", "hash"}


@pytest.mark.parametrize("router", sorted(set(TUNING) & set(ROUTERS)))
def test_what_is_tuned_is_read_by_the_router(router):
    top_k = 4 if router == "soft" else 2
    for point in tuning_points(Variant(router, router)):
        check(variant_tree(lm_tree(moe={"top_k": top_k}), Variant(router, router, point), 0))


def test_a_key_that_a_variant_sets_is_not_tuned():
    fixed = Variant("a", "switch", {"moe.routing.balance_weight": 0.1})
    assert tuning_points(fixed) == [{"optim.router_scale": v} for v in (0.1, 0.3, 1.0)]
    both = fixed.with_options({"optim.router_scale": 0.5})
    assert tuning_points(both) == [{}]
    assert tuning_points(Variant("random", "random")) == [{}]
