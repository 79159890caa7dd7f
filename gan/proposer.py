"""The GAN inside the search: G recombines elites, D judges the children before any of them is evaluated.

Evaluations are what a search pays for, and networks are free of them. D has the correlation head and two outputs: how
like the elites a code looks (the adversarial game), and what it will score (learned from all evaluated codes). Drawing
many children and keeping those that D likes is rejection sampling by the discriminator (arXiv:1810.06758). G can learn
from the same two outputs by straight-through gradients; NOTES.md has what each part is worth.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from gan.networks import CorrelationDiscriminator, Definition, Recombiner, Weights, merge, split
from gan.problems import Problem


@dataclasses.dataclass(frozen=True)
class ProposerConfig:
    """How the two networks learn, at every generation of the search.

    Attributes:
        steps: updates of each network; 0 leaves both as they were drawn.
        learn_generator: whether G learns; without, it is a genetic crossover and has no network. One that learns is
            drawn anew at every restart.
        adversarial: weight of D's logit in the liking of a child and in G's loss; 0 plays no game, D only predicts.
        restraint: weight of the mean squared shift of G's odds, which keeps its children diverse.
        noise: standard deviation of the instance noise on chips.
    """

    steps: int = 20
    learn_generator: bool = False
    adversarial: float = 0.0
    restraint: float = 0.1
    learning_rate: float = 1e-3
    generator_learning_rate: float = 1e-4
    batch: int = 128
    noise: float = 0.3


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Networks:
    generator: Weights
    discriminator: Weights
    generator_optimizer: optax.OptState
    discriminator_optimizer: optax.OptState


@dataclasses.dataclass(frozen=True)
class _Game:
    problem: Problem
    config: ProposerConfig
    generator: Definition
    discriminator: Definition

    def judged(self, weights: Weights, codes: jax.Array) -> tuple[jax.Array, jax.Array]:
        """D's logits and ratings, float32 `[B]` each, of codes `[B, L]`."""
        return merge(self.discriminator, weights).outputs(self.problem.unfold(codes.astype(jnp.float32)))


