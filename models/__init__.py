"""Flax linen shells: parameters, names and logical axes around pure code."""
