"""What one request asks of sampling: validated once, when the request arrives. Knows no JAX."""

import dataclasses
import math
import reprlib
from collections.abc import Callable

# Rows of a batch carry their biases and stop ids in arrays of one fixed width, so the widest request is bounded.
MAX_LOGIT_BIAS = 300
MAX_STOP_TOKEN_IDS = 24
MAX_LOGPROBS = 20
# Batches hold integers as int32.
MAX_INT = 2**31 - 1
# Beyond these, products and quotients leave float32: a probability becomes 0, a logit infinite, and the draw token 0.
MAX_TEMPERATURE = 100
MIN_TOP_P = 1e-30
MAX_REPETITION_PENALTY = 1000


class SamplingParamsError(ValueError):
    """A sampling parameter that cannot be honoured; `parameter` is its name."""

    def __init__(self, parameter: str, value: object, rule: str) -> None:
        super().__init__(f"`{parameter}` is {reprlib.repr(value)}: {rule}.")
        self.parameter = parameter


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_token(value: object) -> bool:
    return isinstance(value, int) and _is_int(value) and 0 <= value <= MAX_INT


def _is_number(value: object) -> bool:
    # An int may be too large for `isfinite`; every rule bounds it.
    return _is_int(value) or (isinstance(value, float) and math.isfinite(value))


_RULES: tuple[tuple[str, Callable[..., bool], str], ...] = (
    (
        "temperature",
        lambda x: _is_number(x) and 0 <= x <= MAX_TEMPERATURE,
        f"use a number from 0 (greedy) to {MAX_TEMPERATURE}",
    ),
    ("top_k", lambda x: _is_int(x) and 0 <= x <= MAX_INT, f"use a number of tokens up to {MAX_INT}, or 0 for all"),
    ("top_p", lambda x: _is_number(x) and MIN_TOP_P <= x <= 1, f"use a probability from {MIN_TOP_P} to 1"),
    ("min_p", lambda x: _is_number(x) and 0 <= x <= 1, "use a probability from 0 to 1"),
    (
        "repetition_penalty",
        lambda x: _is_number(x) and 1 / MAX_REPETITION_PENALTY <= x <= MAX_REPETITION_PENALTY,
        f"use a number from {1 / MAX_REPETITION_PENALTY} to {MAX_REPETITION_PENALTY}; 1 is off",
    ),
    ("frequency_penalty", lambda x: _is_number(x) and -2 <= x <= 2, "use a number from -2 to 2; 0 is off"),
    ("presence_penalty", lambda x: _is_number(x) and -2 <= x <= 2, "use a number from -2 to 2; 0 is off"),
    ("seed", lambda x: x is None or (_is_int(x) and -(2**63) <= x < 2**64), "use a 64-bit integer, or none"),
    (
        "logprobs",
        lambda x: x is None or (_is_int(x) and 0 <= x <= MAX_LOGPROBS),
        f"use a number of alternatives from 0 to {MAX_LOGPROBS}, or none",
    ),
    ("stop", lambda x: all(isinstance(s, str) and s for s in x), "every stop string needs at least one character"),
    (
        "stop_token_ids",
        lambda x: len(x) <= MAX_STOP_TOKEN_IDS and all(_is_token(i) for i in x),
        f"use at most {MAX_STOP_TOKEN_IDS} token ids, each from 0 to {MAX_INT}",
    ),
    ("max_tokens", lambda x: _is_int(x) and 1 <= x <= MAX_INT, f"use from 1 to {MAX_INT} tokens"),
    ("min_tokens", lambda x: _is_int(x) and x >= 0, "use 0 or more tokens"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen and when they end.

    Fields are applied in this order: `logit_bias`, `min_tokens`, `repetition_penalty` (prompt and output, Keskar et
    al. 2019), `frequency_penalty` and `presence_penalty` (output only, as OpenAI defines them), `temperature`,
    `min_p`, `top_k`, `top_p`. A temperature of 0 is greedy. `logprobs` is the number of most likely alternatives
    reported beside the log-probability of each token; they are the model's, before anything in this class.
    `stop` strings are matched by whoever turns tokens into text; everything else concerns token ids.

    Raises:
        SamplingParamsError: names the parameter, its value and the rule.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    logprobs: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    max_tokens: int = 16

    def __post_init__(self) -> None:
        for name, holds, rule in _RULES:
            value = getattr(self, name)
            if not holds(value):
                raise SamplingParamsError(name, value, rule)
        if self.min_tokens > self.max_tokens:
            rule = f"use at most `max_tokens`, which is {self.max_tokens}"
            raise SamplingParamsError("min_tokens", self.min_tokens, rule)
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            rule = f"use at most {MAX_LOGIT_BIAS} tokens"
            raise SamplingParamsError("logit_bias", f"{len(self.logit_bias)} tokens", rule)
        if len({token for token, _ in self.logit_bias}) != len(self.logit_bias):
            raise SamplingParamsError("logit_bias", self.logit_bias, "name every token once")
        for token, bias in self.logit_bias:
            if not (_is_token(token) and _is_number(bias) and -100 <= bias <= 100):
                rule = f"use pairs of a token id, from 0 to {MAX_INT}, and a bias from -100 to 100"
                raise SamplingParamsError("logit_bias", (token, bias), rule)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken; below 1e-5 a temperature leaves float32 no other choice."""
        return self.temperature < 1e-5

    @property
    def penalized(self) -> bool:
        """Whether the choice depends on the tokens so far, so that `sample` needs their counts."""
        penalties = (self.repetition_penalty, self.frequency_penalty, self.presence_penalty)
        return penalties != (1, 0, 0)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises SamplingParamsError if a token id named here is not below `vocab_size`."""
        for name, tokens in (
            ("logit_bias", [token for token, _ in self.logit_bias]),
            ("stop_token_ids", self.stop_token_ids),
        ):
            for token in tokens:
                if token >= vocab_size:
                    raise SamplingParamsError(name, token, f"the vocabulary ends at token id {vocab_size - 1}")

    def with_seed(self, seed: int) -> "SamplingParams":
        """These parameters with `seed`, unless the request chose its own."""
        return self if self.seed is not None else dataclasses.replace(self, seed=seed)