class Proposer:
    """Owns both networks of one search."""

    def __init__(self, problem: Problem, config: ProposerConfig, seed: int) -> None:
        self._rngs = nnx.Rngs(seed)
        self._problem = problem
        generator, generator_weights = split(Recombiner(self._rngs, problem.chips, learns=config.learn_generator))
        discriminator, discriminator_weights = split(
            CorrelationDiscriminator(self._rngs, problem.shape, spectral=False)
        )
        self._game = _Game(problem, config, generator, discriminator)
        self._networks = _Networks(
            generator_weights,
            discriminator_weights,
            _optimizer(config.generator_learning_rate).init(generator_weights),
            _optimizer(config.learning_rate).init(discriminator_weights),
        )
        self._key = jax.random.key(seed)

    def renew_generator(self) -> None:
        """Draws a G that learns anew: what it has learned of one population narrows its children of the next."""
        config = self._game.config
        if config.learn_generator:
            _, weights = split(Recombiner(self._rngs, self._problem.chips, learns=True))
            optimizer = _optimizer(config.generator_learning_rate).init(weights)
            self._networks = dataclasses.replace(self._networks, generator=weights, generator_optimizer=optimizer)

    def propose(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Children int8 `[B, L]` of parents int8 `[B, L]` each."""
        self._key, key = jax.random.split(self._key)
        return np.array(_children(self._game, self._networks.generator, first, second, key))

    def likings(self, codes: np.ndarray) -> np.ndarray:
        """How much D likes each of codes int8 `[B, L]`, float32 `[B]`."""
        return np.array(_likings(self._game, self._networks.discriminator, codes))

    def learn(self, elites: np.ndarray, codes: np.ndarray, worth: np.ndarray, rng: np.random.Generator) -> None:
        """One generation's updates.

        Args:
            elites: int8 `[K, L]`, the real samples and the parents of fakes.
            codes, worth: int8 `[M, L]` and float32 `[M]`, evaluated codes and what D shall predict of them.
        """
        steps, batch = self._game.config.steps, self._game.config.batch
        if not steps:
            return
        seen, real, first, second = (
            rng.integers(0, size, (steps, batch)) for size in (len(codes), *(len(elites),) * 3)
        )
        self._key, key = jax.random.split(self._key)
        data = (codes[seen], worth[seen].astype(np.float32), elites[real], elites[first], elites[second])
        self._networks = _learn(self._game, self._networks, data, jax.random.split(key, steps))


def _optimizer(rate: float) -> optax.GradientTransformation:
    return optax.adam(rate, b1=0.5)


@functools.partial(jax.jit, static_argnums=0)
def _children(game: _Game, weights: Weights, first: jax.Array, second: jax.Array, key: jax.Array) -> jax.Array:
    children, _ = merge(game.generator, weights)(first.astype(jnp.float32), second.astype(jnp.float32), key)
    return children.astype(jnp.int8)


@functools.partial(jax.jit, static_argnums=0)
def _likings(game: _Game, weights: Weights, codes: jax.Array) -> jax.Array:
    logits, ratings = game.judged(weights, codes)
    return ratings - game.config.adversarial * jax.nn.softplus(-logits)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _learn(game: _Game, networks: _Networks, data: Any, keys: jax.Array) -> _Networks:
    def step(carry: _Networks, batch: tuple[Any, jax.Array]) -> tuple[_Networks, None]:
        (codes, worth, real, first, second), key = batch
        return _step(game, carry, codes, worth, real, first, second, key), None

    return jax.lax.scan(step, networks, (data, keys))[0]


def _step(
    game: _Game,
    networks: _Networks,
    codes: jax.Array,
    worth: jax.Array,
    real: jax.Array,
    first: jax.Array,
    second: jax.Array,
    key: jax.Array,
) -> _Networks:
    config = game.config
    child_key, real_key, fake_key = jax.random.split(key, 3)
    codes, real, first, second = (x.astype(jnp.float32) for x in (codes, real, first, second))

    def judging(weights: Weights, fake: jax.Array) -> jax.Array:
        error = ((game.judged(weights, codes)[1] - worth) ** 2).mean()
        if not config.adversarial:
            return error
        on_real, _ = game.judged(weights, real + config.noise * jax.random.normal(real_key, real.shape))
        on_fake, _ = game.judged(weights, fake + config.noise * jax.random.normal(fake_key, fake.shape))
        return error + config.adversarial * (jax.nn.softplus(-on_real) + jax.nn.softplus(on_fake)).mean()

    def pleasing(weights: Weights) -> tuple[jax.Array, jax.Array]:
        children, shift = merge(game.generator, weights)(first, second, child_key)
        logits, ratings = game.judged(networks.discriminator, children)
        liking = ratings - config.adversarial * jax.nn.softplus(-logits)
        return config.restraint * shift - liking.mean(), children

    generator: Any = networks.generator
    generator_optimizer = networks.generator_optimizer
    if config.learn_generator:
        (_, fake), gradients = jax.value_and_grad(pleasing, has_aux=True)(networks.generator)
        optimizer = _optimizer(config.generator_learning_rate)
        updates, generator_optimizer = optimizer.update(gradients, generator_optimizer, generator)
        generator = optax.apply_updates(generator, updates)
    else:
        fake, _ = merge(game.generator, networks.generator)(first, second, child_key)
    gradients = jax.grad(judging)(networks.discriminator, jax.lax.stop_gradient(fake))
    optimizer = _optimizer(config.learning_rate)
    updates, discriminator_optimizer = optimizer.update(
        gradients, networks.discriminator_optimizer, networks.discriminator
    )
    discriminator: Any = optax.apply_updates(networks.discriminator, updates)
    return _Networks(generator, discriminator, generator_optimizer, discriminator_optimizer)
