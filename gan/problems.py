"""The three searches as problems: what a code is, how good it is, which codes are the same.

A code is int8 `[chips]` of +1 and -1: the sequences of a set one after another (flock, then sequence, then chip). Where
a problem searches codes of one symmetry, a code is the chips that are free, and `unfold` gives the others.
Scores are higher for better codes. In float32 they rank codes; `exact` is the value that may be reported.
"""

import abc
import dataclasses
import fractions
import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from gan.sequences import codes as _codes
from gan.sequences import complementary, levinson, neighbours, pulse_compression, symmetry
from gan.sequences.known import known_sir

Codes = TypeVar("Codes", np.ndarray, jax.Array)


@dataclasses.dataclass(frozen=True)
class Problem(abc.ABC):
    """One search. Frozen and hashable, so that it can be a static argument of a jitted function."""

    name: ClassVar[str]
    title: ClassVar[str]
    length: int

    def __str__(self) -> str:
        """A title for tables and plots."""
        parameters = "".join(f", {name} {value}" for name, value in self.parameters.items())
        return f"{self.title}, N = {self.length}{parameters}"

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of one code when its sequences are told apart; the last axis is `length`."""

    @property
    def chips(self) -> int:
        """L, chips of one code."""
        return math.prod(self.shape)

    def unfold(self, codes: Codes) -> Codes:
        """All chips `[B, prod(shape)]` of (relaxed) codes `[B, chips]`, NumPy or JAX."""
        return codes

    def each_sequence(self, codes: Codes, change: Callable[[Codes], Codes]) -> Codes:
        """Codes `[..., chips]` after `change`, which permutes a last axis, of the (free) chips of every sequence."""
        count = math.prod(self.shape[:-1])
        rows = codes.reshape(*codes.shape[:-1], count, self.chips // count)
        return change(rows).reshape(codes.shape)

    @property
    @abc.abstractmethod
    def target(self) -> float:
        """The score of a hit."""

    @property
    @abc.abstractmethod
    def parameters(self) -> dict[str, Any]:
        """What `problem(name, length, ...)` takes beside name and length."""

    @property
    @abc.abstractmethod
    def group(self) -> symmetry.SymmetryGroup:
        """The symmetries under which codes are the same."""

    def score(self, codes: jax.Array | np.ndarray) -> jax.Array:
        """float32 `[B]` of codes int8 `[B, chips]`, jitted; higher is better."""
        return _score(self, codes)

    @abc.abstractmethod
    def _score(self, codes: jax.Array) -> jax.Array: ...

    def score_flips(self, codes: jax.Array | np.ndarray) -> jax.Array:
        """float32 `[B, chips]` of codes int8 `[B, chips]`, jitted: the score after chip n alone is flipped."""
        return _score_flips(self, codes)

    @abc.abstractmethod
    def _score_flips(self, codes: jax.Array) -> jax.Array: ...

    @abc.abstractmethod
    def soft_score(self, x: jax.Array) -> jax.Array:
        """A differentiable surrogate of the score, float32 `[B]` of relaxed codes float `[B, chips]`."""

    @abc.abstractmethod
    def exact(self, code: np.ndarray) -> fractions.Fraction:
        """The score of one code `[chips]` without rounding."""

    def values(self, codes: np.ndarray) -> list[float]:
        """`exact` of each of `[B, chips]`, rounded once to float64."""
        return [float(self.exact(code)) for code in codes]

    def gauge(self, codes: Codes) -> Codes:
        """Codes int8 `[B, chips]` with their free signs fixed: the same class, fewer chips that vary. NumPy or JAX."""
        return codes * self._free_signs(codes)

    @abc.abstractmethod
    def _free_signs(self, codes: Any) -> Any:
        """The signs `[B, chips]` of a symmetry that makes chosen chips +1."""

    def altitude(self, score: jax.Array) -> jax.Array:
        """The score on the scale on which searches weigh a loss against a gain."""
        return score

    def is_hit(self, score: Any) -> Any:
        """Whether a score (or each of an array) reaches the target, float32 rounding allowed."""
        return score >= self.target - 1e-4 * abs(self.target)

    def orbit(self, code: np.ndarray) -> np.ndarray:
        """The distinct codes that are the same as `code` `[chips]`, int8 `[<= order of the group, chips]`."""
        return symmetry.orbit(self.group, code)

    def image(self, codes: Codes, element: Codes) -> Codes:
        """Codes int8 `[B, chips]`, each under its own `element` `[B]` of the group, gauge-fixed. NumPy or JAX."""
        xp: Any = jnp if isinstance(codes, jax.Array) else np
        source, sign = xp.asarray(self.group.source)[element], xp.asarray(self.group.sign)[element]
        return self.gauge(xp.take_along_axis(codes, source, axis=1) * sign)

    def canonical(self, codes: np.ndarray) -> np.ndarray:
        """The representative of each code's class, int8 `[B, chips]` of `[B, chips]`."""
        return self.group.canonical(codes)

    def class_id(self, code: np.ndarray) -> str:
        """A name of the code's class that does not change: 16 hexadecimal digits of the representative's SHA-256."""
        return self.class_ids(np.asarray(code)[None])[0]

    def class_ids(self, codes: np.ndarray) -> list[str]:
        """`class_id` of each of `[B, chips]`."""
        label = f"{self.name}:{','.join(map(str, self.parameters.values()))}:{self.shape}:".encode()
        return [hashlib.sha256(label + row.tobytes()).hexdigest()[:16] for row in self.canonical(codes)]

    def random(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """n uniform random codes, int8 `[n, chips]`."""
        return _codes.random_codes(rng, n, self.chips)

    def to_text(self, code: np.ndarray) -> list[str]:
        """The sequences of one code as `+-` text, first chip left."""
        return [_codes.to_text(row) for row in self.unfold(np.asarray(code)[None]).reshape(-1, self.length)]

    def from_text(self, texts: Sequence[str]) -> np.ndarray:
        """The code int8 `[chips]` of its sequences.

        Raises:
            ValueError: if their number, their lengths or their symbols do not fit this problem.
        """
        count = math.prod(self.shape[:-1])
        if len(texts) != count:
            raise ValueError(f"a code of {self} has {count} sequences, got {len(texts)}.")
        rows = [_codes.from_text(text) for text in texts]
        for row in rows:
            if row.size != self.length:
                raise ValueError(f"sequence {_codes.to_text(row)} has {row.size} chips, must have {self.length}.")
        return np.concatenate(rows)


@functools.partial(jax.jit, static_argnums=0)
def _score(problem: Problem, codes: jax.Array) -> jax.Array:
    return problem._score(codes)


@functools.partial(jax.jit, static_argnums=0)
def _score_flips(problem: Problem, codes: jax.Array) -> jax.Array:
    return problem._score_flips(codes)


@dataclasses.dataclass(frozen=True)
class PulseCompression(Problem):
    """`mmf`: one code whose best length-N filter has the largest signal-to-interference ratio (SIR) gamma.

    The score is gamma. A hit reaches `goal`, by default the best known value of the length (`gan.sequences.known`);
    at lengths without one nothing is a hit.
    """

    name = "mmf"
    title = "pulse compression"
    goal: float | None = None

    def __post_init__(self) -> None:
        if self.length < 3:
            raise ValueError(f"`length` is {self.length}; pulse compression needs at least 3 chips.")

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.length,)

    @property
    def target(self) -> float:
        known = known_sir().get(self.length)
        return self.goal if self.goal is not None else known.sir if known else math.inf

    @property
    def parameters(self) -> dict[str, int]:
        return {}

    @property
    def group(self) -> symmetry.SymmetryGroup:
        return symmetry.code_group(self.length)

    def _score(self, codes: jax.Array) -> jax.Array:
        return levinson.sir(codes)

    def _score_flips(self, codes: jax.Array) -> jax.Array:
        return neighbours.sir_of_flips(codes)

    def altitude(self, score: jax.Array) -> jax.Array:
        """log gamma: gains are ratios."""
        return jnp.log(score)

    def soft_score(self, x: jax.Array) -> jax.Array:
        """log gamma, with its closed-form gradient."""
        return levinson.log_sir(x)

    def exact(self, code: np.ndarray) -> fractions.Fraction:
        return pulse_compression.sir_exact(code)

    def _free_signs(self, codes: Any) -> Any:
        """Negation and alternation: the first two chips become +1."""
        odd = (np.arange(self.chips) % 2).astype(np.int8)[None]
        return codes[:, :1] * (1 - odd) + codes[:, 1:2] * odd


