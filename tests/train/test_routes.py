"""Which tokens experts take: counts against plain ones, and what is computed from them."""

import math

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.train.tiny import lm_tree, vit_tree
from train import evaluate, routes, run
from train.config import freeze
from train.data.tokenizer import byte_tokenizer

LN2 = math.log(2)

TABLES = hnp.arrays(
    np.int64, st.tuples(st.integers(1, 4), st.integers(1, 5)), elements=st.integers(0, 9)
)


def untrained(tree, folder):
    """A run and its initial state."""
    folder.mkdir(exist_ok=True)
    this = run.build(freeze(tree), folder)
    return this, {"router": {}} | this.init()


def test_counts_are_assignments_by_expert_and_category():
    indices = np.array([[0, 2], [0, 1], [2, 0]])  # three tokens, two experts each
    counts = routes.count(indices, np.array([1, 1, 0]), experts=3, categories=2)
    np.testing.assert_array_equal(counts, [[1, 2], [0, 1], [1, 1]])
    np.testing.assert_array_equal(
        routes.merged(np.array([[1, 2, 3], [4, 5, 6]]), np.array([1, 0, 1]), 3),
        [[2, 4, 0], [5, 10, 0]],
    )


def test_entropy_and_information_of_tables_that_one_can_compute():
    assert routes.entropy(np.array([2, 2, 0])) == pytest.approx(LN2)
    assert routes.entropy(np.array([3])) == routes.entropy(np.zeros(2)) == 0
    # Independent: rows are multiples of each other.
    independent = np.array([[1, 2, 3], [2, 4, 6]])
    assert routes.mutual_information(independent) == pytest.approx(0, abs=1e-12)
    # Each category has one expert: the category tells all, the expert half of the category.
    settled = np.array([[5, 5, 0, 0], [0, 0, 5, 5]])
    assert routes.mutual_information(settled) == pytest.approx(LN2)
    assert routes.explained(settled) == pytest.approx(1)
    assert routes.explained(settled.T) == pytest.approx(0.5)
    # Two of four equally likely experts: ln 2 of ln 4 stays open.
    pairs = np.array([[4, 0], [4, 0], [0, 4], [0, 4]])
    assert routes.explained(pairs) == pytest.approx(0.5)
    # 3 of 4 right: 1 - (-3/4 log2 3/4 - 1/4 log2 1/4) bits of one.
    noisy = 1 + 0.75 * math.log2(0.75) + 0.25 * math.log2(0.25)
    assert routes.explained(np.array([[3, 1], [1, 3]])) == pytest.approx(noisy)
    assert routes.explained(np.array([[7, 2], [0, 0]])) == 0  # one expert: nothing to explain


@given(counts=TABLES, seed=st.integers(0, 9))
def test_explained_lies_in_zero_to_one_and_knows_no_order(counts, seed):
    value = routes.explained(counts)
    assert 0 <= value <= 1 + 1e-9
    mixed = np.random.default_rng(seed)
    other = mixed.permutation(mixed.permutation(counts, axis=0), axis=1)
    assert routes.explained(other) == pytest.approx(value, abs=1e-9)
    assert routes.explained(3 * counts) == pytest.approx(value, abs=1e-9)
    assert 0 <= routes.explained_by_chance(counts, seed) <= 1 + 1e-9


def test_chance_is_what_rare_categories_explain_without_meaning_anything():
    draw = np.random.default_rng(0)
    experts = draw.integers(0, 4, 20_000)
    rare = routes.count(experts[:, None], draw.integers(0, 500, 20_000), experts=4, categories=500)
    # (E-1)(N-1)/(2n) nats is the expected excess of an independent table, over ln 4.
    expected = 3 * 499 / 40_000 / math.log(4)
    assert routes.explained(rare) == pytest.approx(expected, rel=0.15)
    assert routes.explained_by_chance(rare) == pytest.approx(expected, rel=0.15)
    settled = np.array([[50, 0], [0, 50]])
    assert routes.explained(settled) == 1
    assert routes.explained_by_chance(settled) < 0.1


def test_lift_is_the_share_over_the_overall_share():
    # Category 0 is 4 of 8 assignments; 3/4 of expert 0's, 1/4 of expert 1's. Nothing of category 2.
    counts = np.array([[3, 1, 0], [1, 3, 0], [0, 0, 0]])
    np.testing.assert_allclose(routes.lift(counts), [[1.5, 0.5, 0], [0.5, 1.5, 0], [0, 0, 0]])
    assert routes.lift(np.zeros((2, 2), int)).tolist() == [[0, 0], [0, 0]]


def test_top_lists_leave_out_what_was_hardly_seen():
    counts = np.array([[50, 5, 4, 0], [50, 1, 0, 20]])
    assert routes.top(counts, 0, 3, by="count") == [0, 1, 2]
    assert routes.top(counts, 0, 3, by="lift") == [1, 0]  # the third was seen fewer than 5 times
    assert routes.top(counts, 1, 1, by="lift") == [3]
    with pytest.raises(ValueError, match="by='size' must be 'count' or 'lift'"):
        routes.top(counts, 0, 3, by="size")


