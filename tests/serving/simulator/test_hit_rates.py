"""Hit rates of a whole trace against those that an independent script found in the public conversation trace."""

import pathlib

import pytest

from serving.simulator.errors import SimulatorError
from serving.simulator.hit_rates import named_policy, replay_hits
from serving.workload.requests import Trace
from serving.workload.traces import read_trace

# Token-weighted hit rate by capacity in blocks of 512 tokens.
EXPECTED = {
    "lru": {1000: 0.045, 1953: 0.054, 5859: 0.138, 10000: 0.215, 19531: 0.291, 50000: 0.362, 100000: 0.371},
    "fifo": {1000: 0.044, 1953: 0.052, 5859: 0.127, 10000: 0.185, 19531: 0.261, 50000: 0.340, 100000: 0.363},
}


@pytest.mark.parametrize("name", EXPECTED)
def test_conversation_trace(name: str, conversation_trace: pathlib.Path) -> None:
    trace = read_trace(conversation_trace)
    for capacity, rate in EXPECTED[name].items():
        assert replay_hits(trace, named_policy(name, capacity, trace)).rate == pytest.approx(rate, abs=0.005)


def test_unknown_policy_names_the_known() -> None:
    with pytest.raises(SimulatorError, match=r"known: lru.*belady"):
        named_policy("mru", 5, Trace("t", ()))