@dataclasses.dataclass(frozen=True)
class SkewPulseCompression(PulseCompression):
    """`mmf_skew`: `mmf` among skew-symmetric codes of odd length N, s[c+i] = (-1)^i s[c-i] about the middle c.

    A code is its first (N+1)/2 chips. All odd-lag autocorrelations vanish (Golay, IEEE Trans. IT 23(1), 1977), which
    favours large gamma; but where the best code is not skew-symmetric this search cannot find it. What it finds are
    codes of `mmf`, and are catalogued so.
    """

    title = "pulse compression, skew-symmetric codes"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length % 2 == 0:
            raise ValueError(f"`length` is {self.length}; a skew-symmetric code has an odd length.")

    @property
    def chips(self) -> int:
        return (self.length + 1) // 2

    @property
    def group(self) -> symmetry.SymmetryGroup:
        """Of the free chips: reversing the code is alternating them."""
        return symmetry.sign_group(self.chips)

    def unfold(self, codes: Any) -> Any:
        signs = np.where(np.arange(1, self.chips) % 2, -1, 1).astype(np.int8)[None]
        mirrored = codes[:, -2::-1] * signs
        return jnp.concatenate([codes, mirrored], 1) if isinstance(codes, jax.Array) else np.hstack([codes, mirrored])

    def _score(self, codes: jax.Array) -> jax.Array:
        return super()._score(self.unfold(codes))

    def _score_flips(self, codes: jax.Array) -> jax.Array:
        flipped = codes[:, None] * (1 - 2 * jnp.eye(self.chips, dtype=codes.dtype))[None]
        return self._score(flipped.reshape(-1, self.chips)).reshape(codes.shape)

    def soft_score(self, x: jax.Array) -> jax.Array:
        return super().soft_score(self.unfold(x))

    def exact(self, code: np.ndarray) -> fractions.Fraction:
        return super().exact(self.unfold(code[None])[0])

    def class_ids(self, codes: np.ndarray) -> list[str]:
        return PulseCompression(self.length).class_ids(self.unfold(codes))

    def from_text(self, texts: Sequence[str]) -> np.ndarray:
        full = super().from_text(texts)[None]
        code = full[:, : self.chips]
        if not np.array_equal(self.unfold(code), full):
            raise ValueError(f"sequence {texts[0]} is not skew-symmetric.")
        return code[0]