def test_kinds_and_labels_of_tokens():
    tokenizer = byte_tokenizer()
    kinds = routes.token_kinds(tokenizer)
    assert len(kinds) == 258
    named = {text: routes.KINDS[kinds[ord(text)]] for text in "a7.\n"}
    assert named == {
        "a": "goes on with letters",
        "7": "digits",
        ".": "punctuation",
        "\n": "white space",
    }
    assert routes.KINDS[kinds[0xC3]] == "part of a character"
    assert routes.KINDS[kinds[tokenizer.bos_id]] == "document's begin or end"
    assert routes._kind(" the") == "begins a word"
    assert routes._kind(" 1876") == "digits"
    ids = [ord("a"), ord(" "), ord("\n"), 1, 0xC3, tokenizer.bos_id, tokenizer.eos_id]
    labels = [routes.token_label(tokenizer, i) for i in ids]
    assert labels == ["a", "␣", "⏎", "\\x01", "#195", "⟨begin⟩", "⟨end⟩"]


def test_texts_count_every_scored_position_once(finished, one_device):
    this, state, _ = run.load_trained(finished.workdir, {})
    batches = list(evaluate.heldout(this))
    found = routes.collect(this, state, batches=len(batches) + 3)
    tokens = np.concatenate([batch["tokens"][batch["scored"]] for batch in batches])
    assert found.tokens == len(tokens) == this.data.heldout_targets
    assert list(found.counts) == ["layer_00", "layer_01"]
    for tables in found.counts.values():
        # Each token has K = 2 experts.
        np.testing.assert_array_equal(
            tables["token"].sum(axis=0), 2 * np.bincount(tokens, minlength=258)
        )
        assert tables["kind"].sum() == tables["position"].sum() == 2 * len(tokens)
        np.testing.assert_array_equal(tables["kind"].sum(axis=1), tables["token"].sum(axis=1))
    scored, rows = batches[0]["scored"], routes.EXAMPLES
    for chosen in found.chosen.values():
        np.testing.assert_array_equal(chosen >= 0, scored[:rows])
    np.testing.assert_array_equal(found.examples["tokens"], batches[0]["tokens"][:rows])
    rows = routes.summary(found.counts)
    assert list(rows[0])[:3] == ["layer", "by token", "by token, chance"]
    assert rows[1]["layer"] == "layer_01"


def test_a_router_by_token_is_explained_by_the_token_alone(tmp_path, one_device, finished):
    tree = lm_tree(finished.source, moe={"router": "hash", "top_k": 1})
    this, state = untrained(tree, tmp_path)
    found = routes.collect(this, state, batches=1)
    for tables in found.counts.values():
        assert routes.explained(tables["token"]) == pytest.approx(1)
        assert routes.explained(tables["position"]) < 0.6


def test_images_count_as_a_plain_computation_and_padding_counts_nowhere(tmp_path, one_device):
    # 360 images: 104 rows of the third batch are padding.
    moe = {"experts": 4, "top_k": 2, "hidden": 8, "dispatch": "dense"}
    this, state = untrained(vit_tree(batch=128, steps=2, moe=moe), tmp_path)
    found = routes.collect(this, state)
    assert found.tokens == 360 * 4
    batches = list(evaluate.heldout(this))
    images, labels = (
        np.concatenate([batch[name][batch["scored"]] for batch in batches])
        for name in ("images", "labels")
    )
    classes = labels.argmax(-1)
    model = this.model.bind(state["params"], state["router"])
    captured = jax.jit(lambda images: model(images, capture=True)[2])(images)
    indices = np.asarray(captured["router.0.indices"])  # [360,4,2]
    plain = {"class": np.zeros((4, 10), int), "position": np.zeros((4, 4), int)}
    for (image, patch, _), expert in np.ndenumerate(indices):
        plain["class"][expert, classes[image]] += 1
        plain["position"][expert, patch] += 1
    for name, table in plain.items():
        np.testing.assert_array_equal(found.counts["layer_00"][name], table)

    rows = routes.EXAMPLES
    np.testing.assert_array_equal(found.chosen["layer_00"], indices[:rows, :, 0])
    assert found.patches == 4
    pixels = found.examples["images"]
    assert pixels.shape == (routes.EXAMPLES, 8, 8, 1)
    assert 0 <= pixels.min() < pixels.max() <= 1
    np.testing.assert_array_equal(found.examples["labels"], classes[:rows])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"moe": {"router": "expert_choice"}}, "lets each expert choose its tokens"),
        ({"moe": {"router": "soft"}}, "sends every token to every expert"),
        ({"model": {"moe_every": 0}}, "has no expert layers"),
    ],
)
def test_models_without_routes_say_why(changes, words, tmp_path):
    this = run.Run(freeze(vit_tree(**changes)), *[None] * 6)
    assert words in routes.no_routes(this)
    with pytest.raises(ValueError, match=words):
        routes.collect(this, {})


def test_no_batches_are_refused(tmp_path):
    this = run.Run(freeze(vit_tree()), *[None] * 6)
    assert routes.no_routes(this) is None
    with pytest.raises(ValueError, match="batches=0 must be at least 1"):
        routes.collect(this, {}, batches=0)
