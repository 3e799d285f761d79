"""The trial of an exchange passes where it is right, and stops what is wrong."""

import jax
import pytest

from emoe_jax.config import MoEConfig
from emoe_jax.dispatch import transport
from emoe_jax.dispatch.selfcheck import check_exchange
from emoe_jax.sharding import MeshConfig, make_mesh

CONFIG = MoEConfig(experts=4, top_k=2, exchange="ragged_all_to_all")


def mesh():
    return make_mesh(MeshConfig(data=1, fsdp=2, expert=2), jax.devices()[:4])


def test_a_right_exchange_passes():
    check_exchange(CONFIG, mesh())


def test_an_exchange_that_mixes_rows_up_is_refused(monkeypatch):
    right = transport.emulated_ragged

    def wrong(operand, output, *offsets):
        moved = right(operand, output, *offsets)
        return moved.at[0].set(moved[1])

    monkeypatch.setattr(transport, "emulated_ragged", wrong)
    with pytest.raises(RuntimeError, match=r"'ragged_all_to_all' gives wrong numbers.*all_to_all'"):
        check_exchange(CONFIG, mesh())


def test_the_trial_is_compiled_as_the_program_will_be():
    with pytest.raises(jax.errors.JaxRuntimeError, match="no_such_option"):
        check_exchange(CONFIG, mesh(), {"no_such_option": True})
