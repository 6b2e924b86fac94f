"""Partial Model Collapse unlearning (arXiv 2507.04219), fast."""

__version__ = "0.1.0"
