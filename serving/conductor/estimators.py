"""What the Conductor believes about time, learned from what it is told, with the error of each belief."""

import bisect
import dataclasses
from collections.abc import Sequence


class OnlineRegression:
    """Recursive least squares with forgetting: y ~ w . x, from first weights that may come from a calibration.

    `error` is the running mean of |predicted - observed| / observed, each prediction made before it was learned from.
    """

    def __init__(self, weights: Sequence[float], scales: Sequence[float], forgetting: float = 0.9995) -> None:
        """`scales` are typical feature sizes; they make the problem well conditioned."""
        size = len(weights)
        self._scales = tuple(scales)
        self._weights = [w * s for w, s in zip(weights, scales, strict=True)]
        self._covariance = [[float(i == j) for j in range(size)] for i in range(size)]
        self._forgetting = forgetting
        self.observations = 0
        self.error = 0.0

    @property
    def weights(self) -> tuple[float, ...]:
        return tuple(w / s for w, s in zip(self._weights, self._scales, strict=True))

    def predict(self, features: Sequence[float]) -> float:
        return sum(w * f / s for w, f, s in zip(self._weights, features, self._scales, strict=True))

    def learn(self, features: Sequence[float], observed: float) -> None:
        x = [f / s for f, s in zip(features, self._scales, strict=True)]
        residual = observed - sum(w * f for w, f in zip(self._weights, x, strict=True))
        self.observations += 1
        if observed > 0:
            self.error += (abs(residual) / observed - self.error) / min(self.observations, 1000)
        px = [sum(p * f for p, f in zip(row, x, strict=True)) for row in self._covariance]
        denominator = self._forgetting + sum(f * p for f, p in zip(x, px, strict=True))
        gain = [p / denominator for p in px]
        self._weights = [w + g * residual for w, g in zip(self._weights, gain, strict=True)]
        # Directions that the workload never excites must not blow up: their covariance stays below its start.
        shrunk = [
            [p - g * q for p, q in zip(row, px, strict=True)] for row, g in zip(self._covariance, gain, strict=True)
        ]
        trace = sum(shrunk[i][i] for i in range(len(x)))
        forget = self._forgetting if trace < len(x) else 1.0
        self._covariance = [[value / forget for value in row] for row in shrunk]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TimeModel:
    """Coefficients, in seconds, of the costs of one instance.

    prefill(n, p) = prefill_base + prefill_token (n - p) + prefill_pair (n^2 - p^2) + prefill_reused p, for a prompt of
    n tokens of which the first p are cached; an iteration of a decode batch of b sequences with c tokens of KV in all
    takes decode_base + decode_sequence b + decode_token c.
    """

    prefill_base: float
    prefill_token: float
    prefill_pair: float
    prefill_reused: float
    decode_base: float
    decode_sequence: float
    decode_token: float
    transfer_token: float

    def prefill_s(self, tokens: int, reused: int) -> float:
        fresh = tokens - reused
        return (
            self.prefill_base
            + self.prefill_token * fresh
            + self.prefill_pair * fresh * (tokens + reused)
            + self.prefill_reused * reused
        )

    def decode_s(self, batch: float, tokens: float) -> float:
        return self.decode_base + self.decode_sequence * batch + self.decode_token * tokens

    def decode_run(self, batch: int, tokens: int) -> tuple[float, float, int]:
        """Iterations of a batch whose members stay: first term and step in seconds, and how many follow that rule."""
        return self.decode_s(batch, tokens), self.decode_token * batch, 1 << 60

    def transfer_s(self, tokens: int) -> float:
        return self.transfer_token * tokens


class MeanError:
    """Running means of |predicted - observed| and of that over what was observed."""

    def __init__(self) -> None:
        self.observations = 0
        self.absolute = self.relative = 0.0

    def observe(self, predicted: float, observed: float) -> None:
        self.observations += 1
        error = abs(predicted - observed)
        self.absolute += (error - self.absolute) / self.observations
        if observed > 0:
            self.relative += (error / observed - self.relative) / self.observations


