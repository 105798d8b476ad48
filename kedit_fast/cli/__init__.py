"""The commands of kedit-fast."""
