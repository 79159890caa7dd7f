"""`DecodeWorkload`: the few numbers of a trace that decide what decoding and prefilling it costs."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence

from attention_offload.errors import OffloadError

# Prompts are summarised by the means of this many equally large groups, shortest to longest.
_GROUPS = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeWorkload:
    """Lengths of a trace, in tokens.

    `context` is the mean over decode steps, not over requests: a request with p prompt and g generated tokens is seen
    g times with p, p + 1, ... tokens, so it is sum(p·g + g(g-1)/2) / sum(g). `reserved` is the room that a sequence
    needs by its end, p + g, as a mean over decode steps too. `context_spread` is the standard deviation of the contexts
    over their mean. `prompts` are representative prompt lengths, equally likely, shortest
    first, with the mean of the trace.
    """

    name: str
    mean_prompt: float
    mean_generated: float
    context: float
    context_spread: float = 0.0
    reserved: float = 0.0
    prompts: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for field in ("mean_prompt", "mean_generated", "context"):
            if not getattr(self, field) > 0:
                raise OffloadError(f"Workload `{self.name}`: `{field}` must be positive, got {getattr(self, field)}.")
        if not self.reserved:
            object.__setattr__(self, "reserved", self.context)
        if not self.prompts:
            object.__setattr__(self, "prompts", (self.mean_prompt,))

    @classmethod
    def from_means(cls, name: str, mean_prompt: float, mean_generated: float) -> "DecodeWorkload":
        """Makes a workload from means alone: every request alike."""
        context, reserved = mean_prompt + (mean_generated - 1) / 2, mean_prompt + mean_generated
        return cls(
            name=name, mean_prompt=mean_prompt, mean_generated=mean_generated, context=context, reserved=reserved
        )

    @classmethod
    def from_lengths(cls, name: str, lengths: Iterable[tuple[int, int]]) -> "DecodeWorkload":
        """Makes a workload from (prompt, generated) tokens of requests. Raises `OffloadError` if none are generated."""
        pairs = [(p, g) for p, g in lengths if g > 0]
        if not pairs:
            raise OffloadError(f"Workload `{name}` has no request that generates a token.")
        steps = sum(g for _, g in pairs)
        context = sum(p * g + g * (g - 1) / 2 for p, g in pairs) / steps
        square = sum(g * (p + g / 2) ** 2 for p, g in pairs) / steps
        reserved = sum(g * (p + g) for p, g in pairs) / steps
        prompts = sorted(p for p, _ in pairs)
        return cls(
            name=name,
            mean_prompt=sum(prompts) / len(prompts),
            mean_generated=steps / len(pairs),
            context=context,
            context_spread=math.sqrt(max(square - context**2, 0.0)) / context,
            reserved=reserved,
            prompts=_group_means(prompts),
        )


def _group_means(ordered: Sequence[int]) -> tuple[float, ...]:
    """Means of `_GROUPS` groups of as equal a size as can be."""
    groups = min(_GROUPS, len(ordered))
    edges = [round(index * len(ordered) / groups) for index in range(groups + 1)]
    return tuple(max(sum(ordered[i:j]) / (j - i), 1.0) for i, j in itertools.pairwise(edges))
