"""Eight virtual CPU devices (or EMOE_TEST_DEVICES), strict promotion, one hypothesis profile."""

import os

# Before JAX starts: it reads these once.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count="
    + os.environ.get("EMOE_TEST_DEVICES", "8")
).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax
import pytest

hypothesis.settings.register_profile(
    "emoe", deadline=None, max_examples=25, derandomize=True, database=None
)
hypothesis.settings.load_profile("emoe")


@pytest.fixture
def strict():
    """Strict dtype promotion and no implicit rank promotion, for our own maths."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield
