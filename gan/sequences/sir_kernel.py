"""Builds and loads `sir_kernel.cc`, the SIR of many codes on a CPU, several times as fast as XLA's.

Built at first use with the machine's C++ compiler and kept under a name made of all that it depends on. Without a
compiler nothing is lost but speed: `unavailable` says why, and the callers use XLA.
"""

import ctypes
import functools
import hashlib
import logging
import os
import pathlib
import platform
import shutil
import subprocess

import jax
import jaxlib

_SOURCE = pathlib.Path(__file__).with_suffix(".cc")
_FLAGS = ("-std=c++20", "-O3", "-march=native", "-shared", "-fPIC")
_TARGETS = {"halfmoon_sir": "HalfmoonSir", "halfmoon_sir_of_flips": "HalfmoonSirOfFlips"}


@functools.cache
def unavailable() -> str | None:
    """None when the kernel is loaded, else the reason why it cannot be; logged once."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    reason = _load(compiler) if compiler else "no C++ compiler was found (install g++, or name one in CXX)"
    if reason:
        logging.getLogger(__name__).warning("SIR runs in XLA, several times slower: %s.", reason)
    return reason


def usable() -> bool:
    """Whether arrays are on the CPU by default and the kernel is loaded; builds it if need be."""
    return jax.default_backend() == "cpu" and unavailable() is None


def _load(compiler: str) -> str | None:
    path = _cache_folder() / f"sir-{_fingerprint(compiler)}.so"
    if not path.exists():
        partial = path.with_suffix(f".{os.getpid()}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            subprocess.run(
                [compiler, *_FLAGS, "-isystem", jax.ffi.include_dir(), "-o", partial, _SOURCE],
                check=True,
                capture_output=True,
                text=True,
            )
            partial.rename(path)
        except subprocess.CalledProcessError as error:
            return f"{compiler} failed: {error.stderr.strip()[:500]}"
        except OSError as error:
            return f"{path} cannot be made: {error}"
    # Handlers are registered with a backend that exists, so that one it refuses cannot keep it from starting.
    jax.local_devices(backend="cpu")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return f"{path} cannot be loaded: {error}"
    for target, symbol in _TARGETS.items():
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, symbol)), platform="cpu")
    return None


def _cache_folder() -> pathlib.Path:
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "halfmoon" / "sequences"


def _fingerprint(compiler: str) -> str:
    """Of the source, the compiler and its flags, the processor and jaxlib, whose FFI headers have versions."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    processor = (
        next((line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")), "")
        if (cpuinfo.exists())
        else platform.processor()
    )
    parts = [_SOURCE.read_text(), compiler, *_FLAGS, platform.machine(), processor, jaxlib.__version__]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def sir(codes: jax.Array) -> jax.Array:
    """float32 `[B]` of codes int8 `[B, N]`."""
    return jax.ffi.ffi_call("halfmoon_sir", jax.ShapeDtypeStruct(codes.shape[:1], "float32"), vmap_method="sequential")(
        codes
    )


def sir_of_flips(codes: jax.Array) -> jax.Array:
    """float32 `[B, N]` of codes int8 `[B, N]`: the SIR after chip n alone is flipped."""
    return jax.ffi.ffi_call(
        "halfmoon_sir_of_flips", jax.ShapeDtypeStruct(codes.shape, "float32"), vmap_method="sequential"
    )(codes)
