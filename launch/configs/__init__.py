"""One file, one experiment: each has a `get_config()`."""
