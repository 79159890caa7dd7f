"""How many nodes, with how much memory, a trace needs: `python -m experiments.plan_capacity --trace=trace.jsonl`.

Simulates clusters of like nodes until it has the cheapest (device, prefill, decode, DRAM, SSD) that keeps the SLO, and
says why cheaper ones miss it. For pools of unlike devices see `plan_deployment`.
"""

import itertools

from absl import app, flags
from tqdm import tqdm

from attention_offload.costs.model_table import load_shape
from attention_offload.errors import OffloadError
from experiments.common.flags import define_float, define_floats, define_texts
from experiments.common.results import start_result, write_result
from experiments.common.script import SEED, run
from experiments.common.tables import print_table
from model.config import ConfigError
from serving.conductor import SLO, ConductorConfig
from serving.conductor.admission import ADMISSIONS
from serving.conductor.errors import ConductorError
from serving.conductor.placement import PLACEMENTS
from serving.planning.capacity import CapacitySearch, ClusterSize, NodeType, size_row
from serving.simulator.errors import SimulatorError
from serving.simulator.performance import named_performance
from serving.workload.errors import TraceError
from serving.workload.traces import read_trace

TRACE = flags.DEFINE_string("trace", None, "Trace to serve, a Mooncake JSONL or Azure CSV file.", required=True)
LIMIT = flags.DEFINE_integer("limit", None, "Requests to take from the trace; by default all.", lower_bound=1)
SPEED = define_float("speed", 1.0, "Offered load as a multiple of the trace's own.", lower_bound=1e-9)
MODEL = flags.DEFINE_string("model", "llama3-70b", "Preset of the model that is served.")
DEVICES = define_texts(
    "devices",
    ["a800x8", "h100x4", "h100x8", "h200x4"],
    "Kinds of node to compare, as device and count, such as h100x8.",
)
DRAM_GB = define_floats(
    "dram_gb", [0, 500, 1000, 2000], "GB of KVCache in host memory of a prefill node.", lower_bound=0.0
)
SSD_GB = define_floats("ssd_gb", [0, 8000], "GB of KVCache on SSD of a prefill node.", lower_bound=0.0)
DRAM_PRICE = define_float(
    "dram_price", 0.0042, "Dollars per GB-hour of DRAM: an AWS r7a.48xlarge less an m7a.48xlarge.", lower_bound=0.0
)
SSD_PRICE = define_float(
    "ssd_price", 0.00008, "Dollars per GB-hour of NVMe: an AWS i3en.24xlarge less an m5.24xlarge.", lower_bound=0.0
)
TTFT_SLO_S = define_float("ttft_slo_s", 30.0, "Limit of TTFT, in seconds.", lower_bound=1e-9)
TBT_SLO_S = define_float("tbt_slo_s", 0.1, "Limit of TBT, in seconds.", lower_bound=1e-9)
ATTAINMENT = define_float("attainment", 0.95, "Share of all requests that must be within both limits.")
PLACEMENT = flags.DEFINE_enum("placement", "kvcache_centric", PLACEMENTS, "Rule that places prefills.")
ADMISSION = flags.DEFINE_enum("admission", "none", ADMISSIONS, "Rule that rejects requests.")
MAX_NODES = flags.DEFINE_integer("max_nodes", 32, "Most nodes of either pool.", lower_bound=1)


def _node_types() -> list[NodeType]:
    kv_bytes = load_shape(MODEL.value).kv_bytes_per_token
    node_types = []
    for device in DEVICES.value:
        performance = named_performance(MODEL.value, device)
        if not performance.price_per_hour:
            raise app.UsageError(f"{device} has no price, so it cannot be compared; leave it out.")
        for dram, ssd in itertools.product(DRAM_GB.value, SSD_GB.value):
            if ssd and not dram:
                # What is on SSD got there from DRAM.
                continue
            price = dram * DRAM_PRICE.value + ssd * SSD_PRICE.value
            node_types.append(
                NodeType(
                    device=device,
                    performance=performance,
                    kv_bytes=kv_bytes,
                    dram_gb=dram,
                    ssd_gb=ssd,
                    memory_price=price,
                )
            )
    return node_types


def main() -> None:
    out, meta = start_result()
    slo = SLO(TTFT_SLO_S.value, TBT_SLO_S.value)
    conductor = ConductorConfig(placement=PLACEMENT.value, admission=ADMISSION.value, slo=slo, seed=SEED.value)
    trace, node_types = read_trace(TRACE.value, limit=LIMIT.value, speed=SPEED.value), _node_types()
    with tqdm(desc="simulated clusters", unit="") as bar:

        def tell(size: ClusterSize) -> None:
            node_type = size.node_type
            bar.set_postfix_str(f"{node_type.device} {size.prefill}P+{size.decode}D: {size.run.attainment:.1%}")
            bar.update()

        search = CapacitySearch(trace, conductor, attainment=ATTAINMENT.value, max_nodes=MAX_NODES.value, progress=tell)
        best = search.cheapest(node_types)
        cheaper = search.why_not_cheaper(best, node_types) if best else search.simulated
    targets = f"{ATTAINMENT.value:.0%} of {trace.name} within TTFT {slo.ttft_s:g} s and TBT {slo.tbt_s:g} s"
    if best:
        print_table([size_row(best)], f"Cheapest for {targets}")
        title = "Why nothing cheaper does"
    else:
        title = f"Nothing keeps {targets} with up to {MAX_NODES.value} nodes in either pool. Tried"
    print_table([size_row(size) for size in cheaper], title)
    totals = {"best": size_row(best) if best else None, "cheaper": [size_row(size) for size in cheaper]}
    write_result(out, meta, [size_row(size) for size in search.simulated], totals)


if __name__ == "__main__":
    run(main, TraceError, SimulatorError, ConductorError, OffloadError, ConfigError)
