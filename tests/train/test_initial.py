"""Weights from a run or a file: what is taken, where it is put, and what is refused."""

import dataclasses
import logging

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from emoe_jax import interop, sharding
from emoe_jax.checkpoint import Checkpoints
from emoe_jax.config import ViTConfig
from emoe_jax.models import EMoEViT
from tests.train.tiny import lm_tree, mesh_of_one, vit_tree
from train import cluster, describe, loop
from train.config import freeze, to_json
from train.initial import by_block, initial_params, matching, place_params, with_positions
from train.loop import train
from train.run import build, load_model, load_trained, save_model

BACKBONE = {"patch": 4, "width": 8, "depth": 2, "heads": 2, "mlp_hidden": 8, "pooling": "class"}
PLAIN = BACKBONE | {"moe_every": 0}
ADAPTER = BACKBONE | {"moe_form": "adapter", "moe_blocks": (0,)}
EXPERTS = {"router": "eigen", "experts": 2, "hidden": 4, "dispatch": "dense", "basis": {"rank": 4}}


def adapter(source, **changes):
    """An adapter on the backbone, of which branches and head are trained."""
    optim = {"warmup": 0, "trainable": ("moe", "alpha", "head")}
    keys = {"init_from": str(source), "steps": 2, "model": ADAPTER, "moe": EXPERTS, "optim": optim}
    return vit_tree(**keys | changes)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """The folder of a Vision Transformer without experts, its blocks stacked."""
    folder = tmp_path_factory.mktemp("backbone") / "run"
    write_run(folder, vit_tree(model=PLAIN))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", mesh_of_one)
        state = build(freeze(vit_tree(model=PLAIN)), folder).init()
    with Checkpoints(folder / "checkpoints", every=1) as checkpoints:
        checkpoints.save(7, state, data_state={}, meta={}, force=True)
    return folder


