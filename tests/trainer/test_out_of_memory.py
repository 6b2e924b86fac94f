"""A step that runs out of memory, wherever it does, ends as one that had enough."""

import pytest
import torch
from transformers import TrainerCallback

from pmc_fast import PMCConfig, PMCError, PMCTrainer
from pmc_fast.trainer import checkpointing
from tests.trainer.test_trainer import QUESTIONS, RETAIN, arguments, flat, half, trainer_of

OOM = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
SGD = {
    "num_train_epochs": 1,
    "optim": "sgd",
    "weight_decay": 0.0,
    "learning_rate": 0.02,
    "warmup_epochs": 0,
    "lr_scheduler_type": "constant",
}


@pytest.fixture(scope="module")
def model_of(tiny_dir):
    import transformers

    return lambda: transformers.AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float64)


@pytest.fixture(scope="module")
def undisturbed(model_of, tokenizer, tmp_path_factory):
    trainer = trainer_of(model_of(), tokenizer, arguments(tmp_path_factory.mktemp("run"), **SGD))
    trainer.train()
    return trainer


def fail_once(call, at):
    """Return `call`, which raises at its `at`-th call, and a list with an entry for each."""
    calls = []

    def failing(*args, **kwargs):
        calls.append(None)
        if len(calls) == at:
            raise OOM
        return call(*args, **kwargs)

    return failing, calls


class Fails(torch.autograd.Function):
    """The identity, until backward has come `at` times."""

    @staticmethod
    def forward(ctx, x, calls, at):
        ctx.calls, ctx.at = calls, at
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.calls.append(None)
        if len(ctx.calls) == ctx.at:
            raise OOM
        return grad, None, None


@pytest.mark.parametrize(
    ("place", "at"),
    [("forward", 1), ("forward", 2), ("half-way in backward", 1), ("half-way in backward", 2), ("rollout", 2)],
)
def test_gradients_are_those_of_an_undisturbed_step(
    place, at, undisturbed, model_of, tokenizer, tmp_path, monkeypatch, caplog
):
    trainer = trainer_of(model_of(), tokenizer, arguments(tmp_path, **SGD))
    mlp = trainer.model.model.layers[1].mlp
    inner, calls = mlp.forward, []
    if place == "rollout":
        engine = trainer.pmc.engine
        trainer.pmc.prepare()
        failing, calls = fail_once(engine._step.logits, 3 * at)
        monkeypatch.setattr(engine._step, "logits", failing)
    elif place == "forward":
        failing, calls = fail_once(inner, at)
        mlp.forward = lambda x: failing(x) if torch.is_grad_enabled() else inner(x)
    else:  # the layers above, and the head, have added their gradients by then
        mlp.forward = lambda x: inner(Fails.apply(x, calls, at) if torch.is_grad_enabled() else x)
    start = flat(trainer.model)
    trainer.train()
    assert len(calls) > at
    assert "ran out of memory" in "".join(caplog.messages)
    moved = (flat(undisturbed.model) - start).norm()
    assert (flat(trainer.model) - flat(undisturbed.model)).norm() <= 1e-6 * moved
    assert trainer.pmc.store.state_dict() == undisturbed.pmc.store.state_dict()
    if place != "rollout":
        assert trainer.pmc._loss.max_tokens < 200
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        assert losses == pytest.approx([log["loss"] for log in undisturbed.state.log_history if "loss" in log])


def test_an_optimizer_step_without_memory_leaves_the_checkpoint(model_of, tokenizer, tmp_path, monkeypatch):
    args = arguments(tmp_path, save_strategy="steps", save_steps=1, **SGD)
    trainer = trainer_of(model_of(), tokenizer, args)
    monkeypatch.setattr(torch.optim.SGD, "step", fail_once(torch.optim.SGD.step, 2)[0])
    with pytest.raises(PMCError) as error:
        trainer.train()
    text = str(error.value)
    assert text.startswith(
        "the device ran out of memory in the optimizer step (step 2 of 2): use bfloat16 parameters, LoRA"
    )
    assert "checkpoint-1 is sound: resume_from_checkpoint='auto' goes on from it" in text
    assert "\n" not in text
    checkpointing.load(tmp_path / "run/checkpoint-1", {})
    assert not (tmp_path / "run/checkpoint-2").exists()


