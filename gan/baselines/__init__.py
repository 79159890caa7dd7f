"""Classical searches at an equal evaluation budget, thousands of chains at once in JAX."""

from typing import Any

from gan.baselines import annealing, cross_entropy, genetic, random_search, tabu
from gan.search import Search

METHODS: dict[str, Search[Any]] = {
    "random": random_search.run,
    "cem": cross_entropy.run,
    "annealing": annealing.run,
    "tabu": tabu.run,
    "ga": genetic.run,
    "memetic": genetic.run_memetic,
}
