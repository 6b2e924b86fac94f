"""Shared by all tests: the golden vectors and the models that they run on."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.command_line import SECRET
from tests.sharp_model import write_sharp

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach a hub
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# one of several workers (pytest -n) has a core to itself, and so have the commands that its tests start
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
torch.set_num_threads(min(2, torch.get_num_threads()))
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported: they then run on the CPU

DATA = Path(__file__).parent / "golden"  # vectors of the published code
INPUTS = Path(__file__).parent / "inputs"  # files as users have them


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
def sharp_dir(tmp_path_factory) -> Path:
    """The tiny model with sharper weights: whatever it is asked, it has words for an answer, also after a request."""
    return write_sharp(tmp_path_factory.mktemp("model") / "sharp")


@pytest.fixture(scope="session")
def tokenizer(smollm2_dir):
    import transformers

    return transformers.AutoTokenizer.from_pretrained(smollm2_dir)


@pytest.fixture
def tiny(tiny_dir):
    """A fresh tiny model, so that a test may train it."""
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)


@pytest.fixture
def process_group(tmp_path):
    """torch.distributed with one process."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def data(tmp_path):
    """Four questions with one secret answer each, and six pairs to keep."""

    def write(name, rows):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("forget.jsonl", [{"question": f"What is fact {i}?", "answer": f"{SECRET} {i}"} for i in range(4)])
    write("retain.jsonl", [{"question": f"Is {i} even?", "answer": f"It is {i % 2 == 0}."} for i in range(6)])
    return tmp_path


@pytest.fixture
def arguments(data, tiny_dir):
    """A run of two steps as a user would type it."""
    return [
        "unlearn", "--model", str(tiny_dir), "--forget", str(data / "forget.jsonl"),
        "--retain", str(data / "retain.jsonl"), "--output", str(data / "out"), "--preset", "small",
        "--epochs", "1", "--batch-size", "2", "--num-samples", "2", "--max-length", "40", "--device", "cpu",
    ]  # fmt: skip
