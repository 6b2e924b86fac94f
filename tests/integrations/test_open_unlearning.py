"""PMC in OpenUnlearning, on a stand-in for its trainers: losses, gradients and prompts of plain padded passes."""

import functools
import json
import os
import resource
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from pmc_fast.errors import PMCError
from pmc_fast.rollout import RolloutEngine

TREE = Path(__file__).parents[1] / "open_unlearning"
QUESTIONS = ["Who wrote it?", "Where was the author born, and when?", "Why?", "What is the name of the cat?"]
SETTINGS = {"num_samples": 3, "max_length": 60, "temperature": 1.25, "gamma": 0.7, "alpha": 1.5}


@pytest.fixture(scope="module", autouse=True)
def tree():
    """The stand-in's src/ on sys.path, as its own scripts have it."""
    sys.path.insert(0, str(TREE / "src"))
    yield
    sys.path.remove(str(TREE / "src"))


@pytest.fixture
def trainer_of(tiny_dir, tokenizer, tmp_path):
    """Make a trainer of the tiny model in float64."""
    from data import Collator, ForgetRetain, Rows

    from pmc_fast.integrations.open_unlearning import PMC

    def make(forget=None, evaluators=None, pad="<|im_end|>", *, args=None, **change):
        names = transformers.AutoTokenizer.from_pretrained(tokenizer.name_or_path, pad_token=pad)
        pairs = [(q, "Known.") for q in QUESTIONS]
        retain = [("Is 4 even?", "It is."), ("And 5?", "No, it is odd."), ("6?", "Yes."), ("7?", "No, never.")]
        data = ForgetRetain(Rows(names, pairs) if forget is None else forget, Rows(names, retain))
        given = {
            "output_dir": str(tmp_path / "run"), "per_device_train_batch_size": 2, "report_to": [], "seed": 5,
            "gradient_accumulation_steps": 2, "num_train_epochs": 1, "learning_rate": 1e-3, "save_strategy": "no",
            "logging_steps": 1, "remove_unused_columns": False, "use_cpu": True,
        }  # fmt: skip
        return PMC(
            model=transformers.AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float64),
            args=transformers.TrainingArguments(**given | (args or {})), train_dataset=data,
            eval_dataset=data.retain, processing_class=names, data_collator=Collator(names), evaluators=evaluators,
            template_args=None, **SETTINGS | change,
        )  # fmt: skip

    return make


def batch_of(trainer, rows=(2, 0, 3)):
    """A micro-batch; the collator's own draw decides what is retained."""
    return trainer.data_collator([trainer.train_dataset[i] for i in rows])


def gradients(model):
    made = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    return made


def same(ours, theirs, rtol=1e-5):  # transformers' RMS norms round to float32 whatever the model is
    for name, g in theirs.items():
        assert (ours[name] - g).norm() <= rtol * g.norm(), name


def plain(trainer, batch, rows):
    """gamma CE(stored answers) + alpha CE(retain answers), each one padded pass, masked as the collator masks."""
    stored = []
    for i in rows:
        item = trainer.train_dataset.forget[i]
        prompt = item["input_ids"][item["labels"] == -100]
        [[answer, _]] = trainer.pmc.store.answer(i)
        stored.append(
            {"input_ids": torch.cat([prompt, torch.tensor(answer)]),
             "labels": torch.cat([torch.full_like(prompt, -100), torch.tensor(answer)])}
        )  # fmt: skip
    forget = trainer.data_collator(stored)
    losses = [trainer.model(**part, use_cache=False).loss for part in (forget, batch["retain"])]
    return trainer.gamma * losses[0] + trainer.alpha * losses[1]


@pytest.mark.parametrize("own_step", [True, False])
def test_an_evaluation_is_grad_diffs(trainer_of, own_step, monkeypatch):
    """With their prediction_step, which asks for the Trainer's loss, and with the Trainer's, which asks for ours."""
    from trainer.unlearn.base import UnlearnTrainer
    from trainer.unlearn.grad_diff import GradDiff

    trainer = trainer_of()
    rows = trainer.train_dataset.retain
    theirs = GradDiff(
        model=trainer.model, args=trainer.args, train_dataset=trainer.train_dataset, data_collator=trainer.data_collator,
        processing_class=trainer.processing_class,
    ).evaluate(rows)  # fmt: skip
    if not own_step:
        monkeypatch.delattr(UnlearnTrainer, "prediction_step")
    state = trainer._ready().state_dict()
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(theirs["eval_loss"], rel=1e-6)
    trainer.model.eval()
    one = trainer.compute_loss(trainer.model, trainer.data_collator([rows[0]]))
    assert one.item() == pytest.approx(trainer.model(**trainer.data_collator([rows[0]])).loss.item(), rel=1e-6)
    assert trainer.pmc.state_dict() == state  # nothing was sampled


