"""Gates: bounds that the scores must meet; and warnings about runs that damaged the model or diverged."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..config import EvaluationConfig

CHOSEN = ("unlearn_quality", "utility")  # gates that a user sets; max_degenerate is on by default
FELL = 0.8  # warn if utility falls below this fraction of its initial value
ROSE = 1.0  # or if the retain loss ends this many nats per token above its first value
PEAK = 10.0  # or was ever this far above it, about the loss of guessing any token


def judge(
    config: EvaluationConfig, after: Mapping[str, Any], before: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Return the gates of `config` that apply to the scores: ``name``, ``value``, ``bound`` and whether it ``passed``.

    `max_degenerate` bounds ``says_nothing`` of each set; a set that was no better before passes.
    """
    gates = []
    for key, bound in (("unlearn_quality", config.min_quality), ("utility", config.min_utility)):
        if bound is not None and key in after:
            gates.append({"name": key, "value": after[key], "bound": bound, "passed": after[key] >= bound})
    for name, scores in after.get("sets", {}).items() if config.max_degenerate is not None else ():
        share, bound = scores["says_nothing"], config.max_degenerate
        then = (before or {}).get("sets", {}).get(name, {}).get("says_nothing", 0.0)
        passed = share <= bound or share <= then
        gates.append({"name": f"{name}: answers that say nothing", "value": share, "bound": bound, "passed": passed})
    return gates


def missed(gates: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line for each gate that was not passed."""
    return [line(gate) for gate in gates if not gate["passed"]]


def line(gate: Mapping[str, Any]) -> str:
    """Describe a gate with its value and bound."""
    value, bound = gate["value"], gate["bound"]
    if gate["name"] in CHOSEN:
        return f"{gate['name']} is {value:.1f}, {'at least' if gate['passed'] else 'below'} {bound:g}"
    return f"{gate['name']}: {value:.0%}, {'at most' if value <= bound else 'above'} {bound:.0%}"


def warnings(before: Mapping[str, Any], after: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return warnings about a run: nothing to forget, lost utility, divergence."""
    found = []
    for name, scores in before.get("sets", {}).items():
        if scores["role"] == "forget" and not scores["answered"]:
            found.append(
                f"{name}: the model knew none of the {scores['rows']} answers before (no recall of half of a truth's "
                "words): there was nothing to forget, and the scores after it show nothing"
            )
    if "utility" in before and after["utility"] < FELL * before["utility"]:
        found.append(
            f"utility fell from {before['utility']:.1f} to {after['utility']:.1f}: the model forgot more than it was asked to; "
            "try a smaller learning_rate, a larger retain_weight or more epochs"
        )
    losses = [step["retain_loss"] for step in history if "retain_loss" in step]
    last = losses[-max(1, len(losses) // 10) :]
    if losses and (sum(last) / len(last) > losses[0] + ROSE or max(losses) > losses[0] + PEAK):
        found.append(
            f"the retain loss rose from {losses[0]:.3g} nats a token to {max(losses):.3g}, and ended at {losses[-1]:.3g}: "
            "training diverged; try a smaller learning_rate"
        )
    return found
