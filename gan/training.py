"""Training a GAN on codes: one pure step under `lax.scan`, from a frozen config, over as many devices as there are."""

import dataclasses
import functools
import hashlib
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gan import hopfield, networks
from gan.losses import LOSSES, discriminator_loss, generator_loss, property_loss
from gan.networks import NOISE, Definition, Weights, merge, split
from gan.problems import Problem

Codec = Literal["hopfield", "rank1", "tanh_sign", "straight_through", "gumbel"]
CODECS: tuple[Codec, ...] = ("hopfield", "rank1", "tanh_sign", "straight_through", "gumbel")


@dataclasses.dataclass(frozen=True)
class GanConfig:
    """A GAN and how it is trained; durations in steps.

    Attributes:
        codec: what travels between the networks. `hopfield`: G emits a matrix, which is decoded by relaxation.
            `rank1`: G emits a relaxed code and D sees its matrix c c^T. The controls have no encoder, D sees chips:
            `tanh_sign` relaxed ones, `straight_through` and `gumbel` signs.
        architecture: `mlp` or `conv` (matrices as images; `hopfield` only).
        head: what D looks at: the `raw` entries, or the `correlation` sums of the diagonals.
        loss: a name of `gan.losses.LOSSES`.
        guidance: weight of the property loss of G.
        augment: whether every training code is shown as a random member of its class.
    """

    codec: Codec = "hopfield"
    architecture: Literal["mlp", "conv"] = "mlp"
    head: Literal["raw", "correlation"] = "raw"
    loss: str = "ns"
    guidance: float = 0.0
    augment: bool = False
    learning_rate: float = 2e-4
    batch: int = 128
    ema: float = 0.999
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, known in (("codec", self.codec, CODECS), ("loss", self.loss, tuple(LOSSES))):
            if value not in known:
                raise ValueError(f"`{name}` is {value!r}; it must be one of {', '.join(known)}.")
        if self.architecture == "conv" and self.codec != "hopfield":
            raise ValueError(f"`architecture` conv draws matrices; codec {self.codec!r} emits codes: use mlp.")
        if self.head == "correlation" and self.codec not in ("hopfield", "rank1"):
            raise ValueError(f"The correlation head reads Hopfield matrices; codec {self.codec!r} has none: use raw.")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GanState:
    """All that a run carries from step to step.

    Attributes:
        step: int32 [], updates of G made.
        generator, discriminator: flat weights.
        average: exponential moving average of G's weights, from which samples are drawn.
        generator_optimizer, discriminator_optimizer: states of Adam.
    """

    step: jax.Array
    generator: Weights
    discriminator: Weights
    average: Weights
    generator_optimizer: optax.OptState
    discriminator_optimizer: optax.OptState