# the first is eos, which stands in chat prompts; the other stands nowhere
@pytest.mark.parametrize("pad", ["<|im_end|>", "<|endoftext|>"])
def test_losses_and_gradients_are_the_padded_passes(trainer_of, pad):
    trainer = trainer_of(pad=pad)
    batch = batch_of(trainer)
    ours = trainer.compute_loss(trainer.model, batch)
    ours.backward()
    made = gradients(trainer.model)
    theirs = plain(trainer, batch, (2, 0, 3))
    theirs.backward()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    same(made, gradients(trainer.model))
    assert any(trainer.pmc.positions) is (pad == "<|im_end|>")


def test_rollouts_see_what_training_sees(trainer_of):
    """Initial answers where eos is masked: greedy under the plain model with the collator's mask."""
    trainer = trainer_of()
    trainer._ready()
    for i, answer in enumerate(trainer.pmc._initial_ids):
        item = trainer.train_dataset.forget[i]
        ids = item["input_ids"][item["labels"] == -100]
        mask = ids != trainer.data_collator.pad
        assert not mask.all()
        for token in answer[:12]:
            with torch.no_grad():
                logits = trainer.model(ids[None], attention_mask=mask[None], use_cache=False).logits[0, -1]
            assert token == int(logits.argmax())
            ids, mask = torch.cat([ids, torch.tensor([token])]), torch.cat([mask, torch.tensor([True])])


def test_questions_are_prompts_in_order_and_are_found_again(trainer_of, tokenizer):
    from data import Rows

    pairs = [(q, a) for a in ("One answer.", "Another, and longer.") for q in QUESTIONS[:3]]
    trainer = trainer_of(forget=Rows(tokenizer, pairs))
    assert len(trainer.pmc.prompts) == 3
    (batch,) = trainer._sampled([batch_of(trainer, (1, 5, 0, 4))])
    assert batch["pmc"][0].indices == [1, 2, 0, 1]
    batch = batch_of(trainer, (1, 2))
    batch["forget"]["input_ids"][1, 0] += 1
    with pytest.raises(PMCError, match=r"has a prompt that train_dataset\.forget has not"):
        trainer.compute_loss(trainer.model, batch)


@pytest.mark.parametrize("normalization", ["micro_batch", "step"])
def test_accumulation_changes_no_gradient(trainer_of, normalization, monkeypatch):
    """Of rows of one length, where each micro-batch's mean is the step's; of any, where the mean is over the step."""
    made, asked = {}, []
    trainer = trainer_of(normalization=normalization)
    real = RolloutEngine.__call__
    monkeypatch.setattr(
        RolloutEngine, "__call__", lambda self, p, **how: asked.append(len(p)) or real(self, p, **how)
    )
    trainer._ready()
    differ = normalization == "step"
    for i in range(4):  # answers as if solved: never sampled again
        trainer.pmc.store.offer(i, [[[7 + i, 8, 9, *[11] * differ * i], 1.0]], 0.0)
    for size, accumulation in ((4, 1), (2, 2), (1, 4)):
        whole = [trainer.train_dataset.forget[i] for i in range(4)]
        rows = [
            {"forget": f, "retain": trainer.train_dataset.retain[i if differ else 2]} for i, f in enumerate(whole)
        ]
        batches = [trainer.data_collator(rows[i : i + size]) for i in range(0, 4, size)]
        batches, items = trainer.get_batch_samples(iter(batches), accumulation, trainer.args.device)
        assert items is None
        trainer.current_gradient_accumulation_steps = accumulation
        for batch in batches:
            trainer.training_step(trainer.model, batch, items)
        made[accumulation] = gradients(trainer.model)
    same(made[2], made[1])
    same(made[4], made[1])
    assert asked == [4]  # the initial answers


