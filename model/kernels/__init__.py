"""One folder per op: api, reference, one file per backend (floor 0)."""
