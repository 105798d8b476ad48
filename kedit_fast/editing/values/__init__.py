"""Values: what an edited layer should put out. They are optimized, looked up in files, shared between processes."""