@dataclasses.dataclass(frozen=True)
class ComplementaryPair(Problem):
    """`ob_zcp`: an optimal odd-length binary Z-complementary pair of type `kind` 1 or 2.

    The score is minus the residual: 0 for an optimal pair (zone (N+1)/2 wide, magnitude 2 outside it).
    """

    name = "ob_zcp"
    title = "optimal OB-ZCP"
    kind: int = 1

    def __post_init__(self) -> None:
        complementary.in_zone(self.length, self.kind)

    @property
    def shape(self) -> tuple[int, ...]:
        return (2, self.length)

    @property
    def target(self) -> float:
        return 0.0

    @property
    def parameters(self) -> dict[str, int]:
        return {"kind": self.kind}

    @property
    def group(self) -> symmetry.SymmetryGroup:
        return symmetry.pair_group(self.length)

    def _score(self, codes: jax.Array) -> jax.Array:
        return -complementary.ob_zcp_energy(codes.reshape(-1, *self.shape), self.kind, exact=True)

    def _score_flips(self, codes: jax.Array) -> jax.Array:
        return -neighbours.ob_zcp_residual_of_flips(codes.reshape(-1, *self.shape), self.kind).reshape(codes.shape)

    def soft_score(self, x: jax.Array) -> jax.Array:
        """Minus the residual."""
        return -complementary.ob_zcp_energy(x.reshape(-1, *self.shape), self.kind, exact=False)

    def exact(self, code: np.ndarray) -> fractions.Fraction:
        return fractions.Fraction(-int(complementary.ob_zcp_residual(code.reshape(self.shape), self.kind)))

    def _free_signs(self, codes: Any) -> Any:
        """Negations and alternation: the first chip of each sequence and the second of the first become +1."""
        chip = np.arange(self.chips)[None]
        second, odd = (chip >= self.length).astype(np.int8), (chip % self.length % 2).astype(np.int8)
        start = codes[:, :1] * (1 - second) + codes[:, self.length : self.length + 1] * second
        return start * ((1 - odd) + codes[:, :1] * codes[:, 1:2] * odd)


