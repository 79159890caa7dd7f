"""The C++ kernels of all ops: built on first use, where the CPU has vectors that they are written for."""

import functools
import logging
import pathlib
import platform

from native import NativeLibrary, UnavailableError

_logger = logging.getLogger(__name__)

_KERNELS = pathlib.Path(__file__).parent.parent
# Flags of the CPU for each kind of vector in simd.h, the widest first; `-march=native` makes simd.h choose likewise.
_VECTORS = {
    "AVX-512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "AVX2": {"avx2", "fma", "f16c"},
}
_LIBRARY = NativeLibrary(
    name="cpu_kernels",
    sources=tuple(_KERNELS / op / "cpu_kernels.cc" for op in ("paged_attention", "linear")),
    headers=tuple(_KERNELS / name for name in ("parallel_for.h", "simd.h", "simd_avx2.h", "simd_avx512.h")),
    flags=("-std=c++17",),
    handlers={
        "halfmoon_paged_attention": "HalfmoonPagedAttention",
        "halfmoon_write_kv": "HalfmoonWriteKV",
        "halfmoon_linear": "HalfmoonLinear",
    },
)


@functools.cache
def unavailable() -> str | None:
    """None once the kernels are built and registered; else why they cannot be, which is also logged, once."""
    try:
        _check_vectors()
        _LIBRARY.load()
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


def _check_vectors() -> None:
    flags = _cpu_flags()
    lacking = {name: ", ".join(sorted(needs - flags)) for name, needs in _VECTORS.items()}
    if all(lacking.values()):
        reasons = "; ".join(f"for {name}, the CPU lacks {missing}" for name, missing in lacking.items())
        raise UnavailableError(f"they need AVX-512 or AVX2 ({reasons}).")


def _cpu_flags() -> set[str]:
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise UnavailableError(f"they need x86-64 Linux, this is {platform.machine()} {platform.system()}.")
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return set(line.split(":", 1)[1].split())
    return set()
