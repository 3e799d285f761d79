"""Eight virtual CPU devices (or EMOE_TEST_DEVICES), strict promotion, one hypothesis profile.

Programs are compiled without optimisation, which takes a fraction of the time: they are too small
for their own speed to matter. EMOE_TEST_OPTIMIZED=1 compiles them as users' programs are.
"""

import importlib.metadata
import os

# Before JAX starts: it reads these once.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        f"--xla_force_host_platform_device_count={os.environ.get('EMOE_TEST_DEVICES', '8')}",
        ""
        if os.environ.get("EMOE_TEST_OPTIMIZED")
        else "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1",
        # Compilers from jax 0.11 on do not know it.
        "--xla_cpu_use_fusion_emitters=false"
        if importlib.metadata.version("jaxlib").startswith("0.10.")
        and not os.environ.get("EMOE_TEST_OPTIMIZED")
        else "",
    ]
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
