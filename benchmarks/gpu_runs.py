"""Whole runs on a card, and the speed of a larger model's shape: `python -m benchmarks.gpu --end-to-end --tofu DIR`.

SmolLM2-135M forgets all 400 questions of TOFU's forget10, once by the published algorithm and once by PMCTrainer, with
the published settings (preset "llama"). DIR holds TOFU's files forget10, retain90, forget10_perturbed, real_authors and
world_facts (.jsonl, .json or .parquet). Without --model, SmolLM2 is taught forget10 and retain90 first.

Then a Llama-3.2-3B of random weights in bfloat16: rollouts, and loss and backward of a step, against generate and the
published step (on the true answers, for their lengths). Speed only: samples of random weights share no history and
their scores mean nothing, so neither the trie nor the store's gating has anything to do.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from examples.demo_model import base_model
from pmc_fast.bench import measure
from pmc_fast.config import UnlearnConfig
from pmc_fast.data import Encoder, load_rows
from pmc_fast.data.loading import SUFFIXES
from pmc_fast.models.loading import load_model, load_tokenizer, resolve_device
from pmc_fast.models.packed_forward import PackedPass

from . import end_to_end, harness
from .runs import Run, demo_config, measured
from .settings import Setting, StepSetting

METHODS = ("pmc_fast", "reference")
TEACHING = {"epochs": 5, "batch_size": 16, "learning_rate": 1e-4}
LLAMA_3B: dict[str, Any] = {
    "vocab_size": 128256, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
    "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SMOLLM2: dict[str, Any] = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "tie_word_embeddings": True,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
COUNT = 8  # questions of a rollout and of a step
SHORT_EPOCHS = 2  # of the runs that are compared in the short form


def find(directory: str, name: str) -> str:
    """Return TOFU's file of a name; SystemExit with one line if it is not there."""
    for suffix in SUFFIXES:
        if (file := Path(directory) / f"{name}{suffix}").is_file():
            return str(file)
    raise SystemExit(
        f"benchmarks.gpu: {directory} has no {name}{{{','.join(SUFFIXES)}}}: give --tofu a folder of TOFU's files"
    )


def task(model: str, tofu: str, device: str, **values: Any) -> UnlearnConfig:
    """Return the settings of a run on all of forget10."""
    own = {
        "model": model, "device": device, "forget": find(tofu, "forget10"), "retain": find(tofu, "retain90"),
        "paraphrased": find(tofu, "forget10_perturbed"),
        "general": [find(tofu, "real_authors"), find(tofu, "world_facts")],
    }  # fmt: skip
    return UnlearnConfig.merge("llama", own | values)


