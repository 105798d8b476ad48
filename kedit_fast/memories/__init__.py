"""Memories beside the weights: edits that are asked for by a route instead of being written into the model."""
