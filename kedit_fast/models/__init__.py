"""Architectures as data, and partial forward passes through them."""
