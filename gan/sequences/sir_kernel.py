"""`sir_kernel.cc`, the SIR of many codes on a CPU, several times as fast as XLA's.

Without a compiler nothing is lost but speed: `unavailable` says why, and the callers use XLA.
"""

import functools
import logging
import pathlib

import jax

from native import NativeLibrary, UnavailableError

LIBRARY = NativeLibrary(
    name="sir",
    sources=(pathlib.Path(__file__).with_suffix(".cc"),),
    flags=("-std=c++20",),
    handlers={"halfmoon_sir": "HalfmoonSir", "halfmoon_sir_of_flips": "HalfmoonSirOfFlips"},
)


@functools.cache
def unavailable() -> str | None:
    """None once the kernel is built and registered; else why it cannot be, which is also logged, once."""
    try:
        LIBRARY.load()
    except UnavailableError as error:
        logging.getLogger(__name__).warning("SIR runs in XLA, several times slower: %s", error)
        return str(error)
    return None


def usable() -> bool:
    """Whether arrays are on the CPU by default and the kernel is loaded; builds it if need be."""
    return jax.default_backend() == "cpu" and unavailable() is None


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
