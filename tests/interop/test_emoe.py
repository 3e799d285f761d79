"""The release's checkpoints: same outputs, routing, loss and gradients; and back, bit for bit."""

import json
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import save_file

from emoe_jax import ViTConfig, interop, pure
from emoe_jax.config import BasisConfig, MoEConfig
from emoe_jax.interop import emoe
from emoe_jax.models import EMoEViT
from emoe_jax.moe import auxiliary_loss

FOLDER = pathlib.Path(__file__).parents[1] / "data"
CASES = ("tiny_soft", "tiny_top1", "tiny_top2", "tiny_all_tokens")


def read(path):
    with safe_open(path, "np") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def part(arrays, prefix):
    return {k[len(prefix) :]: v for k, v in arrays.items() if k.startswith(prefix)}


class Case:
    """A fixture of tests/data/parity and the model that it makes."""

    def __init__(self, name):
        self.arrays, facts = read(FOLDER / "parity" / f"{name}.safetensors")
        self.state = part(self.arrays, "state.")
        self.config = json.loads(facts["cfg"]) | {"num_heads": int(facts["heads"])}
        self.model = interop.load_emoe(self.state, self.config)
        self.images = jnp.asarray(self.arrays["images"].transpose(0, 2, 3, 1))
        graph, self.variables = nnx.split(self.model)

        def run(variables, images, **options):
            return nnx.merge(graph, variables)(images, **options)

        self.run = jax.jit(run, static_argnames=("train", "capture"))


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return Case(request.param)


@pytest.fixture(scope="module")
def top1():
    return Case("tiny_top1")


def assert_close(ours, theirs, tolerance):
    """Within a share of the largest magnitude."""
    scale = np.max(np.abs(theirs))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * max(scale, 1e-7))


def test_outputs_equal_the_release(case):
    logits, aux, captured = case.run(case.variables, case.images, capture=True)
    assert_close(logits, case.arrays["logits"], 1e-5)
    # Both are rounding errors of QᵀQ - I and PᵀP - I, squared; for other values see below.
    assert float(auxiliary_loss(aux)) == pytest.approx(float(case.arrays["aux"][0]), abs=1e-12)
    theirs = {k: v for k, v in case.arrays.items() if k.startswith(("router.", "branch."))}
    assert set(theirs) <= set(captured)
    for key, value in theirs.items():
        chex.assert_equal_shape([captured[key], value])
        assert_close(captured[key], value, 1e-5)


