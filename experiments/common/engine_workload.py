"""What `bench_engine` asks of every engine, and how it is measured."""

import contextlib
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from tqdm import tqdm

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """What every engine is asked to do."""

    dtype: str
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    prefill: int
    steps: int
    repeats: int
    cores: int
    seed: int
    shape: str | None = None  # a preset; each engine draws weights of its own then: their values do not change speed
    mesh: str | None = None  # of our engine; peers run on one device
    mixed: bool = False  # whether our engines also serve prompts and answers of many lengths at once

    @property
    def decoded(self) -> int:
        """Tokens asked of each decoding sequence: none ends before the last measured step."""
        return self.steps * (self.repeats + 1) + 2

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, decoding included."""
        return max(*self.contexts, self.prefill) + self.decoded

    def prompts(self, batch: int, context: int, repeat: int) -> list[list[int]]:
        """Random token ids, different in each repeat so that no prefix cache answers; `context` tokens each."""
        rng = np.random.default_rng((self.seed, batch, context, repeat))
        return rng.integers(3, 1000, (batch, context)).tolist()


def measure(tokens: int, work: Callable[[], None]) -> tuple[float, float]:
    """Tokens per wall second and per core-second of `work()`."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return tokens / (time.perf_counter() - wall), tokens / (time.process_time() - cpu)


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Tells on stderr that a part of the benchmark begins, and then how long it took."""
    start = time.perf_counter()
    tqdm.write(f"{name} ...", file=sys.stderr)
    yield
    tqdm.write(f"{name}: {time.perf_counter() - start:.1f} s", file=sys.stderr)


def row(engine: str, device: str, test: str, batch: int, context: int, speeds: list[tuple[float, float]]) -> Row:
    """One result row, of an engine that computes on that kind of device: medians over the repeats.

    Told on stderr at once: a run that is cut off has then shown what it had.
    """
    tok_s, tok_core_s = (statistics.median(column) for column in zip(*speeds, strict=True))
    tqdm.write(f"{engine}, {test} {batch}x{context}: {tok_s:.4g} tok/s", file=sys.stderr)
    return {
        "engine": engine,
        "device": device,
        "test": test,
        "batch": batch,
        "context": context,
        "tok_s": tok_s,
        "tok_core_s": tok_core_s,
    }
