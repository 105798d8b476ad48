"""Closed-form solves: preconditioners S^-1, the least-squares update, low-rank factors."""