class Gan:
    """One GAN for one problem.

    Args:
        mesh: with an axis `batch`, over which every batch is split; None uses the first device.
    """

    def __init__(self, problem: Problem, config: GanConfig, mesh: Mesh | None = None) -> None:
        if mesh is not None and config.batch % mesh.size:
            raise ValueError(f"`batch` {config.batch} cannot be split over {mesh.size} devices; use a multiple.")
        if config.head == "correlation" and config.codec == "hopfield" and problem.chips != math.prod(problem.shape):
            raise ValueError(
                f"The correlation head needs all chips of a code, but matrices of {problem} have the free ones: use "
                "codec rank1, or head raw."
            )
        self.problem, self.config, self._mesh = problem, config, mesh
        rngs = nnx.Rngs(config.seed)
        self._generator, self._generator_weights = split(_generator(rngs, problem, config))
        self._discriminator, self._discriminator_weights = split(_discriminator(rngs, problem, config))
        # The seed stays outside, so that runs of several seeds compile once.
        self._game = _Game(problem, dataclasses.replace(config, seed=0), self._generator, self._discriminator, mesh)

    def initial_state(self) -> GanState:
        """The state before the first step."""
        generator, discriminator = (
            jax.tree.map(jnp.copy, weights) for weights in (self._generator_weights, self._discriminator_weights)
        )
        optimizer = _optimizer(self.config)
        state = GanState(
            jnp.int32(0),
            generator,
            discriminator,
            jax.tree.map(jnp.copy, generator),
            optimizer.init(generator),
            optimizer.init(discriminator),
        )
        return state if self._mesh is None else jax.device_put(state, NamedSharding(self._mesh, PartitionSpec()))

    def train(self, state: GanState, codes: np.ndarray, steps: int) -> tuple[GanState, dict[str, jax.Array]]:
        """`steps` further updates on training codes int8 `[P, L]`; `state` is donated.

        Returns the new state and float32 `[steps]` of each loss. Batches are drawn with replacement, by a key that is a
        function of seed and step alone, so that it does not matter where a run was cut.
        """
        return _train(self._game, steps, state, jnp.asarray(codes, jnp.int8), jax.random.key(self.config.seed))

    def sample(self, state: GanState, key: jax.Array, count: int) -> tuple[jax.Array, np.ndarray]:
        """`count` samples of the averaged generator, and the codes int8 `[count, L]` that they decode to."""
        samples = _sample(self._game, count, state.average, key)
        return samples, self.decode(samples)

    def decode(self, samples: jax.Array) -> np.ndarray:
        """Codes int8 `[B, L]` of samples."""
        return np.asarray(hopfield.decode(samples).codes if samples.ndim == 3 else hopfield.sign(samples))

    def evaluations(self, steps: int) -> int:
        """Evaluations that `steps` of training cost: property guidance asks for scores and gradients."""
        return 2 * steps * self.config.batch if self.config.guidance else 0

    def identity(self, codes: np.ndarray) -> dict[str, Any]:
        """What must be equal for a checkpoint to be continued by this GAN on these codes; plain JSON."""
        digest = hashlib.sha256(np.ascontiguousarray(codes, np.int8).tobytes()).hexdigest()
        problem = {"name": self.problem.name, "shape": list(self.problem.shape)} | self.problem.parameters
        return dataclasses.asdict(self.config) | {"problem": problem, "codes_sha256": digest}


def _generator(rngs: nnx.Rngs, problem: Problem, config: GanConfig) -> nnx.Module:
    if config.codec == "hopfield":
        kind = networks.ConvGenerator if config.architecture == "conv" else networks.MatrixGenerator
        return kind(rngs, problem.chips)
    relaxations: dict[str, networks.Relaxation] = {"straight_through": "straight_through", "gumbel": "gumbel"}
    return networks.CodeGenerator(rngs, problem.chips, relaxations.get(config.codec, "tanh"))


def _discriminator(rngs: nnx.Rngs, problem: Problem, config: GanConfig) -> nnx.Module:
    spectral = LOSSES[config.loss].spectral
    if config.head == "correlation":
        return networks.CorrelationDiscriminator(rngs, problem.shape, spectral=spectral)
    if config.codec not in ("hopfield", "rank1"):
        return networks.CodeDiscriminator(rngs, problem.chips, spectral=spectral)
    kind = networks.ConvDiscriminator if config.architecture == "conv" else networks.MatrixDiscriminator
    return kind(rngs, problem.chips, spectral=spectral)


def _optimizer(config: GanConfig) -> optax.GradientTransformation:
    wasserstein = LOSSES[config.loss].game == "wasserstein"
    return optax.adam(config.learning_rate, b1=0.5, b2=0.9 if wasserstein else 0.999)


