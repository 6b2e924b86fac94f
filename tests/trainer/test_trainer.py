"""PMCTrainer: the core's trajectory, resumed bit for bit, whatever the accumulation."""

import gzip
import json
import os
import signal
import stat
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers

from pmc_fast import (
    PMC,
    PMCArguments,
    PMCConfig,
    PMCError,
    PMCTrainer,
)
from pmc_fast.data import Row
from pmc_fast.data.packing import num_targets
from pmc_fast.models.packed_forward import PackedPass
from pmc_fast.pmc.schedule import EpochOrder
from pmc_fast.trainer import checkpointing
from pmc_fast.trainer.callbacks import StepProfiler, StopRule
from pmc_fast.trainer.master_weights import MasterWeights
from tests.families import FAMILIES, build

QUESTIONS = [f"What is fact {i}?" for i in range(5)]
RETAIN = [Row(f"Is {i} even?", f"It is {i % 2 == 0}.") for i in range(6)]


def arguments(path, **change):
    given = {
        "output_dir": str(path / "run"), "num_train_epochs": 2, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2, "learning_rate": 1e-3, "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip
    return PMCArguments(**given | change)


def trainer_of(model, tokenizer, args, forget=QUESTIONS, retain=RETAIN, pmc=None, **more):
    config = PMCConfig(**{"num_samples": 2, "max_length": 40, "prompt_format": "tags"} | (pmc or {}))
    return PMCTrainer(model, args, forget, retain, config, tokenizer, reward=half, **more)


def half(initial, candidates, min_len):
    """A reward that is never satisfied and depends on the answers."""
    return np.array([[0.2 + 0.5 * (len(x) % 7) / 7 for x in texts] for texts in candidates])


def flat(model):
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


@pytest.fixture
def fresh(tiny_dir):
    return lambda: transformers.AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)


def test_the_trainers_steps_are_the_cores(fresh, tokenizer, tmp_path):
    """The snippet of the README, by hand, in the same order with the same retain pairs."""
    args = arguments(
        tmp_path, optim="sgd", weight_decay=0.0, learning_rate=0.02, warmup_epochs=0, lr_scheduler_type="constant"
    )
    trainer = trainer_of(fresh(), tokenizer, args)
    start = flat(trainer.model)
    trainer.train()
    model = fresh()
    pmc = PMC(model, tokenizer, trainer.pmc.config, QUESTIONS, reward=half)
    pmc.prepare()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    retain_order, order = torch.Generator().manual_seed(1), EpochOrder(5, 0)
    for epoch in range(2):
        order.set_epoch(epoch)
        batches = torch.tensor(list(order)).split(2)
        for at in ([0, 1], [2]):
            step = pmc.sample(torch.cat([batches[b] for b in at]).tolist())
            for part in step.split(2):
                draws = torch.randint(6, (len(part.indices),), generator=retain_order)
                pmc.loss(part, pmc.encode_retain([RETAIN[i] for i in draws])).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert trainer.state.global_step == 4
    assert (flat(model) - flat(trainer.model)).norm() <= 1e-3 * (flat(model) - start).norm()
    assert pmc.store.state_dict() == trainer.pmc.store.state_dict()