def test_a_step_is_one_rollout_and_a_run_moves_the_weights(trainer_of, monkeypatch):
    asked = []
    real = RolloutEngine.__call__
    monkeypatch.setattr(
        RolloutEngine, "__call__", lambda self, p, **how: asked.append(len(p)) or real(self, p, **how)
    )
    trainer = trainer_of()
    start = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    assert asked == [4, 4]  # initial answers, and the one step of two micro-batches
    assert all(not torch.equal(a, b) for a, b in zip(start, trainer.model.parameters(), strict=True))
    (logged,) = [r for r in trainer.state.log_history if "collapse_loss" in r]
    assert logged["loss"] == pytest.approx(0.7 * logged["collapse_loss"] + 1.5 * logged["retain_loss"], rel=1e-4)
    assert logged["sampled_tokens"] > 0
    assert 0 < logged["cut_samples"] <= logged["sampled_tokens"]
    assert not any(q in json.dumps(trainer.state.log_history) for q in QUESTIONS)


def test_kl_is_the_base_classs(trainer_of):
    trainer = trainer_of(retain_loss_type="KL")
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.mul_(1.1)
    batch = batch_of(trainer)
    loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    assert outputs["loss"] is loss
    kl = trainer.compute_retain_loss(trainer.model, batch["retain"])
    assert kl > 0
    trainer.alpha = 0.0
    collapse = plain(trainer, batch, (2, 0, 3))
    assert loss.item() == pytest.approx((collapse + 1.5 * kl).item(), rel=1e-6)


def test_their_evaluators_are_called_as_before(trainer_of, tmp_path):
    class Evaluator:
        def evaluate(self, output_dir, template_args, model, tokenizer):
            (Path(output_dir) / "done.json").write_text("{}")
            return {"quality": 0.5}

    trainer = trainer_of(
        evaluators={"mine": Evaluator()}, args={"eval_strategy": "epoch", "do_eval": True, "save_strategy": "epoch"}
    )
    trainer.train()
    assert any(r.get("quality") == 0.5 for r in trainer.state.log_history)
    assert (tmp_path / "run/checkpoint-1/evals/done.json").is_file()
    assert (tmp_path / "run/checkpoint-1/pmc_state.json").is_file()


def test_resumed_is_uninterrupted(trainer_of, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 3, "save_total_limit": 3}
    whole = trainer_of(args=saving)
    whole.train()
    state = tmp_path / "run/checkpoint-1/pmc_state.json"
    assert stat.S_IMODE(state.stat().st_mode) == 0o600
    shutil.rmtree(tmp_path / "run/checkpoint-3")
    again = trainer_of(args=saving)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3
    assert again.pmc.state_dict() == whole.pmc.state_dict()
    for a, b in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    state.write_text(json.dumps({"fingerprint": {"questions": "others"}, "pmc": {}}))
    with pytest.raises(PMCError, match="belongs to another run: its questions differ"):
        trainer_of().train(str(state.parent))
    state.unlink()
    with pytest.raises(PMCError, match=r"has no sound pmc_state\.json"):
        trainer_of().train(str(state.parent))


class Drawing(transformers.TrainerCallback):
    """Draws from the global generator in every step, as dropout does."""

    def on_substep_end(self, args, state, control, **others):
        torch.rand(3)

    on_step_end = on_substep_end


