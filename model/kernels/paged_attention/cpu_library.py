"""Builds the C++ kernels of all ops on first use and registers their handlers with XLA.

The library is compiled with the machine's g++ against the headers of the installed jaxlib, whose FFI is versioned, and
kept in `$XDG_CACHE_HOME/halfmoon` (default `~/.cache/halfmoon`) under a name made of everything it depends on.
"""

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import pathlib
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator

import jax
import jaxlib.version

_logger = logging.getLogger(__name__)

_KERNELS = pathlib.Path(__file__).parent.parent
_SOURCES = tuple(_KERNELS / op / "cpu_kernels.cc" for op in ("paged_attention", "linear"))
_HEADERS = tuple(_KERNELS / name for name in ("parallel_for.h", "simd.h", "simd_avx2.h", "simd_avx512.h"))
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC")
# Flags of the CPU for each kind of vector in simd.h, the widest first; `-march=native` makes simd.h choose likewise.
_VECTORS = {
    "AVX-512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "AVX2": {"avx2", "fma", "f16c"},
}
_HANDLERS = {
    "halfmoon_paged_attention": "HalfmoonPagedAttention",
    "halfmoon_write_kv": "HalfmoonWriteKV",
    "halfmoon_linear": "HalfmoonLinear",
}


@functools.cache
def unavailable() -> str | None:
    """None once the kernels are built and registered; else why they cannot be, which is also logged, once."""
    try:
        _register(_build())
    except UnavailableError as error:
        _logger.warning("CPU kernels are not available, XLA does their work more slowly: %s", error)
        return str(error)
    return None


def multiplies_bfloat16() -> bool:
    """Whether the CPU has products of bfloat16 for the kernels: those of AVX-512, or AMX tiles."""
    return unavailable() is None and not _cpu_flags().isdisjoint({"avx512_bf16", "amx_bf16"})


def has_avx512() -> bool:
    """Whether the kernels' vectors are of AVX-512, not of AVX2."""
    return unavailable() is None and _VECTORS["AVX-512"] <= _cpu_flags()


class UnavailableError(Exception):
    """This machine cannot build or load the CPU kernels."""


def _build() -> pathlib.Path:
    """The path of the compiled library."""
    flags = _cpu_flags()
    lacking = {name: ", ".join(sorted(needs - flags)) for name, needs in _VECTORS.items()}
    if all(lacking.values()):
        reasons = "; ".join(f"for {name}, the CPU lacks {missing}" for name, missing in lacking.items())
        raise UnavailableError(f"they need AVX-512 or AVX2 ({reasons}).")
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if not compiler:
        raise UnavailableError("no g++ was found; install it, or name another compiler in CXX.")
    source = b"".join(file.read_bytes() for file in (*_SOURCES, *_HEADERS))
    about = [jaxlib.version.__version__, compiler, *_FLAGS, *sorted(flags)]
    digest = hashlib.sha256(source + "\n".join(about).encode()).hexdigest()[:24]
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "halfmoon"
    path = cache / f"cpu_kernels-{digest}.so"
    if path.exists():
        return path
    _logger.info("building the CPU kernels into %s (some seconds, once)", path)
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _alone_in(cache), tempfile.TemporaryDirectory(dir=cache) as folder:
            if path.exists():
                return path
            built = pathlib.Path(folder) / path.name
            command = [compiler, *_FLAGS, f"-I{jax.ffi.include_dir()}", *map(str, _SOURCES), "-o", str(built)]
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
            if done.returncode:
                raise UnavailableError(f"{compiler} failed: {done.stderr.strip()[-800:]}")
            built.replace(path)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnavailableError(f"building into {cache} failed: {error}") from error
    return path


@contextlib.contextmanager
def _alone_in(folder: pathlib.Path) -> Iterator[None]:
    """Of processes that start together one builds, and the others wait for what it has built."""
    import fcntl  # not everywhere; but builds are on Linux only

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _register(path: pathlib.Path) -> None:
    # A library that XLA refuses breaks the whole CPU backend unless that exists already.
    jax.local_devices(backend="cpu")
    try:
        library = ctypes.CDLL(str(path))
        for target, symbol in _HANDLERS.items():
            jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, symbol)), platform="cpu")
    except (OSError, AttributeError, jax.errors.JaxRuntimeError) as error:
        raise UnavailableError(f"{path} does not load: {error}") from error


def _cpu_flags() -> set[str]:
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise UnavailableError(f"they need x86-64 Linux, this is {platform.machine()} {platform.system()}.")
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return set(line.split(":", 1)[1].split())
    return set()
