"""Exchanges: on every mesh, by every way, with every router and load, the layer is the dense one.

A pairwise cover here; `make soak` runs the full product, and all four axes on 16 devices.
"""

import itertools

import pytest

from tests.dispatch.agreement import (
    ALL_AXES,
    CHUNKS,
    EXCHANGES,
    MESHES,
    SHAPES,
    Case,
    assert_case,
    loads,
)

TOKEN_CHOICE = ("eigen", "softmax", "switch", "loss_free", "hash", "random")
FAMILIES = (TOKEN_CHOICE, ("expert_choice",), ("soft",))
ROUTERS = tuple(itertools.chain(*FAMILIES))


def top_ks(router):
    return (8,) if router == "soft" else (1, 2)


def cover():
    """A case for each mesh and family of routers: 18, fewer cannot have all pairs.

    The dear ones, exchanges in chunks and of the two families with K = E assignments, are few.
    """
    a2a, ragged, gather = EXCHANGES
    token, expert, soft = FAMILIES
    table = (
        ("expert2", token, a2a, 1, 1, "even"),
        ("expert2", expert, ragged, 2, 1, "uneven"),
        ("expert2", soft, gather, 8, 2, "even"),
        ("expert4", token, ragged, 1, 1, "uneven"),
        ("expert4", expert, gather, 2, 2, "uneven"),
        ("expert4", soft, a2a, 8, 1, "even"),
        ("expert8", token, gather, 1, 2, "uneven"),
        ("expert8", expert, a2a, 2, 1, "even"),
        ("expert8", soft, ragged, 8, 1, "uneven"),
        ("data.fsdp.expert", token, a2a, 2, 2, "uneven"),
        ("data.fsdp.expert", expert, ragged, 1, 1, "even"),
        ("data.fsdp.expert", soft, gather, 8, 2, "uneven"),
        ("data.expert.tensor", token, ragged, 2, 2, "even"),
        ("data.expert.tensor", expert, gather, 1, 1, "uneven"),
        ("data.expert.tensor", soft, a2a, 8, 1, "even"),
        ("fsdp.expert.tensor", token, gather, 2, 2, "even"),
        ("fsdp.expert.tensor", expert, a2a, 1, 1, "uneven"),
        ("fsdp.expert.tensor", soft, ragged, 8, 1, "even"),
    )
    return [
        Case(exchange, mesh, routers, top_k, chunks, shape)
        for mesh, routers, exchange, top_k, chunks, shape in table
    ]


COVER = cover()


def full_product(meshes):
    return [
        Case(exchange, mesh, (router,), top_k, chunks, shape)
        for exchange in EXCHANGES
        for mesh in meshes
        for router in ROUTERS
        for top_k in top_ks(router)
        for chunks in CHUNKS
        for shape in SHAPES
    ]


def pairs_of(cases):
    """All pairs of values that some run of these cases has."""
    found = set()
    for case in cases:
        for router in case.routers:
            for load in loads(router):
                values = (case.exchange, case.mesh, router, f"K{case.top_k}", load)
                values += (f"chunks{case.chunks}", case.shape)
                found |= set(itertools.combinations(values, 2))
    return found


def test_the_cover_has_every_pair_of_the_full_product():
    missing = pairs_of(full_product(MESHES)) - pairs_of(COVER)
    assert not missing


@pytest.mark.parametrize("case", COVER, ids=str)
def test_every_exchange_equals_dense_on_one_device(case):
    assert_case(case)


@pytest.mark.soak
@pytest.mark.parametrize("case", full_product(MESHES), ids=str)
def test_the_full_product_equals_dense_on_one_device(case):
    assert_case(case)


@pytest.mark.soak
@pytest.mark.parametrize("case", full_product(ALL_AXES), ids=str)
def test_all_four_axes_equal_dense_on_one_device(case):
    assert_case(case)
