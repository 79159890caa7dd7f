"""Generators and discriminators, as Flax NNX modules that are split once and merged inside jit.

A generator turns noise into *samples*: Hopfield matrices `[B, L, L]` or relaxed codes `[B, L]`. A discriminator turns
samples into one logit each: positive for real ones. The paper's layers are unknown; sizes here are our choice.
"""

import dataclasses
import itertools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gan import hopfield
from gan.features import code_features, feature_count, matrix_features

NOISE = 64
"""Entries of the noise z ~ N(0, I)."""

Relaxation = Literal["tanh", "straight_through", "gumbel"]


@dataclasses.dataclass(frozen=True)
class Definition:
    """A network without its weights; hashable, hence a static argument of jitted functions."""

    graph: Any
    tree: Any


Weights = tuple[jax.Array, ...]


def split(network: nnx.Module) -> tuple[Definition, Weights]:
    """A network as a definition and the flat tuple of its weights."""
    graph, state = nnx.split(network)
    leaves, tree = jax.tree.flatten(state)
    return Definition(graph, tree), tuple(leaves)


def merge(definition: Definition, weights: Weights) -> Any:
    """The inverse of `split`; free inside jit."""
    return nnx.merge(definition.graph, jax.tree.unflatten(definition.tree, weights))


def leaky(x: jax.Array) -> jax.Array:
    """LeakyReLU(0.2)."""
    return jax.nn.leaky_relu(x, 0.2)


def spectral_norm(weight: jax.Array, steps: int = 4) -> jax.Array:
    """The largest singular value of a weight, its last axis against the others (arXiv:1802.05957).

    The power iteration begins anew at every call, from a fixed start: slower than carrying its state along, but a
    layer's output then depends on its weight alone. No gradient flows through the singular vectors.
    """
    matrix = weight.reshape(-1, weight.shape[-1])
    v = jnp.asarray(np.random.default_rng(0).standard_normal(matrix.shape[1]), matrix.dtype)
    u = matrix @ v
    for _ in range(steps):
        v = u @ matrix
        u = matrix @ (v / (jnp.linalg.norm(v) + 1e-12))
    u = jax.lax.stop_gradient(u / (jnp.linalg.norm(u) + 1e-12))
    v = jax.lax.stop_gradient(v / (jnp.linalg.norm(v) + 1e-12))
    return u @ matrix @ v


class Dense(nnx.Module):
    """`x` [B, in] to [B, out]; He-normal weights times `gain`, divided by their spectral norm if `spectral`."""

    def __init__(self, rngs: nnx.Rngs, size: int, out: int, *, spectral: bool = False, gain: float = 1.0):
        self.weight = nnx.Param(jax.random.normal(rngs.params(), (size, out)) * gain * math.sqrt(2 / size))
        self.bias = nnx.Param(jnp.zeros(out))
        self.spectral = spectral

    def __call__(self, x: jax.Array) -> jax.Array:
        weight = self.weight[...]
        if self.spectral:
            weight = weight / spectral_norm(weight)
        return x @ weight + self.bias[...][None]


class MLP(nnx.Module):
    """Dense layers with LeakyReLU between: [B, sizes[0]] to [B, sizes[-1]]."""

    def __init__(self, rngs: nnx.Rngs, sizes: tuple[int, ...], *, spectral: bool = False, last_gain: float = 1.0):
        gains = [1.0] * (len(sizes) - 2) + [last_gain]
        pairs = zip(sizes[:-1], sizes[1:], gains, strict=True)
        self.layers = nnx.List([Dense(rngs, a, b, spectral=spectral, gain=gain) for a, b, gain in pairs])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers[:-1]:
            x = leaky(layer(x))
        return self.layers[-1](x)