@dataclasses.dataclass(frozen=True)
class FoldedPair(ComplementaryPair):
    """`ob_zcp_folded`: `ob_zcp` among the pairs whose mirrored chips have the signs that every optimal pair has.

    Of an optimal pair (a, b) all A(u) are known modulo 4, and with them the product of a[i] b[i] a[i+u] b[i+u] over i.
    Dividing that of u by that of u + 1 leaves a[i] b[i] a[N-1-i] b[N-1-i] = -1 off the middle, but +1 at i = 0 for
    type I. So no optimal pair is lost: a code is a and the first (N+1)/2 chips of b. Symmetries are those of the pairs.
    """

    title = "optimal OB-ZCP by free chips"

    @property
    def chips(self) -> int:
        return self.length + (self.length + 1) // 2

    def unfold(self, codes: Any) -> Any:
        middle = self.length // 2
        signs = np.where((np.arange(middle) == 0) & (self.kind == 1), 1, -1).astype(np.int8)[None]
        start, end = codes[:, :middle], codes[:, self.length - 1 : self.length - 1 - middle : -1]
        mirrored = (signs * start * end * codes[:, self.length : self.length + middle])[:, ::-1]
        return (jnp if isinstance(codes, jax.Array) else np).concatenate([codes, mirrored], axis=1)

    def each_sequence(self, codes: Any, change: Callable[[Any], Any]) -> Any:
        xp: Any = jnp if isinstance(codes, jax.Array) else np
        return xp.concatenate([change(codes[..., : self.length]), change(codes[..., self.length :])], axis=-1)

    def _score(self, codes: jax.Array) -> jax.Array:
        return super()._score(self.unfold(codes))

    def _score_flips(self, codes: jax.Array) -> jax.Array:
        return -neighbours.folded_residual_of_flips(self.unfold(codes).reshape(-1, *self.shape), self.kind)

    def soft_score(self, x: jax.Array) -> jax.Array:
        return super().soft_score(self.unfold(x))

    def exact(self, code: np.ndarray) -> fractions.Fraction:
        return super().exact(self.unfold(code[None])[0])

    def orbit(self, code: np.ndarray) -> np.ndarray:
        return np.unique(super().orbit(self.unfold(code[None])[0])[:, : self.chips], axis=0)

    def image(self, codes: Any, element: Any) -> Any:
        return self._whole.image(self.unfold(codes), element)[:, : self.chips]

    def canonical(self, codes: np.ndarray) -> np.ndarray:
        return self._whole.canonical(self.unfold(codes))[:, : self.chips]

    def class_ids(self, codes: np.ndarray) -> list[str]:
        return self._whole.class_ids(self.unfold(codes))

    def from_text(self, texts: Sequence[str]) -> np.ndarray:
        whole = super().from_text(texts)[None]
        code = whole[:, : self.chips]
        if not np.array_equal(self.unfold(code), whole):
            raise ValueError(f"pair {texts[0]}, {texts[1]} has not the mirrored signs of an optimal pair.")
        return code[0]

    @property
    def _whole(self) -> ComplementaryPair:
        return ComplementaryPair(self.length, self.kind)