@pytest.mark.parametrize("accumulation", [1, 2])
def test_resumed_within_an_epoch_is_uninterrupted(trainer_of, tmp_path, accumulation):
    """OpenUnlearning's train.py hands no checkpoint over, and its loader has drawn a retain row ahead of each step."""
    saving = {
        "save_strategy": "steps", "save_steps": 1, "num_train_epochs": 2, "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": accumulation,
    }  # fmt: skip
    whole = trainer_of(args=saving)
    whole.add_callback(Drawing())
    whole.train()
    last = whole.state.global_step
    for step in sorted({1, last // 2, last - 1}):  # within an epoch, between two, before the end
        part = trainer_of(args=saving | {"resume_from_checkpoint": str(tmp_path / f"run/checkpoint-{step}")})
        part.add_callback(Drawing())
        torch.rand(step)  # whatever was drawn before
        part.train()
        assert len(part.state.log_history) == len(whole.state.log_history)  # it did go on from there
        assert part.pmc.state_dict() == whole.pmc.state_dict()
        for a, b in zip(part.model.parameters(), whole.model.parameters(), strict=True):
            assert torch.equal(a, b), step


def test_the_newest_checkpoint_is_found_from_the_command_line(trainer_of, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 2, "resume_from_checkpoint": "auto"}
    trainer_of(args=saving).train()  # there is none yet
    state = tmp_path / "run/checkpoint-2/pmc_state.json"
    before = state.stat().st_mtime_ns
    again = trainer_of(args=saving)
    again.train()
    assert again.state.global_step == 2
    assert state.stat().st_mtime_ns == before


def test_a_state_that_was_half_written_is_not_there(trainer_of, tmp_path):
    """Writing the second checkpoint's state fails half-way: the next run goes on from the first."""
    saving = {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 2}
    trainer = trainer_of(args=saving)
    state_dict, (soft, hard) = trainer.pmc.state_dict, resource.getrlimit(resource.RLIMIT_FSIZE)

    def with_little_room():
        if trainer.state.global_step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
        return state_dict()

    trainer.pmc.state_dict = with_little_room
    try:
        with pytest.raises((OSError, PMCError), match="File too large"):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in (tmp_path / "run/checkpoint-2").iterdir() if "pmc_state" in p.name] == []
    again = trainer_of(args=saving | {"resume_from_checkpoint": "auto"})
    again.train()
    assert again.pmc.state_dict() == state_dict()
    assert json.loads((tmp_path / "run/checkpoint-2/pmc_state.json").read_text())["pmc"] == state_dict()


def test_a_checkpoint_of_other_settings_is_refused(trainer_of, tmp_path):
    from data import Rows

    saving = {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 2}
    trainer_of(args=saving).train()
    found = str(tmp_path / "run/checkpoint-1")
    others = {
        "training settings": {"args": saving | {"learning_rate": 1e-4}},
        "PMC settings": {"alpha": 3.0},
    }
    for what, change in others.items():
        with pytest.raises(PMCError, match=f"belongs to another run: its {what} differ"):
            trainer_of(**{"args": saving} | change).train(found)
    again = trainer_of(args=saving)
    again.train_dataset.retain = Rows(again.processing_class, [("8?", "It is.")])
    with pytest.raises(PMCError, match="belongs to another run: its retain rows differ"):
        again.train(found)


def test_settings(trainer_of):
    trainer = trainer_of(top_p=0.9, selection="soft")
    config = trainer.pmc_config
    assert (config.top_p, config.selection, config.num_samples, config.seed) == (0.9, "soft", 3, 5)
    assert config.retain_weight == pytest.approx(1.5 / 0.7)
    assert trainer.loss_is_scaled_for_ga is False
    assert trainer.model_accepts_loss_kwargs is False
    assert trainer_of(seed=8).pmc_config.seed == 8


def test_refusals(trainer_of, tokenizer, monkeypatch):
    from pmc_fast.integrations.open_unlearning import PMC

    with pytest.raises(PMCError, match="older than transformers 5; update it"):
        PMC(model=None, tokenizer=tokenizer)
    with pytest.raises(PMCError, match=r"method_args\.gamma is 0: it must be above 0"):
        trainer_of(gamma=0)
    with pytest.raises(PMCError, match=r"method_args\.alpha is 'x': it must be a number"):
        trainer_of(alpha="x")
    with pytest.raises(PMCError, match=r"method_args\.num_smaples is not a setting: did you mean num_samples\?"):
        trainer_of(num_smaples=2)
    with pytest.raises(
        PMCError, match=r"method_args\.steering_coeff is not a setting: there are GradDiff's and those"
    ):
        trainer_of(steering_coeff=20)
    with pytest.raises(PMCError, match=r"retain_loss_type is 'EMBED_DIFF', which .* does not know: use NLL or KL"):
        trainer_of(retain_loss_type="EMBED_DIFF")  # RMU's
    with pytest.raises(PMCError, match=r"method_args\.retain_weight is not a setting here: alpha weighs"):
        trainer_of(retain_weight=1.0)
    for given in (
        {"retain_loss": "kl"},
        {"retain_order": "shuffled"},
        {"retain_per_question": 2},
        {"question_dropout": 0.3},
    ):
        with pytest.raises(PMCError, match=rf"method_args\.{next(iter(given))} is not a setting here: "):
            trainer_of(**given)
    with pytest.raises(PMCError, match=r"top_p is 2\.0"):
        trainer_of(top_p=2.0)
    with pytest.raises(PMCError, match="train_dataset has no forget set"):
        trainer_of(forget=[]).train()
    with pytest.raises(PMCError, match="forget row 0 has no input_ids and labels"):
        trainer_of(forget=[{"original": {}, "alternate": {}}]).train()
    base = PMC.__base__
    inner = base.__init__

    @functools.wraps(inner)  # its parameters are looked at
    def under_fsdp(self, *a, **k):
        inner(self, *a, **k)
        self.is_fsdp_enabled = True

    monkeypatch.setattr(base, "__init__", under_fsdp)
    with pytest.raises(PMCError, match="which FSDP may shard: use accelerate's multi_gpu"):
        trainer_of()
    monkeypatch.undo()
    text = {"input_ids": torch.tensor([3, 4]), "labels": torch.tensor([3, 4])}
    with pytest.raises(PMCError, match="forget row 0 has no prompt before an answer"):
        trainer_of(forget=[text]).train()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"fp16": True}, "would compute in float16 on the CPU: load it in float32 or bfloat16"),
        ({"auto_find_batch_size": True}, r"trainer\.args\.auto_find_batch_size is True: memory depends on"),
        ({"label_smoothing_factor": 0.1}, r"trainer\.args\.label_smoothing_factor is 0\.1: PMC's loss is the plain"),
        ({"remove_unused_columns": True}, r"trainer\.args\.remove_unused_columns is True: .* set it to false"),
        ({"train_sampling_strategy": "group_by_length"}, "is 'group_by_length': rows are pairs of"),
    ],
)
def test_arguments_that_cant_be_met_are_refused_at_construction(trainer_of, args, message):
    with pytest.raises(PMCError, match=message):
        trainer_of(args=args)


