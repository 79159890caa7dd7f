"""Strict JAX for every test: eight CPU devices, no silent rank promotion, no accelerator, one compilation cache."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(__file__).parent.parent / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)

SHARED = pathlib.Path(__file__).parent.parent.parent / "shared"


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