@pytest.mark.parametrize("normalization", ["micro_batch", "step"])
def test_a_step_is_one_pass_and_ends_where_its_parts_do(tokenizer, tmp_path, normalization, monkeypatch):
    """20 steps, every other one of a single part, of a small model of token ids."""
    ids = [
        [int(i) for i in torch.randint(20, 60, (n,), generator=torch.Generator().manual_seed(n))]
        for n in range(3, 14)
    ]
    passes, run = [], PackedPass.__call__

    def counted(packed, *given, **how):
        passes.append(torch.is_grad_enabled())
        return run(packed, *given, **how)

    def apart(pmc, parts, *, model):
        tokens = sum(num_targets(s) for _, kept in parts for s in kept)
        made = [pmc.loss(*part, model=model, retain_tokens=tokens) for part in parts]
        for out in made:
            yield replace(out, **{n: torch.stack([getattr(o, n) for o in made]) for n in ("collapse", "retain")})

    def trained():
        args = arguments(tmp_path, num_train_epochs=10, include_num_input_tokens_seen="all", learning_rate=0.1)
        model, retain = build(FAMILIES["phi"]()), [{"input_ids": row, "labels": row} for row in ids[5:]]
        pmc = {"normalization": normalization, "max_length": 24}
        trainer = trainer_of(model, tokenizer, replace(args, optim="sgd"), ids[:5], retain, pmc)
        start = flat(model)
        trainer.train()
        return flat(model) - start, trainer.state

    monkeypatch.setattr(PackedPass, "__call__", counted)
    ours, state = trained()
    assert sum(passes) == state.global_step == 20
    monkeypatch.setattr(PMC, "step_losses", apart)
    theirs, their_state = trained()
    assert sum(passes) == 20 + 30
    assert (ours - theirs).norm() <= 1e-10 * theirs.norm()
    for a, b in zip(state.log_history[:-1], their_state.log_history[:-1], strict=True):
        clocks = {name: x for name, x in a.items() if "second" in name or "runtime" in name}
        assert a == pytest.approx(b | clocks, rel=1e-6)


def test_accumulation_changes_no_gradient_of_a_steps_mean(fresh, tokenizer, tmp_path):
    ends = []
    for size, accumulation in ((4, 1), (2, 2), (1, 4)):
        args = arguments(
            tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, max_steps=1,
            optim="sgd", weight_decay=0.0, warmup_epochs=0, lr_scheduler_type="constant", learning_rate=0.1,
        )  # fmt: skip
        trainer = trainer_of(fresh(), tokenizer, args, pmc={"normalization": "step"})
        start = flat(trainer.model)
        trainer.train()
        ends.append(flat(trainer.model) - start)
    for end in ends[1:]:
        assert (end - ends[0]).norm() <= 1e-4 * ends[0].norm()


def test_retain_pairs_of_a_step(fresh, tokenizer, tmp_path):
    """Two for each question, in its micro-batch, and none twice before all have been drawn."""
    args = arguments(tmp_path, max_steps=4)
    trainer = trainer_of(fresh(), tokenizer, args, pmc={"retain_order": "shuffled", "retain_per_question": 2})
    drawn, accumulated = [], trainer.accumulated

    def noted(model, parts):
        drawn.extend((len(part.indices), [trainer.retain.index(s) for s in kept]) for part, kept in parts)
        return accumulated(model, parts)

    trainer.accumulated = noted
    trainer.train()
    assert [(questions, len(kept)) for questions, kept in drawn] == [(2, 4), (2, 4), (1, 2)] * 2
    flat = [i for _, kept in drawn for i in kept]
    assert [sorted(flat[i : i + 6]) for i in (0, 6, 12)] == [list(range(6))] * 3


def test_published_schedule(fresh, tokenizer, tmp_path):
    """AdamW, one epoch of warm-up from 0, linear decay to 0, no clipping."""
    trainer = trainer_of(fresh(), tokenizer, arguments(tmp_path, num_train_epochs=3))
    trainer.train()
    rates = [r["learning_rate"] for r in trainer.state.log_history if "learning_rate" in r]
    # the Trainer logs the rate that a step was taken with: 2 steps an epoch, 6 in all
    assert rates == pytest.approx([0, 5e-4, 1e-3, 7.5e-4, 5e-4, 2.5e-4])
    assert trainer.args.max_grad_norm == 0
    assert isinstance(trainer.optimizer.optimizer, torch.optim.AdamW)
    assert trainer.optimizer.optimizer.defaults["fused"]


