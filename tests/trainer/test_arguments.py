"""Every setting that people bring along to PMCTrainer is honoured, refused by name, or warned about."""

import dataclasses
import json
import re

import pandas
import pytest
import torch
import transformers
from transformers.trainer_pt_utils import AcceleratorConfig

import pmc_fast.trainer.base
from pmc_fast import (
    PMCArguments,
    PMCConfig,
    PMCError,
    PMCTrainer,
)
from pmc_fast.pmc import packed_loss
from pmc_fast.trainer.arguments import (
    ELSEWHERE,
    REFUSED,
    WITHOUT_EFFECT,
    autocast_dtype,
    check_arguments,
    check_overrides,
)
from tests import command_line
from tests.trainer.test_trainer import QUESTIONS, RETAIN, flat, fresh, trainer_of  # noqa: F401
from tests.trainer.test_trainer import arguments as arguments_of


class Given:
    """Arguments as they would be typed, where building them would need an accelerator or a package."""

    def __init__(self, **given):
        vars(self).update(vars(PMCArguments(use_cpu=True)) | given)

    world_size, device = 1, torch.device("cpu")


BAD = {
    "label_smoothing_factor": 0.1,
    "auto_find_batch_size": True,
    "train_sampling_strategy": "group_by_length",
    "neftune_noise_alpha": 5.0,
    "use_liger_kernel": True,
    "optim": "galore_adamw_layerwise",
    "ignore_data_skip": True,
    "bf16_full_eval": True,
    "fp16_full_eval": True,
    "enable_jit_checkpoint": True,
    "parallelism_config": object(),
    "accelerator_config": AcceleratorConfig(split_batches=True),
}
IDLE = {
    "data_seed": 3, "length_column_name": "size", "dataloader_num_workers": 2,
    "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 4,
    "dataloader_multiprocessing_context": "spawn", "dataloader_in_order": False,
}  # fmt: skip


def test_a_value_for_every_setting_that_is_not_honoured():
    assert set(BAD) == set(REFUSED)
    assert set(IDLE) == set(WITHOUT_EFFECT)


@pytest.mark.parametrize("name", BAD)
def test_settings_that_are_refused(name):
    assert check_arguments(Given(), PMCConfig()) == []
    with pytest.raises(PMCError, match=rf"^{name} is [^\n]+$"):
        check_arguments(Given(**{name: BAD[name]}), PMCConfig())


@pytest.mark.parametrize("name", IDLE)
def test_settings_without_effect_are_said(name):
    (text,) = check_arguments(Given(**{name: IDLE[name]}), PMCConfig())
    assert text.startswith(f"{name} is {IDLE[name]!r} and has no effect: ")


@pytest.mark.parametrize("name", ["mps", "xpu", "hpu"])
def test_the_device_that_the_trainer_would_move_to_is_refused(name):
    there = Given()
    there.device = torch.device(name)
    with pytest.raises(PMCError, match=rf"args.device is {name}: pmc_fast runs on cpu and cuda \(use_cpu=True\)"):
        check_arguments(there, PMCConfig())


def test_settings_that_depend_on_others():
    (text,) = check_arguments(Given(seed=7), PMCConfig())
    assert text.startswith("seed is 7 but PMCConfig.seed 0: samples")
    assert check_arguments(Given(seed=7), PMCConfig(seed=7)) == []
    several = Given(average_tokens_across_devices=False)
    assert check_arguments(several, PMCConfig()) == []
    several.world_size = 2
    assert check_arguments(several, PMCConfig())[0].startswith("average_tokens_across_devices is False and has no")
    best = {"metric_for_best_model": "eval_forget_score", "load_best_model_at_end": True}
    with pytest.raises(PMCError, match="greater_is_better is True but a smaller forget_score is better"):
        check_arguments(Given(greater_is_better=True, **best), PMCConfig())
    assert check_arguments(Given(greater_is_better=False, **best), PMCConfig()) == []
    with pytest.raises(PMCError, match="push_to_hub would push checkpoints, which hold initial answers"):
        check_arguments(Given(push_to_hub=True, save_strategy="steps"), PMCConfig())
    for fine in ({"save_strategy": "no"}, {"save_strategy": "steps", "hub_strategy": "end"}):
        assert check_arguments(Given(push_to_hub=True, **fine), PMCConfig()) == []


