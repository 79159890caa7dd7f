"""Bits per byte: how well a model predicts text, whatever its vocabulary."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from model.sharding import shard_attend
from model.tokenizer import Tokenizer
from model.training.batches import token_stream
from model.training.corpus import Document
from model.transformer import Definition, Transformer, causal_attend, merge, split


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found: `bits_per_byte` of `bytes` of UTF-8 text, as `tokens` seen in windows of `context`."""

    bits_per_byte: float
    bytes: int
    tokens: int
    context: int


def token_losses(model: Transformer, windows: jax.Array, mesh: Mesh | None = None) -> jax.Array:
    """Negative log-likelihoods in nats: windows int32 [B, T + 1] -> float32 [B, T], of each token but the first."""
    inputs, targets = windows[:, :-1], windows[:, 1:]
    positions = jnp.broadcast_to(jnp.arange(inputs.shape[1], dtype=jnp.int32), inputs.shape)
    attend = shard_attend(causal_attend(model.config), mesh, kv_spec=None)
    hidden, _ = model(inputs, positions, attend, None)
    return optax.softmax_cross_entropy_with_integer_labels(model.logits(hidden), targets)


@functools.partial(jax.jit, static_argnames=("definition", "mesh"))
def _total_loss(
    definition: Definition, weights: tuple[jax.Array, ...], windows: jax.Array, counted: jax.Array, mesh: Mesh | None
) -> jax.Array:
    return jnp.sum(jnp.where(counted, token_losses(merge(definition, weights), windows, mesh), 0))


def evaluate(
    model: Transformer,
    tokenizer: Tokenizer,
    documents: Iterable[Document],
    *,
    context: int,
    batch: int = 8,
    mesh: Mesh | None = None,
    track: Callable[[range], Iterable[int]] = iter,
) -> Evaluation:
    """Bits per byte of `documents`, read as one stream in windows of `context` tokens, every token predicted once.

    What separates entries must be predicted too and counts as no bytes. The first token of a window sees nothing
    before it, so a longer context scores better. `track` wraps the loop over batches in a progress bar.
    """
    documents = list(documents)
    stream = token_stream(tokenizer, documents)
    predicted = len(stream) - 1
    windows, counted = _tile(stream, context, batch)
    definition, weights = split(model)
    nats = sum(
        float(_total_loss(definition, weights, windows[i : i + batch], counted[i : i + batch], mesh))
        for i in track(range(0, len(windows), batch))
    )
    size = sum(len(entry.encode()) for document in documents for entry in document.entries)
    return Evaluation(bits_per_byte=nats / math.log(2) / size, bytes=size, tokens=predicted, context=context)


def _tile(stream: np.ndarray, context: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Windows int32 [n, context + 1] over the stream, n a multiple of `batch`; which targets are real [n, context]."""
    count = -(-(len(stream) - 1) // context)
    count += -count % batch
    padded = np.zeros(count * context + 1, np.int32)
    padded[: len(stream)] = stream
    windows = np.stack([padded[i * context : (i + 1) * context + 1] for i in range(count)])
    counted = np.arange(count * context).reshape(count, context) < len(stream) - 1
    return windows, counted