def test_training_loss_and_gradients_equal_the_release(case):
    labels = jnp.asarray(case.arrays["labels"])

    def loss(variables):
        logits, aux = case.run(variables, case.images, train=True)
        task = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.mean(task) + auxiliary_loss(aux), logits

    (value, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(case.variables)
    assert float(value) == pytest.approx(float(case.arrays["train_loss"][0]), rel=1e-5)
    assert_close(logits, case.arrays["train_logits"], 1e-5)
    ours = interop.export_emoe(grads)
    for key, value in part(case.arrays, "grad.").items():
        # The basis' gradient carries rounding of the penalty: 2e-4 of it, or 1e-7 (its README).
        loose = key.endswith("basis.Q")
        limit = max(2e-4 * np.max(np.abs(value)), 1e-7) if loose else None
        if limit:
            np.testing.assert_allclose(ours[key], value, rtol=0, atol=limit)
        else:
            assert_close(ours[key], value, 1e-4)
    # What is trained here loads again, there as here.
    moved = jax.tree.map(lambda p, g: p - 0.1 * g, case.variables, grads)
    again = interop.load_emoe(interop.export_emoe(moved), case.config)
    chex.assert_trees_all_equal(nnx.state(again), moved)


def test_round_trip_is_bit_equal(case, tmp_path):
    out = interop.export_emoe(case.model)
    assert set(out) == set(case.state)
    for key, value in case.state.items():
        assert out[key].shape == value.shape
        assert out[key].tobytes() == value.tobytes()
    interop.write_safetensors(tmp_path / "model.safetensors", out)
    again = interop.load_emoe(tmp_path, case.config)
    chex.assert_trees_all_equal(nnx.state(again), nnx.state(case.model))


def test_penalty_of_both_bases_in_evaluation(top1):
    state = dict(top1.state)
    for block, (q, p) in enumerate(((2.0, 1.0), (1.0, 3.0), (1.0, 1.0))):
        for name, factor in (("Q", q), ("P", p)):
            key = f"branches.{block}.router.basis.{name}"
            state[key] = np.float32(factor) * state[key]
    variables = nnx.state(interop.load_emoe(state, top1.config))

    def penalty(variables):
        return auxiliary_loss(top1.run(variables, top1.images)[1])

    value, grads = jax.value_and_grad(penalty)(variables)
    # 5e-4 times R=16 diagonal entries of (4 - 1)² in block 0 and of (9 - 1)² in block 1.
    assert float(value) == pytest.approx(5e-4 * 16 * (9 + 64), rel=1e-5)
    ours = interop.export_emoe(grads)
    # d/dQ λ‖QᵀQ - I‖² = 4 λ Q (QᵀQ - I) = 4 λ 3 Q where QᵀQ = 4 I; none for P.
    expected = 4 * 5e-4 * 3 * state["branches.0.router.basis.Q"]
    np.testing.assert_allclose(ours["branches.0.router.basis.Q"], expected, rtol=1e-3, atol=1e-6)
    np.testing.assert_array_equal(ours["branches.1.router.basis.P"], np.zeros((32, 16)))


def test_every_way_to_hand_a_model_over_exports_the_same(top1):
    whole = interop.export_emoe(top1.model)
    _, params, router = pure.split(top1.model)
    assert {k.rpartition(".")[2] for k in whole if k not in interop.export_emoe(params)} == {
        "P",
        "log_lambda",
    }
    flax = interop.export_emoe(nnx.state(top1.model))
    chex.assert_trees_all_equal(flax, whole)
    assert set(interop.export_emoe(router)) | set(interop.export_emoe(params)) == set(whole)


def test_a_model_of_ours_exports_what_the_release_needs(top1):
    moe = MoEConfig(router="eigen", experts=4, hidden=24, activation="gelu", basis=BasisConfig(16))
    # A periodic pattern is stacked: blocks 1 and 3 share one array, and so do 0 and 2.
    config = ViTConfig(
        image_size=8, width=32, depth=4, moe_every=2, moe_form="adapter", pooling="class", moe=moe
    )
    build = pure.initializer(lambda: EMoEViT(config, rngs=nnx.Rngs(0)))
    model, _, _ = pure.abstract_split(lambda: EMoEViT(config, rngs=nnx.Rngs(0)))
    out = interop.export_emoe(model.bind(*jax.jit(build)()))
    branches = {key.split(".")[1] for key in out if key.startswith("branches.")}
    assert branches == {"1", "3"}
    per_block = {k.split(".", 2)[2] for k in top1.state if k.startswith("branches.")}
    assert {k.split(".", 2)[2] for k in out if k.startswith("branches.")} == per_block
    given = {"experts": 4, "r": 16, "bottleneck": 24, "router_mode": "top1", "blocks": "1,3"}
    again = interop.load_emoe(out, given | {"num_heads": 4})
    chex.assert_trees_all_equal(interop.export_emoe(again), out)
    assert again.config.moe_blocks == (1, 3)


def test_configuration_of_the_hub_is_read(top1, tmp_path):
    save_file(top1.state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"there is no .*config.json"):
        interop.load_emoe(tmp_path)
    tree = {"vit_model_name": "vit_tiny_patch4_16", "moe_config": {"router_mode": "top1"}}
    (tmp_path / "config.json").write_text(json.dumps(tree))
    # "tiny" has three heads, and sizes that are not told are read off the weights.
    with pytest.raises(ValueError, match="r=64 is more than the width 32"):
        interop.load_emoe(tmp_path, {"num_heads": 4, "r": 64})
    with pytest.raises(ValueError, match="heads=3 does not divide width=32"):
        interop.load_emoe(tmp_path)
    moe = {key: value for key, value in top1.config.items() if key != "num_heads"}
    tree = {"vit_model_name": "vit_large_patch4_16", "moe_config": moe}
    (tmp_path / "config.json").write_text(json.dumps(tree))
    assert interop.load_emoe(tmp_path).config.heads == 16
    # What is given goes before what is written there, and leaves the rest of it.
    told = interop.load_emoe(tmp_path, {"num_heads": 4, "tau": 0.25}).config
    assert (told.heads, told.moe.routing.temperature, told.moe.top_k) == (4, 0.25, 1)


def test_a_configuration_beside_initial_weights_is_heeded(top1, tmp_path):
    config = top1.model.config
    _, params, _ = pure.abstract_split(lambda: EMoEViT(config, rngs=nnx.Rngs(0)))
    save_file(top1.state, tmp_path / "model.safetensors")
    args = {"num_heads": 4, "global_pool": "avg"}
    for changes, words in (
        ({}, None),
        ({"num_heads": 2}, "tells num_heads=2, the model has heads=4, .* set model.heads=2"),
        ({"act_layer": "relu"}, "act_layer='relu' is not supported"),
    ):
        tree = {"architecture": "vit_other", "model_args": args | changes}
        (tmp_path / "config.json").write_text(json.dumps(tree))
        if words is None:
            taken, _ = interop.initial_params(tmp_path, config, params)
            chex.assert_trees_all_equal_structs(taken, params)
            continue
        with pytest.raises(ValueError, match=words):
            interop.initial_params(tmp_path, config, params)


def test_what_was_exported_needs_no_configuration(case, tmp_path):
    interop.write_safetensors(tmp_path / "model.safetensors", interop.export_emoe(case.model))
    (tmp_path / "config.json").write_text(json.dumps(interop.describe(case.model)))
    again = interop.load(tmp_path)
    assert again.config == case.model.config
    chex.assert_trees_all_equal(nnx.state(again), nnx.state(case.model))


def without(state, *names):
    return {key: value for key, value in state.items() if key not in names}


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        ({}, {"routermode": "top1"}, "unknown key 'routermode'; did you mean 'router_mode'"),
        ({}, {"router_mode": "top3"}, "router_mode='top3' is not known"),
        ({}, {"act_layer": "relu"}, "act_layer='relu' is not supported"),
        ({}, {"depth": 4}, "depth=4, but the checkpoint has 3"),
        ({}, {"num_heads": 5}, "heads=5 does not divide width=32"),
        ({}, {"blocks": "0,1"}, r"unexpected: branches\.2\.alpha \(\)"),
        ({}, {"experts": 5}, r"missing: branches\.0\.experts\.4\.down\.weight \(24, 32\)"),
        ({}, {"r": 8}, r"router\.basis\.Q is \(32, 16\), expected \(32, 8\)"),
        ({"vit.reg_token": np.zeros((1, 2, 32))}, {}, "knows no register tokens"),
        ({"vit.norm.bias": np.full(32, np.nan)}, {}, r"1 of \d+ tensors hold NaN .*vit.norm.bias"),
    ],
)
def test_bad_checkpoints_are_refused(top1, change, config, message):
    with pytest.raises(ValueError, match=message):
        interop.load_emoe(top1.state | change, top1.config | config)


