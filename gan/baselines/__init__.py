"""Classical searches at an equal evaluation budget, thousands of chains at once in JAX."""
