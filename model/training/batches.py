"""Token ids in batches that depend on the seed and the step alone, so that a resumed run loses nothing."""

from collections.abc import Iterable

import numpy as np

from model.tokenizer import Tokenizer
from model.training.corpus import Document


def token_stream(tokenizer: Tokenizer, documents: Iterable[Document]) -> np.ndarray:
    """All entries one after another, int32 [tokens]; each begins with the tokenizer's special tokens."""
    entries = [tokenizer.encode(entry) for document in documents for entry in document.entries]
    return np.concatenate([np.array(entry, np.int32) for entry in entries])


def batch_at(stream: np.ndarray, step: int, *, batch: int, context: int, seed: int) -> np.ndarray:
    """The batch of one step, int32 [batch, context + 1]: inputs and, one further, targets.

    Windows tile the stream from an offset that changes every epoch, and come in a new order every epoch.

    Raises ValueError where the stream has no window of that length.
    """
    windows = (len(stream) - 1) // context - 1  # one less, so that the offset has room
    if windows < 1:
        raise ValueError(f"{len(stream)} tokens are too few for windows of {context}: use a shorter context.")
    rows = []
    for index in range(step * batch, (step + 1) * batch):
        epoch, place = divmod(index, windows)
        rng = np.random.default_rng([seed, epoch])
        start = rng.integers(context) + rng.permutation(windows)[place] * context
        rows.append(stream[start : start + context + 1])
    return np.stack(rows)
