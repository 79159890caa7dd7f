"""Every search method under its name."""

from typing import Any

from gan import baselines, hpgan, surrogate
from gan.search import Search

METHODS: dict[str, Search[Any]] = {
    "surrogate": surrogate.run,
    "hpgan": hpgan.run,
    "hpgan_untrained": hpgan.run_untrained,
    **baselines.METHODS,
}
