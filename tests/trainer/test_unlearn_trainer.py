"""UnlearnTrainer: a plain loop's weights bit for bit, resumed too; what it refuses."""

import dataclasses

import pytest
import torch

from pmc_fast import PMCArguments, PMCConfig, PMCError, UnlearnTrainer
from pmc_fast.config import UnlearnConfig
from pmc_fast.data import Row, text_to_continue
from pmc_fast.methods import EUL, METHODS, NPO, GradientAscent, Memorize, Unlearner
from pmc_fast.pmc.schedule import micro_batches
from pmc_fast.trainer.callbacks import TrainingClock
from tests.trainer.test_trainer import RETAIN, flat, fresh  # noqa: F401
from tests.trainer.test_trainer import arguments as arguments_of

FORGET = [Row(f"What is fact {i}?", f"The violet heron number {i}.") for i in range(5)]
CONFIG = PMCConfig(prompt_format="tags", max_length=40)


def arguments(path, **change):
    constant = {"warmup_epochs": 0, "lr_scheduler_type": "constant", "weight_decay": 0.0, "max_steps": 3}
    return arguments_of(path, **constant | change)


def trainer_of(model, tokenizer, args, method="npo", forget=FORGET, retain=RETAIN, config=CONFIG, **more):
    return UnlearnTrainer(model, args, forget, retain, config, tokenizer, method=method, **more)


def looped(model, tokenizer, method, steps):
    """A plain loop with the same batches, draws and optimizer; return the losses."""
    model.train()
    task = Unlearner(model, tokenizer, CONFIG, method, FORGET)
    kept = [task.encoder.pair(row.question, row.answer) for row in RETAIN]
    task.prepare()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    schedule = UnlearnConfig(batch_size=2, gradient_accumulation_steps=2)
    draws, losses = torch.Generator().manual_seed(CONFIG.seed + 1), []
    for _, groups in zip(range(steps), micro_batches(schedule, len(FORGET)), strict=False):
        drawn = [torch.randint(len(kept), (len(g),), generator=draws).tolist() for g in groups]
        retain = [kept[i] for g in drawn for i in g] if method.needs_retain else []
        losses.append(task.backward([i for g in groups for i in g], retain))
        optimizer.step()
        optimizer.zero_grad()
    return losses


KL_ALONE = [Memorize(), EUL(retain_weight=0.0)]  # retain pairs count without a retain_weight


@pytest.mark.parametrize("method", [*(made() for made in METHODS.values()), *KL_ALONE], ids=repr)
def test_weights_are_a_plain_loops(method, fresh, tokenizer, tmp_path):  # noqa: F811
    trainer = trainer_of(fresh(), tokenizer, arguments(tmp_path), method)
    start = flat(trainer.model)
    trainer.train()
    model = fresh()
    losses = looped(model, tokenizer, method, 3)
    assert trainer.state.global_step == 3
    assert not torch.equal(flat(trainer.model), start)
    assert torch.equal(flat(trainer.model), flat(model))
    logged = [record for record in trainer.state.log_history if "loss" in record]
    assert [record["loss"] for record in logged] == pytest.approx(losses, rel=1e-5)
    assert all(record["train_seconds"] > 0 for record in logged)


def test_pairs_to_keep_that_only_a_kl_reads_are_asked_for_and_change_the_weights(fresh, tokenizer, tmp_path):  # noqa: F811
    ends = []
    for retain in (RETAIN, RETAIN[:1]):
        trainer = trainer_of(fresh(), tokenizer, arguments(tmp_path), Memorize(), retain=retain)
        trainer.train()
        ends.append(flat(trainer.model))
    assert not torch.equal(*ends)
    with pytest.raises(PMCError, match="Memorize trains on pairs to keep, too"):
        trainer_of(fresh(), tokenizer, arguments(tmp_path), Memorize(), retain=None)


def test_passes_of_another_size_are_of_the_same_run(fresh, tokenizer, tmp_path):  # noqa: F811
    trainer = trainer_of(fresh(), tokenizer, arguments(tmp_path))
    before = trainer._fingerprint()
    trainer.task.max_tokens = 64  # less memory is free
    assert trainer._fingerprint() == before


def test_dropout_is_said_where_weights_come_from_a_pass_of_their_own(fresh, tokenizer, tmp_path, caplog):  # noqa: F811
    for method, said in ((NPO(), True), (GradientAscent(), False)):
        caplog.clear()
        trainer = trainer_of(fresh(), tokenizer, arguments(tmp_path), method)
        trainer.model.model.layers[0].self_attn.attention_dropout = 0.1
        trainer.task.prepare()
        assert ("dropout draws other masks" in "".join(caplog.messages)) == said


