"""The CPU library is optional: without a compiler, or without AVX-512 and AVX2, XLA takes over and says so once."""

import logging
import os
import pathlib
import platform
import shutil
import subprocess

import jax
import numpy as np
import pytest

from model import kernels
from model.kernels.paged_attention import cpu_library, paged_attention
from tests.model.kernels.paged_attention import cases


@pytest.fixture
def fresh_library(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path):
    """A machine that has built nothing yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpu_library.unavailable.cache_clear()
    yield tmp_path
    cpu_library.unavailable.cache_clear()


@pytest.mark.usefixtures("fresh_library")
@pytest.mark.parametrize("missing", ["compiler", "vectors", "platform"])
def test_without_it_xla_takes_over_and_it_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, missing: str
) -> None:
    if missing == "compiler":
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setenv("PATH", "")
        monkeypatch.setattr(cpu_library, "_cpu_flags", lambda: {"avx512f", "avx512bw", "avx512dq", "avx512vl"})
    elif missing == "vectors":
        monkeypatch.setattr(cpu_library, "_cpu_flags", lambda: {"avx512f", "avx2", "f16c"})
    else:
        monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    reason = {
        "compiler": r"no C\+\+ compiler was found",
        "vectors": "for AVX-512, the CPU lacks avx512bw, avx512dq, avx512vl; for AVX2, the CPU lacks fma",
        "platform": "they need x86-64 Linux, this is aarch64",
    }[missing]
    batch = cases.build(cases.Shape(), [17, 5], [1, 1])
    with caplog.at_level(logging.WARNING):
        out = paged_attention(*batch, max_query_len=1)
        paged_attention(*batch, max_query_len=1)
    np.testing.assert_array_equal(out, paged_attention(*batch, max_query_len=1, implementation="xla"))
    assert len([record for record in caplog.records if "CPU kernels" in record.message]) == 1
    with pytest.raises(NotImplementedError, match=rf"(?s)cpu_ffi: .*{reason}.*\n  xla: takes it"):
        paged_attention(*batch, max_query_len=1, implementation="cpu_ffi")


def test_a_compiler_that_fails_is_quoted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fresh_library: pathlib.Path
) -> None:
    compiler = fresh_library / "cxx"
    compiler.write_text("#!/bin/sh\necho 'no such header' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(cpu_library, "_cpu_flags", lambda: {"avx512f", "avx512bw", "avx512dq", "avx512vl"})
    with caplog.at_level(logging.WARNING):
        assert "no such header" in (cpu_library.unavailable() or "")
    assert not list((fresh_library / "halfmoon").iterdir()), "a failed build leaves nothing behind"


@pytest.mark.slow
@pytest.mark.parametrize("processor", ["x86-64-v3", "x86-64-v4", "sapphirerapids"])
def test_the_sources_compile_for_every_kind_of_vector(processor: str) -> None:
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if not compiler or platform.machine() != "x86_64":
        pytest.skip("needs g++ for x86-64")
    for source in pathlib.Path(kernels.__path__[0]).glob("*/cpu_kernels.cc"):
        flags = [f"-march={processor}", "-std=c++17", "-fPIC", f"-I{jax.ffi.include_dir()}"]
        subprocess.run([compiler, *flags, "-c", source, "-o", os.devnull], check=True)
