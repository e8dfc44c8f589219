"""Leaf helpers, one job a file; nothing here imports another package of the project."""
