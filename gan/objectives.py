"""Single codes under another objective than the SIR of a mismatched filter: PSL, merit factor, or the user's own."""

import dataclasses
import fractions
import functools
import importlib
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gan.problems import Problem
from gan.sequences import symmetry
from gan.sequences.correlation import autocorrelation, autocorrelation_f32

Objective = Callable[[jax.Array], jax.Array]
"""Scores float32 `[B]`, higher for better, of (relaxed) codes float32 `[B, N]`; traced and differentiated by JAX."""


def peak_to_sidelobe(codes: jax.Array) -> jax.Array:
    """N / PSL."""
    return codes.shape[-1] / jnp.abs(autocorrelation_f32(codes)[:, 1:]).max(-1)


def merit_factor(codes: jax.Array) -> jax.Array:
    """N^2 / ISL, so that the smallest ISL is the largest merit factor."""
    return codes.shape[-1] ** 2 / (2 * (autocorrelation_f32(codes)[:, 1:] ** 2).sum(-1))


OBJECTIVES: dict[str, Objective] = {"psl": peak_to_sidelobe, "merit_factor": merit_factor}


@functools.cache
def objective_named(name: str) -> Objective:
    """The objective of a name in `OBJECTIVES`, or of `module:function`, which is imported.

    Raises:
        ValueError: if there is none.
    """
    module, _, function = name.partition(":")
    if not function:
        if name not in OBJECTIVES:
            raise ValueError(
                f"objective {name!r} is unknown; it must be one of {', '.join(OBJECTIVES)}, or module:function."
            )
        return OBJECTIVES[name]
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"objective {name!r} cannot be imported: {error}") from error


@dataclasses.dataclass(frozen=True)
class CodeObjective(Problem):
    """`code`: one binary code of the largest `objective`, a name in `OBJECTIVES` or `module:function`.

    Nothing is known to compare with, so nothing is a hit but what reaches `goal`. Of the user's own objective no
    symmetry is known, and its value is exact only as the float32 that it returns.
    """

    name = "code"
    title = "binary code"
    objective: str = "merit_factor"
    goal: float | None = None

    def __post_init__(self) -> None:
        objective_named(self.objective)
        if self.length < 3:
            raise ValueError(f"`length` is {self.length}; a code with sidelobes to optimise needs at least 3 chips.")

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.length,)

    @property
    def target(self) -> float:
        return math.inf if self.goal is None else self.goal

    @property
    def parameters(self) -> dict[str, Any]:
        return {"objective": self.objective}

    @property
    def group(self) -> symmetry.SymmetryGroup:
        return symmetry.code_group(self.length) if self._built_in else symmetry.no_group(self.length)

    @property
    def _built_in(self) -> bool:
        return self.objective in OBJECTIVES

    def _score(self, codes: jax.Array) -> jax.Array:
        return objective_named(self.objective)(codes.astype(jnp.float32))

    def _score_flips(self, codes: jax.Array) -> jax.Array:
        flipped = codes[:, None] * (1 - 2 * jnp.eye(self.chips, dtype=codes.dtype))[None]
        return self._score(flipped.reshape(-1, self.chips)).reshape(codes.shape)

    def soft_score(self, x: jax.Array) -> jax.Array:
        """The objective itself."""
        return objective_named(self.objective)(x)

    def exact(self, code: np.ndarray) -> fractions.Fraction:
        sidelobes = np.abs(autocorrelation(code)[1:])
        if self.objective == "psl":
            return fractions.Fraction(self.length, int(sidelobes.max()))
        if self.objective == "merit_factor":
            return fractions.Fraction(self.length**2, 2 * int((sidelobes**2).sum()))
        return fractions.Fraction(float(self.score(code[None])[0]))

    def _free_signs(self, codes: Any) -> Any:
        if not self._built_in:
            return codes * codes
        odd = (np.arange(self.chips) % 2).astype(np.int8)[None]
        return codes[:, :1] * (1 - odd) + codes[:, 1:2] * odd
