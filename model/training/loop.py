"""The training loop: AdamW with warm-up and cosine decay, one pure update per step, checkpoints that resume exactly."""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

from model.sharding import shard_model
from model.training.batches import batch_at
from model.training.config import TrainConfig
from model.training.evaluate import token_losses
from model.transformer import Definition, Transformer, merge, split


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """All that a run carries from step to step.

    Attributes:
        step: int32 [], updates made.
        weights: the flat weights of the model.
        optimizer: the optimiser's state.
        losses: float32 [steps], mean nats per token of the steps made; NaN for those to come.
        scores: float32 [steps], what was measured after a step; NaN where nothing was.
    """

    step: jax.Array
    weights: tuple[jax.Array, ...]
    optimizer: optax.OptState
    losses: jax.Array
    scores: jax.Array


class Trainer:
    """Trains one model on one token stream.

    Args:
        config: how.
        model: the initial model.
        stream: int32 [tokens], of `token_stream`.
        mesh: of `parse_mesh`; None trains on the first device. Batches are split over `dp`, weights over `tp`.
    """

    def __init__(self, config: TrainConfig, model: Transformer, stream: np.ndarray, mesh: Mesh | None = None) -> None:
        self.config = config
        self._stream = stream
        self._mesh = mesh
        self._optimizer = config.optimizer()
        self._definition, self._weights = split(model if mesh is None else shard_model(model, mesh))

    def initial_state(self) -> TrainState:
        """The state before the first step."""
        weights = jax.tree.map(jnp.copy, self._weights)  # a step takes its state over, and the model stays the caller's
        nothing = jnp.full(self.config.steps, jnp.nan)
        return TrainState(
            step=jnp.int32(0),
            weights=weights,
            optimizer=self._optimizer.init(weights),
            losses=nothing,
            scores=jnp.copy(nothing),
        )

    def step(self, state: TrainState, step: int) -> TrainState:
        """The state after update number `step`, which is `state.step` known on the host; `state` is donated."""
        context = self.config.context_at(step)
        rows = max(1, self.config.batch_tokens // context)
        batch = batch_at(self._stream, step, batch=rows, context=context, seed=self.config.seed)
        placed = batch if self._mesh is None else jax.device_put(batch, NamedSharding(self._mesh, PartitionSpec("dp")))
        return _update(self._definition, self._optimizer, self._mesh, state, placed)

    def model(self, state: TrainState) -> Transformer:
        """The model with the weights of `state`."""
        return merge(self._definition, state.weights)

    def identity(self) -> dict[str, Any]:
        """What must be equal for a checkpoint to be continued by this trainer; plain JSON."""
        digest = hashlib.sha256(self._stream.tobytes()).hexdigest()
        shapes = [list(weight.shape) for weight in self._weights]
        return {"config": dataclasses.asdict(self.config), "text_sha256": digest, "weight_shapes": shapes}


def fit(
    trainer: Trainer,
    folder: str | os.PathLike[str],
    *,
    checkpoint_every: int,
    measure: Callable[[Transformer], float],
    on_step: Callable[[int, TrainState], None] = lambda step, state: None,
) -> TrainState:
    """Trains to the end, from the newest checkpoint in `folder` if there is one, and returns the last state.

    Args:
        folder: of Orbax checkpoints; the newest two are kept.
        checkpoint_every: steps between checkpoints; the last step is always saved.
        measure: called before each checkpoint; its value goes into `TrainState.scores`.
        on_step: called after each step with the number of steps made.

    Raises:
        ResumeError: the checkpoint in `folder` is of another run.
    """
    # Orbax annotates its policies with another class of metadata than the protocol that it asks for.
    keep: Any = ocp.training.preservation_policies.LatestN(2)
    with ocp.training.Checkpointer(os.path.abspath(folder), preservation_policy=keep) as checkpoints:
        state = trainer.initial_state()
        if (latest := checkpoints.latest) is not None:
            _check_same_run(checkpoints.metadata(latest).custom_metadata, trainer.identity(), folder)
            state = checkpoints.load(latest, jax.tree.map(ocp.arrays.to_shape_dtype_struct, state))
        for step in range(int(state.step), trainer.config.steps):
            state = trainer.step(state, step)
            if (step + 1) % checkpoint_every == 0 or step + 1 == trainer.config.steps:
                score = measure(trainer.model(state))
                state = dataclasses.replace(state, scores=state.scores.at[step].set(score))
                checkpoints.save(step + 1, state, custom_metadata=trainer.identity())
            on_step(step + 1, state)
        return state


class ResumeError(ValueError):
    """A checkpoint that another configuration, model or text made."""


def _check_same_run(saved: Any, current: dict[str, Any], folder: str | os.PathLike[str]) -> None:
    saved = saved or {}
    differences = [
        f"`{name}` is {new} and was {old}"
        for name, new in (current | current["config"]).items()
        if name != "config" and new != (old := (saved | saved.get("config", {})).get(name))
    ]
    if differences:
        raise ResumeError(
            f"{folder} holds a checkpoint of another run: {'; '.join(differences)}. Continue it as it was started, or "
            "name another folder."
        )


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=3)
def _update(
    definition: Definition,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | None,
    state: TrainState,
    windows: jax.Array,
) -> TrainState:
    def mean_loss(weights: tuple[jax.Array, ...]) -> jax.Array:
        return jnp.mean(token_losses(merge(definition, weights), windows, mesh))

    loss, gradients = jax.value_and_grad(mean_loss)(state.weights)
    updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.weights)
    weights: Any = optax.apply_updates(state.weights, updates)
    return TrainState(
        step=state.step + 1,
        weights=weights,
        optimizer=optimizer_state,
        losses=state.losses.at[state.step].set(loss),
        scores=state.scores,
    )
