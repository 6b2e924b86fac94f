"""Runs, from their settings to the files that they write: unlearning and evaluation."""
