"""`turns` learns how long people take, whatever that is."""

import pytest

from kvcache.eviction import eviction_policy
from serving.simulator.hit_rates import replay_hits
from serving.workload.synthetic import Lengths, chat


@pytest.mark.parametrize("name", ["turns", "turns+prefix"])
def test_slow_and_fast_traffic_is_hit_alike(name: str) -> None:
    rates = []
    for scale in (0.01, 1.0, 1000.0):
        trace = chat(
            800,
            session_rate=0.8 / scale,
            turns=4.0,
            think_s=12.0 * scale,
            system=Lengths(2048, cv=0.5),
            question=Lengths(900, cv=1.0),
            answer=Lengths(350, cv=0.7),
            seed=0,
        )
        rates.append(replay_hits(trace, eviction_policy(name, 150)).rate)
    assert min(rates) > 0.4
    assert max(rates) - min(rates) < 0.02