@dataclasses.dataclass(frozen=True)
class ComplementarySet(Problem):
    """`mocss`: `flocks` mutually orthogonal complementary sequence sets of `sequences` sequences each.

    The score is minus the residual: 0 when every AACS and every cross term vanishes. As many flocks as sequences make a
    complete complementary code (CCC).
    """

    name = "mocss"
    title = "MOCSS"
    flocks: int = 2
    sequences: int = 2

    def __post_init__(self) -> None:
        if not 1 <= self.flocks <= self.sequences or self.length < 1:
            raise ValueError(
                f"{self.flocks} flocks of {self.sequences} sequences of length {self.length}: there must be at least "
                "one flock, no more flocks than sequences, and at least one chip."
            )

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.flocks, self.sequences, self.length)

    @property
    def target(self) -> float:
        return 0.0

    @property
    def parameters(self) -> dict[str, int]:
        return {"flocks": self.flocks, "sequences": self.sequences}

    @property
    def group(self) -> symmetry.SymmetryGroup:
        return symmetry.set_group(self.flocks, self.sequences, self.length)

    def canonical(self, codes: np.ndarray) -> np.ndarray:
        return symmetry.canonical_sets(codes, self.flocks, self.sequences, self.length)

    def _score(self, codes: jax.Array) -> jax.Array:
        return -complementary.mocss_energy(codes.reshape(-1, *self.shape), exact=True)

    def _score_flips(self, codes: jax.Array) -> jax.Array:
        return -neighbours.mocss_residual_of_flips(codes.reshape(-1, *self.shape)).reshape(codes.shape)

    def soft_score(self, x: jax.Array) -> jax.Array:
        """Minus the residual."""
        return -complementary.mocss_energy(x.reshape(-1, *self.shape), exact=False)

    def exact(self, code: np.ndarray) -> fractions.Fraction:
        return fractions.Fraction(-int(complementary.mocss_residual(code.reshape(self.shape))))

    def _free_signs(self, codes: Any) -> Any:
        """Negations: every sequence of the first flock and every flock begin with +1."""
        starts = codes.reshape(-1, *self.shape)[..., :1]
        signs = starts[:, :1] * starts[:, :, :1] * starts[:, :1, :1]
        return signs.repeat(self.length, -1).reshape(-1, self.chips)


PROBLEMS: dict[str, type[Problem]] = {
    "mmf": PulseCompression,
    "mmf_skew": SkewPulseCompression,
    "ob_zcp": ComplementaryPair,
    "ob_zcp_folded": FoldedPair,
    "mocss": ComplementarySet,
}


def problem(name: str, length: int, **parameters: Any) -> Problem:
    """The problem `mmf` or `mmf_skew` (`goal`), `ob_zcp` or `ob_zcp_folded` (`kind`), or `mocss` (`flocks`,
    `sequences`) at one length.

    Raises:
        ValueError: if the name or a parameter is unknown, or the length is impossible.
    """
    if name not in PROBLEMS:
        raise ValueError(f"problem {name!r} is unknown; it must be one of {', '.join(PROBLEMS)}.")
    known = {field.name for field in dataclasses.fields(PROBLEMS[name])}
    if unknown := sorted(set(parameters) - known):
        raise ValueError(f"`{unknown[0]}` is no parameter of {name}; it has {', '.join(sorted(known - {'length'}))}.")
    return PROBLEMS[name](length, **parameters)
