"""Evaluation of PMCTrainer: against plain forward passes and generate; it changes nothing of the run."""

import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from pmc_fast import PMCError, PMCTrainer
from pmc_fast.data import Row
from pmc_fast.pmc.reward import rouge_l_recall
from tests.trainer.test_trainer import QUESTIONS, RETAIN, arguments, flat, fresh, half, trainer_of  # noqa: F401

KEPT = [Row(f"Is {i} odd?", f"It is {i % 2 == 1}, " * (1 + i)) for i in range(3)]
CLOCKS = ("second", "runtime", "preparation", "flos", "train_loss")


@pytest.fixture
def make(fresh, tokenizer, tmp_path):  # noqa: F811
    def made(folder="a", **change):
        given = {
            name: change.pop(name)
            for name in list(change)
            if name not in ("eval_dataset", "compute_metrics", "model", "callbacks")
        }
        model = change.pop("model", None) or fresh()
        return trainer_of(model, tokenizer, arguments(tmp_path / folder, **given), **{"eval_dataset": KEPT} | change)

    return made


def test_its_numbers_are_those_of_plain_passes(fresh, tokenizer, tmp_path):  # noqa: F811
    model = fresh()
    args = arguments(tmp_path, per_device_eval_batch_size=1, learning_rate=0.01)
    trainer = PMCTrainer(model, args, QUESTIONS, RETAIN, pmc_config(), tokenizer, eval_dataset=KEPT)
    before = trainer.evaluate()
    assert before["eval_forget_score"] == 1  # the greedy answers are the initial ones
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_forget_score"] < 0.9
    losses, said, again = [], [], []
    model.eval()
    encoder = trainer.pmc.encoder
    for row in KEPT:
        s = encoder.pair(row.question, row.answer)
        ids, labels = torch.tensor([s.input_ids]), torch.tensor([s.labels])
        logits = model(ids).logits[0, :-1].detach()
        losses.append(torch.nn.functional.cross_entropy(logits, labels[0, 1:]).item())
    for question in [row.question for row in KEPT] + QUESTIONS:
        prompt = torch.tensor([encoder.prompt(question)])
        made = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_length=40, eos_token_id=encoder.stops
        )
        again.append(made[0, prompt.shape[1] :].tolist())
    said = encoder.answers(again)
    truths = encoder.answers([[x for x in encoder.pair(r.question, r.answer).labels if x != -100] for r in KEPT])
    mean = lambda wanted, given: rouge_l_recall(wanted, [[x] for x in given]).mean()  # noqa: E731
    assert after["eval_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert after["eval_recall"] == pytest.approx(mean(truths, said[:3]))
    assert after["eval_forget_score"] == pytest.approx(mean(trainer.pmc.initial_answers, said[3:]))
    assert not any(text in json.dumps(trainer.state.log_history) for text in [*QUESTIONS, KEPT[0].question])


def pmc_config():
    from pmc_fast import PMCConfig

    return PMCConfig(num_samples=2, max_length=40, prompt_format="tags")


def test_it_changes_nothing_of_the_run(tokenizer, make):
    def model():
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(transformers.GPT2Config(
            vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=64, attn_pdrop=0.3, resid_pdrop=0.3,
            bos_token_id=1, eos_token_id=2,
        ))  # fmt: skip

    plain = make(model=model(), eval_dataset=None)
    plain.train()
    ours = make("b", model=model(), eval_strategy="steps", eval_steps=1, eval_on_start=True)
    ours.evaluate()
    ours.train()
    assert torch.equal(flat(ours.model), flat(plain.model))
    assert ours.pmc.state_dict() == plain.pmc.state_dict()

    def steps(trainer):
        logs = [r for r in trainer.state.log_history if "collapse_loss" in r]
        return [{k: v for k, v in r.items() if not any(c in k for c in CLOCKS)} for r in logs]

    assert steps(ours) == steps(plain)
    assert sum("eval_recall" in r for r in ours.state.log_history) == 5  # before step 1, after each of 4


def test_compute_metrics_gets_logits_and_labels(make):
    seen = []
    trainer = make(
        compute_metrics=lambda given: seen.append(given) or {"accuracy": 0.25}, per_device_eval_batch_size=2
    )
    metrics = trainer.evaluate()
    assert metrics["eval_accuracy"] == 0.25
    longest = max(trainer.eval_dataset, key=lambda s: len(s.input_ids))
    at = trainer.eval_dataset.index(longest)
    logits = trainer.model(torch.tensor([longest.input_ids])).logits[0]
    torch.testing.assert_close(torch.tensor(seen[0].predictions[at]), logits.detach(), rtol=1e-4, atol=1e-4)
    assert seen[0].label_ids[at].tolist() == longest.labels


def test_the_best_model_is_kept_and_loaded(make, tmp_path):
    """The best step's weights come back, whose checkpoint stands where its path says, resumed or not."""
    best = {
        "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2,
        "load_best_model_at_end": True, "metric_for_best_model": "third",
    }  # fmt: skip
    run = tmp_path / "a/run"
    for resume in (None, "auto"):
        values = iter([1, 2, 5, 4])
        trainer = make(**best, compute_metrics=lambda given, values=values: {"third": next(values)})
        trainer.train(resume_from_checkpoint=resume)
        assert sorted(p.name for p in run.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
        assert trainer.state.best_model_checkpoint == str(run / "checkpoint-3")
        state = json.loads((run / "checkpoint-3/trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == str(run / "checkpoint-3")
        saved = load_file(run / "checkpoint-3/model.safetensors")
        assert all(torch.equal(p, saved[n]) for n, p in trainer.model.named_parameters())


def test_early_stopping(make):
    stop = transformers.EarlyStoppingCallback(early_stopping_patience=1)
    trainer = make(
        eval_strategy="steps", eval_steps=1, num_train_epochs=9, callbacks=[stop], metric_for_best_model="forget_score",
        greater_is_better=False, learning_rate=0.0,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 2  # nothing moves: the second evaluation is no better


def test_several_sets_in_several_forms(make, tokenizer):
    plain = make()
    tokenised = [{"input_ids": s.input_ids, "labels": s.labels} for s in plain.eval_dataset]
    trainer = make(eval_dataset={"kept": KEPT, "ids": iter(tokenised)})
    metrics = trainer.evaluate()
    for name in ("loss", "recall", "forget_score"):
        assert metrics[f"eval_kept_{name}"] == metrics[f"eval_ids_{name}"] == plain.evaluate()[f"eval_{name}"]
    forgotten = [Row(q, "It is secret.") for q in QUESTIONS]  # may be watched
    assert set(plain.evaluate({"forget": forgotten})) >= {"eval_forget_loss", "eval_forget_recall"}
    assert plain.evaluate(tokenised[:2])["eval_loss"] != metrics["eval_kept_loss"]
    assert plain.predict(tokenised).metrics["test_recall"] == metrics["eval_kept_recall"]


def test_what_has_no_prompt_has_no_recall_and_losses_can_be_all(make):
    whole = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}]
    metrics = make(eval_dataset=whole).evaluate()
    assert "eval_recall" not in metrics
    assert {"eval_loss", "eval_forget_score"} <= set(metrics)
    metrics = make(prediction_loss_only=True).evaluate()
    assert "eval_loss" in metrics
    assert not {"eval_recall", "eval_forget_score"} & set(metrics)


def test_gaps_keep_their_positions(make):
    row = {"input_ids": [9, 5, 6, 7, 8], "labels": [-100, -100, -100, 7, 8], "attention_mask": [1, 0, 1, 1, 1]}
    trainer = make(eval_dataset=[row])
    ids, labels = torch.tensor([[9, 6, 7, 8]]), torch.tensor([[-100, -100, 7, 8]])
    seen = torch.ones_like(ids)  # else transformers takes a jump in positions for another sequence
    loss = trainer.model(ids, attention_mask=seen, position_ids=torch.tensor([[0, 2, 3, 4]]), labels=labels).loss
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_refusals(make):
    trainer = make(eval_dataset=None)
    with pytest.raises(PMCError, match="evaluation needs an eval_dataset: pairs to keep"):
        trainer.evaluate()
    with pytest.raises(PMCError, match="eval_dataset, row 1 has no answer"):
        make(eval_dataset=[{"question": "Who?"}])
    with pytest.raises(PMCError, match="eval_dataset train, row 1 has no answer"):
        make(eval_dataset={"train": [{"question": "Who?"}]})
