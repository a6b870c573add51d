"""Evaluations: one module each, data made here or read from files."""
