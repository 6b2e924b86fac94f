"""Shared by all tests: the golden vectors and the models that they run on."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach a hub
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(min(2, torch.get_num_threads()))
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported: they then run on the CPU

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def golden():
    """Load a file of golden vectors, computed with the published implementation, by its name."""

    def load(name: str) -> list[dict[str, Any]]:
        content = json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))
        return content.get("cases") or content["traces"]

    return load


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    from examples.demo_model import base_model

    return base_model()


@pytest.fixture(scope="session")
def tiny_dir() -> Path:
    from examples.demo_model import tiny_model

    return tiny_model()


@pytest.fixture(scope="session")
def tokenizer(smollm2_dir):
    import transformers

    return transformers.AutoTokenizer.from_pretrained(smollm2_dir)


@pytest.fixture
def tiny(tiny_dir):
    """A fresh tiny model, so that a test may train it."""
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)
