"""pmc_fast's CUDA module, compiled: pmc_fast.ops.native loads it, and refuses one of another version."""
