"""Chunked pipeline parallelism: a group of instances computes one long prompt (Mooncake, FAST'25, section 3.3).

Each instance of a group holds a share of the layers. A prompt goes through them in chunks: while one is on the second
instance, the next one is on the first.
"""

import dataclasses

from serving.conductor.errors import ConductorError
from serving.conductor.estimators import TimeModel


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PipelineTimeModel(TimeModel):
    """Costs of a group of `stages` like instances; the coefficients are those of one instance.

    Attributes:
        stages: instances of the group.
        chunk: prompt tokens per chunk, at most.
        boundary_token: seconds to send one token's activations to the next instance.

    Raises:
        ConductorError: fewer than one stage, or chunks below 1 token.
    """

    stages: int = 1
    chunk: int = 8192
    boundary_token: float = 0.0

    def __post_init__(self) -> None:
        if self.stages < 1 or self.chunk < 1:
            raise ConductorError(
                f"A group of {self.stages} instances with chunks of {self.chunk} tokens; use at least 1 of both."
            )

    def prefill_s(self, tokens: int, reused: int) -> float:
        """Latency of a prompt that has the group to itself.

        Every stage takes a chunk as long as the one before it, so the last chunk leaves after the sum of all chunks on
        one stage, and the longest one, with its hop, once more for each further stage.
        """
        fresh = tokens - reused
        chunks = -(-fresh // self.chunk)
        whole_s = TimeModel.prefill_s(self, tokens, reused) + (chunks - 1) * self.prefill_base
        # Chunks grow longer, but for the first, which loads what is reused, and the last, which may be cut short.
        longest_s = max(self._hop_and_stage_s(tokens, reused, index) for index in {0, max(0, chunks - 2), chunks - 1})
        return whole_s / self.stages + (self.stages - 1) * longest_s

    def transfer_s(self, tokens: int) -> float:
        """Between two groups: every instance sends its share of the layers."""
        return TimeModel.transfer_s(self, tokens) / self.stages

    def occupied_s(self, tokens: int, reused: int) -> float:
        """How long each stage computes; the next prompt can follow after that."""
        return sum(seconds for _, seconds in self.chunks(tokens, reused))

    def chunks(self, tokens: int, reused: int) -> list[tuple[float, float]]:
        """Seconds of each chunk: of its hop between two stages, and on one stage."""
        return [self._chunk(tokens, reused, index) for index in range(-(-(tokens - reused) // self.chunk))]

    def _chunk(self, tokens: int, reused: int, index: int) -> tuple[float, float]:
        begin = reused + index * self.chunk
        size = min(self.chunk, tokens - begin)
        seconds = self.prefill_base + self.prefill_token * size + self.prefill_pair * size * (2 * begin + size)
        if index == 0:
            seconds += self.prefill_reused * reused
        return self.boundary_token * size, seconds / self.stages

    def _hop_and_stage_s(self, tokens: int, reused: int, index: int) -> float:
        hop_s, seconds = self._chunk(tokens, reused, index)
        return hop_s + seconds
