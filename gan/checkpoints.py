"""Checkpoints of a GAN in training, in Orbax v1: a run that was cut continues bit for bit."""

import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from gan.training import Gan, GanState


class ResumeError(ValueError):
    """A checkpoint of another run."""


def fit(
    gan: Gan,
    codes: np.ndarray,
    folder: str | os.PathLike[str],
    *,
    steps: int,
    checkpoint_every: int,
    on_checkpoint: Callable[[int, GanState, dict[str, np.ndarray]], None] = lambda step, state, losses: None,
) -> GanState:
    """Trains on codes int8 `[P, L]` until `steps` updates are made, from the newest checkpoint in `folder` if any.

    Args:
        folder: of Orbax checkpoints; the newest two are kept.
        on_checkpoint: called after each checkpoint with the updates made, the state and the losses since the last.

    Raises:
        ResumeError: the checkpoint in `folder` is of another run.
    """
    # Orbax annotates its policies with another class of metadata than the protocol that it asks for.
    keep: Any = ocp.training.preservation_policies.LatestN(2)
    with ocp.training.Checkpointer(os.path.abspath(folder), preservation_policy=keep) as checkpoints:
        state = gan.initial_state()
        if (latest := checkpoints.latest) is not None:
            _check_same_run(checkpoints.metadata(latest).custom_metadata, gan.identity(codes), folder)
            state = checkpoints.load(latest, jax.tree.map(ocp.arrays.to_shape_dtype_struct, state))
        while (done := int(state.step)) < steps:
            # Chunks end at the same steps wherever a run began.
            chunk = min(checkpoint_every - done % checkpoint_every, steps - done)
            state, losses = gan.train(state, codes, chunk)
            checkpoints.save(done + chunk, state, custom_metadata=gan.identity(codes))
            on_checkpoint(done + chunk, state, {name: np.asarray(values) for name, values in losses.items()})
        return state


def _check_same_run(saved: Any, current: dict[str, Any], folder: str | os.PathLike[str]) -> None:
    saved = saved or {}
    differences = [
        f"`{name}` is {new} and was {saved.get(name)}" for name, new in current.items() if new != saved.get(name)
    ]
    if differences:
        raise ResumeError(
            f"{folder} holds a checkpoint of another run: {'; '.join(differences)}. Continue it as it was started, or "
            "name another folder."
        )
