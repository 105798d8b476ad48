"""Plain torch, one file per op: the oracle of the tests (in float64) and the `torch` backend."""