def test_logs_say_what_happens_and_hold_no_text(fresh, tokenizer, tmp_path):
    trainer = trainer_of(fresh(), tokenizer, arguments(tmp_path))
    trainer.train()
    steps = [r for r in trainer.state.log_history if "collapse_loss" in r]
    assert len(steps) == 4
    for r in steps:
        assert r["loss"] == pytest.approx(r["collapse_loss"] + 1.25 * r["retain_loss"], rel=1e-3)
        assert r["pending"] == 5
        assert r["sampled_tokens"] > 0
        assert r["rows"] > 0
        assert 0 < r["cut_samples"] <= r["sampled_tokens"]  # the model of random weights seldom ends
    logged = json.dumps(trainer.state.log_history)
    assert not any(q in logged for q in QUESTIONS)
    assert all(isinstance(v, (int, float)) for r in trainer.state.log_history for v in r.values())


def test_logs_are_of_all_steps_since_the_last(fresh, tokenizer, tmp_path):
    """Losses are means of them, as the Trainer's own; counts and seconds add up; the store is as it is then."""
    logs = []
    for every in (1, 4, 3):
        trainer = trainer_of(fresh(), tokenizer, arguments(tmp_path, num_train_epochs=3, logging_steps=every))
        trainer.train()
        logs.append([r for r in trainer.state.log_history if "collapse_loss" in r])
    single, *several = logs
    assert len(single) == 6
    for every, windows in zip((4, 3), several, strict=True):
        assert [r["step"] for r in windows] == list(range(every, 7, every))
        for made, steps in zip(windows, (single[i : i + every] for i in range(0, 6, every)), strict=False):
            for name in ("loss", "collapse_loss", "retain_loss"):
                assert made[name] == pytest.approx(sum(r[name] for r in steps) / every, rel=1e-5), name
            for name in ("sampled_tokens", "cut_samples", "rows"):
                assert made[name] == sum(r[name] for r in steps), name
            for name in ("mean_score", "pending", "learning_rate", "epoch"):
                assert made[name] == steps[-1][name], name
            assert made["loss"] == pytest.approx(made["collapse_loss"] + 1.25 * made["retain_loss"], rel=1e-3)
            assert made["rollout_seconds"] > 0
    assert several[0][0]["sampled_tokens"] > single[3]["sampled_tokens"]


def test_texts_are_printed_on_demand(fresh, tokenizer, tmp_path, capsys):
    for log_text in (False, True):
        args = arguments(tmp_path, max_steps=1, log_text=log_text, per_device_train_batch_size=6)
        trainer_of(fresh(), tokenizer, args, forget=[*QUESTIONS, "What [bold]is[/bold] it?"]).train()
        assert ("[/bold]" in capsys.readouterr().out) is log_text