def test_a_step_that_never_fits_says_so(model_of, tokenizer, tmp_path):
    trainer = trainer_of(model_of(), tokenizer, arguments(tmp_path, **SGD))
    full(trainer, 0)
    with pytest.raises(PMCError) as error:
        trainer.train()
    assert str(error.value).startswith(
        "the device ran out of memory in a training pass (step 1 of 2): use a smaller num_samples, a smaller max_length, "
        "bfloat16 parameters, LoRA, or a larger device; "
    )


def full(trainer, most):
    """Let training passes of more than `most` tokens run out of memory; return the numbers that come."""
    mlp = trainer.model.model.layers[1].mlp
    inner, seen = mlp.forward, []

    def forward(x):
        if torch.is_grad_enabled():
            seen.append(x.shape[-2])
            if seen[-1] > most:
                raise OOM
        return inner(x)

    mlp.forward = forward
    return seen


def test_a_step_is_halved_until_it_fits(undisturbed, model_of, tokenizer, tmp_path, caplog):
    """One that needs a quarter fits; the least is the longest group."""
    trainer = trainer_of(model_of(), tokenizer, arguments(tmp_path, **SGD))
    start = flat(trainer.model)
    probe = full(trainer, 1 << 30)
    trainer.train()
    whole = probe[0]
    trainer = trainer_of(model_of(), tokenizer, arguments(tmp_path / "short", **SGD))
    seen = full(trainer, whole // 4)
    trainer.train()
    tries = [text for text in caplog.messages if "step 1 ran out of memory" in text]
    assert len(tries) > 1
    assert f"at most {whole // 2} tokens" in tries[0]
    assert max(seen[len(tries) :]) <= whole // 4 < seen[len(tries) - 1]
    moved = (flat(undisturbed.model) - start).norm()
    assert (flat(trainer.model) - flat(undisturbed.model)).norm() <= 1e-6 * moved


def test_an_evaluation_is_named(model_of, tokenizer, tmp_path, monkeypatch):
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=1, **SGD)
    trainer = trainer_of(model_of(), tokenizer, args, eval_dataset=RETAIN)
    monkeypatch.setattr(trainer, "prediction_step", fail_once(trainer.prediction_step, 1)[0])
    with pytest.raises(PMCError) as error:
        trainer.train()
    assert str(error.value).startswith(
        "the device ran out of memory in an evaluation (after step 1 of 2): use a smaller per_device_eval_batch_size, "
    )
    assert "LoRA" not in str(error.value)


def test_what_follows_the_optimizer_step_is_not_the_optimizer_step(model_of, tokenizer, tmp_path):
    class Callback(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            raise OOM

    trainer = trainer_of(model_of(), tokenizer, arguments(tmp_path, **SGD), callbacks=[Callback()])
    with pytest.raises(PMCError, match=r"out of memory in a callback or checkpoint \(after step 1 of 2\)"):
        trainer.train()


def test_gradients_of_a_subclass_are_not_dropped(model_of, tokenizer, tmp_path):
    class Own(PMCTrainer):
        def training_step(self, model, inputs, *args):
            model.get_input_embeddings().weight.square().mean().backward()
            return super().training_step(model, inputs, *args)

    config = PMCConfig(num_samples=2, max_length=40, prompt_format="tags")
    trainer = Own(model_of(), arguments(tmp_path, **SGD), QUESTIONS, RETAIN, config, tokenizer, reward=half)
    mlp = trainer.model.model.layers[1].mlp
    failing, _ = fail_once(mlp.forward, 1)
    inner = mlp.forward
    mlp.forward = lambda x: failing(x) if torch.is_grad_enabled() else inner(x)
    with pytest.raises(PMCError, match="in a training pass"):
        trainer.train()