def write_run(folder, tree):
    """What a run leaves before its first checkpoint."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.json").write_text(to_json(tree))


def zeros(run):
    """Parameters where the run has them."""
    return jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding), run.abstract["params"]
    )


@pytest.fixture
def lines(caplog):
    """What the program logs."""
    caplog.set_level(logging.INFO, logger="train")
    logging.getLogger("train").propagate = True
    return lambda: [record.getMessage() for record in caplog.records]


# ----------------------------------------------------------------------------------- what is taken

# Two blocks, stacked (period 1) and listed (period 2).
STACKED = {
    "head": {"kernel": np.array([1, 2])},
    "blocks": {"groups": {"0": {"mlp": np.array([[3, 4], [5, 6]])}}},
}
LISTED = {
    "head": {"kernel": np.array([1, 2])},
    "blocks": {"groups": {"0": {"mlp": np.array([[3, 4]])}, "1": {"mlp": np.array([[5, 6]])}}},
}


def test_blocks_are_compared_by_their_number():
    expected = {"head/kernel": [1, 2], "blocks/0/mlp": [3, 4], "blocks/1/mlp": [5, 6]}
    for tree in (STACKED, LISTED):
        rows = by_block(tree)
        assert {"/".join(path): row.tolist() for path, row in rows.items()} == expected
    for source, target in ((STACKED, LISTED), (LISTED, STACKED), (LISTED, LISTED)):
        taken, notes = matching(source, target)
        chex.assert_trees_all_equal(taken, target)
        assert notes == []


def test_places_of_a_period_come_in_turn():
    # Four blocks, experts in every other one: place 0 holds blocks 0 and 2, place 1 blocks 1 and 3.
    groups = {"0": {"mlp": np.array([0, 2])}, "1": {"moe": np.array([1, 3])}}
    rows = by_block({"blocks": {"groups": groups}})
    assert {"/".join(path): int(row) for path, row in rows.items()} == {
        "blocks/0/mlp": 0,
        "blocks/2/mlp": 2,
        "blocks/1/moe": 1,
        "blocks/3/moe": 3,
    }


def test_what_does_not_fit_is_left_and_told():
    target = {
        "head": {"kernel": np.zeros(3)},
        "blocks": {"groups": {"0": {"mlp": np.zeros((1, 2)), "moe": np.zeros((1, 2))}}},
    }
    taken, notes = matching(LISTED, target)
    chex.assert_trees_all_equal(taken, {"blocks": {"groups": {"0": {"mlp": np.array([[3, 4]])}}}})
    assert notes == [
        "head/kernel: (3,) here, (2,) there: starts anew",
        "not in the source, start anew: blocks/0/moe",
        "in the source alone, not used: blocks/1/mlp",
    ]


def test_stacked_blocks_are_taken_whole_or_not_at_all():
    target = {"blocks": {"groups": {"0": {"mlp": np.zeros((3, 2))}}}}
    taken, notes = matching(STACKED, target)
    assert taken == {}
    assert notes[0].endswith("start anew: blocks/0,1,2/mlp")


# -------------------------------------------------------------------------------------- from a run


def test_an_adapter_starts_from_its_backbone_and_keeps_it(
    backbone, tmp_path, one_device, lines, monkeypatch
):
    train(adapter(backbone), tmp_path)
    _, source, _ = load_trained(backbone, {})
    _, state, step = load_trained(tmp_path, {})
    assert step == 2
    ours, theirs = by_block(state["params"]), by_block(source["params"])
    names = {"/".join(path) for path in ours.keys() - theirs.keys()}
    assert {name.split("/")[2] for name in names} == {"moe", "alpha"}
    for path, leaf in theirs.items():
        same = np.array_equal(leaf, ours[path])
        assert same != (path[0] == "head"), path
    told = lines()
    assert f"init_from: the newest checkpoint in {backbone}" in told
    (note,) = [line for line in told if "not in the source" in line]
    assert note.startswith(
        "init_from: not in the source, start anew: blocks/0/alpha, blocks/0/moe/"
    )
    count = sum(leaf.size for leaf in theirs.values())
    assert f"{count:,} parameters start from {backbone}" in told
    (size,) = [line for line in told if "active per token" in line]
    # Basis 8·4, masks 2·4, gamma 4, bias 2, two matrices 2·8·4 and a gate, alpha; head 10·8 + 10.
    trained = 32 + 8 + 4 + 2 + 3 * 64 + 1 + 90
    assert f" parameters, {trained} of them trained, " in size

    # A resumed run does not read the source; this one is at its end.
    monkeypatch.setattr(loop, "initial_params", lambda run: pytest.fail("read again"))
    train(adapter(backbone.parent / "gone"), tmp_path)


def test_a_model_without_experts_says_so(backbone, tmp_path, one_device, lines):
    describe.describe(build(freeze(vit_tree(model=PLAIN)), tmp_path))
    (size,) = [line for line in lines() if "active per token" in line]
    assert size.endswith("; no experts")
    assert "of them trained" not in size


def started(run):
    """The state that a run begins with."""
    with cluster.Compiler() as compiler:
        return loop._begin_start(run, compiler)()


def test_freezing_what_is_drawn_is_pointed_out(tmp_path, one_device, lines):
    run = build(freeze(adapter("")), tmp_path)
    nothing = {"params": {}}
    assert started(dataclasses.replace(run, init=jax.jit(lambda: nothing))) == nothing
    assert lines() == ["what optim.trainable leaves out stays as it is drawn: init_from is empty"]


def test_weights_are_put_where_those_drawn_were(tmp_path):
    # Eight devices: matrices are split over two of the axes, the rest is on all.
    tree = adapter("weights", mesh={"fsdp": 2, "tensor": 2}, batch=8)
    run = build(freeze(tree), tmp_path)
    drawn = zeros(run)
    kernel = np.random.default_rng(0).normal(size=(1, 8, 8))  # float64, as a file may have it
    taken = {"blocks": {"groups": {"0": {"attention": {"query": {"kernel": kernel}}}}}}
    placed = place_params(drawn, taken)
    chex.assert_trees_all_equal_shapes_and_dtypes(placed, drawn)
    assert all(
        new.sharding == old.sharding
        for new, old in zip(jax.tree.leaves(placed), jax.tree.leaves(drawn), strict=True)
    )
    there = placed["blocks"]["groups"]["0"]["attention"]["query"]["kernel"]
    assert there.addressable_shards[0].data.shape == (1, 4, 4)
    np.testing.assert_array_equal(there, kernel.astype(np.float32))
    assert placed["head"]["kernel"] is drawn["head"]["kernel"]


def test_a_drawn_array_is_gone_before_its_place_is_taken(tmp_path, one_device, monkeypatch):
    run = build(freeze(adapter("weights")), tmp_path)
    drawn = zeros(run)
    taken = {"position": np.ones((5, 8)), "class_token": np.ones((1, 8))}
    put, alive = jax.device_put, []

    def watched(value, where):
        alive.append([name for name in taken if not drawn[name].is_deleted()])
        return put(value, where)

    monkeypatch.setattr(jax, "device_put", watched)
    placed = place_params(drawn, taken)
    # Two arrays, one after the other, and never with the one that they replace.
    assert alive == [["class_token"], []]
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(placed))
    gone = [path for path, leaf in jax.tree_util.tree_leaves_with_path(drawn) if leaf.is_deleted()]
    assert {path[0].key for path in gone} == taken.keys()
    np.testing.assert_array_equal(placed["position"], taken["position"])


# ------------------------------------------------------------------------------------- from a file


def test_a_released_file_is_read_and_its_bases_made_orthonormal(tmp_path, one_device, lines):
    file = tmp_path / "weights.safetensors"
    tree = adapter(file, moe=EXPERTS | {"activation": "gelu"})
    run = build(freeze(tree), tmp_path)
    drawn = jax.device_get(run.init())
    state = interop.export_emoe(run.model.bind(drawn["params"], drawn["router"]))
    state["branches.0.router.basis.Q"] = 2 * state["branches.0.router.basis.Q"]
    state["vit.head.weight"] = np.zeros((11, 8), np.float32)
    state["vit.pos_embed"] = state["vit.pos_embed"] + 1
    interop.write_safetensors(file, state)
    began = started(run)["params"]
    router, before = (p["blocks"]["groups"]["0"]["moe"]["router"] for p in (began, drawn["params"]))
    chex.assert_trees_all_close(router["basis"], before["basis"], atol=1e-6)
    chex.assert_trees_all_equal(router["masks"], before["masks"])
    chex.assert_trees_all_equal(began["position"], drawn["params"]["position"] + 1)
    assert "init_from: head/kernel starts anew" in lines()


def test_frozen_parameters_must_come_from_the_source(backbone, tmp_path, one_device, monkeypatch):
    words = "gives nothing, or other shapes, for .* optim.trainable leaves out: blocks/groups/0/mlp"
    other = adapter(backbone, model=ADAPTER | {"mlp_hidden": 12})
    refused(other, tmp_path, ValueError, words, monkeypatch)


# ------------------------------------------------------------------------------- other image sizes


def test_positions_are_resized_alike_from_a_run_and_from_a_file(backbone, tmp_path, one_device):
    interop.write_safetensors(
        tmp_path / "vit.safetensors", interop.export_vit(load_model(backbone))
    )
    keys = {"data": {"image_size": 16, "resize": True}, "moe": EXPERTS | {"activation": "gelu"}}
    ours, theirs = (
        initial_params(build(freeze(adapter(source, **keys)), tmp_path))
        for source in (backbone, tmp_path / "vit.safetensors")
    )
    # 2 x 2 patches and the class token there, 4 x 4 and the token here.
    assert ours[0]["position"].shape == (1 + 16, 8)
    for _, notes in (ours, theirs):
        assert "positions are resized from 2 x 2 patches to 4 x 4" in notes
    chex.assert_trees_all_equal(ours[0], theirs[0])
    source = load_model(backbone).position[...]
    np.testing.assert_array_equal(ours[0]["position"][0], source[0])
    # The corners keep most of their patch; the mean of all stays.
    np.testing.assert_allclose(ours[0]["position"][1:].mean(0), source[1:].mean(0), atol=1e-6)
    assert np.abs(ours[0]["position"][1] - source[1]).max() < np.ptp(source[1:])


def test_positions_of_other_tokens_are_not_taken_for_patches():
    # Nine positions: of 3 x 3 patches there; of a class token, four registers and 2 x 2 here.
    there = ViTConfig(image_size=12, patch=4, width=8, heads=2)
    here = dataclasses.replace(there, image_size=8, pooling="class", registers=4)
    source = {"position": np.ones((9, 8)), "registers": np.ones((4, 8))}
    left, (note,) = with_positions(source, there, here)
    assert left.keys() == {"registers"}
    assert note == "positions start anew: 5 of them belong to no patch here, 0 there"
    same, notes = with_positions(source, there, there)
    assert notes == []
    np.testing.assert_array_equal(same["position"], source["position"])


# -------------------------------------------------------------------------------- what is refused


def refused(tree, workdir, error, words, monkeypatch):
    """The error comes before anything is compiled."""
    monkeypatch.setattr(loop, "begin_evaluate", None)
    monkeypatch.setattr(jax, "jit", lambda *_, **__: lambda *_: pytest.fail("compiled"))
    with pytest.raises(error, match=words):
        train(tree, workdir)
    assert not (workdir / "config.json").exists()


def test_a_source_that_is_not_there_is_refused(backbone, tmp_path, one_device, monkeypatch):
    gone = backbone.parent / "gone"
    words = rf"init_from={gone} does not exist; {backbone.parent} holds run; name"
    refused(adapter(gone), tmp_path, FileNotFoundError, words, monkeypatch)


def test_a_run_of_text_is_refused(tmp_path, one_device, monkeypatch):
    text = tmp_path / "text"
    write_run(text, lm_tree())
    words = f"{text} is a run of task='lm'; name one of task='vit'"
    refused(adapter(text), tmp_path / "run", ValueError, words, monkeypatch)


def test_a_run_without_a_checkpoint_is_refused(tmp_path, one_device, monkeypatch):
    early = tmp_path / "early"
    write_run(early, vit_tree(model=PLAIN))
    words = "holds no finished checkpoint yet"
    refused(adapter(early), tmp_path / "run", FileNotFoundError, words, monkeypatch)


def test_a_run_of_which_nothing_fits_is_refused(backbone, tmp_path, one_device, monkeypatch):
    other = adapter(backbone, model=ADAPTER | {"width": 16, "mlp_hidden": 32}, data={"classes": 11})
    words = rf"init_from={backbone} holds no parameter that fits: .*position"
    refused(other, tmp_path, ValueError, words, monkeypatch)


def test_a_converted_model_is_a_source_too(tmp_path, one_device):
    model = EMoEViT(freeze(vit_tree(model=PLAIN)).model, rngs=nnx.Rngs(0))
    save_model(tmp_path / "converted", model)
    taken, _ = initial_params(build(freeze(adapter(tmp_path / "converted")), tmp_path))
    np.testing.assert_array_equal(taken["position"], model.position[...])


def test_the_data_of_the_source_are_not_needed(backbone, tmp_path, one_device):
    tree = vit_tree(model=PLAIN, data={"source": "tfds:absent", "tfds_dir": str(tmp_path)})
    write_run(tmp_path / "other", tree)
    (tmp_path / "other/checkpoints").rmdir()
    (tmp_path / "other/checkpoints").symlink_to(backbone / "checkpoints")
    taken, _ = initial_params(build(freeze(adapter(tmp_path / "other")), tmp_path))
    assert taken["head"]["kernel"].shape == (8, 10)
