"""Rollouts: samples of a model's answers, each distinct token history computed once."""

from .engine import RolloutEngine, Rollouts, rollout
from .shared import SharedEngine

__all__ = ["RolloutEngine", "Rollouts", "SharedEngine", "rollout"]
