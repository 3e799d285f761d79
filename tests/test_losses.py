"""Cross-entropies: the chunked one equals the plain one and never holds all logits."""

import math
import re
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from emoe_jax.losses import chunked_cross_entropy, cross_entropy
from emoe_jax.sharding import MeshConfig, batch_sharding, in_mesh, make_mesh
from train.collectives import collectives

pytestmark = pytest.mark.usefixtures("strict")

T, D, N = 7, 3, 11


def draw(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def inputs(dtype="float32"):
    targets = jnp.asarray(np.random.default_rng(5).integers(0, N, T), jnp.int32)
    weights = jnp.asarray([1.0, 0.5, 0.0, 2.0, 1.0, 0.25, 1.0])
    return draw((T, D)).astype(dtype), draw((N, D), 1), targets, weights


def plain(hidden, head, targets, weights):
    logits = hidden.astype(jnp.float32) @ head.astype(hidden.dtype).astype(jnp.float32).T
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], axis=1)[:, 0]
    return -jnp.sum(weights * chosen)


def value_and_gradients(loss, *arguments):
    return jax.jit(jax.value_and_grad(loss, (0, 1)))(*arguments)


def test_uniform_logits_cost_the_log_of_the_classes():
    targets, weights = jnp.zeros((2,), jnp.int32), jnp.array([1.0, 3.0])
    loss = chunked_cross_entropy(jnp.zeros((2, D)), draw((N, D)), targets, weights, 1)
    assert float(loss) == pytest.approx(4 * math.log(N), rel=1e-6)


@pytest.mark.parametrize("chunk", [1, 3, 7, 16])
def test_equals_the_plain_loss_with_gradients(chunk):
    arguments = inputs()
    chunked = value_and_gradients(lambda *a: 3.0 * chunked_cross_entropy(*a, chunk), *arguments)
    expected = value_and_gradients(lambda *a: 3.0 * plain(*a), *arguments)
    chex.assert_trees_all_close(chunked, expected, rtol=1e-5, atol=1e-5)
    assert not np.any(chunked[1][0][2])
    forward = jax.jit(chunked_cross_entropy, static_argnums=4)(*arguments, chunk)
    assert float(forward) == pytest.approx(float(plain(*arguments)), rel=1e-5)


def test_huge_logits_stay_finite():
    hidden, head, targets, weights = inputs()
    result = value_and_gradients(
        lambda *a: chunked_cross_entropy(*a, 4), 1e3 * hidden, head, targets, weights
    )
    expected = value_and_gradients(plain, 1e3 * hidden, head, targets, weights)
    chex.assert_trees_all_close(result, expected, rtol=1e-5, atol=1e-3)


def test_bfloat16_hidden_states():
    arguments = inputs("bfloat16")
    chunked = value_and_gradients(lambda *a: chunked_cross_entropy(*a, 3), *arguments)
    expected = value_and_gradients(plain, *arguments)
    assert chunked[0].dtype == jnp.float32
    assert chunked[1][0].dtype == jnp.bfloat16
    assert chunked[1][1].dtype == jnp.float32
    assert float(chunked[0]) == pytest.approx(float(expected[0]), rel=1e-5)
    for ours, theirs in zip(chunked[1], expected[1], strict=True):
        ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
        np.testing.assert_allclose(ours, theirs, atol=0.02 * np.abs(theirs).max())


def test_weights_and_targets_get_no_gradient():
    hidden, head, targets, weights = inputs()
    gradient = jax.grad(lambda w: chunked_cross_entropy(hidden, head, targets, w, 3))(weights)
    assert not np.any(gradient)


def largest_array(function, *arguments):
    """Elements of the largest array anywhere in a program, inner loops included."""
    program = str(jax.make_jaxpr(function)(*arguments))
    shapes = re.findall(r"\w+\[([\d,]+)\]", program)
    return max(math.prod(int(n) for n in shape.split(",")) for shape in shapes)


def test_no_array_holds_all_logits():
    tokens, classes, width = 24, 40, 2
    arguments = (
        draw((tokens, width)),
        draw((classes, width)),
        jnp.zeros((tokens,), jnp.int32),
        jnp.ones((tokens,)),
    )
    for chunk, held in ((4, 4), (5, 5), (24, 24)):
        loss = partial(lambda chunk, *a: chunked_cross_entropy(*a, chunk), chunk)
        for program in (loss, jax.value_and_grad(loss, (0, 1))):
            assert largest_array(program, *arguments) == held * classes
    assert largest_array(jax.grad(plain, (0, 1)), *arguments) >= tokens * classes


