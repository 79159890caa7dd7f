"""What every search method is: a name, a body that spends a ledger, and default settings."""

import dataclasses
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from gan.ledger import Ledger, Progress, SearchResult
from gan.problems import Problem

Settings = TypeVar("Settings")


@dataclasses.dataclass(frozen=True)
class Search(Generic[Settings]):
    """A search method.

    Attributes:
        method: its name, under which results are reported.
        body: searches under a ledger until `ledger.spent`.
        defaults: makes the settings of a run that states none.
    """

    method: str
    body: Callable[[Ledger, Settings], None]
    defaults: Callable[[], Settings]

    def __call__(
        self,
        problem: Problem,
        budget: int,
        seed: int,
        progress: Progress | None = None,
        *,
        stop_at: float | None = None,
        cpu_limit_s: float | None = None,
        settings: Any = None,
    ) -> SearchResult:
        """Searches until a limit is reached: `budget` evaluations, a score of `stop_at`, or `cpu_limit_s`.

        Args:
            cpu_limit_s: processor seconds of this process, all threads together; looked at after every batch.
            settings: of the method; None for its defaults.
        """
        ledger = Ledger(problem, budget, self.method, seed, stop_at=stop_at, cpu_limit_s=cpu_limit_s, progress=progress)
        self.body(ledger, self.defaults() if settings is None else settings)
        return ledger.result()
