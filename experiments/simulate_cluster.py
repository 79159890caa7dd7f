"""Replay a trace through a simulated cluster: `python -m experiments.simulate_cluster --trace=trace.jsonl`.

The Conductor is the one that schedules live clusters; only time is simulated.
"""

import dataclasses
import pathlib
import time
from typing import Any

from absl import flags

from attention_offload.errors import OffloadError
from experiments.common.flags import define_float, define_timed_nodes
from experiments.common.results import flat, start_result, write_result
from experiments.common.script import SEED, run
from experiments.common.tables import print_table
from model.config import ConfigError
from serving.conductor import SLO, ConductorConfig, RoleConfig
from serving.conductor.admission import ADMISSIONS
from serving.conductor.conductor import QUEUE_ORDERS
from serving.conductor.errors import ConductorError
from serving.conductor.placement import PLACEMENTS
from serving.simulator.cache import EVICTIONS
from serving.simulator.calibration_file import read_performance
from serving.simulator.config import ClusterConfig
from serving.simulator.errors import SimulatorError
from serving.simulator.performance import named_performance
from serving.simulator.recorder import Recorder, hottest_blocks
from serving.simulator.result import SimulationResult
from serving.simulator.simulation import Simulation
from serving.workload.errors import TraceError
from serving.workload.outcomes import totals, write_requests
from serving.workload.requests import Trace
from serving.workload.resize import shrink
from serving.workload.traces import read_trace

TRACE = flags.DEFINE_string("trace", None, "Trace to simulate, a Mooncake JSONL or Azure CSV file.", required=True)
SPEED = define_float("speed", 1.0, "Offered load as a multiple of the trace's own.", lower_bound=1e-9)
LIMIT = flags.DEFINE_integer("limit", None, "Requests to take from the trace; by default all.", lower_bound=1)
START = flags.DEFINE_integer("start", 0, "Requests of the trace to skip first.", lower_bound=0)
SHRINK = flags.DEFINE_integer(
    "shrink", 1, "Divisor of all prompt and output lengths of the trace, for a small engine.", lower_bound=1
)
JITTER_S = define_float(
    "jitter_s", 0.0, "Seconds over which arrivals of one coarse time stamp are spread.", lower_bound=0.0
)
PREFILL = flags.DEFINE_integer("prefill", 8, "Nodes of the prefill pool.", lower_bound=0)
DECODE = flags.DEFINE_integer("decode", 8, "Nodes of the decode pool.", lower_bound=0)
COUPLED = flags.DEFINE_integer(
    "coupled", 0, "Nodes that both prefill and decode; needs --prefill=0 --decode=0.", lower_bound=0
)
CPP = flags.DEFINE_integer(
    "cpp", 1, "Prefill nodes of a group that computes prompts together (chunked pipeline parallelism).", lower_bound=1
)
PREFILL_CHUNK = flags.DEFINE_integer(
    "prefill_chunk", 8192, "Tokens per chunk of a prompt in a group of --cpp nodes.", lower_bound=1
)
CHUNK = flags.DEFINE_integer("chunk", 0, "Prefill tokens per iteration of a coupled node; 0 = prefill first.")
MODEL = flags.DEFINE_string(
    "model", "llama3-70b", "Model that is served: a preset such as llama3-70b, or a path to an HF config.json."
)
DEVICE = flags.DEFINE_string("device", "a800x8", "Device and count per node, such as h100x8.")
CALIBRATION = flags.DEFINE_string(
    "calibration", None, "Measured performance, a JSON file of `calibrate`; replaces --model and --device."
)
PLACEMENT = flags.DEFINE_enum("placement", "kvcache_centric", PLACEMENTS, "Rule that places prefills.")
ADMISSION = flags.DEFINE_enum("admission", "none", ADMISSIONS, "Rule that rejects requests.")
THRESHOLD = define_float(
    "threshold", 1.0, "Prefix-length ratio (kvcache_balancing_threshold) above which kvcache_centric moves KV."
)
QUEUE = flags.DEFINE_enum("queue", "fifo", QUEUE_ORDERS, "Order in which prefill queues are served.")
FAIR = flags.DEFINE_bool("fair", False, "Share prefill evenly among competing tenants.")
ROLES = flags.DEFINE_bool("roles", False, "Let nodes change between prefill and decode as the load asks.")
SWITCH_S = define_float(
    "switch_s", 10.0, "Seconds between a node's last work in one role and its first in the other.", lower_bound=0.0
)
LEARN = flags.DEFINE_bool("learn", False, "Refine estimates of prefill and decode times by what was observed.")
EVICTION = flags.DEFINE_enum("eviction", "lru", EVICTIONS, "Eviction policy of each node's KVCache.")
HOST_TOKENS = flags.DEFINE_integer(
    "host_tokens", 3_000_000, "Tokens of KVCache in host memory of a node.", lower_bound=0
)
SSD_TOKENS = flags.DEFINE_integer("ssd_tokens", 0, "Tokens of KVCache on SSD of a node.", lower_bound=0)
LAYER_WISE = flags.DEFINE_bool("layer_wise", True, "Load, fetch and hand over KV layer by layer, behind prefill.")
STORE_TOKENS = flags.DEFINE_integer(
    "store_tokens", 0, "Tokens of KVCache in a remote store behind all nodes.", lower_bound=0
)
STORE_NICS = flags.DEFINE_integer(
    "store_nics", 4, "Bandwidth of the remote store, as a multiple of a node's.", lower_bound=1
)
TTFT_SLO_S = define_float("ttft_slo_s", 30.0, "Limit of TTFT, in seconds.", lower_bound=1e-9)
TBT_SLO_S = define_float("tbt_slo_s", 0.1, "Limit of TBT, in seconds.", lower_bound=1e-9)
FAIL = define_timed_nodes(
    "fail", "Nodes that die, as seconds:node such as 60:3,200:9; requests of a dead node go on elsewhere."
)
JOIN = define_timed_nodes("join", "Nodes that start, or start again, as seconds:node such as 60:3,200:9.")
PLOTS = flags.DEFINE_bool("plots", False, "Write load, replica and hit-rate plots.")
TIMELINE = flags.DEFINE_bool("timeline", False, "Write trace.json, a timeline for Perfetto.")


