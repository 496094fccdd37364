"""Malformed inputs thrown at every reader: mutators, readers with their proofs, and the workers that may die of it."""
