"""Optimisers of Nested Learning as Optax transforms."""
