"""A part of `python -m tests.sweep`, with each kind of family that was wrong or raw once; docs/models.md says the same."""

import re

import pytest
import transformers

from tests.sweep import PAGE, families, judge, row

EXPECTED = {
    "llama": "served",
    "gemma3n_text": "served",  # layers that share keys and values
    "deepseek_v3": "served",  # values smaller than keys
    "minicpm3": "served",
    "moshi": "served|refused: .*does not pass its arguments on",  # in 5.17; embeds a token more than its head knows
    "bert": "served",  # a decoder here
    "falcon": "refused: .*0 of 2 layers",
    "mpt": "refused: .*0 of 2 layers",
    "deepseek_v32": "refused: .*layers of",
    "glm_moe_dsa": "refused: .*layers of",
    "hy_v4": "refused: .*layers of",
    "phimoe": "refused: .*disagree about their sliding window",
    "llama4_text": "refused: .*chunked",
    "whisper": "refused: .*ignores logits_to_keep",
    "hrm_text": "refused: .*attention more than once a pass",
    "roberta": "refused: .*do(es)? not compute what the model computes",
    "nemotron": "refused: .*does not pass its arguments on",
}


@pytest.mark.parametrize("family", EXPECTED)
def test_served_and_right_or_refused_by_name(family):
    if family not in families():
        pytest.skip(f"this transformers has no {family}")
    made = judge(family)
    for outcome in made.values():
        assert re.match(EXPECTED[family], outcome), outcome
    if f"transformers {transformers.__version__}:" in PAGE.read_text(encoding="utf-8"):
        assert row(family, made) in PAGE.read_text(encoding="utf-8").splitlines()


def test_nothing_in_the_table_is_raw_or_wrong():
    rows = re.findall(r"^\| (\S+) \| ([^|]+) \|", PAGE.read_text(encoding="utf-8"), re.M)[1:]
    assert len(rows) > 150
    assert {outcome for _, outcome in rows} <= {"served", "refused", "not tried"}