def test_cross_entropy_of_soft_labels_by_hand():
    # p = (3/4, 1/4): -(1/2 ln 3/4 + 1/2 ln 1/4), and -ln 1/4.
    logits = jnp.array([[math.log(3), 0.0], [math.log(3), 0.0]])
    labels = jnp.array([[0.5, 0.5], [0.0, 1.0]])
    expected = [-0.5 * math.log(0.75) - 0.5 * math.log(0.25), math.log(4)]
    np.testing.assert_allclose(cross_entropy(logits, labels), expected, rtol=1e-6)
    gradient = jax.grad(lambda x: jnp.sum(cross_entropy(x, labels)))(logits)
    np.testing.assert_allclose(gradient, [[0.25, -0.25], [0.75, -0.75]], atol=1e-6)
    assert cross_entropy(logits.astype(jnp.bfloat16), labels).dtype == jnp.float32


def compiled_on(mesh, run):
    """The program of eight sequences over eight devices of a mesh."""
    rows = NamedSharding(mesh, PartitionSpec(mesh.axis_names[0]))
    abstract = [
        jax.ShapeDtypeStruct((8, 6, 4), jnp.float32, sharding=rows),
        jax.ShapeDtypeStruct((5, 4), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec())),
        jax.ShapeDtypeStruct((8, 6), jnp.int32, sharding=rows),
        jax.ShapeDtypeStruct((8, 6), jnp.float32, sharding=rows),
    ]
    return jax.jit(run).lower(*abstract).compile().as_text()


def test_sequences_stay_on_their_devices():
    # The hidden states are never gathered, also on a mesh that is not ours.
    run = jax.value_and_grad(partial(chunked_cross_entropy, chunk=2), (0, 1))
    ours = make_mesh(MeshConfig(data=8))
    others = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    for mesh, function in ((ours, in_mesh(ours, run)), (others, run)):
        text = compiled_on(mesh, function)
        assert "all-reduce" in text
        assert "all-gather" not in text


def test_no_device_reduces_with_itself():
    mesh = make_mesh(MeshConfig(data=8))
    run = jax.value_and_grad(partial(chunked_cross_entropy, chunk=2), (0, 1))
    assert "{{0},{1}" not in compiled_on(mesh, in_mesh(mesh, run))


MESHES = (
    {"data": 8},
    {"data": 2, "fsdp": 2, "expert": 2},
    {"fsdp": 2, "tensor": 2},
    {"data": 2, "expert": 2, "tensor": 2},
)


def mesh_and_places(sizes):
    """A mesh, and where the arguments of the loss lie there."""
    mesh = make_mesh(
        MeshConfig(**({"data": 1} | sizes)), jax.devices()[: math.prod(sizes.values())]
    )
    rows = batch_sharding(mesh)
    return mesh, (rows, NamedSharding(mesh, PartitionSpec("tensor", "fsdp")), rows, rows)


def on_mesh(sizes, chunk):
    """The loss and its gradients on a mesh, and where its arguments lie there."""
    mesh, places = mesh_and_places(sizes)
    loss = jax.value_and_grad(partial(chunked_cross_entropy, chunk=chunk), (0, 1))
    return jax.jit(in_mesh(mesh, loss)), places