class Stop(transformers.TrainerCallback):
    """Breaks off after a step, as a crash would."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize(("broken_off", "retain_loss"), [(1, "nll"), (2, "nll"), (3, "nll"), (2, "kl")])
def test_resumed_is_uninterrupted(fresh, tokenizer, tmp_path, broken_off, retain_loss):
    pmc = {"retain_loss": retain_loss}
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    whole = trainer_of(fresh(), tokenizer, arguments(tmp_path / "whole", **saving), pmc=pmc)
    whole.train()
    cut = trainer_of(fresh(), tokenizer, arguments(tmp_path, **saving), pmc=pmc, callbacks=[Stop(broken_off + 1)])
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    again = trainer_of(fresh(), tokenizer, arguments(tmp_path, **saving), pmc=pmc)
    again.train(resume_from_checkpoint="auto")
    assert again.state.global_step == whole.state.global_step
    assert torch.equal(flat(again.model), flat(whole.model))
    assert again.pmc.state_dict() == whole.pmc.state_dict()

    def strip(history):
        clocks = ("second", "runtime", "flos", "train_loss")
        return [{k: v for k, v in r.items() if not any(c in k for c in clocks)} for r in history]

    assert strip(again.state.log_history) == strip(whole.state.log_history)


def test_resumed_with_dropout_is_uninterrupted(tokenizer, tmp_path):
    def model():
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(transformers.GPT2Config(
            vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=64, attn_pdrop=0.3, resid_pdrop=0.3,
            bos_token_id=1, eos_token_id=2,
        ))  # fmt: skip

    saving = {"save_strategy": "steps", "save_steps": 1}
    whole = trainer_of(model(), tokenizer, arguments(tmp_path / "whole", **saving))
    whole.train()
    again = trainer_of(model(), tokenizer, arguments(tmp_path / "whole", **saving))
    again.train(resume_from_checkpoint=str(tmp_path / "whole/run/checkpoint-3"))
    assert torch.equal(flat(again.model), flat(whole.model))


KILLED = """
import sys, torch, transformers
sys.path.insert(0, {root!r})
from tests.trainer.test_trainer import arguments, trainer_of
from pathlib import Path
tokenizer = transformers.AutoTokenizer.from_pretrained({tokenizer!r})
model = transformers.AutoModelForCausalLM.from_pretrained({model!r}, dtype=torch.float32)
torch.set_num_threads({threads})
args = arguments(Path({out!r}), save_strategy="steps", save_steps=1, num_train_epochs=6)
trainer = trainer_of(model, tokenizer, args)
print("begin", flush=True)
trainer.train(resume_from_checkpoint="auto")
torch.save(trainer.model.state_dict(), {out!r} + "/end.pt")
"""


def test_killed_at_any_moment_it_goes_on(fresh, tokenizer, tiny_dir, smollm2_dir, tmp_path, pytestconfig):
    """kill -9 a few times at moments of its own choosing, also while it writes; then the same end, bit for bit."""
    script = KILLED.format(
        root=str(pytestconfig.rootpath), tokenizer=str(smollm2_dir), model=str(tiny_dir), out=str(tmp_path),
        threads=torch.get_num_threads(),
    )  # fmt: skip
    start = lambda: subprocess.Popen(  # noqa: E731
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    kills = 0
    for delay in (0.4, 1.1, 0.9):
        process = start()
        assert process.stdout.readline()
        time.sleep(delay)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
    process = start()
    assert process.wait(timeout=240) == 0
    whole = trainer_of(fresh(), tokenizer, arguments(tmp_path / "whole", num_train_epochs=6))
    whole.train()
    end = torch.load(tmp_path / "end.pt")
    assert all(torch.equal(p, end[n]) for n, p in whole.model.state_dict().items())
    assert kills


@pytest.fixture
def saved(fresh, tokenizer, tmp_path):
    """A run of 4 steps with a checkpoint after each of the last three."""
    args = arguments(tmp_path, save_strategy="steps", save_steps=1, save_total_limit=3)
    trainer_of(fresh(), tokenizer, args).train()
    return tmp_path / "run", lambda **change: trainer_of(fresh(), tokenizer, args, **change)


def test_checkpoints_are_private_and_rotated(saved):
    run, _ = saved
    assert sorted(p.name for p in run.iterdir()) == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]
    for path in run.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)


def test_torn_checkpoints_are_named_and_passed_over(saved, tmp_path):
    run, new = saved
    weights = run / "checkpoint-4/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    (run / "checkpoint-3/pmc_manifest.json").unlink()
    with pytest.raises(PMCError, match=r"checkpoint-4 is damaged: model.safetensors is not what was written"):
        new().train(resume_from_checkpoint=str(run / "checkpoint-4"))
    with pytest.raises(PMCError, match=r"checkpoint-3 has no sound pmc_manifest.json: it was not finished"):
        new().train(resume_from_checkpoint=str(run / "checkpoint-3"))
    with pytest.raises(PMCError, match="checkpoint-9 does not exist"):
        new().train(resume_from_checkpoint=str(run / "checkpoint-9"))
    heard = []
    path, _ = checkpointing.newest(run, new()._fingerprint(), heard.append)
    assert path.name == "checkpoint-2"
    assert [text.split(" ")[1].rsplit("/", 1)[1] for text in heard] == ["checkpoint-4", "checkpoint-3"]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"forget": [*QUESTIONS[:4], "Another?"]}, "questions"),
        ({"retain": RETAIN[:5]}, "retain rows"),
        ({"pmc": {"num_samples": 3}}, "PMC settings"),
    ],
)
def test_foreign_checkpoints_are_refused(saved, change, name):
    run, new = saved
    with pytest.raises(PMCError, match=f"belongs to another run: its {name} differ"):
        new(**change).train(resume_from_checkpoint=str(run / "checkpoint-4"))


def test_checkpoints_of_another_models_weights_are_refused(saved):
    """Same shapes, other weights: the report would name one model and the weights be another's."""
    run, new = saved
    trainer = new()
    with torch.no_grad():
        trainer.model.lm_head.weight[7, 3] += 1e-3
    with pytest.raises(PMCError, match="checkpoint-4 belongs to another run: its model's weights differ"):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-4"))
    manifest = run / "checkpoint-4/pmc_manifest.json"
    content = json.loads(manifest.read_text())
    del content["fingerprint"]["model's weights"]
    manifest.write_text(json.dumps(content))
    with pytest.raises(PMCError, match="is of an older pmc_fast: it does not say of which model's weights it is"):
        new().train(resume_from_checkpoint=str(run / "checkpoint-4"))


