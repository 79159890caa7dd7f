"""Strict JAX for every test: eight CPU devices, no silent promotion of ranks or dtypes, one compilation cache."""

import os
import pathlib

# By environment, so that processes that tests start have them too.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parent.parent / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
# Scripts that want huge pages would otherwise start themselves a second time.
os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")

import hypothesis
import jax
import numpy as np
import pytest

# A test that takes long on a busy machine has not failed.
hypothesis.settings.register_profile("unhurried", deadline=None)
hypothesis.settings.load_profile("unhurried")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Whose tests meet libraries that promote dtypes themselves: optax divides by integer counts and JAX's own attention
# widens bfloat16. gan/ also mixes its int8 chips with floats.
_PROMOTING = (
    "tests/gan",
    "tests/experiments",
    "tests/model/test_training.py",
    "tests/model/test_presets.py",
    "tests/attention_offload/converter",
)

SHARED = pathlib.Path(__file__).parent.parent.parent / "shared"
SLOW_TIMEOUT_S = 1800


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT_S))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def conversation_trace() -> pathlib.Path:
    """Mooncake's public conversation trace, where this checkout has it beside it."""
    path = SHARED / "traces" / "conversation_trace.jsonl"
    if not path.exists():
        pytest.skip(f"needs the public conversation trace at {path}")
    return path


@pytest.fixture(scope="session")
def azure_trace() -> pathlib.Path:
    """Azure's public conversation trace, where this checkout has it beside it."""
    path = SHARED / "traces" / "azure_conv.csv"
    if not path.exists():
        pytest.skip(f"needs the public Azure trace at {path}")
    return path


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Dtypes are promoted where they are converted, and nowhere else."""
    promotes = item.nodeid.startswith(_PROMOTING)
    jax.config.update("jax_numpy_dtype_promotion", "standard" if promotes else "strict")
