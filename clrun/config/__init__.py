"""Composition of configurations by Hydra, and their check against the signatures of what they name."""
