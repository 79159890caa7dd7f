"""What one step of an engine costs. An engine pads its steps to a few shapes, so each shape has a cost of its own."""

import dataclasses
import functools

from serving.simulator.errors import SimulatorError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepWork:
    """What one step computes.

    Attributes:
        shape: (decode rows, prefill rows, prefill tokens) to which it is padded.
        decodes: sequences that decode one token each.
        decode_tokens: KV tokens that those attend to.
        chunks: prompts that a piece is computed of.
        prefill_tokens: tokens of those pieces.
        prefill_pairs: sum over pieces of end^2 - begin^2, twice the (query, key) pairs of causal attention.
    """

    shape: tuple[int, int, int]
    decodes: int
    decode_tokens: int
    chunks: int
    prefill_tokens: int
    prefill_pairs: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepModel:
    """Seconds of a step: its shape's own, plus what its contents add.

    Attributes:
        shapes: (decode rows, prefill rows, prefill tokens, seconds) of every shape.
        decode_sequence, decode_token: seconds per decoding sequence and per KV token that it attends to.
        prefill_token, prefill_pair: seconds per prompt token, and per unit of `StepWork.prefill_pairs`.
        decode_noise, prefill_noise: by which factors real steps without and with prompts differed from that, as evenly
            spaced quantiles; empty where no step does.
    """

    shapes: tuple[tuple[int, int, int, float], ...]
    decode_sequence: float
    decode_token: float
    prefill_token: float
    prefill_pair: float
    decode_noise: tuple[float, ...] = ()
    prefill_noise: tuple[float, ...] = ()

    @functools.cached_property
    def _shape_s(self) -> dict[tuple[int, int, int], float]:
        return {(decodes, rows, tokens): seconds for decodes, rows, tokens, seconds in self.shapes}

    def seconds(self, work: StepWork) -> float:
        """Raises `SimulatorError` for a shape that was never measured."""
        try:
            shape_s = self._shape_s[work.shape]
        except KeyError:
            raise SimulatorError(f"No step of shape {work.shape} was measured; calibrate this engine anew.") from None
        return (
            shape_s
            + self.decode_sequence * work.decodes
            + self.decode_token * work.decode_tokens
            + self.prefill_token * work.prefill_tokens
            + self.prefill_pair * work.prefill_pairs
        )

    def noise_of(self, work: StepWork) -> tuple[float, ...]:
        """The factors of which such a step takes one, each as likely as the others."""
        return self.prefill_noise if work.chunks else self.decode_noise

    def mean_s(self, work: StepWork) -> float:
        """Seconds of a step on average, noise included."""
        noise = self.noise_of(work)
        return self.seconds(work) * (sum(noise) / len(noise) if noise else 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineModel:
    """An engine's sizes (as in its own configuration, nothing left open) and the cost of its steps."""

    page_size: int
    num_pages: int
    max_batch: int
    token_budget: int
    max_prefill_rows: int
    max_model_len: int
    prefix_cache: bool
    deterministic: bool = False
    steps: StepModel

    def fits(self, input_tokens: int, output_tokens: int) -> bool:
        """Whether the engine would ever serve such a request; it refuses others when they come."""
        total = input_tokens + output_tokens
        # The last token needs no KV.
        return total <= self.max_model_len and -(-(total - 1) // self.page_size) <= self.num_pages

    @classmethod
    def from_json(cls, fields: dict) -> "EngineModel":
        """From what `dataclasses.asdict` made of one. Raises KeyError, TypeError or ValueError for anything else."""
        fields = dict(fields)
        steps = dict(fields.pop("steps"))
        shapes = tuple((int(d), int(r), int(t), float(s)) for d, r, t, s in steps.pop("shapes"))
        decode_noise, prefill_noise = (
            tuple(map(float, steps.pop(f"{name}_noise", ()))) for name in ("decode", "prefill")
        )
        model = StepModel(shapes=shapes, decode_noise=decode_noise, prefill_noise=prefill_noise, **steps)
        return cls(steps=model, **fields)
