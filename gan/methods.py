"""Every search method under its name, called as `METHODS[name](problem, budget, seed, progress, stop_at=None)`."""

from collections.abc import Callable

from gan import paper_search, search
from gan.ledger import SearchResult

METHODS: dict[str, Callable[..., SearchResult]] = {
    "hpgan": search.run,
    "hpgan_paper": paper_search.run,
}