def test_all_wrong_keys_are_reported_at_once(top1):
    state = without(top1.state, "vit.norm.bias", "branches.1.alpha") | {"extra": np.zeros(2)}
    state["branches.0.router.gamma"] = np.ones(3, np.float32)
    with pytest.raises(ValueError, match="nothing was loaded") as error:
        interop.load_emoe(state, top1.config)
    for line in (
        "missing: vit.norm.bias (32,)",
        "missing: branches.1.alpha ()",
        "unexpected: extra (2,)",
        "shape: branches.0.router.gamma is (3,), expected (16,)",
    ):
        assert line in str(error.value)


def test_of_very_many_wrong_keys_the_first_are_told(top1):
    extra = {f"extra_{n:04}": np.zeros(2) for n in range(3 * emoe.MOST_LINES)}
    with pytest.raises(ValueError, match="nothing was loaded") as error:
        interop.load_emoe(top1.state | extra, top1.config)
    _, *lines, last = str(error.value).splitlines()
    assert lines == [f"  unexpected: extra_{n:04} (2,)" for n in range(emoe.MOST_LINES)]
    assert last == f"  and {2 * emoe.MOST_LINES} more"


def test_what_the_release_has_no_place_for_is_refused(top1):
    moe = MoEConfig(router="softmax", experts=2, activation="gelu")
    config = ViTConfig(width=8, depth=1, heads=2, moe=moe)
    _, model, _ = pure.abstract_split(lambda: EMoEViT(config, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"no place in a checkpoint.*moe/router/kernel"):
        interop.export_emoe(model)
    form = ViTConfig(**(vars(top1.model.config) | {"moe_form": "mlp"}))
    graph, params, router = pure.abstract_split(lambda: EMoEViT(form, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="the release has no moe_form='mlp', only adapter"):
        interop.export_emoe(graph.bind(params, router))
    with pytest.raises(ValueError, match="timm's Vision Transformer has none; use export_emoe"):
        interop.export_vit(top1.model)
    with pytest.raises(ValueError, match=r"none of the EMoE release.*load_vit"):
        interop.load_emoe(part(top1.state, "vit."), top1.config)


def test_initial_params_take_what_fits(top1):
    config = top1.model.config
    # Five classes there, seven here; branches after block 1 alone; images of 24 pixels.
    other = ViTConfig(**(vars(config) | {"classes": 7, "image_size": 24, "moe_blocks": (1,)}))
    _, params, _ = pure.abstract_split(lambda: EMoEViT(other, rngs=nnx.Rngs(0)))
    backbone = without(part(top1.state, "vit."), "head.weight")
    taken, notes = interop.initial_params(backbone, other, params)
    assert "head" not in taken
    assert "head/kernel starts anew" in notes
    assert taken["position"].shape == (37, 32)
    np.testing.assert_array_equal(taken["position"][0], top1.state["vit.pos_embed"][0, 0])
    assert "moe" not in taken["blocks"]["groups"]["1"]
    whole, notes = interop.initial_params(top1.state, other, params)
    np.testing.assert_array_equal(
        whole["blocks"]["groups"]["1"]["moe"]["router"]["masks"][0],
        top1.state["branches.1.router.masks"],
    )
    assert "branches.0.alpha is not used" in notes
    assert "positions are resized from 4 x 4 patches to 6 x 6" in notes
    scaled = backbone | {"blocks.0.ls1.gamma": np.ones(32, np.float32)}
    with pytest.raises(ValueError, match=r"unexpected: vit.blocks.0.ls1.gamma \(32,\)"):
        interop.initial_params(scaled, other, params)
    with pytest.raises(ValueError, match=r"missing: vit.blocks.2.norm2.bias \(32,\)"):
        interop.initial_params(without(backbone, "blocks.2.norm2.bias"), other, params)
