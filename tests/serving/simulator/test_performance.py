"""Performance models, calibration files, NICs, tiers and the paper's tables that need no trace."""

import dataclasses
import json
import pathlib

import pytest

from papers.comparison import REPRODUCED
from serving.conductor.links import Links
from serving.simulator.cache import EVICTIONS, NodeCache
from serving.simulator.calibration_file import read_performance, write_performance
from serving.simulator.config import ClusterConfig
from serving.simulator.decode_table import DecodeTable
from serving.simulator.errors import SimulatorError
from serving.simulator.paper.hardware import break_even, figure_14
from serving.simulator.performance import mooncake_a800, named_performance


def test_paper_tables_without_traces_are_reproduced() -> None:
    for table in (break_even(), figure_14()):
        assert [row for row in table.comparisons if row.verdict != REPRODUCED] == []


def test_roofline_of_the_papers_node_is_near_its_measurements() -> None:
    measured, computed = mooncake_a800(), named_performance("llama3-70b", "a800x8")
    assert computed == measured
    computed = named_performance("llama3-70b", "a100x8")
    for tokens in (8192, 32768, 131072):
        assert computed.costs.prefill_s(tokens, 0) == pytest.approx(measured.costs.prefill_s(tokens, 0), rel=0.35)
    assert computed.kv_capacity_tokens == pytest.approx(measured.kv_capacity_tokens, rel=0.15)


def test_models_that_do_not_fit_and_odd_devices_are_refused() -> None:
    with pytest.raises(SimulatorError, match="does not fit"):
        named_performance("llama3-70b", "a100x1")
    with pytest.raises(SimulatorError, match="not a device and a count"):
        named_performance("llama3-70b", "a100")


def test_calibration_round_trip_and_its_errors(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "calibration.json"
    write_performance(path, mooncake_a800())
    assert read_performance(path) == mooncake_a800()
    table = DecodeTable((1, 8), (100, 1000), ((0.01, 0.02), (0.03, 0.04)))
    tabled = dataclasses.replace(mooncake_a800(), decode_table=table)
    write_performance(path, tabled)
    assert read_performance(path) == tabled
    fields = json.loads(path.read_text())
    fields["costs"]["decode_base"] = -1
    path.write_text(json.dumps(fields))
    with pytest.raises(SimulatorError, match="`decode_base` is -1"):
        read_performance(path)
    path.write_text("[]")
    with pytest.raises(SimulatorError, match="is not a calibration"):
        read_performance(path)
    with pytest.raises(SimulatorError, match="Cannot read"):
        read_performance(tmp_path / "absent.json")


def test_two_pulls_from_one_sender_take_twice_as_long_as_one() -> None:
    links = Links([1] * 5)
    assert links.book(0, 1, 2.0, since_s=1.0) == 3.0
    assert links.book(0, 2, 2.0, since_s=1.0) == 5.0
    assert links.book(3, 4, 2.0, since_s=1.0) == 3.0


def test_host_overflows_to_ssd_and_a_prefix_always_survives() -> None:
    cache = NodeCache(host_blocks=4, ssd_blocks=2)
    assert cache.touch([1, 2, 3], 0.0) == ([], [])
    assert cache.touch([11, 12, 13], 1.0)[1] == []
    assert cache.on_ssd([1, 2, 3]) == 2
    # The deepest blocks left first.
    assert cache.on_ssd([1]) == 0
    assert cache.touch([21, 22], 2.0)[1] == [3, 2]
    assert cache.on_ssd([1, 13]) == 2


@pytest.mark.parametrize("eviction", EVICTIONS)
def test_a_prompt_longer_than_memory_overflows_whatever_the_policy(eviction: str) -> None:
    cache = NodeCache(host_blocks=4, ssd_blocks=3, eviction=eviction)
    cache.touch([1, 2], 0.0)
    demoted, lost = cache.touch([1, 2, *range(10, 20)], 1.0)
    assert len(cache) == 7
    assert len(demoted) == 8
    assert len(set(demoted) - set(lost)) == cache.on_ssd(range(20)) == 3
    # Without SSD, what does not fit is lost.
    small = NodeCache(host_blocks=4, eviction=eviction)
    assert len(small.touch(list(range(9)), 0.0)[1]) == 5
    assert len(small) == 4


def test_clusters_that_cannot_be_are_refused() -> None:
    with pytest.raises(SimulatorError, match="at least one of each"):
        ClusterConfig(prefill=0, decode=3)
    with pytest.raises(SimulatorError, match="use one kind"):
        ClusterConfig(prefill=1, decode=1, coupled=2)
    with pytest.raises(SimulatorError, match="there are nodes 0 to 1"):
        ClusterConfig(prefill=1, decode=1, failures=((1.0, 2),))


def test_decode_tables_interpolate_and_refuse_nonsense() -> None:
    table = DecodeTable((1, 3), (100, 200, 400), ((0.01, 0.02, 0.02), (0.03, 0.04, 0.06)))
    assert table.decode_s(0, 0) == 0
    assert table.decode_s(2, 2 * 150) == pytest.approx(0.025)
    assert table.decode_s(1, 20) == pytest.approx(0.01)
    assert table.decode_s(6, 6 * 600) == pytest.approx(0.16)
    first, step, count = table.decode_run(3, 3 * 190)
    assert (first, step, count) == (pytest.approx(0.039), pytest.approx(0.0001), 11)
    with pytest.raises(SimulatorError, match="`batches` of a decode table"):
        DecodeTable((3, 1), (1, 2), ((1.0, 2.0), (1.0, 2.0)))
    with pytest.raises(SimulatorError, match="needs 2 rows of 2 seconds"):
        DecodeTable((1, 3), (1, 2), ((1.0, 2.0),))
    with pytest.raises(SimulatorError, match="Seconds at batch 3 must be above 0, finite and never fall"):
        DecodeTable((1, 3), (1, 2), ((1.0, 2.0), (2.0, 1.0)))
