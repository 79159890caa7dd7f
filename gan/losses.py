"""Adversarial losses. A critic maps samples `[B, ...]` to logits `[B]`."""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from gan.networks import straight_through
from gan.problems import Problem

Critic = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Loss:
    """How the two networks play.

    Attributes:
        game: `non_saturating` (arXiv:1406.2661, section 3) or `wasserstein` with gradient penalty (arXiv:1704.00028).
        instance_noise: standard deviation of what is added to real and fake samples alike. Encoded codes are +-1 and
            generated ones are not, so that without it the discriminator wins by looking at magnitudes alone.
        gradient_penalty: weight of (|grad| - 1)^2 between real and fake samples, in the Wasserstein game.
        r1: weight of |grad|^2 / 2 at real samples (arXiv:1801.04406).
        spectral: whether the discriminator's weights are divided by their spectral norms (arXiv:1802.05957).
        critic_steps: updates of the discriminator per update of the generator.
    """

    game: Literal["non_saturating", "wasserstein"] = "non_saturating"
    instance_noise: float = 0.3
    gradient_penalty: float = 0.0
    r1: float = 0.0
    spectral: bool = False
    critic_steps: int = 1


LOSSES = {
    "ns": Loss(),
    "wgan_gp": Loss("wasserstein", instance_noise=0.0, gradient_penalty=10.0, critic_steps=3),
    "r1": Loss(r1=1.0),
    "sn": Loss(spectral=True),
}


def discriminator_loss(loss: Loss, critic: Critic, real: jax.Array, fake: jax.Array, key: jax.Array) -> jax.Array:
    """What the discriminator minimises, float32 []."""
    noise_key, mix_key = jax.random.split(key)
    real, fake = (noisy(loss, x, k) for x, k in zip((real, fake), jax.random.split(noise_key), strict=True))
    on_real, on_fake = critic(real), critic(fake)
    if loss.game == "wasserstein":
        value = on_fake.mean() - on_real.mean()
    else:
        value = jax.nn.softplus(-on_real).mean() + jax.nn.softplus(on_fake).mean()
    if loss.gradient_penalty:
        weight = jax.random.uniform(mix_key, (real.shape[0],) + (1,) * (real.ndim - 1))
        norms = jnp.sqrt(_square_gradients(critic, weight * real + (1 - weight) * fake) + 1e-12)
        value += loss.gradient_penalty * ((norms - 1) ** 2).mean()
    if loss.r1:
        value += loss.r1 / 2 * _square_gradients(critic, real).mean()
    return value


def generator_loss(loss: Loss, critic: Critic, fake: jax.Array, key: jax.Array) -> jax.Array:
    """What the generator minimises, float32 []."""
    on_fake = critic(noisy(loss, fake, key))
    return -on_fake.mean() if loss.game == "wasserstein" else jax.nn.softplus(-on_fake).mean()


def property_loss(problem: Problem, soft: jax.Array) -> jax.Array:
    """Minus the mean soft score of the signs of relaxed codes `[B, L]`, with straight-through gradients.

    Each code costs two evaluations: its score and the gradient of its score. Scores that are residuals are compressed,
    so that a batch is not ruled by its worst codes.
    """
    scores = problem.soft_score(straight_through(soft))
    return -(scores if np.isposinf(problem.target) or problem.target > 0 else -jnp.log1p(-scores)).mean()


def noisy(loss: Loss, samples: jax.Array, key: jax.Array) -> jax.Array:
    """Samples with instance noise; matrices stay symmetric without a diagonal."""
    if not loss.instance_noise:
        return samples
    noise = loss.instance_noise * jax.random.normal(key, samples.shape)
    if samples.ndim == 3:
        upper = jnp.triu(noise, 1)
        noise = upper + upper.swapaxes(1, 2)
    return samples + noise


def _square_gradients(critic: Critic, samples: jax.Array) -> jax.Array:
    gradients = jax.grad(lambda x: critic(x).sum())(samples)
    return (gradients**2).reshape(samples.shape[0], -1).sum(-1)
