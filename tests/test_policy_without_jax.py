"""Policy code starts without JAX: scheduling, placement, eviction and simulation are plain Python."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
POLICY = (
    "kvcache.allocator",
    "kvcache.blocks",
    "kvcache.eviction",
    "kvcache.layout",
    "kvcache.prefix_index",
    "model.sampling_params",
    "serving.cluster.coordinator",
    "serving.conductor",
    "serving.engine.buckets",
    "serving.engine.scheduler",
    "serving.planning.confirm",
    "serving.replay",
    "serving.request",
    "serving.simulator.calibration",
    "serving.simulator.simulation",
    "serving.token_times",
    "serving.workload.traces",
)


def test_importing_policy_code_imports_no_jax() -> None:
    code = f"""
import importlib, sys
for name in {POLICY}:
    importlib.import_module(name)
    loaded = {{"flax", "jax", "jaxlib", "optax"}} & set(sys.modules)
    assert not loaded, f"importing {{name}} imports {{sorted(loaded)}}"
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
