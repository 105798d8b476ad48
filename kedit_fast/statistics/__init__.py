"""Second moments of layer inputs: accumulate, collect through a model, store."""
