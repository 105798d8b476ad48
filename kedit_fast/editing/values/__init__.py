"""What an edited layer should put out: found by gradient descent, looked up, shared between processes."""
