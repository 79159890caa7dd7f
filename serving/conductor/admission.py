"""Admission: whom to refuse before any compute is spent (Mooncake arXiv, section 7).

Loads are predicted latencies over their SLOs. `baseline` looks at each stage when it begins, so a request may be
refused after its prefill; `early_rejection` looks at both at arrival, with today's decode load; `predicted` with the
decode load of the moment when the prefill will end; `length_aware` predicts that load from how long outputs really are;
`deferred` does not refuse for decode load but lets requests wait at the Conductor while their TTFT allows it. `goodput`
is `length_aware` with a limit that learns: a request admitted at a forecast of exactly the SLO misses it once its batch
grows, so the limit follows the share of finished requests that did.

`request_level` is `goodput` with an output length predicted for every single request, which the paper leaves to future
work. `shortest_output` defers on that forecast and lets those with the shortest predicted outputs go first: more
requests within their SLOs when there is no room for all, at the price of those with long outputs.
"""

import dataclasses
from collections.abc import Callable, Sequence

from serving.conductor.errors import ConductorError
from serving.conductor.estimators import Occupancy, OutputLengths, TimeModel
from serving.conductor.mirror import ClusterMirror, DecodeMirror
from serving.conductor.output_predictor import OutputPredictor
from serving.conductor.placement import PrefillCandidate
from serving.conductor.types import SLO

ADMISSIONS = (
    "none",
    "baseline",
    "early_rejection",
    "predicted",
    "length_aware",
    "deferred",
    "goodput",
    "request_level",
    "shortest_output",
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionContext:
    """What admission decides on: the beliefs of the Conductor at `now` about one request.

    `decoding` are (start, predicted output tokens) of the requests that the selected instance decodes, and
    `output_tokens` what this one is predicted to generate; only request-level policies are told these.
    """

    mirror: ClusterMirror
    costs: TimeModel
    occupancy: Occupancy
    lengths: OutputLengths
    candidate: PrefillCandidate
    decode: DecodeMirror
    context_tokens: float
    now: float
    predictor: OutputPredictor
    decoding: Sequence[tuple[float, float]]
    output_tokens: float


# The TBT, in seconds, on which the decode stage is judged at arrival.
DecodeForecast = Callable[[AdmissionContext], float]


def _pool_tbt_s(context: AdmissionContext, requests: float) -> float:
    """TBT when so many requests and one more are spread evenly over the decode pool."""
    batch = (requests + 1) / max(1, len(context.mirror.decode_order))
    return context.costs.decode_s(batch, batch * context.context_tokens)


def current_tbt_s(context: AdmissionContext) -> float:
    """From the requests that the selected instance decodes now: blind to those in prefill, hence the oscillation of
    section 7.3.
    """
    decode = context.decode
    return context.costs.decode_s(decode.present + 1, decode.present_tokens + context.context_tokens)


def predicted_tbt_s(context: AdmissionContext) -> float:
    """From the requests that will decode when this prefill ends, each for t_d seconds (section 7.4)."""
    return _pool_tbt_s(context, context.occupancy.at(context.now + context.candidate.ttft_s))


def length_aware_tbt_s(context: AdmissionContext) -> float:
    """On the selected instance: each present request counts with its chance of still running when this prefill ends."""
    decode, costs = context.decode, context.costs
    step_s = costs.decode_s(decode.present, decode.present_tokens)
    more = context.candidate.ttft_s / step_s
    mean = context.lengths.mean
    leaving = decode.present * (1 - context.lengths.survival(int(mean / 2), more))
    batch = decode.assigned - leaving + 1
    mean_tokens = (decode.assigned_tokens + context.context_tokens) / (decode.assigned + 1)
    return costs.decode_s(batch, batch * mean_tokens)


def request_level_tbt_s(context: AdmissionContext) -> float:
    """On the selected instance, request by request: each counts with its own chance of still running, from what it has
    generated and what it was predicted to, when this prefill ends.
    """
    decode, costs, predictor = context.decode, context.costs, context.predictor
    step_s = costs.decode_s(max(1, decode.present), decode.present_tokens)
    more = context.candidate.ttft_s / step_s
    staying = sum(
        predictor.survival(predicted, (context.now - start_s) / step_s, more) for start_s, predicted in context.decoding
    )
    batch = staying + max(0, decode.assigned - len(context.decoding)) + 1
    mean_tokens = (decode.assigned_tokens + context.context_tokens) / (decode.assigned + 1)
    return costs.decode_s(batch, batch * mean_tokens)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionPolicy:
    """When to refuse.

    Attributes:
        checks_ttft: refuse at arrival when the predicted TTFT misses its SLO.
        forecast: TBT judged at arrival; `None` does not look.
        checks_late: the decode instance looks again when the prefill is done.
        defers: wait for decode instead of refusing.
        learns_limit: scale the TBT limit by a `LearnedLimit`.
        per_request: outputs are predicted for each request.
        prefers_short: of the requests that wait, those with the shortest predicted outputs go first.
    """

    name: str
    checks_ttft: bool
    forecast: DecodeForecast | None
    checks_late: bool
    defers: bool = False
    learns_limit: bool = False
    per_request: bool = False
    prefers_short: bool = False

    @property
    def looks(self) -> bool:
        """Whether anything is judged at arrival."""
        return self.checks_ttft or self.forecast is not None

    def reason(
        self, context: AdmissionContext, slo: SLO, waited_s: float, limit: float = 1.0
    ) -> tuple[str | None, float]:
        """Why to refuse ("ttft" or "tbt"; `None` = accept), and the forecast TBT; `limit` scales its SLO."""
        if self.checks_ttft and waited_s + context.candidate.ttft_s > slo.ttft_s:
            return "ttft", 0.0
        if self.forecast is None:
            return None, 0.0
        tbt_s = self.forecast(context)
        return ("tbt" if tbt_s > slo.tbt_s * limit else None), tbt_s


def admission_policy(name: str) -> AdmissionPolicy:
    """The policy called `name`, one of `ADMISSIONS`."""
    policies = (
        AdmissionPolicy(name="none", checks_ttft=False, forecast=None, checks_late=False),
        AdmissionPolicy(name="baseline", checks_ttft=True, forecast=None, checks_late=True),
        AdmissionPolicy(name="early_rejection", checks_ttft=True, forecast=current_tbt_s, checks_late=True),
        AdmissionPolicy(name="predicted", checks_ttft=True, forecast=predicted_tbt_s, checks_late=True),
        AdmissionPolicy(name="length_aware", checks_ttft=True, forecast=length_aware_tbt_s, checks_late=True),
        AdmissionPolicy(
            name="deferred",
            checks_ttft=True,
            forecast=length_aware_tbt_s,
            checks_late=True,
            defers=True,
            learns_limit=True,
        ),
        AdmissionPolicy(
            name="goodput", checks_ttft=True, forecast=length_aware_tbt_s, checks_late=True, learns_limit=True
        ),
        AdmissionPolicy(
            name="request_level",
            checks_ttft=True,
            forecast=request_level_tbt_s,
            checks_late=True,
            learns_limit=True,
            per_request=True,
        ),
        AdmissionPolicy(
            name="shortest_output",
            checks_ttft=True,
            forecast=request_level_tbt_s,
            checks_late=True,
            defers=True,
            learns_limit=True,
            per_request=True,
            prefers_short=True,
        ),
    )
    for policy in policies:
        if policy.name == name:
            return policy
    raise ConductorError(f"No admission `{name}`; known: {', '.join(ADMISSIONS)}.")
