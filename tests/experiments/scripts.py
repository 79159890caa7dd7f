"""Scripts from the command line, each in a process of its own that need not import the libraries again.

Importing JAX, Flax and what builds on them takes seconds, in every process anew. Here one server imports them once and
forks for each run, before there is any JAX backend. All else is as a user has it: flags, output, exit status.
"""

import json
import multiprocessing
import os
import pathlib
import runpy
import subprocess
import sys
import tempfile
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent.parent
TRACE = ROOT / "experiments" / "assets" / "demo_trace.jsonl"
_TIMEOUT_S = 300.0

_FORKS = multiprocessing.get_context("forkserver")
# Nothing here may define flags or touch a device.
_FORKS.set_forkserver_preload(
    [
        "gan.search",
        "httpx",
        "matplotlib.pyplot",
        "model.checkpoints",
        "serving.engine.engine",
        "serving.planning.confirm",
    ]
)


def run_script(name: str, out: pathlib.Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs `python -m experiments.NAME --out=OUT ARGUMENTS` in the root of the project."""
    return run_command(f"experiments.{name}", f"--out={out}", *arguments)


def result_of(name: str, out: pathlib.Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """Runs a script that must succeed; returns its result file and what it wrote to stderr."""
    done = run_script(name, out, *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads((out / "result.json").read_text()), done.stderr


def run_command(*command: str) -> subprocess.CompletedProcess[str]:
    """Runs `python -m COMMAND`."""
    with tempfile.TemporaryDirectory() as folder:
        files = [pathlib.Path(folder) / stream for stream in ("stdout", "stderr")]
        process = _FORKS.Process(target=_main, args=(command, *files))
        process.start()
        process.join(_TIMEOUT_S)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(command, _TIMEOUT_S, *(file.read_bytes() for file in files))
        return subprocess.CompletedProcess(command, process.exitcode, *(file.read_text() for file in files))


def _main(command: tuple[str, ...], stdout: pathlib.Path, stderr: pathlib.Path) -> None:
    for path, descriptor in ((stdout, 1), (stderr, 2)):
        with path.open("wb") as file:
            os.dup2(file.fileno(), descriptor)
    os.chdir(ROOT)
    sys.argv = [*command]
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)