def test_the_trainer_asks(fresh, tokenizer, tmp_path, monkeypatch):  # noqa: F811
    with pytest.raises(PMCError, match=r"label_smoothing_factor is 0\.1"):
        trainer_of(fresh(), tokenizer, arguments_of(tmp_path, label_smoothing_factor=0.1))
    said = []
    monkeypatch.setattr(pmc_fast.trainer.base.logger, "warning", said.append)
    trainer_of(fresh(), tokenizer, arguments_of(tmp_path, data_seed=3))
    assert said == ["data_seed is 3 and has no effect: the order of questions is PMCConfig.seed's"]


def table(path, heading):
    """Return a table's second column of names by the first column's word."""
    text = path.read_text(encoding="utf-8").split(f"\n### {heading}\n", 1)[1].split("\n#", 1)[0]
    rows = [line.split("|")[1:3] for line in text.splitlines() if line.startswith("| ")]
    return [(kind.strip(), name) for kind, names in rows for name in re.findall(r"`(\w+)`", names)]


def test_the_documents_classify_every_setting_of_transformers(pytestconfig):
    listed = table(pytestconfig.rootpath / "docs/integrations.md", "Every setting of TrainingArguments")
    names = [name for _, name in listed]
    assert len(names) == len(set(names))
    assert {f.name for f in dataclasses.fields(transformers.TrainingArguments)} <= set(names)
    assert {name for kind, name in listed if kind == "refused"} == set(REFUSED)
    assert {name for kind, name in listed if kind == "warned about"} == {
        *WITHOUT_EFFECT,
        "average_tokens_across_devices",
    }


def test_the_documents_classify_every_setting_of_trls_sft(pytestconfig):
    trl = pytest.importorskip("trl")
    from pmc_fast.integrations.trl import PMCConfig as Ours

    listed = table(pytestconfig.rootpath / "docs/integrations.md", "Every setting of SFTConfig")
    own = {f.name for f in dataclasses.fields(trl.SFTConfig)}
    own -= {f.name for f in dataclasses.fields(transformers.TrainingArguments)}
    ours = {f.name for f in dataclasses.fields(Ours)}
    assert sorted(name for _, name in listed) == sorted(own)
    assert {name for kind, name in listed if kind == "refused"} == own - ours
    for name in own - ours:
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            Ours(use_cpu=True, **{name: None})
        with pytest.raises(ValueError, match=f"--{name}"):
            trl.TrlParser((Ours,)).parse_args_and_config(
                ["--use_cpu", f"--{name}", "1"], return_remaining_strings=False
            )


# --- what is honoured where this trainer has its own way


def test_an_uneven_last_batch_is_dropped(fresh, tokenizer, tmp_path):  # noqa: F811
    args = arguments_of(tmp_path, dataloader_drop_last=True, gradient_accumulation_steps=1, num_train_epochs=3)
    trainer = trainer_of(fresh(), tokenizer, args)
    trainer.train()
    assert trainer.state.global_step == 6
    rates = [r["learning_rate"] for r in trainer.state.log_history if "learning_rate" in r]
    assert rates == pytest.approx([0, 5e-4, 1e-3, 7.5e-4, 5e-4, 2.5e-4])
    args = arguments_of(tmp_path, dataloader_drop_last=True, per_device_train_batch_size=6)
    big = trainer_of(fresh(), tokenizer, args)
    with pytest.raises(PMCError, match="dataloader_drop_last leaves no batch of 5 questions"):
        big.train()


def test_tokens_are_counted_and_caches_emptied(fresh, tokenizer, tmp_path, monkeypatch):  # noqa: F811
    packs, emptied = [], []
    pack = packed_loss.pack
    monkeypatch.setattr(packed_loss, "pack", lambda *a, **kw: packs.append(pack(*a, **kw)) or packs[-1])
    monkeypatch.setattr(pmc_fast.trainer.base, "clear_device_cache", lambda: emptied.append(1))
    args = arguments_of(tmp_path, include_num_input_tokens_seen=True, torch_empty_cache_steps=2)
    trainer = trainer_of(fresh(), tokenizer, args)
    trainer.train()
    assert trainer.state.num_input_tokens_seen == sum(len(p) for several in packs for p in several) > 0
    assert trainer.state.log_history[-2]["num_input_tokens_seen"] == trainer.state.num_input_tokens_seen
    assert len(emptied) == 2  # steps 0 and 2


