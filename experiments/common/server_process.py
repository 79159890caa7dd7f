"""A server in a process of its own: started, waited for, watched, ended."""

import contextlib
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from types import TracebackType

_DRAIN_S = 20.0
_LAST_LINES = 15


class ServerDiedError(Exception):
    """The server's process ended by itself, or did not come up in time; the message has its last lines of output."""


class ServerProcess:
    """`python -m experiments.serve` on a free port. A context manager that starts it and ends it.

    Args:
        model: HF folder.
        log: file for everything that it prints.
        *flags: further flags of `experiments.serve`.
        start_timeout_s: how long loading and compiling may take.
        on_output: told its latest line of output while it starts.

    Attributes:
        url: where it serves.
    """

    def __init__(
        self,
        model: pathlib.Path,
        log: pathlib.Path,
        *flags: str,
        start_timeout_s: float = 600.0,
        on_output: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._command = [sys.executable, "-m", "experiments.serve", f"--model={model}", "--port=0", *flags]
        self._log = log
        self._start_timeout_s = start_timeout_s
        self._on_output = on_output

    def __enter__(self) -> "ServerProcess":
        with self._log.open("w") as output:
            self._process = subprocess.Popen(self._command, stdout=output, stderr=subprocess.STDOUT)
        try:
            self.url = self._wait_until_it_serves()
        except BaseException:
            self._process.kill()
            self._process.wait()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Lets it drain if all went well, and ends it at once otherwise."""
        if kind is None and self._process.poll() is None:
            self.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_DRAIN_S)
        self._process.kill()
        self._process.wait()

    @property
    def output(self) -> str:
        """Everything it has printed."""
        return self._log.read_text(errors="replace")

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def last_lines(self) -> str:
        """The end of what it has printed."""
        return "\n".join(self.output.rstrip().splitlines()[-_LAST_LINES:])

    def terminate(self) -> None:
        """Asks it to drain and end."""
        self._process.send_signal(signal.SIGTERM)

    def exit_code(self, timeout_s: float) -> int:
        """Waits for its end."""
        return self._process.wait(timeout_s)

    def check(self, wait_s: float = 0.0) -> None:
        """Raises ServerDiedError if the process has ended, or does within `wait_s` seconds."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(wait_s)
        if (code := self._process.poll()) is not None:
            ended = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            raise ServerDiedError(f"The server {ended}. Its last output ({self._log}):\n{self.last_lines()}")

    def _wait_until_it_serves(self) -> str:
        deadline = time.monotonic() + self._start_timeout_s
        while not (found := re.search(r"^Serving .* at (http://[^ ]+):", output := self.output, re.MULTILINE)):
            self.check()
            if time.monotonic() > deadline:
                raise ServerDiedError(
                    f"The server was not ready within {self._start_timeout_s:.0f} s. Its last output ({self._log}):\n"
                    f"{self.last_lines()}"
                )
            self._on_output(output.rstrip().rpartition("\n")[2])
            time.sleep(0.1)
        return found[1]
