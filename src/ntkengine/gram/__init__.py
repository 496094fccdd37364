"""Factors to Gram matrices: strategies, tiles, plans, noise, and the engine that runs them."""