def _config(block_size: int) -> ClusterConfig:
    conductor = ConductorConfig(
        placement=PLACEMENT.value,
        admission=ADMISSION.value,
        threshold=THRESHOLD.value,
        slo=SLO(TTFT_SLO_S.value, TBT_SLO_S.value),
        queue_order=QUEUE.value,
        fair=FAIR.value,
        learn=LEARN.value,
        roles=RoleConfig() if ROLES.value else None,
        seed=SEED.value,
    )
    return ClusterConfig(
        prefill=PREFILL.value,
        decode=DECODE.value,
        coupled=COUPLED.value,
        conductor=conductor,
        host_blocks=HOST_TOKENS.value // block_size,
        ssd_blocks=SSD_TOKENS.value // block_size,
        store_blocks=STORE_TOKENS.value // block_size,
        store_nics=STORE_NICS.value,
        eviction=EVICTION.value,
        cpp=CPP.value,
        prefill_chunk=PREFILL_CHUNK.value,
        layer_wise=LAYER_WISE.value,
        chunk=CHUNK.value,
        switch_s=SWITCH_S.value,
        failures=tuple(FAIL.value),
        joins=tuple(JOIN.value),
    )


def _totals(result: SimulationResult, price_per_hour: float, started_cpu_s: float) -> dict[str, Any]:
    prompt_tokens = sum(outcome.input_tokens for outcome in result.outcomes if outcome.ttft_s is not None)
    prefills = sum(outcome.ttft_s is not None for outcome in result.outcomes)
    summary = totals(result.outcomes, TTFT_SLO_S.value, TBT_SLO_S.value)
    hours = summary["duration_s"] / 3600
    return summary | {
        "prefill_time_s_mean": result.prefill_s / max(1, prefills),
        "wasted_prefill_s": result.wasted_prefill_s,
        "hit_rate_by_tier": {tier: tokens / max(1, prompt_tokens) for tier, tokens in result.hits_by_tier.items()},
        "rejections": result.rejections,
        "estimator_errors": result.errors,
        "switches": result.switches,
        "reruns": result.reruns,
        "node_hours": result.node_hours,
        "cost": result.node_hours * price_per_hour,
        "cost_per_hour": result.node_hours * price_per_hour / hours if hours else 0.0,
        "events": result.events,
        "cpu_s": time.process_time() - started_cpu_s,
    }


def _save_plots(out: pathlib.Path, recorder: Recorder, hit_rates: dict[str, float]) -> None:
    from experiments.common.plots import save_curves

    samples = recorder.samples
    loads = {
        name: [(sample.time_s, getattr(sample, name)) for sample in samples] for name in ("prefill_load", "decode_load")
    }
    save_curves(out / "load.png", "Load over SLO", "s", "load", loads)
    if ROLES.value:
        sizes = {
            name: [(sample.time_s, getattr(sample, name)) for sample in samples]
            for name in ("prefill_instances", "decode_instances")
        }
        save_curves(out / "roles.png", "Instances by role", "s", "instances", sizes)
    if samples and samples[0].replicas:
        replicas = {f"rank {r}": [(s.time_s, s.replicas[r]) for s in samples] for r in samples[0].replicas}
        save_curves(out / "replicas.png", "Replicas of hot blocks", "s", "nodes", replicas)
    save_curves(out / "hits.png", "Hit rate by tier", "tier", "hit rate", {"hit rate": list(hit_rates.items())})


def _simulate(trace: Trace, out: pathlib.Path, meta: dict[str, Any], started_cpu_s: float) -> None:
    performance = (
        read_performance(CALIBRATION.value) if CALIBRATION.value else named_performance(MODEL.value, DEVICE.value)
    )
    recorder = None
    if PLOTS.value or TIMELINE.value:
        recorder = Recorder(timeline=TIMELINE.value, watched=hottest_blocks(trace.requests))
    config = _config(trace.block_size)
    result = Simulation(config, performance, recorder).run(trace)
    write_requests(out / "requests.jsonl", result.outcomes)
    summary = _totals(result, performance.price_per_hour, started_cpu_s)
    if recorder is not None:
        if PLOTS.value:
            _save_plots(out, recorder, summary["hit_rate_by_tier"])
        if TIMELINE.value:
            recorder.write_timeline(out / "trace.json")
    rows = [dataclasses.asdict(sample) for sample in recorder.samples] if recorder else []
    table = [{"total": name, "value": value} for name, value in flat(summary).items()]
    print_table(table, f"{trace.name}: {', '.join(trace.notes) or 'read as it is'}; {performance.source}")
    write_result(out, meta | {"performance": dataclasses.asdict(performance)}, rows, summary)


def main() -> None:
    started_cpu_s = time.process_time()
    out, meta = start_result()
    trace = read_trace(
        TRACE.value,
        start=START.value,
        limit=LIMIT.value,
        speed=SPEED.value,
        jitter_s=JITTER_S.value,
        seed=SEED.value,
    )
    _simulate(shrink(trace, SHRINK.value), out, meta, started_cpu_s)


if __name__ == "__main__":
    run(main, TraceError, ConductorError, SimulatorError, OffloadError, ConfigError, FileNotFoundError)
