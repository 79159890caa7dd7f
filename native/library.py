"""`NativeLibrary`: C++ handlers of XLA's foreign function interface, as a library that is built on first use.

A library is compiled with the machine's compiler against the headers of the installed jaxlib, whose interface is
versioned, and kept in `$XDG_CACHE_HOME/halfmoon` (default `~/.cache/halfmoon`) under a name made of everything that it
depends on.
"""

import contextlib
import ctypes
import dataclasses
import hashlib
import logging
import os
import pathlib
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping

import jax
import jaxlib.version

_logger = logging.getLogger(__name__)
_FLAGS = ("-O3", "-march=native", "-shared", "-fPIC")
_LONGEST_BUILD_S = 300.0


class UnavailableError(Exception):
    """This machine cannot build or load a library."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NativeLibrary:
    """Sources and what they define.

    Attributes:
        name: of the file, before the digest of what it depends on.
        sources: C++ files, compiled into one library.
        headers: files beside jaxlib's that the sources include.
        flags: of the compiler, after those of every library; at least the C++ standard.
        handlers: symbol of each FFI target.
    """

    name: str
    sources: tuple[pathlib.Path, ...]
    headers: tuple[pathlib.Path, ...] = ()
    flags: tuple[str, ...]
    handlers: Mapping[str, str]

    def load(self) -> None:
        """Builds the library if this machine has not yet, and registers its handlers with XLA's CPU backend.

        Raises:
            UnavailableError: there is no compiler, or it failed, or the library does not load.
        """
        self._register(self._build())

    def _build(self) -> pathlib.Path:
        """Returns the path of the compiled library."""
        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
        if not compiler:
            raise UnavailableError("no C++ compiler was found; install g++, or name another in CXX.")
        flags = (*_FLAGS, *self.flags)
        cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "halfmoon"
        path = cache / f"{self.name}-{self._digest(compiler, flags)}.so"
        if path.exists():
            return path
        _logger.info("building %s (some seconds, once)", path)
        try:
            cache.mkdir(mode=0o700, parents=True, exist_ok=True)
            with _alone_in(cache), tempfile.TemporaryDirectory(dir=cache) as folder:
                if path.exists():
                    return path
                built = pathlib.Path(folder) / path.name
                includes = ("-isystem", jax.ffi.include_dir())
                command = [compiler, *flags, *includes, *map(str, self.sources), "-o", str(built)]
                done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_LONGEST_BUILD_S)
                if done.returncode:
                    raise UnavailableError(f"{compiler} failed: {done.stderr.strip()[-800:]}")
                built.replace(path)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise UnavailableError(f"building into {cache} failed: {error}") from error
        return path

    def _digest(self, compiler: str, flags: tuple[str, ...]) -> str:
        source = b"".join(file.read_bytes() for file in (*self.sources, *self.headers))
        about = (jaxlib.version.__version__, compiler, *flags, platform.machine(), _processor())
        return hashlib.sha256(source + "\n".join(about).encode()).hexdigest()[:24]

    def _register(self, path: pathlib.Path) -> None:
        # A library that XLA refuses breaks the whole CPU backend unless that exists already.
        jax.local_devices(backend="cpu")
        try:
            library = ctypes.CDLL(str(path))
            for target, symbol in self.handlers.items():
                jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, symbol)), platform="cpu")
        except (OSError, AttributeError, jax.errors.JaxRuntimeError) as error:
            raise UnavailableError(f"{path} does not load: {error}") from error


@contextlib.contextmanager
def _alone_in(folder: pathlib.Path) -> Iterator[None]:
    """Of processes that start together one builds, and the others wait for what it has built."""
    try:
        import fcntl
    except ImportError:  # Windows: each builds its own, and the last one's stays
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _processor() -> str:
    """What `-march=native` depends on: the flags of the CPU where the system tells them."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("flags"):
                return " ".join(sorted(line.split(":", 1)[1].split()))
    return platform.processor()
