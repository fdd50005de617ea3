"""Benchmarks: each prints a table, then one JSON line. Method, commands and results are in README.md beside this."""
