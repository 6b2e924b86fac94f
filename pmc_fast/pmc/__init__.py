"""The algorithm without a loop: sampling, reward, store, losses."""
