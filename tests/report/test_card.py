"""The model card: the hub reads its metadata back, and it names no local path."""

import pytest
from huggingface_hub import ModelCard

from pmc_fast.report import render

MADE = {"questions": 4, "history": [{}], "versions": {"pmc_fast": "0.1.0"}}


def card(model, **settings):
    settings |= {
        "model": str(model),
        "num_samples": 2,
        "retain_weight": 1.25,
        "prompt_format": "tags",
        "reward": "rouge",
    }
    return ModelCard(render.model_card(MADE | {"settings": settings}))


@pytest.mark.parametrize("model", ["owner/name", "1e5", "no", "owner/a-b_c.d"])
def test_the_hub_reads_a_base_model_as_it_was_given(model):
    data = card(model).data.to_dict()
    tags = ["pmc_fast", "unlearning"]
    assert data == {
        "base_model": model,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": tags,
    }


def test_a_local_model_is_named_without_its_path(tmp_path):
    (tmp_path / "mine").mkdir()
    made = card(tmp_path / "mine", lora=True)
    assert made.data.base_model is None
    assert made.data.library_name == "peft"
    assert "Made from mine by" in made.text
    assert str(tmp_path) not in made.content
