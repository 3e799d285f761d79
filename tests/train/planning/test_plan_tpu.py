"""Plans compiled for TPUs that nobody holds: memory by formula against the compiler's."""

import dataclasses
import re

import pytest

from configs.lm_c4 import get_config
from emoe_jax.sharding import MeshConfig
from train.config import freeze, update
from train.planning import hlo, operations
from train.planning.compiler import compile_step
from train.planning.cost import predict as predict_cost
from train.planning.memory import predict, weigh
from train.planning.program import planned, step_on
from train.planning.topology import abstract_shape, parse

pytestmark = pytest.mark.soak

SMALL = {
    "model.depth": 4,
    "model.width": 1024,
    "model.heads": 8,
    "model.kv_heads": 8,
    "moe.experts": 16,
    "moe.top_k": 4,
    "moe.hidden": 512,
    "data.vocab_size": 32000,
    "data.sequence_length": 2048,
    "data.shards": 1,
    "batch": 16,
}
CASES = {
    "dots": {"mesh.expert": 4},
    "microbatches": {"mesh.fsdp": 2, "mesh.expert": 2, "accumulate": 2},
    "full": {"mesh.expert": 4, "model.remat": "full"},
    "none": {"mesh.expert": 4, "model.remat": "none"},
    "exchange": {"mesh.expert": 4, "model.remat": "exchange"},
    "chunks": {"mesh.expert": 4, "model.remat": "exchange", "moe.exchange_chunks": 2},
    "deep": {
        "mesh.fsdp": 4,
        "model.depth": 24,
        "moe.experts": 32,
        "moe.top_k": 2,
        "data.sequence_length": 512,
        "batch": 32,
    },
    "logits": {
        "mesh.fsdp": 4,
        "model.loss_chunk": 4096,
        "data.vocab_size": 128_000,
        "moe.experts": 32,
        "moe.top_k": 2,
        "data.sequence_length": 512,
        "batch": 32,
    },
    "tensor": {
        "mesh.fsdp": 2,
        "mesh.expert": 2,
        "mesh.tensor": 2,
        "model.remat": "full",
        "data.sequence_length": 1024,
        "batch": 64,
    },
}


def case(name, changes=()):
    """A topology of as many chips as the mesh has, and the configuration on it."""
    tree = get_config()
    update(tree, SMALL | {"mesh.fsdp": 1, "mesh.expert": 1} | CASES[name] | dict(changes))
    place = parse("v5p:2x2x2" if name == "tensor" else "v5p:2x2x1")
    return place, planned(freeze(tree), "tpu", place.devices)


@pytest.mark.parametrize("name", CASES)
def test_memory_by_formula_is_within_a_tenth_of_the_compilers(name):
    place, config = case(name)
    compiled = compile_step(step_on(config, place), config, place, keep=None)
    memory = predict(config, weigh(config), abstract_shape(place, config.mesh))
    assert compiled.arguments == pytest.approx(memory.arguments, rel=0.01)
    assert memory.total == pytest.approx(compiled.total, rel=0.1)


def inside(schedule, kind):
    """For each exchange of a kind: what the program does while it is under way.

    Those of further rounds, in loops of their own, are left out.
    """
    begun, found = {}, []
    lines = schedule.splitlines()
    for number, line in enumerate(lines):
        begin = re.match(rf"\s*%({kind}-start[\w.]*) = ", line)
        if begin:
            begun[begin[1]] = number
        end = re.match(rf"\s*%{kind}-done[\w.]* = .* async-done\(%([\w.-]+)\)", line)
        if end and "shard_map/closed_call/while" not in line:
            found.append("\n".join(lines[begun[end[1]] + 1 : number]))
    return found


@pytest.mark.parametrize("exchange", ["all_to_all", "ragged_all_to_all"])
def test_chunks_are_exchanged_while_experts_compute(exchange):
    kind = exchange.replace("_", "-")
    place, config = case("chunks", {"moe.exchange": exchange})
    schedule = compile_step(step_on(config, place), config, place, keep=None).schedule
    beside = inside(schedule, kind)
    assert len(beside) >= 6
    assert sum("ragged-dot-none" in each for each in beside) >= 1
    # No conditional stands around an exchange.
    assert " conditional(" not in schedule


def test_one_chunk_is_left_to_the_compilers_defaults():
    place, config = case("exchange")
    schedule = compile_step(step_on(config, place), config, place, keep=None).schedule
    assert inside(schedule, "all-to-all") == []
    assert " all-to-all(" in schedule


def test_a_whole_compile_says_what_the_buffer_assignment_says():
    place, config = case("dots")
    early = compile_step(step_on(config, place), config, place, keep=None)
    whole = compile_step(step_on(config, place), config, place, keep=None, whole=True)
    assert whole.analysis
    assert not early.analysis
    assert early.total == pytest.approx(whole.total, rel=0.001)
    # The compiler's count, loops once, against the traced program's.
    counted = operations.products(step_on(config, place).jaxpr)
    assert whole.flops * 4 == pytest.approx(counted.once, rel=0.2)


def test_the_formula_moves_what_the_schedule_moves():
    place, config = case("microbatches")
    compiled = compile_step(step_on(config, place), config, place, keep=None)
    mesh = abstract_shape(place, config.mesh)
    config = dataclasses.replace(config, mesh=MeshConfig(**mesh))
    for purpose in ("exchange", "fsdp gather", "gradients"):
        scheduled = sum(
            each.times * each.received
            for each in hlo.collectives(compiled.schedule, mesh)
            if each.purpose == purpose
        )
        flows = predict_cost(config, weigh(config), place).flows
        formula = sum(flow.received for flow in flows if flow.purpose == purpose)
        assert formula == pytest.approx(scheduled, rel=0.2), purpose
