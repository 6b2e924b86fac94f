"""A run from its settings to what it writes: unlearning, evaluation."""