@dataclasses.dataclass(frozen=True)
class _Game:
    """What stays the same from step to step: hashable, static in the jitted functions."""

    problem: Problem
    config: GanConfig
    generator: Definition
    discriminator: Definition
    mesh: Mesh | None

    def split(self, batch: jax.Array) -> jax.Array:
        """The batch, divided over the devices."""
        if self.mesh is None:
            return batch
        return jax.lax.with_sharding_constraint(batch, NamedSharding(self.mesh, PartitionSpec("batch")))

    def samples(self, weights: Weights, key: jax.Array, count: int) -> jax.Array:
        z_key, own_key = jax.random.split(key)
        z = self.split(jax.random.normal(z_key, (count, NOISE)))
        return merge(self.generator, weights)(z, own_key)

    def critic(self, weights: Weights, samples: jax.Array) -> jax.Array:
        """Logits of samples, as this codec shows them to the discriminator."""
        if self.config.codec == "rank1" and self.config.head == "correlation":
            samples = self.problem.unfold(samples)
        elif self.config.codec == "rank1":
            samples = hopfield.encode(samples)
        return merge(self.discriminator, weights)(samples)

    def picked(self, codes: jax.Array, key: jax.Array) -> jax.Array:
        """A batch of training codes, with replacement."""
        batch = codes[jax.random.randint(key, (self.config.batch,), 0, codes.shape[0])]
        if not self.config.augment:
            return batch
        element = jax.random.randint(jax.random.fold_in(key, 0), (self.config.batch,), 0, self.problem.group.order)
        return self.problem.image(batch, element)

    def real(self, codes: jax.Array) -> jax.Array:
        return hopfield.encode(codes) if self.config.codec == "hopfield" else codes.astype(jnp.float32)

    def relaxed(self, samples: jax.Array) -> jax.Array:
        """Relaxed codes `[B, L]` of samples; of a matrix, the mean field on each chip of the code it decodes to."""
        if samples.ndim == 2:
            return samples
        code = jax.lax.stop_gradient(hopfield.decode(samples).codes).astype(jnp.float32)
        return jnp.einsum("bij,bj->bi", samples, code) / code.shape[-1]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sample(game: _Game, count: int, weights: Weights, key: jax.Array) -> jax.Array:
    return game.samples(weights, key, count)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _train(
    game: _Game, steps: int, state: GanState, codes: jax.Array, seed: jax.Array
) -> tuple[GanState, dict[str, jax.Array]]:
    return jax.lax.scan(lambda carry, _: _step(game, carry, codes, seed), state, length=steps)


def _step(game: _Game, state: GanState, codes: jax.Array, seed: jax.Array) -> tuple[GanState, dict[str, jax.Array]]:
    config, loss = game.config, LOSSES[game.config.loss]
    optimizer = _optimizer(config)
    key = jax.random.fold_in(seed, state.step)
    discriminator = state.discriminator
    discriminator_optimizer = state.discriminator_optimizer
    of_real = jnp.float32(0)
    for critic_key in jax.random.split(jax.random.fold_in(key, 0), loss.critic_steps):
        pick_key, fake_key, loss_key = jax.random.split(critic_key, 3)
        batch = game.split(game.picked(codes, pick_key))
        fake = game.samples(state.generator, fake_key, config.batch)

        def against(weights: Weights, batch: Any = batch, fake: Any = fake, key: Any = loss_key) -> jax.Array:
            return discriminator_loss(loss, lambda x: game.critic(weights, x), game.real(batch), fake, key)

        of_real, gradients = jax.value_and_grad(against)(discriminator)
        updates, discriminator_optimizer = optimizer.update(gradients, discriminator_optimizer, discriminator)
        stepped: Any = optax.apply_updates(discriminator, updates)
        discriminator = stepped

    fake_key, loss_key = jax.random.split(jax.random.fold_in(key, 1))

    def fooling(weights: Weights) -> tuple[jax.Array, jax.Array]:
        fake = game.samples(weights, fake_key, config.batch)
        adversarial = generator_loss(loss, lambda x: game.critic(discriminator, x), fake, loss_key)
        guided = property_loss(game.problem, game.relaxed(fake)) if config.guidance else jnp.float32(0)
        return adversarial + config.guidance * guided, guided

    (of_fake, guided), gradients = jax.value_and_grad(fooling, has_aux=True)(state.generator)
    updates, generator_optimizer = optimizer.update(gradients, state.generator_optimizer, state.generator)
    generator: Any = optax.apply_updates(state.generator, updates)
    average = jax.tree.map(lambda old, new: config.ema * old + (1 - config.ema) * new, state.average, generator)
    new = GanState(state.step + 1, generator, discriminator, average, generator_optimizer, discriminator_optimizer)
    return new, {"discriminator": of_real, "generator": of_fake, "property": guided}
