"""The self-referential Titan memory (NL section 8.1) and its relatives."""