def teach(config: UnlearnConfig, directory: Path, epochs: int, batch_size: int, learning_rate: float) -> None:
    """Fine-tune a model on all of TOFU, in the prompt format of the run, and save it."""
    device = resolve_device(config.device)
    loaded, tokenizer = load_model(config.model, device=device, dtype=config.dtype), load_tokenizer(config.model)
    encoder = Encoder(tokenizer, config)
    rows = [row for source in (config.forget, config.retain) for row in load_rows(source, answers=True)]
    pairs = [encoder.pair(row.question, row.answer or "") for row in rows]
    optimizer = torch.optim.AdamW(loaded.model.parameters(), lr=learning_rate, weight_decay=0.01, fused=True)
    order, packed = torch.Generator().manual_seed(0), PackedPass(loaded.model, cuda_graphs=True)
    steps = epochs * -(-len(pairs) // batch_size)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    loaded.model.train()
    for epoch in range(epochs):
        losses = []
        for chosen in torch.randperm(len(pairs), generator=order).split(batch_size):
            with loaded.autocast():
                loss = packed.mean_nll([pairs[i] for i in chosen.tolist()])
            loss.backward()
            optimizer.step()
            rate.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        print(f"teaching TOFU: epoch {epoch + 1}/{epochs}, loss {torch.stack(losses).mean():.3f}", flush=True)
    loaded.model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def shape_contests(
    shape: dict[str, Any], tokenizer: str, device: str, dtype: torch.dtype, *, rounds: int = measure.ROUNDS, peaks: bool = True,
    name: str = "", **settings: Any,
) -> list[dict[str, Any]]:  # fmt: skip
    """Measure rollouts, and loss and backward of a step, of a Llama of this shape with random weights."""
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**shape)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.generation_config = transformers.GenerationConfig()
    setting = Setting(tokenizer, ["forget20"], COUNT, model=model)
    greedy = setting.rollout(num_samples=1, temperature=0)  # the engine's check on first use, its buffers
    step = StepSetting(tokenizer, COUNT, model=model, sampled=False, **settings)
    reference = step.published()

    def backward(loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def once() -> None:
            loss().backward()
            model.zero_grad()

        return once

    theirs = lambda: reference.loss(range(COUNT), step.retain)["loss"]  # noqa: E731
    contests: dict[str, dict[str, measure.Contestant]] = {
        "rollouts, T 0.9": {
            "pmc_fast": lambda: setting.rollout(temperature=0.9, drafts=greedy.tokens),
            "generate": lambda: setting.samples(0.9),
        },
        "loss and backward, 8 + 8": {
            "pmc_fast": backward(lambda: step.pmc.loss(step.step, step.kept).loss),
            "reference": backward(theirs),
        },
    }
    results = []
    facts = {"shape": shape, "dtype": str(dtype), "weights": "random: neither trie nor gating is exercised"}
    for what, contestants in contests.items():
        warm_up = 1 if "generate" in contestants else 2  # a training pass is captured in its second round
        times = [measure.time_round(contestants, i) for i in range(rounds + warm_up)][warm_up:]
        memory = {who: measure.peak_bytes(f) if peaks else None for who, f in contestants.items()}
        summary = measure.summarize(times, memory)
        title = f"{name}: {what}" if name else what
        print(f"  {title}: " + ", ".join(f"{who} {c['median_s']:.3f} s" for who, c in summary.items()), flush=True)
        more = {"counters": setting.rollout(temperature=0.9, drafts=greedy.tokens).counters} if warm_up == 1 else {}
        results.append({"name": title, "facts": facts | more, "contestants": summary})
    return results


def run_all(
    path: Path, tofu: str, device: str, *, model: str = "", base: str = "", taught: Path | None = None,
    teaching: dict[str, Any] | None = None, shape: dict[str, Any] | None = None, shape_settings: dict[str, Any] | None = None,
    **values: Any,
) -> None:  # fmt: skip
    """Make all runs and write them to `path`, one by one.

    Parameters
    ----------
    path : Path
        Of the JSON.
    tofu : str
        The folder of TOFU's files.
    device : str
        cuda; or cpu, which tests this file.
    model : str
        One that knows TOFU; else `base` is taught and saved in `taught`.
    teaching, shape, shape_settings, values
        Other than the benchmark's: of the teaching, of the random model, of its step, of the runs.
    """
    name = torch.cuda.get_device_name() if device == "cuda" else device
    if not model:
        assert taught is not None
        teach(task(base, tofu, device, **values), taught, **TEACHING | (teaching or {}))
        model = str(taught)
    facts = {"device": name, "settings": "preset llama" + (f", {values}" if values else "")}
    results: list[dict[str, Any]] = []
    for method in METHODS:
        print(f"{method} on {name}", flush=True)
        results.append(end_to_end.METHODS[method](Run(method, task(model, tofu, device, **values))))
        harness.write(path, "gpu_end_to_end", results, facts=facts)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    results += shape_contests(shape or LLAMA_3B, base or model, device, dtype, **(shape_settings or {}))
    print(f"wrote {harness.write(path, 'gpu_end_to_end', results, facts=facts)}")


def run_short(path: Path, device: str, shapes: dict[str, dict[str, Any]], **settings: Any) -> None:
    """Measure shapes, then the demo's task. Each result is written at once; what is there is kept.

    The demo's task is a whole run by PMCTrainer, then its first epochs by PMCTrainer and by the published algorithm.
    """
    facts = {"device": torch.cuda.get_device_name() if device == "cuda" else device, "short": True}
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    results = measured(path)
    for name, shape in shapes.items():
        if not any(r.get("name", "").startswith(name) for r in results):
            results += shape_contests(shape, str(base_model()), device, dtype, peaks=False, name=name, **settings)
            harness.write(path, "gpu", results, facts=facts)
    few = {"num_epochs": float(SHORT_EPOCHS)}
    for method, change in (("pmc_fast", {}), ("pmc_fast", few), ("reference", few)):
        run = Run(method, demo_config(0, device=device, **change))
        if not any((r.get("method"), r.get("steps")) == (method, run.steps) for r in results):
            print(f"{method}, the demo's task, {run.steps} steps", flush=True)
            results.append(end_to_end.METHODS[method](run))
            harness.write(path, "gpu", results, facts=facts)
    print(f"wrote {path}")


def on_card(tofu: str, model: str, path: Path | None) -> None:
    """Run on this machine's card; the JSON is named after it."""
    card = torch.cuda.get_device_name().replace(" ", "-")
    folder = harness.RESULTS / "gpu"
    base = str(base_model())
    run_all(
        path or folder / f"{card}-end-to-end.json", tofu, "cuda", model=model, base=base,
        taught=Path(base).with_name("smollm2-135m-tofu-full"),
    )  # fmt: skip
