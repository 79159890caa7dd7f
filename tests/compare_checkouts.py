"""Shows that two checkouts of this project give the same results: run it by hand before and after a redraw.

    python tests/compare_checkouts.py OLD NEW --trace=conversation_trace.jsonl [--only=NAME,...] [--out=FOLDER]

Each command runs in both checkouts, with the interpreter that runs this script, and `rows` and `totals` of result.json
as well as requests.jsonl must be equal. Results of OLD are kept in `--out` and not made twice. What is meant to differ
is listed in `MEANT`; everything else that differs is printed, and the exit status is 1.
"""

import argparse
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

_SIMULATE = ["simulate_cluster", "--trace={trace}"]
_COUPLED = ["--prefill=0", "--decode=0"]
COMMANDS: dict[str, list[str]] = {
    "8P+8D": [*_SIMULATE, "--plots"],
    "twice the load": [*_SIMULATE, "--limit=6000", "--speed=2", "--admission=goodput", "--queue=shortest", "--fair"],
    "deferred": [*_SIMULATE, "--limit=6000", "--speed=2", "--admission=deferred", "--learn"],
    "failures": [*_SIMULATE, "--limit=5000", "--fail=60:3,200:9,300:0", "--join=400:3"],
    "roles": [*_SIMULATE, "--limit=5000", "--speed=2", "--roles", "--prefill=10", "--decode=4"],
    "cpp": [*_SIMULATE, "--limit=5000", "--cpp=2", "--prefill_chunk=4096"],
    "ssd": [*_SIMULATE, "--limit=5000", "--host_tokens=300000", "--ssd_tokens=3000000", "--eviction=arc"],
    "store": [*_SIMULATE, "--limit=5000", "--host_tokens=300000", "--store_tokens=3000000", "--fail=100:2"],
    "marginal": [*_SIMULATE, "--limit=3000", "--placement=marginal", "--speed=3", "--admission=request_level"],
    "coupled": [*_SIMULATE, "--limit=3000", *_COUPLED, "--coupled=16", "--chunk=512"],
    "engine nodes": [
        *_SIMULATE, "--limit=1500", *_COUPLED, "--coupled=4", "--shrink=16", "--speed=0.5", "--fail=300:1",
        "--calibration={calibration}",
    ],
    "cache_capacity": ["cache_capacity", "--trace={trace}", "--limit=6000", "--capacities=1000,10000"],
    "hpgan_paper": [
        "hpgan_paper", "--seeds=1", "--method=random,ga", "--budget=2000", "--held_out=ob_zcp:7",
        "--held_out_budget=1000", "--held_out_steps=20", "--ablation_length=7", "--ablation_budget=1000",
        "--codec=rank1", "--loss=ns",
    ],
    "lamina_paper": ["lamina_paper"],
    "mooncake_paper": ["mooncake_paper", "--trace={trace}", "--table=break_even,figure_14,figure_9,figure_5"],
    "plan_capacity": ["plan_capacity", "--trace={trace}", "--limit=1000"],
}  # fmt: skip
# Commands of the old checkout where a flag has another name or syntax there.
OLD_COMMANDS: dict[str, list[str]] = {
    # One --fail per node.
    "failures": [*_SIMULATE, "--limit=5000", "--fail=60:3", "--fail=200:9", "--fail=300:0", "--join=400:3"],
}
_CALIBRATE = [
    "calibrate", "--model={model}", "--repeats=1", "--max_model_len=1024", "--num_pages=256", "--max_batch=16",
    "--token_budget=256",
]  # fmt: skip

# What is meant to differ, by a pattern of its whole path, with the reason.
MEANT = {
    r".*\.(cpu_s|seconds|started_at)": "the machine's time",
    r"hpgan_paper\.totals\.searches\.\w+\.(cpu_s_to|evaluations|evaluations_at_chips_to)": "a search says what it cost",
    r"hpgan_paper\.totals\.held_out\[\d+\]\.problem": "problems have names",
    r"hpgan_paper\.totals\.held_out\[3\]\.distinct": "a budget below one step of ga pays for the codes that it covers",
}
_IS_MEANT = re.compile("|".join(f"(?:{pattern})" for pattern in MEANT)).fullmatch
_PROMPTS = ("Once upon a time", "def main(argv):", "The quick brown fox", "import os", "A list of numbers: 1, 2, 3")