class TimeEstimator:
    """A `TimeModel` that follows what the cluster reports, and what its predictions were off by."""

    _PREFILL_SCALES = (1.0, 1e4, 1e8, 1e4)
    _DECODE_SCALES = (1.0, 10.0, 1e5)

    def __init__(self, model: TimeModel, learn: bool = False) -> None:
        self.model = model
        self._learns = learn
        m = model
        self._prefill = OnlineRegression(
            (m.prefill_base, m.prefill_token, m.prefill_pair, m.prefill_reused), self._PREFILL_SCALES
        )
        self._decode = OnlineRegression((m.decode_base, m.decode_sequence, m.decode_token), self._DECODE_SCALES)
        self.prefill, self.queue, self.transfer, self.ttft, self.tbt = (MeanError() for _ in range(5))

    def observe_prefill(self, tokens: int, reused: int, predicted_s: float, seconds: float) -> None:
        """One prefill, and what had been predicted for it."""
        self.prefill.observe(predicted_s, seconds)
        if self._learns:
            fresh = tokens - reused
            self._prefill.learn((1.0, fresh, fresh * (tokens + reused), reused), seconds)
            base, token, pair, again = self._prefill.weights
            self.model = dataclasses.replace(
                self.model, prefill_base=base, prefill_token=token, prefill_pair=pair, prefill_reused=again
            )

    def observe_decode(self, batch: float, tokens: float, seconds: float) -> None:
        """One iteration, or means over several."""
        if self._learns:
            self._decode.learn((1.0, batch, tokens), seconds)
            base, sequence, token = self._decode.weights
            self.model = dataclasses.replace(self.model, decode_base=base, decode_sequence=sequence, decode_token=token)

    def errors(self) -> dict[str, float]:
        """Mean errors of what was observed: relative for prefill, decode iterations and TBT; seconds for the others."""
        found = {"prefill": self.prefill, "tbt": self.tbt}
        errors = {name: error.relative for name, error in found.items() if error.observations}
        if self._decode.observations:
            errors["decode"] = self._decode.error
        found = {"queue_s": self.queue, "transfer_s": self.transfer, "ttft_s": self.ttft}
        return errors | {name: error.absolute for name, error in found.items() if error.observations}


class OutputLengths:
    """How many tokens requests generate, from those that finished: mean, and survival of those still running.

    Bins of 64 tokens with exponential forgetting; starts from `prior_mean` tokens, geometric, worth `prior_weight`
    requests.
    """

    _BIN, _BINS = 64, 64

    def __init__(self, prior_mean: float = 256.0, prior_weight: float = 20.0) -> None:
        keep = 1 - min(1.0, self._BIN / prior_mean)
        self._alive = [prior_weight * keep**i for i in range(self._BINS)]
        self._total, self._mean = prior_weight, prior_mean

    @property
    def mean(self) -> float:
        return self._mean

    def observe(self, tokens: int) -> None:
        self._total += 1
        self._mean += (tokens - self._mean) / min(self._total, 2000.0)
        for i in range(min(tokens // self._BIN + 1, self._BINS)):
            self._alive[i] += 1

    def survival(self, generated: int, more: float) -> float:
        """P(a request that has generated so many tokens generates at least `more` beyond them)."""
        last = self._BINS - 1
        now = self._alive[min(generated // self._BIN, last)]
        return self._alive[min(int((generated + more) // self._BIN), last)] / now if now > 0 else 0.0


class Occupancy:
    """How many requests will be decoding at a later time (Mooncake arXiv, section 7.4): each decodes for t_d seconds.

    t_d is the running mean of recent decode durations.
    """

    def __init__(self, prior_s: float = 15.0) -> None:
        self.decode_s = prior_s
        self._seen = 0
        self._starts: list[float] = []
        self._coming: list[float] = []

    def accept(self, finish_s: float) -> None:
        """A prefill was accepted that will finish at `finish_s`."""
        bisect.insort(self._coming, finish_s)

    def start(self, predicted_s: float, now: float) -> None:
        """The prefill predicted to finish at `predicted_s` is done; its decode starts."""
        self.drop(predicted_s)
        bisect.insort(self._starts, now)

    def drop(self, predicted_s: float) -> None:
        """The prefill predicted to finish at `predicted_s` leads to no decode."""
        del self._coming[bisect.bisect_left(self._coming, predicted_s)]

    def leave(self, started_s: float) -> None:
        """A decode that started then was lost."""
        del self._starts[bisect.bisect_left(self._starts, started_s)]

    def finish(self, started_s: float, now: float) -> None:
        """A decode that started then is done; its duration is learned from."""
        self.leave(started_s)
        self._seen += 1
        self.decode_s += (now - started_s - self.decode_s) / min(self._seen, 500)

    @property
    def running(self) -> int:
        return len(self._starts)

    def at(self, time: float) -> int:
        """Requests decoding at `time`."""
        since = time - self.decode_s
        running = len(self._starts) - bisect.bisect_right(self._starts, since)
        coming = bisect.bisect_right(self._coming, time) - bisect.bisect_right(self._coming, since)
        return running + coming
