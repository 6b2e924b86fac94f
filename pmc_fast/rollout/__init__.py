"""Rollouts: samples of a model's answers, each distinct token history computed once."""

from .distributed_engine import SharedEngine, add_counters
from .engine import RolloutEngine, Rollouts, rollout

__all__ = ["RolloutEngine", "Rollouts", "SharedEngine", "add_counters", "rollout"]
