"""Rotary position embedding: inverse frequencies of every supported kind, and the rotation of queries and keys."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from model.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> tuple[np.ndarray, float]:
    """Angles per position of each rotated pair, and the factor on cos and sin.

    Returns:
      Inverse frequencies, float32 [head_dim / 2] in radians per token, and the attention factor (1 except for yarn).
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    plain = np.float32(1.0) / np.float32(rope.theta) ** exponents
    if rope.kind == "linear":
        return plain / np.float32(rope.factor), 1.0
    if rope.kind == "llama3":
        return _llama3(rope, plain), 1.0
    if rope.kind == "yarn":
        return _yarn(rope, plain, head_dim), _yarn_attention_factor(rope)
    return plain, 1.0


def _llama3(rope: RopeConfig, plain: np.ndarray) -> np.ndarray:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    rotations = rope.original_max_position_embeddings * plain / np.float32(2 * math.pi)
    keep = (rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep = np.clip(keep, 0.0, 1.0)
    return ((1 - keep) * plain / rope.factor + keep * plain).astype(np.float32)


def _yarn(rope: RopeConfig, plain: np.ndarray, head_dim: int) -> np.ndarray:
    """YaRN (arXiv:2309.00071, section 3.2): the same blend, along a ramp over the pairs."""

    def pair_with(rotations: float) -> float:
        wavelengths = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return head_dim * math.log(wavelengths) / (2 * math.log(rope.theta))

    low, high = pair_with(rope.beta_fast), pair_with(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (np.arange(head_dim // 2, dtype=np.float32) - low) / ((high - low) or 0.001)
    stretch = np.clip(ramp, 0.0, 1.0)
    return (stretch * plain / rope.factor + (1 - stretch) * plain).astype(np.float32)


def _yarn_attention_factor(rope: RopeConfig) -> float:
    """The temperature of YaRN (section 3.3), which multiplies cos and sin and so enters the logits squared."""
    if rope.attention_factor is not None:
        return rope.attention_factor

    def temperature(scale: float) -> float:
        return 0.1 * scale * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.mscale and rope.mscale_all_dim:
        return temperature(rope.mscale) / temperature(rope.mscale_all_dim)
    return temperature(1.0)


def rotary(rope: RopeConfig, head_dim: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine, float32 [*batch, 1, head_dim / 2], of int32 positions [*batch]."""
    frequencies, factor = inverse_frequencies(rope, head_dim)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies.reshape((1,) * (positions.ndim + 1) + (-1,))
    return _computed_once(jnp.cos(angles) * factor), _computed_once(jnp.sin(angles) * factor)


def _computed_once(x: jax.Array) -> jax.Array:
    """`x`. XLA:CPU fuses what makes it into all that use it, here into every layer and head, unless that is a product.

    It does so across an optimization barrier, too. Multiplied by one, float32 keeps its bits.
    """

    def times_one(x: jax.Array) -> jax.Array:
        one = jnp.eye(x.shape[-1], dtype=x.dtype)
        return lax.dot_general(x, one, (((x.ndim - 1,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)

    return lax.platform_dependent(x, cpu=times_one, default=lambda x: x)


def rotate(x: jax.Array, cos_sin: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the two halves of each head of `x` [*batch, heads, head_dim] in float32; keeps its dtype."""
    cos, sin = cos_sin
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
