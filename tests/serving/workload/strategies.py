"""Workloads for property tests."""

import numpy as np
from hypothesis import strategies as st

from serving.workload.requests import Trace
from serving.workload.synthetic import Lengths, arrivals, prefix_tree


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    """Workloads with shared prefixes and partial last blocks."""
    numbers = draw(st.integers(0, 2**32 - 1))
    times = arrivals(draw(st.integers(2, 12)), 1.0, np.random.default_rng(numbers))
    inputs, outputs = Lengths(draw(st.integers(1, 4000)), cv=1.0), Lengths(draw(st.integers(1, 600)), cv=0.5)
    return prefix_tree(times, inputs, outputs, draw(st.floats(0, 0.9)), seed=numbers)
