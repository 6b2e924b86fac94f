"""Rollouts: samples of a model's answers, each distinct token history computed once."""

from .engine import RolloutEngine, Rollouts, rollout
from .shared import SharedEngine, add_counters

__all__ = ["RolloutEngine", "Rollouts", "SharedEngine", "add_counters", "rollout"]