class Conv(nnx.Module):
    """4x4 convolution with stride 2 on `x` [B, H, W, in]: halves the image, or doubles it if `transposed`."""

    def __init__(self, rngs: nnx.Rngs, size: int, out: int, *, spectral: bool = False, transposed: bool = False):
        scale = math.sqrt(2 / (16 * size))
        self.weight = nnx.Param(jax.random.normal(rngs.params(), (4, 4, size, out)) * scale)
        self.bias = nnx.Param(jnp.zeros(out))
        self.spectral, self.transposed = spectral, transposed

    def __call__(self, x: jax.Array) -> jax.Array:
        weight = self.weight[...]
        if self.spectral:
            weight = weight / spectral_norm(weight)
        axes = ("NHWC", "HWIO", "NHWC")
        if self.transposed:
            out = jax.lax.conv_transpose(x, weight, (2, 2), "SAME", dimension_numbers=axes)
        else:
            out = jax.lax.conv_general_dilated(x, weight, (2, 2), "SAME", dimension_numbers=axes)
        return out + self.bias[...][None, None, None]


class MatrixGenerator(nnx.Module):
    """The paper's kind: z to the upper triangle of a Hopfield matrix, 64-256-512-L(L-1)/2, tanh."""

    def __init__(self, rngs: nnx.Rngs, chips: int):
        self.mlp = MLP(rngs, (NOISE, 256, 512, chips * (chips - 1) // 2))
        self.chips = chips

    def __call__(self, z: jax.Array, key: jax.Array) -> jax.Array:
        del key
        rows, columns = np.triu_indices(self.chips, 1)
        triangle = jnp.zeros((z.shape[0], self.chips, self.chips)).at[:, rows, columns].set(jnp.tanh(self.mlp(z)))
        return triangle + triangle.swapaxes(1, 2)


class ConvGenerator(nnx.Module):
    """DCGAN on the L x L image (arXiv:1511.06434), three doublings; the image is cropped to L and symmetrised."""

    def __init__(self, rngs: nnx.Rngs, chips: int, channels: int = 64):
        self.side = -(-chips // 8)
        self.project = Dense(rngs, NOISE, self.side * self.side * 4 * channels)
        widths = (4 * channels, 2 * channels, channels, 1)
        self.layers = nnx.List([Conv(rngs, a, b, transposed=True) for a, b in itertools.pairwise(widths)])
        self.chips = chips

    def __call__(self, z: jax.Array, key: jax.Array) -> jax.Array:
        del key
        x = self.project(z).reshape(z.shape[0], self.side, self.side, -1)
        for layer in self.layers:
            x = layer(leaky(x))
        return hopfield.symmetric(jnp.tanh(x[:, : self.chips, : self.chips, 0]))


class CodeGenerator(nnx.Module):
    """The rank-1 generator: z to a relaxed code in (-1, 1), whose matrix is c c^T; 64-256-512-L.

    `tanh` emits the relaxed code; `straight_through` its signs, with the gradient of the relaxed code; `gumbel` signs
    drawn with the relaxed code as log-odds (arXiv:1611.01144), with the same gradient.
    """

    def __init__(self, rngs: nnx.Rngs, chips: int, relaxation: Relaxation):
        self.mlp = MLP(rngs, (NOISE, 256, 512, chips))
        self.relaxation = relaxation

    def __call__(self, z: jax.Array, key: jax.Array) -> jax.Array:
        logits = self.mlp(z)
        if self.relaxation == "tanh":
            return jnp.tanh(logits)
        if self.relaxation == "gumbel":
            logits = (logits + jax.random.logistic(key, logits.shape)) / 2
        return straight_through(jnp.tanh(logits))


def straight_through(soft: jax.Array) -> jax.Array:
    """Signs of a relaxed code, float32, with the gradient of the relaxed code (arXiv:1308.3432)."""
    return soft + jax.lax.stop_gradient(hopfield.sign(soft).astype(soft.dtype) - soft)


class MatrixDiscriminator(nnx.Module):
    """Upper triangle of a matrix to a logit, d-512-256-1."""

    def __init__(self, rngs: nnx.Rngs, chips: int, *, spectral: bool):
        self.mlp = MLP(rngs, (chips * (chips - 1) // 2, 512, 256, 1), spectral=spectral)

    def __call__(self, samples: jax.Array) -> jax.Array:
        rows, columns = np.triu_indices(samples.shape[-1], 1)
        return self.mlp(samples[:, rows, columns])[:, 0]


class ConvDiscriminator(nnx.Module):
    """DCGAN's discriminator on the matrix as an image: 64-128-256 channels, then a logit."""

    def __init__(self, rngs: nnx.Rngs, chips: int, *, spectral: bool, channels: int = 64):
        widths = (1, channels, 2 * channels, 4 * channels)
        self.layers = nnx.List([Conv(rngs, a, b, spectral=spectral) for a, b in itertools.pairwise(widths)])
        self.last = Dense(rngs, (-(-chips // 8)) ** 2 * widths[-1], 1, spectral=spectral)

    def __call__(self, samples: jax.Array) -> jax.Array:
        x = samples[..., None]
        for layer in self.layers:
            x = leaky(layer(x))
        return self.last(x.reshape(x.shape[0], -1))[:, 0]


class CodeDiscriminator(nnx.Module):
    """Chips of a (relaxed) code to a logit, L-512-256-1: the control without any encoder."""

    def __init__(self, rngs: nnx.Rngs, chips: int, *, spectral: bool):
        self.mlp = MLP(rngs, (chips, 512, 256, 1), spectral=spectral)

    def __call__(self, samples: jax.Array) -> jax.Array:
        return self.mlp(samples)[:, 0]


class CorrelationDiscriminator(nnx.Module):
    """A discriminator behind the correlation head, of matrices `[B, L, L]` or of codes `[B, L]`, whose matrix is c c^T.

    Besides the logit it can rate: a second output predicts the standardised score of a code.
    """

    def __init__(self, rngs: nnx.Rngs, shape: tuple[int, ...], *, spectral: bool):
        self.mlp = MLP(rngs, (feature_count(shape), 256, 128, 2), spectral=spectral)
        self.shape = shape

    def __call__(self, samples: jax.Array) -> jax.Array:
        return self.outputs(samples)[0]

    def outputs(self, samples: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Logits `[B]` and predicted scores `[B]`."""
        features = matrix_features if samples.ndim == 3 else code_features
        out = self.mlp(features(samples, self.shape))
        return out[:, 0], out[:, 1]


class Recombiner(nnx.Module):
    """A generator conditioned on two codes: which chips to take from which, and which to flip; [B, L] twice to [B, L].

    Without a network (`learns` False) it is a genetic crossover: z is a random field over the chips, smooth enough that
    few segments change hands, and each code flips chips at one of three rates. A network moves the odds of both
    decisions, hardly at first, because its last layer begins small. Children are signs with straight-through gradients.
    """

    MODES = 16  # cosines of the field; wave number j has amplitude 1 / sqrt(1 + j)
    RATES = (0.5, 1.5, 4.0)  # expected flips of a child
    UNIFORM = 0.2  # share of children whose chips are drawn one by one

    def __init__(self, rngs: nnx.Rngs, chips: int, *, learns: bool):
        sizes = (self.MODES + 2 * chips, 256, 256, 2 * chips)
        self.mlp = MLP(rngs, sizes, last_gain=0.01) if learns else None
        wave = np.arange(self.MODES)[:, None]
        place = (np.arange(chips)[None] + 0.5) / chips
        self.waves = (np.cos(np.pi * wave * place) / np.sqrt(1 + wave)).astype(np.float32)

    def __call__(self, first: jax.Array, second: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Children float32 `[B, L]` of +1 and -1, and the mean squared shift of the odds, by which to rein it in."""
        field_key, mask_key, flip_key, rate_key, kind_key = jax.random.split(key, 5)
        batch, chips = first.shape
        z = jax.random.normal(field_key, (batch, self.MODES))
        shift = jnp.zeros((batch, 2 * chips))
        if self.mlp is not None:
            shift = self.mlp(jnp.concatenate([z, first, first * second], axis=1))
        uniform = jax.random.bernoulli(kind_key, self.UNIFORM, (batch, 1))
        jitter = jax.random.logistic(mask_key, first.shape) * jnp.where(uniform, 1.0, 0.05)
        own = jnp.where(uniform, 0.0, 2 * z @ jnp.asarray(self.waves)) + jitter + shift[:, :chips]
        rate = jax.random.choice(rate_key, jnp.asarray(self.RATES), (batch, 1)) / chips
        flip = jnp.log(rate / (1 - rate)) + jax.random.logistic(flip_key, first.shape) + shift[:, chips:]
        mixed = jnp.where(first == second, first, straight_through(jnp.tanh(own / 2)) * first)
        return mixed * straight_through(-jnp.tanh(flip / 2)), (shift**2).mean()
