"""Every search method under its name."""

from gan import baselines, paper_search, search
from gan.baselines.driver import Search

METHODS: dict[str, Search] = {"hpgan": search.run, "hpgan_paper": paper_search.run, **baselines.METHODS}
