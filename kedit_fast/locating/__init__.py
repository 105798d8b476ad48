"""Where a fact lives in a model, and what an edit does there: tracing, edge scores, circuits, probes."""
