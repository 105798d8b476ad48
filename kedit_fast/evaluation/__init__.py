"""How well edits took, and what they left alone."""
