"""Is it new? Splits of a complete list by class, and what samples are worth against a split.

All counts but `valid` are of distinct codes or of classes, so that neither repeating a code nor applying the known
symmetries to it earns anything: a model that replays the orbit of its training set scores 0 in the last two.
"""

import dataclasses

import numpy as np

from gan.ledger import score_in_buckets
from gan.problems import Problem
from gan.sequences.codes import hash_codes


@dataclasses.dataclass(frozen=True)
class Split:
    """Two halves of a list of codes that share no class.

    Attributes:
        train: int8 `[P, chips]`, every listed member of the training classes.
        train_classes, held_out_classes: class ids.
    """

    problem: Problem
    train: np.ndarray
    train_classes: frozenset[str]
    held_out_classes: frozenset[str]


@dataclasses.dataclass(frozen=True)
class Novelty:
    """What samples hold.

    Attributes:
        samples: their number.
        valid: samples that are hits.
        distinct: different hits.
        novel: of these, the ones that are no training code.
        novel_classes: classes of hits without a training code: novel up to symmetry.
        held_out_recall: share of the held-out classes among them, 0 to 1.
    """

    samples: int
    valid: int
    distinct: int
    novel: int
    novel_classes: int
    held_out_recall: float


def split_by_class(problem: Problem, codes: np.ndarray, seed: int, train: float = 0.5) -> Split:
    """Gives whole classes of codes int8 `[P, chips]` to training until they are the share `train` of all.

    Raises:
        ValueError: if there are fewer than two classes, or one side would be empty.
    """
    ids = np.array(problem.class_ids(codes))
    classes = np.random.default_rng(seed).permutation(np.unique(ids))
    count = round(train * len(classes))
    if not 0 < count < len(classes):
        raise ValueError(f"{train:g} of {len(classes)} classes leaves one side of the split empty.")
    chosen = classes[:count]
    return Split(problem, codes[np.isin(ids, chosen)], frozenset(chosen.tolist()), frozenset(classes[count:].tolist()))


def held_out_recall(split: Split, class_ids: frozenset[str] | set[str]) -> float:
    """Share of the held-out classes among `class_ids`."""
    return len(split.held_out_classes & class_ids) / len(split.held_out_classes)


def novelty(split: Split, samples: np.ndarray) -> Novelty:
    """The worth of samples int8 `[B, chips]` of a model that was trained on `split.train`."""
    problem = split.problem
    hits = samples[problem.is_hit(score_in_buckets(problem, samples))]
    hashed, first = np.unique(hash_codes(hits), return_index=True)
    distinct = hits[first]
    classes = set(problem.class_ids(distinct) if len(distinct) else ()) - split.train_classes
    return Novelty(
        samples=len(samples),
        valid=len(hits),
        distinct=len(distinct),
        novel=int((~np.isin(hashed, hash_codes(split.train))).sum()),
        novel_classes=len(classes),
        held_out_recall=held_out_recall(split, classes),
    )
