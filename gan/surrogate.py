"""Surrogate-assisted memetic search: a network learns scores, screens the children of a genetic crossover, and the best
become elites. By default no network generates and none plays an adversarial game; NOTES.md has what these would add."""

import dataclasses
import functools

import numpy as np

from gan.ledger import Ledger
from gan.polish import polish
from gan.problems import Problem
from gan.proposer import Proposer, ProposerConfig
from gan.search import Search
from gan.sequences.codes import hash_codes


@dataclasses.dataclass(frozen=True)
class SurrogateSettings:
    """The strong loop. Nothing is seeded: every restart begins with uniform random codes.

    Attributes:
        elites: codes kept, the training set.
        children: codes evaluated per generation, before polishing.
        screening: children drawn per child evaluated; D picks. 1 evaluates what G draws.
        flips: neighbours evaluated per polishing step; 0 does not polish.
        polish_steps: at most so many steps per child.
        patience: generations without a new best after which the elites are drawn anew, and a G that learns; D stays.
        recombine: whether children have two parents; without, G only mutates.
        memory: evaluated codes from which D learns to predict, the newest ones.
    """

    elites: int = 100
    children: int = 50
    screening: int = 32
    flips: int = 2
    polish_steps: int = 20
    patience: int = 25
    recombine: bool = True
    memory: int = 8192
    proposer: ProposerConfig = dataclasses.field(default_factory=ProposerConfig)


def _search(ledger: Ledger, settings: SurrogateSettings) -> None:
    search = _Population(ledger, settings, np.random.default_rng(ledger.seed))
    while not ledger.spent:
        search.restart()
        while not ledger.spent and search.patient:
            search.generation()


class _Population:
    """The population of one search and what it learned from."""

    def __init__(self, ledger: Ledger, config: SurrogateSettings, rng: np.random.Generator) -> None:
        self._ledger, self._config, self._rng = ledger, config, rng
        self._problem = ledger.problem
        self._proposer = Proposer(self._problem, config.proposer, ledger.seed)
        self._memory = np.zeros((0, self._problem.chips), np.int8)
        self._worth = np.zeros(0, np.float32)
        self._elites, self._scores, self._stale = self._memory, self._worth, 0

    @property
    def patient(self) -> bool:
        """Whether the population is still improving."""
        return self._stale < self._config.patience

    def restart(self) -> None:
        """Begins anew from random codes; what D knows stays, a G that learns is drawn anew."""
        self._proposer.renew_generator()
        self._elites = self._problem.gauge(self._problem.random(self._rng, self._config.elites))
        self._scores = self._ledger.evaluate(self._elites)
        self._stale = 0
        self._remember(self._elites, self._scores)

    def generation(self) -> None:
        """Proposes, evaluates, polishes, selects, learns."""
        children = self._screened(self._drawn())
        scores = self._ledger.evaluate(children)
        self._remember(children, scores)
        if self._config.flips and not self._ledger.spent:
            children, scores, seen = polish(
                self._ledger, children, scores, self._config.flips, self._config.polish_steps
            )
            for codes, found in seen:
                self._remember(codes, found)
        best = self._scores.max()
        self._select(children, scores)
        self._stale = 0 if self._scores[0] > best else self._stale + 1
        self._proposer.learn(self._elites, self._memory, self._worth, self._rng)

    def _drawn(self) -> np.ndarray:
        """Children of the elites, gauge-fixed: one parent wins a tournament, the other is any."""
        count, size = self._config.children * self._config.screening, len(self._elites)
        rivals = self._rng.integers(0, size, (2, count))
        first = self._elites[rivals.min(0)]  # the elites are sorted
        second = self._mirrored(self._elites[self._rng.integers(0, size, count)]) if self._config.recombine else first
        children = self._shifted(self._proposer.propose(first, second))
        return self._problem.gauge(children)

    def _mirrored(self, codes: np.ndarray) -> np.ndarray:
        """The codes, one in twenty replaced by another member of its class: elites of one class then meet."""
        chosen = np.flatnonzero(self._rng.random(len(codes)) < 0.05)
        element = self._rng.integers(0, self._problem.group.order, len(chosen))
        codes = codes.copy()
        codes[chosen] = self._problem.image(codes[chosen], element)
        return codes

    def _shifted(self, codes: np.ndarray) -> np.ndarray:
        """The codes, one in ten with its sequences rotated by one chip."""
        codes = codes.copy()
        draw = self._rng.random(len(codes))
        for direction, chosen in ((1, draw < 0.05), (-1, draw > 0.95)):
            roll = functools.partial(np.roll, shift=direction, axis=-1)
            codes[chosen] = self._problem.each_sequence(codes[chosen], roll)
        return codes

    def _screened(self, children: np.ndarray) -> np.ndarray:
        """The distinct new children that D likes best."""
        _, kept = np.unique(hash_codes(children), return_index=True)
        fresh = children[np.sort(kept)]
        fresh = fresh[~self._ledger.knows(fresh)]
        if self._config.screening > 1 and len(fresh) > self._config.children:
            padded = np.concatenate([fresh, np.ones((len(children) - len(fresh), fresh.shape[1]), np.int8)])
            likings = self._proposer.likings(padded)[: len(fresh)]
            fresh = fresh[np.argsort(-likings, kind="stable")]
        return fresh[: self._config.children] if len(fresh) else children[: self._config.children]

    def _select(self, children: np.ndarray, scores: np.ndarray) -> None:
        codes, values = np.concatenate([self._elites, children]), np.concatenate([self._scores, scores])
        _, kept = np.unique(hash_codes(codes), return_index=True)
        order = kept[np.argsort(-values[kept], kind="stable")][: self._config.elites]
        self._elites, self._scores = codes[order], values[order]

    def _remember(self, codes: np.ndarray, scores: np.ndarray) -> None:
        known = np.isfinite(scores)
        limit = self._config.memory
        self._memory = np.concatenate([self._memory, codes[known]])[-limit:]
        self._worth = np.concatenate([self._worth, worth(self._problem, scores[known])])[-limit:]


run = Search("surrogate", _search, SurrogateSettings)


def worth(problem: Problem, scores: np.ndarray) -> np.ndarray:
    """Scores float32 `[B]` on the scale on which D predicts them: logarithms of an SIR or of a residual, else as is."""
    if problem.name == "code":
        return scores
    # An SIR in float32 can round to 0, at N = 3 for one.
    return np.log(np.maximum(scores, 1e-3)) if problem.target > 0 else -np.log1p(-scores)