def test_models_that_cant_be_trained_are_refused_at_construction(trainer_of, tiny_dir, monkeypatch):
    peft = pytest.importorskip("peft")
    load = transformers.AutoModelForCausalLM.from_pretrained

    def give(change, **how):
        monkeypatch.setattr(
            transformers.AutoModelForCausalLM, "from_pretrained", lambda *a, **k: change(load(tiny_dir, **how))
        )

    give(lambda model: model, dtype=torch.float16)
    with pytest.raises(PMCError, match="would compute in float16 on the CPU"):
        trainer_of()
    give(lambda model: model.requires_grad_(False))
    with pytest.raises(PMCError, match="has no parameter to train"):
        trainer_of()
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    give(lambda model: peft.get_peft_model(model, prompt))
    with pytest.raises(PMCError, match="PROMPT_TUNING, which adds tokens of its own"):
        trainer_of()


def test_a_run_goes_on_from_whole_checkpoints_only(trainer_of, tmp_path):
    """OpenUnlearning saves the model alone by default, and evaluates into directories named as checkpoints."""
    trainer_of(args={"save_strategy": "steps", "save_steps": 1, "save_only_model": True}).train()
    again = trainer_of(args={"num_train_epochs": 2})
    (tmp_path / "run/checkpoint-7/evals").mkdir(parents=True)
    shutil.copytree(tmp_path / "run/checkpoint-1", tmp_path / "run/checkpoint-mine")
    with pytest.raises(PMCError, match=r"checkpoint-1 holds the model alone.*save_only_model=false"):
        again.train(resume_from_checkpoint=True)


def launch(cwd, *arguments):
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "pmc_fast.integrations.open_unlearning", *arguments], cwd=cwd,
        env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("last", [[], ["-m"]])
