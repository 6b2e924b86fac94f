"""Rollouts: samples of a model's answers, each distinct token history computed once."""

from .engine import RolloutEngine, Rollouts, rollout

__all__ = ["RolloutEngine", "Rollouts", "rollout"]
