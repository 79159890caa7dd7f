"""A real server in a process of its own."""

import pathlib
import re
import signal
import subprocess
import sys
import time
from types import TracebackType

_ROOT = pathlib.Path(__file__).parents[3]
_START_TIMEOUT_S = 240


class ServerProcess:
    """`python -m experiments.serve` on a free port. A context manager that ends it.

    Attributes:
        url: where it serves.
    """

    def __init__(self, model: pathlib.Path, log: pathlib.Path, *flags: str) -> None:
        command = [sys.executable, "-m", "experiments.serve", f"--model={model}", "--port=0", *flags]
        self._log = log
        with log.open("w") as output:
            self._process = subprocess.Popen(command, cwd=_ROOT, stdout=output, stderr=subprocess.STDOUT)

    def __enter__(self) -> "ServerProcess":
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not (found := re.search(r"^Serving .* at (http://[^ ]+):", self.output, re.MULTILINE)):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.__exit__(None, None, None)
                raise RuntimeError(f"The server did not start:\n{self.output}")
            time.sleep(0.1)
        self.url = found[1]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()

    @property
    def output(self) -> str:
        """Everything it has printed."""
        return self._log.read_text()

    def terminate(self) -> None:
        """Asks it to drain and end."""
        self._process.send_signal(signal.SIGTERM)

    def exit_code(self, timeout_s: float) -> int:
        """Waits for its end."""
        return self._process.wait(timeout_s)