def test_launcher_runs_an_unchanged_checkout(tiny_dir, smollm2_dir, tmp_path, last):
    pytest.importorskip("hydra")
    checkout = tmp_path / "open-unlearning"
    shutil.copytree(TREE, checkout, ignore=shutil.ignore_patterns("__pycache__"))
    before = sorted(p for p in checkout.rglob("*") if "__pycache__" not in p.parts)
    done = launch(
        checkout, "--config-name=unlearn.yaml", "trainer=PMC", f"model={tiny_dir}", f"tokenizer={smollm2_dir}",
        f"trainer.args.output_dir={tmp_path}/run", "trainer.method_args.num_samples=2", "+trainer.args.use_cpu=true",
        "trainer.method_args.max_length=60", f"hydra.sweep.dir={tmp_path}/sweep", *last,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "'collapse_loss'" in done.stdout
    assert (tmp_path / "run/model.safetensors").is_file()
    assert sorted(p for p in checkout.rglob("*") if "__pycache__" not in p.parts) == before


@pytest.mark.parametrize("flags", [["--cfg", "job"], ["--info", "searchpath"]])
def test_flags_may_stand_last(tmp_path, flags):
    """Hydra takes overrides in one group only: none may be added behind a flag, nor before one."""
    pytest.importorskip("hydra")
    (tmp_path / "more/trainer").mkdir(parents=True)
    (tmp_path / "more/trainer/Mine.yaml").write_text("defaults: [PMC]\nmethod_args: {num_samples: 77}\n")
    own = f"hydra.searchpath=[file://{tmp_path}/more]"
    done = launch(TREE, "--config-name=unlearn.yaml", "trainer=Mine", own, "model=x", "tokenizer=y", *flags)
    assert done.returncode == 0, done.stderr
    for text in ["handler: PMC", "num_samples: 77"] if "--cfg" in flags else ["pmc_fast", "more"]:
        assert text in done.stdout


@pytest.mark.parametrize(
    ("lines", "pin"),
    [
        ("torch==2.4.1\ntransformers==4.51.3  # newer models\n", "transformers==4.51.3"),
        ("Transformers ~= 4.40\n", "Transformers~=4.40"),
        ("transformers[torch]>=4.45,<5\n", "transformers[torch]<5,>=4.45"),
        ("-r base.txt\n--index-url https://x\ntransformers==5.5.4\n", None),
        ("transformers>=4.51\n", None),
        ("git+https://github.com/huggingface/transformers\ntransformers-stream==0.4\n", None),
    ],
)
def test_a_generation_for_transformers_4_is_refused_by_what_it_pins(tmp_path, capsys, monkeypatch, lines, pin):
    from pmc_fast.integrations.open_unlearning import __main__ as launcher

    (tmp_path / "src/trainer").mkdir(parents=True)
    (tmp_path / "src/train.py").touch()
    (tmp_path / "requirements.txt").write_text(lines)
    monkeypatch.setattr(launcher, "import_module", lambda name: pytest.fail("imported") if pin else sys.exit(0))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        launcher.main()
    assert stop.value.code == (2 if pin else 0)
    said = capsys.readouterr().err.splitlines()
    expected = f"this OpenUnlearning checkout requires {pin} (requirements.txt): pmc_fast needs its generation for"
    assert [line[: len(expected)] for line in said] == ([expected] if pin else [])
    assert all("pull/191/head" in line for line in said)


def test_launcher_refuses_in_one_line(tmp_path):
    (tmp_path / "src/trainer").mkdir(parents=True)
    done = launch(tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"{tmp_path} has no src/train.py: run this in the root of an OpenUnlearning checkout"
    ]
    (tmp_path / "src/train.py").touch()
    init = tmp_path / "src/trainer/__init__.py"
    init.write_text("def load_trainer(trainer_cfg, model, tokenizer=None): ...")
    done = launch(tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert (
        "older than transformers 5 (load_trainer takes a tokenizer, not a processing_class): pmc_fast needs" in line
    )
    init.write_text("from transformers import no_longer_there")
    (line,) = launch(tmp_path).stderr.splitlines()
    assert "can't be imported" in line
    assert "pull/191/head" in line
    init.write_text("import deepspeeds")
    (line,) = launch(tmp_path).stderr.splitlines()
    assert line.endswith("can't be imported (No module named 'deepspeeds'): install what its requirements.txt lists")


def test_a_question_to_be_forgotten_is_not_kept(trainer_of):
    """Prompts are compared as token ids: of rows, whatever the collator draws."""
    from data import ForgetRetain, Rows

    trainer = trainer_of()
    rows = Rows(trainer.processing_class, [("Is it?", "No."), (QUESTIONS[2], "Since."), (QUESTIONS[0], "Ann.")])
    data = ForgetRetain(trainer.train_dataset.forget, rows)
    trainer.train_dataset = data
    with pytest.raises(PMCError, match=r"retain_dataset, rows 2, 3: the same .* \(forget_dataset, rows 1, 3\)"):
        trainer.train()
    trainer = trainer_of(allow_overlap=True)
    trainer.train_dataset = data
    assert len(trainer.pmc.prompts) == 4
