"""Erasure requests: an adapter and a record each, stacked on one frozen model."""