def sequences(dtype, classes=12):
    """Eight sequences of five positions."""
    rng = np.random.default_rng(0)
    targets = jnp.asarray(rng.integers(0, classes, (8, 5)), jnp.int32)
    weights = jnp.asarray(rng.uniform(size=(8, 5)), jnp.float32)
    return draw((8, 5, 4)).astype(dtype), draw((classes, 4), 1), targets, weights


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_every_mesh_equals_one_device(sizes, dtype):
    arguments = sequences(dtype)
    expected = jax.value_and_grad(partial(chunked_cross_entropy, chunk=3), (0, 1))(*arguments)
    # Two positions of each of a device's sequences at a time; the last is padded.
    run, places = on_mesh(sizes, 2 * 8 * sizes.get("tensor", 1) // math.prod(sizes.values()))
    result = run(*jax.device_put(arguments, places))
    # Of the head's gradient, summed in float32, no more is lost on a mesh.
    low = {"rtol": 1e-5, "atol": 1e-5 if dtype == "float32" else 1e-2}
    chex.assert_trees_all_close(result[1][0], expected[1][0], **low)
    chex.assert_trees_all_close(
        (result[0], result[1][1]), (expected[0], expected[1][1]), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_second_derivatives_on_a_mesh(sizes):
    hidden, head, targets, weights = sequences("float32")

    def curvature(hidden, head, targets, weights):
        loss = partial(chunked_cross_entropy, targets=targets, weights=weights, chunk=3)
        return jax.grad(lambda head: jnp.sum(jax.grad(loss, 1)(hidden, head) ** 2))(head)

    expected = jax.jit(curvature)(hidden, head, targets, weights)
    mesh, places = mesh_and_places(sizes)
    arguments = jax.device_put((hidden, head, targets, weights), places)
    result = jax.jit(in_mesh(mesh, curvature))(*arguments)
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("sizes", "part"),
    [
        ({"fsdp": 4}, (slice(3), slice(None), slice(None))),  # three sequences
        ({"fsdp": 4}, (slice(None), slice(3), slice(None))),  # a width of three
        ({"data": 2, "tensor": 4}, (slice(None), slice(None), slice(11))),  # eleven classes
    ],
    ids=str,
)
def test_what_a_mesh_does_not_divide_has_the_same_loss(sizes, part):
    some, widths, classes = part
    hidden, head, targets, weights = sequences("float32")
    arguments = hidden[some, :, widths], head[classes, widths], targets[some] % 11, weights[some]
    expected = jax.value_and_grad(partial(chunked_cross_entropy, chunk=3), (0, 1))(*arguments)
    run, _ = on_mesh(sizes, 3)
    chex.assert_trees_all_close(run(*arguments), expected, rtol=1e-5, atol=1e-5)


def test_inside_somebodys_shard_map_gradients_are_those_of_all_tokens():
    arguments = sequences("float32")
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    rows, whole = PartitionSpec("rows"), PartitionSpec()

    @partial(jax.shard_map, mesh=mesh, in_specs=(rows, whole, rows, rows), out_specs=whole)
    def loss(*arguments):
        return jax.lax.psum(chunked_cross_entropy(*arguments, 3), "rows")

    result = jax.jit(jax.value_and_grad(loss, (0, 1)))(*arguments)
    expected = jax.value_and_grad(partial(chunked_cross_entropy, chunk=3), (0, 1))(*arguments)
    chex.assert_trees_all_close(result, expected, rtol=1e-5, atol=1e-5)


def test_the_head_travels_once_in_the_compute_dtype_and_its_gradient_in_float32():
    run, places = on_mesh({"data": 2, "fsdp": 2, "expert": 2}, 1)
    arguments = jax.device_put(sequences("bfloat16", classes=12), places)
    program = run.trace(*arguments).jaxpr

    def moved(axis):
        found = collectives(program, axis, "cpu")
        return [(each.kind, each.shape, each.given, each.times) for each in found if each.shape]

    # 12 classes of 4 numbers: half of it comes in bfloat16, half of its sums goes in float32.
    assert moved("fsdp") == [
        ("all_gather", (12, 2), 12 * 2 * 2, 1),
        ("reduce_scatter", (4, 12), 12 * 4 * 4, 1),
    ]
    # And what fsdp left is summed over the others, once after all chunks.
    for axis in ("data", "expert"):
        assert moved(axis) == [("psum_invariant", (2, 12), 12 * 2 * 4, 1)]


def test_classes_over_devices_take_three_sums_a_chunk():
    run, places = on_mesh({"data": 2, "tensor": 2}, 4)
    arguments = jax.device_put(sequences("float32"), places)
    # Four sequences a device, one of five positions at a time: the greatest logit, both numbers of
    # a token's loss, and the gradient of its state.
    found = collectives(run.trace(*arguments).jaxpr, "tensor", "cpu")
    assert [(each.shape, each.times) for each in found] == [
        ((4, 1, 1), 5),
        ((2, 4, 1), 5),
        ((4, 1, 4), 5),
    ]


def test_a_chunk_is_that_of_a_device():
    # Three of the five positions of its sequences, in logits of 40 classes.
    for devices, sequences_here in ((4, 2), (2, 4)):
        run, places = on_mesh({"data": devices}, 3 * sequences_here)
        arguments = jax.device_put(sequences("float32", classes=40), places)
        assert largest_array(run, *arguments) == sequences_here * 3 * 40


def test_sequences_equal_their_tokens():
    # Five positions of three sequences in chunks of two positions: the last is padded.
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((3, 5, 4)), jnp.float32)
    head = jnp.asarray(rng.standard_normal((7, 4)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 7, (3, 5)), jnp.int32)
    weights = jnp.asarray(rng.uniform(size=(3, 5)), jnp.float32)
    whole = jax.value_and_grad(chunked_cross_entropy, (0, 1))
    value, (d_hidden, d_head) = whole(hidden, head, targets, weights, 6)
    flat = hidden.reshape(15, 4), head, targets.reshape(15), weights.reshape(15), 15
    expected, (e_hidden, e_head) = whole(*flat)
    chex.assert_trees_all_close(
        (value, d_hidden.reshape(15, 4), d_head), (expected, e_hidden, e_head), rtol=1e-5, atol=1e-6
    )
