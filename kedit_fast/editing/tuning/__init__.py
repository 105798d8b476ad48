"""Methods that tune one matrix by gradient steps."""