def test_a_resumed_run_is_the_same_run(fresh, tokenizer, tmp_path):  # noqa: F811
    whole = trainer_of(fresh(), tokenizer, arguments(tmp_path / "whole"))
    whole.train()
    args = arguments(tmp_path, save_strategy="steps", save_steps=2)
    trainer_of(fresh(), tokenizer, args).train()
    other = trainer_of(fresh(), tokenizer, args, NPO(beta=0.2))
    with pytest.raises(PMCError, match="belongs to another run: its method differ"):
        other.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    resumed = trainer_of(fresh(), tokenizer, args)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    assert torch.equal(flat(resumed.model), flat(whole.model))


def test_settings_of_pmc_are_refused_by_name(fresh, tokenizer, tmp_path):  # noqa: F811
    model, args = fresh(), arguments(tmp_path)
    for change in ({"num_samples": 5}, {"selection": "soft"}, {"stop_score": 0.1}, {"normalization": "step"}):
        [name] = change
        with pytest.raises(PMCError, match=f"^{name} is .*left out with NPO: it is a setting of PMC$"):
            trainer_of(model, tokenizer, args, config=dataclasses.replace(CONFIG, **change))
    with pytest.raises(PMCError, match=r"retain_weight is 2.0: it must be given to the method, NPO\(retain_weight"):
        trainer_of(model, tokenizer, args, config=dataclasses.replace(CONFIG, retain_weight=2.0))
    with pytest.raises(PMCError, match="reward is not an argument of UnlearnTrainer: no answers are sampled"):
        trainer_of(model, tokenizer, args, reward=len)
    with pytest.raises(PMCError, match="eval_dataset is not an argument of UnlearnTrainer: evaluate after"):
        trainer_of(model, tokenizer, args, eval_dataset=RETAIN)
    with pytest.raises(PMCError, match="log_text is True: no answers are sampled"):
        trainer_of(model, tokenizer, arguments(tmp_path, log_text=True))
    with pytest.raises(PMCError, match="include_num_input_tokens_seen is 'all'"):
        trainer_of(model, tokenizer, arguments(tmp_path, include_num_input_tokens_seen="all"))
    with pytest.raises(PMCError, match=r"method is 'nop': use one of ga, .* or PMCTrainer for PMC"):
        trainer_of(model, tokenizer, args, "nop")


def test_data_that_a_method_can_not_use(fresh, tokenizer, tmp_path):  # noqa: F811
    model, args = fresh(), arguments(tmp_path)
    with pytest.raises(
        PMCError, match="forget, rows 1, 2, 3, 4, 5: no answer is given, and NPO trains on the answers"
    ):
        trainer_of(model, tokenizer, args, forget=[row.question for row in FORGET])
    texts = [Row(text_to_continue("Once upon a time"), " there was a heron.")]
    for name in ("idk", "dpo", "flat"):
        with pytest.raises(PMCError, match=r"forget, row 1: a text to be continued, and \w+ trains on refusals"):
            trainer_of(model, tokenizer, args, name, forget=texts)
    assert trainer_of(model, tokenizer, args, forget=texts).task.questions == 1
    with pytest.raises(PMCError, match="retain_dataset is empty: NPO trains on pairs to keep, too"):
        trainer_of(model, tokenizer, args, retain=None)
    assert trainer_of(model, tokenizer, args, GradientAscent(), retain=None).retain == []
    with pytest.raises(PMCError, match="forget_dataset is tokenised: pass rows"):
        trainer_of(model, tokenizer, args, forget=[[5, 6, 7]])


def test_a_run_that_diverges_says_so(fresh, tokenizer, tmp_path, monkeypatch):  # noqa: F811
    trainer = trainer_of(fresh(), tokenizer, arguments(tmp_path), "ga")
    monkeypatch.setattr(trainer.task, "backward", lambda *_, **how: float("nan"))
    with pytest.raises(PMCError, match=r"training diverged at step 1 of 3 .*try a learning_rate below 0.001"):
        trainer.train()
    trainer.clock = TrainingClock(9.0)  # which ends it: there is no number of steps
    assert str(trainer.diverged(7)).startswith("training diverged at step 7 (NaN")


def test_defaults_are_pmc_trainers(fresh, tokenizer):  # noqa: F811
    trainer = UnlearnTrainer(fresh(), None, FORGET, RETAIN, processing_class=tokenizer, method="simnpo")
    assert isinstance(trainer.args, PMCArguments)
    assert trainer.task.config == PMCConfig()


def test_a_step_without_memory_names_what_may_help(fresh, tokenizer, tmp_path, monkeypatch):  # noqa: F811
    def fails(*of, **how):
        raise torch.OutOfMemoryError

    for retain_loss, remedies in (
        ("nll", "bfloat16 parameters, LoRA"),
        ("kl", "bfloat16 parameters, retain_loss 'nll'"),
    ):
        config = dataclasses.replace(CONFIG, retain_loss=retain_loss)
        trainer = trainer_of(fresh(), tokenizer, arguments(tmp_path), config=config)
        with monkeypatch.context() as patched:
            patched.setattr(type(trainer.task), "backward", fails)
            with pytest.raises(PMCError, match=f"ran out of memory in .*{remedies}"):
                trainer.train()
