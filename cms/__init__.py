"""Continuum memory system: levels that learn at their own period."""
