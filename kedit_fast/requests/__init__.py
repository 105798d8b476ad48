"""What is to be edited: a request, its prompts and texts. Knows models, no editing."""
