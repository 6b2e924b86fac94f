"""Measurements: contestants in interleaved rounds, their peak memory, result files; `pmc-fast bench` on them."""
