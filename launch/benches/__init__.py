"""Benchmarks, one module a subcommand of `nestax-bench`."""