def main() -> int:
    """Runs all commands; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=pathlib.Path)
    parser.add_argument("new", type=pathlib.Path)
    parser.add_argument("--trace", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/compare"))
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    out, trace = options.out.resolve(), options.trace.resolve()
    calibration = out / "calibrate" / "calibration.json"
    if not calibration.exists():
        model = options.old.resolve() / "experiments" / "assets" / "demo_model"
        _run(options.old, [part.format(model=model) for part in _CALIBRATE], calibration.parent)
    wanted = [name for name in options.only.split(",") if name] or [*COMMANDS, "tokens"]
    failed = 0
    for name in wanted:
        begun = time.monotonic()
        folders = {side: out / side / re.sub(r"\W+", "_", name) for side in ("old", "new")}
        for side, folder in folders.items():
            checkout = getattr(options, side)
            if side == "old" and (folder / "result.json").exists():
                continue
            if name == "tokens":
                _tokens(checkout, folder)
            else:
                commands = COMMANDS | OLD_COMMANDS if side == "old" else COMMANDS
                command = [part.format(trace=trace, calibration=calibration) for part in commands[name]]
                _run(checkout, command, folder)
        differences = list(_differences(_results(folders["old"]), _results(folders["new"]), name))
        failed += bool(differences)
        verdict = f"{len(differences)} differences" if differences else "equal"
        sys.stdout.write(f"{name}: {verdict} ({time.monotonic() - begun:.0f} s)\n")
        for line in differences[:10]:
            sys.stdout.write(f"    {line}\n")
        sys.stdout.flush()
    return int(failed > 0)


def _environment(checkout: pathlib.Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(checkout.resolve()), "JAX_PLATFORMS": "cpu"}


def _run(checkout: pathlib.Path, command: list[str], folder: pathlib.Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    line = [sys.executable, "-m", f"experiments.{command[0]}", *command[1:], f"--out={folder}"]
    done = subprocess.run(
        line, cwd=checkout, env=_environment(checkout), capture_output=True, text=True, timeout=1200, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(line)} in {checkout} failed:\n{done.stderr[-2000:]}")


def _tokens(checkout: pathlib.Path, folder: pathlib.Path) -> None:
    """What the server answers to prompts sent one after the other, greedy and sampled, log-probabilities included."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    model = checkout.resolve() / "experiments" / "assets" / "demo_model"
    line = [sys.executable, "-m", "experiments.serve", f"--model={model}", f"--port={port}", "--max_batch=8"]
    server = subprocess.Popen(
        line, cwd=checkout, env=_environment(checkout), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        _wait(server, f"http://127.0.0.1:{port}/health")
        rows = [_completion(port, prompt, temperature) for prompt in _PROMPTS for temperature in (0.0, 0.8)]
    finally:
        server.terminate()
        server.wait(60)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps({"rows": rows, "totals": {}}))


def _wait(server: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise SystemExit(f"The server does not answer at {url}.")


def _completion(port: int, prompt: str, temperature: float) -> Any:
    body = {
        "model": "demo_model",
        "prompt": prompt * 20,
        "max_tokens": 48,
        "temperature": temperature,
        "seed": 7,
        "logprobs": 3,
    }
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)["choices"]


def _results(folder: pathlib.Path) -> dict[str, Any]:
    result = json.loads((folder / "result.json").read_text())
    kept = {name: result[name] for name in ("rows", "totals")}
    requests = folder / "requests.jsonl"
    if requests.exists():
        kept["requests"] = [json.loads(line) for line in requests.read_text().splitlines()]
    return kept


def _differences(old: Any, new: Any, path: str) -> Iterator[str]:
    """Every place where the two differ and are not meant to."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            if _IS_MEANT(f"{path}.{key}"):
                continue
            if key not in old or key not in new:
                yield f"{path}.{key}: only in the {'new' if key in new else 'old'} checkout"
            elif key == "id":
                # Ids of requests are strings since clusters and engines share one request.
                yield from _differences(str(old[key]), str(new[key]), f"{path}.{key}")
            else:
                yield from _differences(old[key], new[key], f"{path}.{key}")
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from _differences(one, other, f"{path}[{index}]")
    elif old != new:
        yield f"{path}: {str(old)[:80]} -> {str(new)[:80]}"


if __name__ == "__main__":
    sys.exit(main())
