"""A library is built once for everything that it depends on, and a machine that cannot build it is told why."""

import dataclasses
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from native import NativeLibrary, UnavailableError

SOURCE = """
#include "factor.h"
#include "xla/ffi/api/ffi.h"
namespace ffi = xla::ffi;
static ffi::Error Scale(ffi::Buffer<ffi::F32> x, ffi::ResultBuffer<ffi::F32> out) {
  for (size_t i = 0; i < x.element_count(); ++i) out->typed_data()[i] = kFactor * x.typed_data()[i];
  return ffi::Error::Success();
}
XLA_FFI_DEFINE_HANDLER_SYMBOL(NativeTestScale, Scale,
                              ffi::Ffi::Bind().Arg<ffi::Buffer<ffi::F32>>().Ret<ffi::Buffer<ffi::F32>>());
"""
needs_compiler = pytest.mark.skipif(
    not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler"
)


@pytest.fixture
def library(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> NativeLibrary:
    """A library of one handler, on a machine that has built nothing yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "scale.cc").write_text(SOURCE)
    (tmp_path / "factor.h").write_text("constexpr float kFactor = 3.0f;\n")
    return NativeLibrary(
        name="scale",
        sources=(tmp_path / "scale.cc",),
        headers=(tmp_path / "factor.h",),
        flags=("-std=c++17",),
        handlers={"native_test_scale": "NativeTestScale"},
    )


def built(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted((folder / "cache" / "halfmoon").glob("*"))


@needs_compiler
def test_handlers_compute_and_all_that_they_depend_on_names_the_file(
    library: NativeLibrary, tmp_path: pathlib.Path
) -> None:
    library.load()
    x = jnp.arange(5, dtype=jnp.float32)
    out = jax.ffi.ffi_call("native_test_scale", jax.ShapeDtypeStruct(x.shape, x.dtype))(x)
    np.testing.assert_array_equal(out, 3 * x)
    (first,) = built(tmp_path)
    before = first.stat().st_mtime_ns
    library.load()
    assert first.stat().st_mtime_ns == before, "what is built is not built again"
    (tmp_path / "factor.h").write_text("constexpr float kFactor = 5.0f;\n")
    with pytest.raises(UnavailableError, match="does not load: "):  # XLA keeps the handler that it has
        library.load()
    dataclasses.replace(library, flags=("-std=c++20",), handlers={}).load()
    assert len(built(tmp_path)) == 3


@needs_compiler
def test_of_processes_that_start_together_one_builds(library: NativeLibrary, tmp_path: pathlib.Path) -> None:
    compiler, calls = tmp_path / "cxx", tmp_path / "calls"
    real = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    compiler.write_text(f'#!/bin/sh\necho "$$" >> {calls}\nsleep 1\nexec {real} "$@"\n')
    compiler.chmod(0o755)
    load = f"""
import pathlib
from native import NativeLibrary
NativeLibrary(name="scale", sources={library.sources!r}, flags=("-std=c++17",), handlers={{}}).load()
""".replace("PosixPath", "pathlib.PosixPath")
    environment = os.environ | {"CXX": str(compiler), "JAX_PLATFORMS": "cpu"}
    processes = [subprocess.Popen([sys.executable, "-c", load], env=environment) for _ in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert len(calls.read_text().splitlines()) == len(built(tmp_path)) == 1


def test_a_machine_that_cannot_build_is_told_why(
    library: NativeLibrary, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "cxx"
    compiler.write_text("#!/bin/sh\necho 'no such header' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(UnavailableError, match="cxx failed: no such header"):
        library.load()
    assert built(tmp_path) == [], "a failed build leaves nothing behind"
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UnavailableError, match=r"no C\+\+ compiler was found; install g\+\+"):
        library.load()