def test_the_optimizers_class_is_honoured(fresh, tokenizer, tmp_path):  # noqa: F811
    own = (torch.optim.SGD, {"lr": 0.1})
    trainer = trainer_of(fresh(), tokenizer, arguments_of(tmp_path, max_steps=1), optimizer_cls_and_kwargs=own)
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, torch.optim.SGD)


def test_a_checkpoint_of_the_model_alone_is_not_resumed(fresh, tokenizer, tmp_path):  # noqa: F811
    args = arguments_of(tmp_path, save_strategy="steps", save_steps=1, save_only_model=True)
    trainer_of(fresh(), tokenizer, args).train()
    again = trainer_of(fresh(), tokenizer, args)
    reason = r"checkpoint-2 holds the model alone \(save_only_model\): a run can't go on from it"
    with pytest.raises(PMCError, match=reason):
        again.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    heard = []
    assert again.find_checkpoint("auto", warn=heard.append) is None
    assert re.search(reason, heard[2])


def test_a_launchers_mixed_precision_is_bf16s(fresh, tokenizer, tmp_path, monkeypatch):  # noqa: F811
    """`accelerate launch --mixed_precision bf16` tells it by the environment: rollouts must compute so as well."""
    ends = []
    for environment, given in (("no", {"bf16": True}), ("bf16", {}), ("no", {})):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", environment)
        trainer = trainer_of(fresh(), tokenizer, arguments_of(tmp_path, **given))
        trainer.train()
        ends.append((trainer.pmc.autocast_dtype, trainer.pmc.state_dict(), flat(trainer.model)))
    ours, launched, single = ends
    assert launched[:2] == ours[:2]
    assert torch.equal(launched[2], ours[2])
    assert not torch.equal(launched[2], single[2])
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(PMCError, match="mixed precision is 'fp8': it must be one of no, bf16, fp16"):
        autocast_dtype(arguments_of(tmp_path))


def test_in_the_command_dtype_says_it(arguments, data, monkeypatch):
    losses = []
    for environment in ("no", "bf16"):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", environment)
        assert (
            command_line.run(command_line.replaced([*arguments, "--no-evaluate"], output=str(data / environment)))
            == 0
        )
        report = json.loads((data / environment / "report.json").read_text())
        losses.append([row["loss"] for row in report["history"]])
    assert losses[0] == losses[1]


def test_an_optimizer_of_ones_own_has_no_masters(fresh, tokenizer, tmp_path):  # noqa: F811
    for rate, message in (
        (1e-5, "learning_rate is 1e-05 for bfloat16 parameters without float32 masters"),
        (1e-3, None),
    ):
        model = fresh().bfloat16()
        own = (torch.optim.AdamW(model.parameters(), lr=rate), None)
        if message is None:
            trainer_of(model, tokenizer, arguments_of(tmp_path, learning_rate=1e-5), optimizers=own)
        else:
            with pytest.raises(PMCError, match=message):
                trainer_of(model, tokenizer, arguments_of(tmp_path, learning_rate=1e-3), optimizers=own)


def test_what_is_not_there_is_said_before_any_work(fresh, tokenizer, tmp_path):  # noqa: F811
    for change, message in (
        ({"optim": "schedule_free_adamw"}, "optim is 'schedule_free_adamw': You need to install `schedulefree`"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0: it must be at least 1"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0: it must be at least 1"),
        ({"learning_rate": -1.0}, "learning_rate is -1: it must be 0 or more"),
    ):
        with pytest.raises(PMCError, match=f"^{re.escape(message)}"):
            trainer_of(fresh(), tokenizer, arguments_of(tmp_path, **change))
    with pytest.raises(
        PMCError, match="hyperparameter_search is not supported: make a PMCTrainer, with a fresh model"
    ):
        trainer_of(fresh(), tokenizer, arguments_of(tmp_path)).hyperparameter_search(n_trials=2)


