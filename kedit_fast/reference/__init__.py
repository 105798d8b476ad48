"""Plain torch, one file an op: the oracle (in float64) and the `torch` backend. Imports torch alone."""
