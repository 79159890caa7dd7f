"""The paper's method as a search: a GAN on Hopfield matrices is trained on the best codes so far, again and again.

HpGAN's abstract (arXiv:2012.05645) gives the encoder and the game; that the training set is bootstrapped from random
codes, and all sizes, are our choice. Codec, generator, discriminator, their game and the decoder are all in the loop;
nothing recombines. With `flips`, the GAN proposes basins and a climb by gradients, which is paid for, decides.
"""

import dataclasses
import functools

import jax
import numpy as np

from gan.ledger import Ledger
from gan.polish import polish
from gan.search import Search
from gan.sequences.codes import hash_codes
from gan.training import Gan, GanConfig, GanState


@dataclasses.dataclass(frozen=True, kw_only=True)
class HpganSettings:
    """The loop.

    Attributes:
        training: codes int8 `[P, chips]` that are the first training set; None bootstraps it from random codes.
        start: uniform random codes evaluated first, without a training set; at most a fifth of the budget.
        elites: codes kept, the training set; at most a quarter of the start, at least twice the given training set.
        steps: updates of the GAN between two draws of codes; 0 leaves the networks as drawn, a control.
        samples: codes drawn at a time; those not seen before are evaluated.
        fresh: share of new codes among the samples below which the networks begin anew, because they have collapsed.
        patience: draws in a row without any new code after which the search gives up.
        flips: neighbours evaluated per polishing step of a decoded sample (`gan.polish`); 0 does not polish.
        polish_steps: at most so many steps per sample.
    """

    training: np.ndarray | None = None
    start: int = 500
    elites: int = 200
    steps: int = 40
    samples: int = 200
    fresh: float = 0.05
    patience: int = 10
    flips: int = 2
    polish_steps: int = 30
    gan: GanConfig = dataclasses.field(
        default_factory=functools.partial(GanConfig, batch=64, learning_rate=1e-3, ema=0.9)
    )


def _search(ledger: Ledger, config: HpganSettings) -> None:
    problem, budget, seed = ledger.problem, ledger.budget, ledger.seed
    gan = Gan(problem, dataclasses.replace(config.gan, seed=seed))
    if config.training is None:
        codes = problem.gauge(problem.random(np.random.default_rng(seed), min(config.start, max(4, budget // 5))))
        size = min(config.elites, len(codes) // 4)
    else:
        codes = problem.gauge(config.training)
        size = max(config.elites, 2 * len(codes))
    elites, scores = _best(codes, ledger.evaluate(codes), size)
    state, key, barren = gan.initial_state(), jax.random.key(seed), 0
    while not ledger.spent and barren < config.patience:
        # As many rows every time, however few elites there are, so that training compiles once.
        state = _train(ledger, gan, state, np.resize(elites, (size, problem.chips)), config.steps)
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

run_untrained = Search("hpgan_untrained", _search, functools.partial(HpganSettings, steps=0))
"""The control: `run` with networks that learn nothing, so that what is found is the polish's."""


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