# --- what PMCTrainer is given


@pytest.mark.parametrize("name", ELSEWHERE)
def test_arguments_of_other_trainers(name, fresh, tokenizer, tmp_path):  # noqa: F811
    with pytest.raises(PMCError, match=f"^{name} is not an argument of PMCTrainer: {re.escape(ELSEWHERE[name])}$"):
        PMCTrainer(fresh(), arguments_of(tmp_path), QUESTIONS, RETAIN, processing_class=tokenizer, **{name: None})
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        trainer_of(fresh(), tokenizer, arguments_of(tmp_path), colour=1)


def test_arguments_of_another_kind(fresh, tokenizer, tiny_dir, tmp_path):  # noqa: F811
    model, args, config = fresh(), arguments_of(tmp_path), PMCConfig()
    for change, message in (
        ({"model": str(tiny_dir)}, "model is a str: load it, with AutoModelForCausalLM.from_pretrained"),
        ({"model": None}, "model is a NoneType"),
        ({"args": {"output_dir": "x"}}, "args is a dict: it must be PMCArguments or TrainingArguments"),
        ({"args": config, "pmc_config": args}, "args is a PMCConfig: it must be PMCArguments"),
        ({"pmc_config": {"num_samples": 2}}, "pmc_config is a dict: it must be a PMCConfig"),
        ({"processing_class": str(tiny_dir)}, "processing_class is a str: pass the model's tokenizer"),
        ({"processing_class": model}, "processing_class is a LlamaForCausalLM: pass the model's tokenizer"),
        ({"forget_dataset": "Where is she?"}, "forget_dataset is one str: pass a list of rows"),
        ({"retain_dataset": pandas.DataFrame()}, "retain_dataset is empty"),
    ):
        given = {
            "model": model, "args": args, "forget_dataset": QUESTIONS, "retain_dataset": RETAIN, "pmc_config": config,
            "processing_class": tokenizer,
        }  # fmt: skip
        with pytest.raises(PMCError, match=f"^{re.escape(message)}"):
            PMCTrainer(**given | change)


def test_trls_arguments(fresh, tokenizer, tmp_path):  # noqa: F811
    """Ours have PMC's settings, which are taken from there; those of TRL's trainers are refused."""
    trl = pytest.importorskip("trl")
    from pmc_fast.integrations.trl import PMCConfig as Ours

    ours = Ours(str(tmp_path), use_cpu=True, num_samples=3, max_length=40, temperature=1.25)
    trainer = PMCTrainer(fresh(), ours, QUESTIONS, RETAIN, processing_class=tokenizer)
    assert trainer.pmc.config == ours.pmc_config()
    with pytest.raises(
        PMCError, match=r"^args is a SFTConfig, whose own settings are another trainer's: use PMCArguments"
    ):
        trainer_of(fresh(), tokenizer, trl.SFTConfig(str(tmp_path), use_cpu=True, bf16=False))


def test_overrides_that_training_does_not_call_are_refused(fresh, tokenizer, tmp_path):  # noqa: F811
    class Mine(PMCTrainer):
        def compute_loss(self, *args, **kwargs):
            return 0

    class Ordered(PMCTrainer):
        def _get_train_sampler(self, *args):
            return None

    class Fine(PMCTrainer):
        def training_step(self, *args, **kwargs):
            return super().training_step(*args, **kwargs)

    with pytest.raises(
        PMCError, match=r"^Mine overrides compute_loss, which training does not call: override training_st"
    ):
        Mine(fresh(), arguments_of(tmp_path), QUESTIONS, RETAIN, processing_class=tokenizer)
    with pytest.raises(PMCError, match=r"^Ordered overrides _get_train_sampler"):
        check_overrides(Ordered)
    check_overrides(Fine)


def test_data_without_length(fresh, tokenizer, tmp_path):  # noqa: F811
    """Streams give the run that lists do."""
    ends = []
    for held in (list, iter):
        trainer = trainer_of(fresh(), tokenizer, arguments_of(tmp_path), held(QUESTIONS), held(RETAIN))
        trainer.train()
        ends.append(flat(trainer.model))
    assert torch.equal(*ends)
