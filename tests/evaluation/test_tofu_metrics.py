"""TOFU's metrics: by hand, and on the published losses of two real models."""

import json

import numpy as np
import pytest

from pmc_fast.errors import PMCError
from pmc_fast.evaluation import tofu_metrics as tm
from tests.conftest import DATA

SETS = {"retain": "eval_log.json", "ra": "eval_real_author_wo_options.json", "wf": "eval_real_world_wo_options.json",
        "forget": "eval_log_forget.json"}  # fmt: skip
VARIANTS = {"geometric": "openunlearning_geometric", "arithmetic": "paper_arithmetic"}
LN2 = np.log(2)


@pytest.fixture(scope="module")
def phi():
    """Per-row losses of Phi-1.5 taught all of TOFU, and of one taught retain90 only (locuslab/tofu's logs)."""
    return json.loads((DATA / "tofu_metrics_phi.json").read_text(encoding="utf-8"))


def test_probabilities_by_hand():
    assert tm.probability([0.0, LN2]).tolist() == pytest.approx([1, 0.5])
    # 1/2 against 1/4 and 1/4; 1 against 1 alone: rows may have any number of options
    assert tm.option_probability([LN2, 0.0], [[2 * LN2, 2 * LN2], [0.0]]).tolist() == pytest.approx([0.5, 0.5])


def test_truth_ratio_by_hand():
    """True 1/2; false 1/4 and 1/16, whose geometric mean is 1/8 and arithmetic mean 5/32."""
    losses = [LN2], [[2 * LN2, 4 * LN2]]
    assert tm.truth_ratio(*losses).tolist() == pytest.approx([1 / 4])
    assert tm.truth_ratio(*losses, "arithmetic").tolist() == pytest.approx([5 / 16])


def test_truth_ratios_of_sets_by_hand():
    ratios = np.array([0.5, 2.0, 1.0, 0.0])
    assert tm.forget_truth_ratio(ratios) == pytest.approx((0.5 + 0.5 + 1 + 0) / 4)
    assert tm.kept_truth_ratio(ratios) == pytest.approx((0.5 + 0 + 0 + 1) / 4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_of_broken_models_give_numbers(variant):
    """Probabilities of exp(-2000) are 0 in float64; their ratios are still right, or end at 0 and infinity."""
    ratios = tm.truth_ratio([2000.0, 2000.0, 0.0], [[2001.0], [1.0], [2000.0]], variant)
    assert ratios.tolist() == pytest.approx([np.exp(-1), np.inf, 0])
    assert tm.forget_truth_ratio(ratios) == pytest.approx(np.exp(-1) / 3)
    assert tm.kept_truth_ratio(ratios) == pytest.approx((1 - np.exp(-1) + 0 + 1) / 3)


def test_model_utility_by_hand():
    assert tm.model_utility([1.0, 0.5, 0.25]) == pytest.approx(3 / 7)
    assert tm.model_utility([1.0, 0.0]) == 0


def test_forget_quality_by_hand():
    """Equal samples; and two of three that do not overlap: 2 of the 20 ways to split six numbers are as far apart."""
    assert tm.forget_quality(np.array([1.0, 2, 3]), np.array([1.0, 2, 3])) == 1
    assert tm.forget_quality(np.array([1.0, 2, 3]), np.array([4.0, 5, 6])) == pytest.approx(2 / 20)


@pytest.mark.parametrize("numbers", [[], [np.nan]])
def test_no_numbers_are_refused(numbers):
    with pytest.raises(PMCError, match="finite loss"):
        tm.probability(numbers)


def measured(logs, variant):
    values, ratios = {}, {}
    for name, file in SETS.items():
        log = logs[file]
        true, false = log["avg_gt_loss"], log["average_perturb_loss"]
        ratios = tm.truth_ratio(log["avg_paraphrased_loss"], false, variant)
        likely = tm.option_probability(true, false) if name in ("ra", "wf") else tm.probability(true)
        values[f"{name}_prob"] = likely.mean()
        values[f"{name}_rouge"] = np.mean(log["rougeL_recall"])
        values[f"{name}_truth_ratio"] = (tm.forget_truth_ratio if name == "forget" else tm.kept_truth_ratio)(ratios)
    values["model_utility"] = tm.model_utility([v for k, v in values.items() if not k.startswith("forget")])
    return values, ratios  # the last are those of forget


@pytest.mark.parametrize(("variant", "name"), VARIANTS.items())
def test_published_logs(phi, variant, name):
    expected = phi["expected"][name]
    forget = {}
    for model in ("full", "retain90"):
        values, forget[model] = measured(phi["logs"][model], variant)
        assert values == pytest.approx(expected[model], abs=1e-9)
    quality = tm.forget_quality(forget["full"], forget["retain90"])
    assert quality == pytest.approx(expected["forget_quality_full_vs_retain90"], rel=1e-6)