def test_checkpoints_of_another_adapter_scale_are_refused(fresh, tokenizer, tmp_path):
    """lora_alpha is in no weight: the run would go on with another function of the same numbers."""
    peft = pytest.importorskip("peft")
    args = arguments(tmp_path, save_strategy="steps", save_steps=1)

    def new(alpha):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, lora_alpha=alpha, target_modules=["q_proj"], task_type="CAUSAL_LM")
        return trainer_of(peft.get_peft_model(fresh(), config), tokenizer, args)

    new(8).train()
    assert new(8).find_checkpoint(str(tmp_path / "run/checkpoint-2"))
    with pytest.raises(PMCError, match="belongs to another run: its adapter's settings differ"):
        new(64).find_checkpoint(str(tmp_path / "run/checkpoint-2"))


def test_failure_while_saving_leaves_no_half_checkpoint(fresh, tokenizer, tmp_path, monkeypatch):
    trainer = trainer_of(fresh(), tokenizer, arguments(tmp_path, save_strategy="steps", save_steps=1))
    monkeypatch.setattr(type(trainer), "_save_optimizer_and_scheduler", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert list((tmp_path / "run").iterdir()) == []


def test_datasets_and_their_columns(fresh, tokenizer, tmp_path):
    import datasets

    forget = datasets.Dataset.from_list([{"question": q, "answer": "never read"} for q in QUESTIONS])
    retain = datasets.Dataset.from_list(
        [
            {"messages": [{"role": "user", "content": r.question}, {"role": "assistant", "content": r.answer}]}
            for r in RETAIN
        ]
    )
    plain = trainer_of(fresh(), tokenizer, arguments(tmp_path))
    ours = trainer_of(fresh(), tokenizer, arguments(tmp_path), forget, retain)
    assert ours.pmc.questions == QUESTIONS
    assert ours.retain == plain.retain
    ids = trainer_of(fresh(), tokenizer, arguments(tmp_path), plain.pmc.prompts, [vars_of(s) for s in plain.retain])
    assert ids.retain == plain.retain
    assert not ids.pmc.keeps_text
    ids.train()


def vars_of(encoded):
    return {"input_ids": encoded.input_ids, "labels": encoded.labels}


def test_refusals(fresh, tokenizer, tmp_path):
    with pytest.raises(PMCError, match="forget_dataset is empty"):
        trainer_of(fresh(), tokenizer, arguments(tmp_path), forget=[])
    with pytest.raises(PMCError, match="retain_dataset is empty"):
        trainer_of(fresh(), tokenizer, arguments(tmp_path), retain=[])
    with pytest.raises(PMCError, match="processing_class is not given"):
        trainer_of(fresh(), None, arguments(tmp_path))
    with pytest.raises(PMCError, match="retain_dataset, row 1 has no answer"):
        trainer_of(fresh(), tokenizer, arguments(tmp_path), retain=[{"question": "a"}])


def test_pure_bf16_is_refused_at_small_learning_rates(fresh, tokenizer, tmp_path):
    low = fresh().bfloat16()
    with pytest.raises(PMCError, match="learning_rate is 1e-05 for bfloat16 parameters without float32 masters"):
        trainer_of(low, tokenizer, arguments(tmp_path, learning_rate=1e-5, master_weights=False))
    trainer_of(low, tokenizer, arguments(tmp_path, learning_rate=1e-3, master_weights=False))
    trainer_of(low, tokenizer, arguments(tmp_path, learning_rate=1e-5, master_weights=False, allow_pure_bf16=True))


def test_masters_move_what_bfloat16_alone_does_not(fresh, tokenizer, tmp_path):
    moved = {}
    for masters in (True, False):
        model = fresh().bfloat16()
        args = arguments(
            tmp_path, learning_rate=2e-6, master_weights=masters, allow_pure_bf16=True, num_train_epochs=10
        )
        trainer = trainer_of(model, tokenizer, args)
        start = flat(model)
        trainer.train()
        moved[masters] = float((flat(model) != start).float().mean())
        assert model.dtype == torch.bfloat16
    assert moved[True] > 2 * moved[False]


def test_masters_are_the_optimizers_own_float32_run():
    """Fed the same gradients, bfloat16 parameters are the rounded parameters of a float32 run; state survives."""
    torch.manual_seed(0)
    wide = torch.nn.Parameter(torch.randn(50).bfloat16().float())
    low = torch.nn.Parameter(wide.detach().bfloat16())
    plain, ours = torch.optim.AdamW([wide], lr=1e-3), MasterWeights(torch.optim.AdamW([low], lr=1e-3))
    for n in range(6):
        g = torch.randn(50).bfloat16()
        wide.grad, low.grad = g.float(), g.clone()
        plain.step()
        ours.step()
        assert torch.equal(low, wide.bfloat16())
        if n == 2:
            other = torch.nn.Parameter(torch.zeros(50).bfloat16())
            state = ours.state_dict()
            ours, low = MasterWeights(torch.optim.AdamW([other], lr=1e-3)), other
            ours.load_state_dict(state)
    ours.zero_grad()
    assert low.grad is None


def test_masters_under_fsdp_are_refused(fresh, tokenizer, tmp_path, monkeypatch):
    """accelerate exchanges the optimizer's parameters for sharded ones, and knows no masters."""
    init = transformers.Trainer.__init__

    def under_fsdp(self, *a, **k):
        init(self, *a, **k)
        self.is_fsdp_enabled = True

    monkeypatch.setattr(transformers.Trainer, "__init__", under_fsdp)
    with pytest.raises(PMCError, match="whose float32 masters FSDP does not shard: load it in float32"):
        trainer_of(fresh().bfloat16(), tokenizer, arguments(tmp_path))
    trainer_of(fresh(), tokenizer, arguments(tmp_path))


def test_masters_resume(fresh, tokenizer, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1}
    whole = trainer_of(fresh().bfloat16(), tokenizer, arguments(tmp_path, **saving))
    whole.train()
    again = trainer_of(fresh().bfloat16(), tokenizer, arguments(tmp_path, **saving))
    again.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    assert torch.equal(flat(again.model), flat(whole.model))


def test_bf16_autocast(fresh, tokenizer, tmp_path):
    trainer = trainer_of(fresh(), tokenizer, arguments(tmp_path, bf16=True))
    assert trainer.pmc.autocast_dtype == torch.bfloat16
    start = flat(trainer.model)
    trainer.train()
    assert trainer.model.dtype == torch.float32
    assert not torch.equal(flat(trainer.model), start)


def test_lora_trains_its_adapter_alone(fresh, tokenizer, tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        fresh(), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer = trainer_of(model, tokenizer, arguments(tmp_path))
    trainer.train()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    assert all("lora" in n for n in changed)


def test_gradient_checkpointing(fresh, tokenizer, tmp_path):
    plain = trainer_of(fresh(), tokenizer, arguments(tmp_path))
    plain.train()
    ours = trainer_of(fresh(), tokenizer, arguments(tmp_path, gradient_checkpointing=True))
    ours.train()
    torch.testing.assert_close(flat(ours.model), flat(plain.model))


@pytest.mark.parametrize("epochs", [4, 6])
def test_divergence_names_the_step(fresh, tokenizer, tmp_path, epochs):
    trainer = trainer_of(fresh(), tokenizer, arguments(tmp_path, learning_rate=1e30, num_train_epochs=epochs))
    with pytest.raises(PMCError, match=r"diverged at step \d of .*: try a learning_rate below 1e\+30"):
        trainer.train()


def test_the_stopping_rule_ends_a_run(fresh, tokenizer, tmp_path):
    pmc = {"stop_score": 1.0, "stop_retain_loss": 1e9, "stop_steps": 2}
    trainer = trainer_of(fresh(), tokenizer, arguments(tmp_path, num_train_epochs=9), pmc=pmc)
    trainer.train()
    assert trainer.state.global_step == 3  # all five questions are visited after two steps
    assert "smoothed retain loss" in trainer.stopped


def test_stop_rule():
    rule = StopRule(0.1, None, 2)
    assert rule.update(0.0, 1.0, all_visited=True) is None  # one step only
    assert rule.bound == 1.05
    assert rule.update(0.0, 5.0, all_visited=True) is None  # the retain loss is not back
    assert rule.update(0.0, 0.1, all_visited=False) is None
    for _ in range(40):
        assert rule.update(0.2, 0.1, all_visited=True) is None  # answers are still like the initial ones
    state = json.loads(json.dumps(rule.state_dict()))
    other = StopRule(0.1, None, 2)
    other.load_state_dict(state)
    for r in (rule, other):
        assert r.update(0.1, 0.1, all_visited=True) is None
        assert "mean best score 0.100 <= 0.1" in r.update(0.1, 0.1, all_visited=True)


@pytest.mark.parametrize(("steps", "traced"), [(1, 1), (2, 1), (4, 2)])
def test_a_trace_is_of_the_second_and_third_step(fresh, tokenizer, tmp_path, steps, traced):
    """Of a run of one step that step is traced."""
    profiler = StepProfiler()
    trainer_of(fresh(), tokenizer, arguments(tmp_path, max_steps=steps), callbacks=[profiler]).train()
    text = gzip.decompress(profiler.trace).decode()
    names = [e["name"] for e in json.loads(text)["traceEvents"] if e.get("cat") in ("cpu_op", "user_annotation")]
    assert sum(name.startswith("Optimizer.step") for name in names) == traced
    assert "ProfilerStep#0" not in names
    assert not any(q in text for q in QUESTIONS)


def test_epoch_order():
    order = EpochOrder(7, seed=3)
    orders = []
    for epoch in (0, 1, 2):
        order.set_epoch(epoch)
        orders.append(list(order))
        assert sorted(orders[-1]) == list(range(7))
    assert len({tuple(o) for o in orders}) == 3
    again = EpochOrder(7, seed=3)
    again.set_epoch(2)
    assert list(again) == orders[2]
