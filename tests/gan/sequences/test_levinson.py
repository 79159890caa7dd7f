"""SIR in float32, by the C++ kernel and by XLA, against float64, the definition and exact rationals."""

import os
import pathlib
import platform
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gan.sequences import levinson, neighbours, sir_kernel
from gan.sequences.codes import random_codes
from gan.sequences.pulse_compression import sir, sir_gradient

needs_kernel = pytest.mark.skipif(sir_kernel.unavailable() is not None, reason="the machine has no C++ compiler")
IMPLEMENTATIONS = {"xla": levinson.sir_xla, "cpu": sir_kernel.sir}
FLIPS = {"xla": neighbours.sir_of_flips_xla, "cpu": sir_kernel.sir_of_flips}
implementations = pytest.mark.parametrize("name", ["xla", pytest.param("cpu", marks=needs_kernel)])


@implementations
@pytest.mark.parametrize("length", [3, 16, 59, 128])
def test_float32_is_float64_within_1e_4(name: str, length: int, rng: np.random.Generator) -> None:
    codes = random_codes(rng, 4096 if length == 59 else 100, length)
    np.testing.assert_allclose(np.array(jax.jit(IMPLEMENTATIONS[name])(codes)), sir(codes), rtol=1e-4)


@implementations
@pytest.mark.parametrize("length", [3, 40])
def test_flips(name: str, length: int, rng: np.random.Generator) -> None:
    codes = random_codes(rng, 9, length)
    flipped = codes[:, None] * (1 - 2 * np.eye(length, dtype=np.int8))
    np.testing.assert_allclose(np.array(jax.jit(FLIPS[name])(codes)), sir(flipped), rtol=1e-4)


@needs_kernel
@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 1000])
def test_the_kernel_takes_any_batch(count: int, rng: np.random.Generator) -> None:
    codes = random_codes(rng, count, 21)
    np.testing.assert_allclose(np.array(sir_kernel.sir(jnp.asarray(codes))), sir(codes), rtol=1e-4)


BUILT_FOR = """
import dataclasses, sys
import jax.numpy as jnp, numpy as np
from gan.sequences import pulse_compression, sir_kernel
from gan.sequences.codes import random_codes
built_for = (*sir_kernel.LIBRARY.flags, "-march=" + sys.argv[1])
sir_kernel.LIBRARY = dataclasses.replace(sir_kernel.LIBRARY, flags=built_for)
codes = random_codes(np.random.default_rng(0), 100, 59)
flipped = codes[:2, None] * (1 - 2 * np.eye(59, dtype=np.int8))
assert sir_kernel.usable()
np.testing.assert_allclose(sir_kernel.sir(jnp.asarray(codes)), pulse_compression.sir(codes), rtol=1e-4)
np.testing.assert_allclose(sir_kernel.sir_of_flips(jnp.asarray(codes[:2])), pulse_compression.sir(flipped), rtol=1e-4)
"""


@pytest.mark.slow
@needs_kernel
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the older processors are named for x86-64")
@pytest.mark.parametrize("processor", ["x86-64", "haswell"])
def test_the_kernel_runs_without_avx512(processor: str, tmp_path: pathlib.Path) -> None:
    if processor == "haswell" and "avx2" not in pathlib.Path("/proc/cpuinfo").read_text():
        pytest.skip("the machine has no AVX2")
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", BUILT_FOR, processor]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_without_a_compiler_xla_takes_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, rng: np.random.Generator
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "/bin/false")
    monkeypatch.setattr(sir_kernel, "unavailable", sir_kernel.unavailable.__wrapped__)
    assert "/bin/false failed" in str(sir_kernel.unavailable())
    assert not sir_kernel.usable()
    codes = random_codes(rng, 8, 20)
    np.testing.assert_allclose(np.array(levinson.sir(jnp.asarray(codes))), sir(codes), rtol=1e-4)


def test_log_sir_has_the_closed_form_gradient(rng: np.random.Generator) -> None:
    codes = random_codes(rng, 16, 59)
    relaxed = (codes * rng.uniform(0.2, 1.0, codes.shape)).astype(np.float32)
    for x in (codes.astype(np.float32), relaxed):
        values = np.array(jax.jit(levinson.log_sir)(x))
        gradient = jax.jit(jax.grad(lambda x: levinson.log_sir(x).sum()))(jnp.asarray(x))
        np.testing.assert_allclose(values, np.log(sir(x)), atol=1e-4)
        exact = sir_gradient(x) / sir(x)[:, None]
        np.testing.assert_allclose(np.array(gradient), exact, atol=1e-3 * np.abs(exact).max())


def test_gradient_is_that_of_finite_differences_and_has_no_scale(rng: np.random.Generator) -> None:
    x = rng.normal(size=(8, 31))
    direction, step = rng.normal(size=x.shape), 1e-6
    slope = (sir(x + step * direction) - sir(x - step * direction)) / (2 * step)
    gradient = sir_gradient(x)
    np.testing.assert_allclose((gradient * direction).sum(-1), slope, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose((gradient * x).sum(-1), 0, atol=1e-9)
