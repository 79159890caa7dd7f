"""The paper's method as a search: a GAN on Hopfield matrices is trained on the best codes so far, again and again.

HpGAN's abstract (arXiv:2012.05645) gives the encoder and the game; that the training set is bootstrapped from random
codes, and all sizes, are our choice. Codec, generator, discriminator, their game and the decoder are all in the loop;
nothing recombines. With `flips`, the GAN proposes basins and a climb by gradients, which is paid for, decides.
"""

import dataclasses

import jax
import numpy as np

from gan.ledger import Ledger
from gan.polish import polish
from gan.search import Search
from gan.sequences.codes import hash_codes
from gan.training import Gan, GanConfig, GanState


@dataclasses.dataclass(frozen=True)
class HpganSettings:
    """The loop.

    Attributes:
        start: uniform random codes evaluated first; at most a fifth of the budget.
        elites: codes kept, the training set; at most a quarter of the start.
        steps: updates of the GAN between two draws of codes.
        samples: codes drawn at a time; those not seen before are evaluated.
        fresh: share of new codes among the samples below which the networks begin anew, because they have collapsed.
        patience: draws in a row without any new code after which the search gives up.
        flips: neighbours evaluated per polishing step of a decoded sample (`gan.polish`); 0 does not polish.
        polish_steps: at most so many steps per sample.
    """

    start: int = 20_000
    elites: int = 1000
    steps: int = 150
    samples: int = 1000
    fresh: float = 0.05
    patience: int = 10
    flips: int = 0
    polish_steps: int = 30
    gan: GanConfig = dataclasses.field(default_factory=GanConfig)


def _search(ledger: Ledger, config: HpganSettings) -> None:
    problem, budget, seed = ledger.problem, ledger.budget, ledger.seed
    gan = Gan(problem, dataclasses.replace(config.gan, seed=seed))
    codes = problem.gauge(problem.random(np.random.default_rng(seed), min(config.start, max(4, budget // 5))))
    size = min(config.elites, len(codes) // 4)
    elites, scores = _best(codes, ledger.evaluate(codes), size)
    state, key, barren = gan.initial_state(), jax.random.key(seed), 0
    while not ledger.spent and barren < config.patience:
        state = _train(ledger, gan, state, elites, config.steps)
        if ledger.spent:
            break
        key, sample_key = jax.random.split(key)
        drawn = problem.gauge(gan.sample(state, sample_key, config.samples)[1])
        new = _new(ledger, drawn)
        barren = 0 if len(new) else barren + 1
        if len(new):
            found = ledger.evaluate(new)
            if config.flips and not ledger.spent:
                new, found, _ = polish(ledger, new, found, config.flips, config.polish_steps)
            elites, scores = _best(np.concatenate([elites, new]), np.concatenate([scores, found]), size)
        if len(new) < config.fresh * config.samples:
            state = gan.initial_state()


run = Search("hpgan", _search, HpganSettings)
"""Ends, too, when nothing new is drawn."""


def _train(ledger: Ledger, gan: Gan, state: GanState, elites: np.ndarray, steps: int) -> GanState:
    """Trains, and pays for the scores and gradients of property guidance."""
    state, _ = gan.train(state, elites, steps)
    if cost := gan.evaluations(steps):
        ledger.charge_gradients(cost // 2, scores=cost // 2)
    return state


def _new(ledger: Ledger, codes: np.ndarray) -> np.ndarray:
    """The distinct codes that were never evaluated, in the order in which they were drawn."""
    _, kept = np.unique(hash_codes(codes), return_index=True)
    codes = codes[np.sort(kept)]
    return codes[~ledger.knows(codes)]


def _best(codes: np.ndarray, scores: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` best distinct codes and their scores, best first."""
    _, kept = np.unique(hash_codes(codes), return_index=True)
    order = kept[np.argsort(-scores[kept], kind="stable")][:count]
    return codes[order], scores[order]
