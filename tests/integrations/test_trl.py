"""PMC as a TRL trainer, against TRL itself: its parser, base classes, dataset forms and model card."""

import dataclasses
import json

import datasets
import peft
import pytest
import torch
import transformers
import trl
from trl.trainer import base_trainer
from trl.trainer.base_config import _BaseConfig

import pmc_fast
from pmc_fast import PMCError
from pmc_fast.integrations.trl import PMCConfig, PMCTrainer

QUESTIONS = [f"What is fact {i}?" for i in range(5)]
FORGET = [{"prompt": q, "completion": "It is secret."} for q in QUESTIONS]
RETAIN = [{"prompt": f"Is {i} even?", "completion": f"It is {i % 2 == 0}."} for i in range(6)]
GIVEN = {
    "num_train_epochs": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-3,
    "use_cpu": True, "disable_tqdm": True, "logging_steps": 1,
}  # fmt: skip
PMC = {"num_samples": 2, "max_length": 40, "prompt_format": "tags", "seed": 3}
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def arguments(path, **change):
    return PMCConfig(str(path / "run"), **GIVEN | PMC | change)


@pytest.fixture
def trainer_of(tiny_dir, tmp_path):
    """Return a function that makes a TRL trainer of the tiny model by its path."""

    def make(args=None, forget=FORGET, retain=RETAIN, model=None, **more):
        args = args or arguments(tmp_path)
        return PMCTrainer(model or str(tiny_dir), args, rows(forget), rows(retain), reward=half, **more)

    return make


@pytest.fixture
def core_of(tiny_dir, tokenizer, tmp_path):
    """Return a function that makes the core's trainer with the same settings."""

    def make(wrap=lambda model: model, **change):
        args = pmc_fast.PMCArguments(
            str(tmp_path / "core"), **GIVEN | {"seed": PMC["seed"], "gradient_checkpointing": True} | change
        )
        transformers.set_seed(args.seed)
        model = wrap(transformers.AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32))
        return pmc_fast.PMCTrainer(model, args, QUESTIONS, RETAIN, pmc_fast.PMCConfig(**PMC), tokenizer, reward=half)

    return make


def rows(given):
    return datasets.Dataset.from_list(given) if isinstance(given, list) and given else given


def half(initial, candidates, min_len):
    """A reward that is never satisfied and depends on the answers."""
    return [[0.2 + 0.5 * (len(x) % 7) / 7 for x in texts] for texts in candidates]


def assert_same_run(ours, other):
    for (name, p), (_, q) in zip(ours.model.named_parameters(), other.model.named_parameters(), strict=True):
        assert torch.equal(p, q), name
    assert ours.pmc.state_dict() == other.pmc.state_dict()
    clocks = ("second", "runtime", "flos")
    strip = lambda log: [{k: v for k, v in r.items() if not any(c in k for c in clocks)} for r in log]  # noqa: E731
    assert len(ours.state.log_history) == 5
    assert strip(ours.state.log_history[:4]) == strip(other.state.log_history[:4])


# --- the config


def test_defaults_are_the_cores_and_trls():
    ours, core, base = PMCConfig(), pmc_fast.PMCArguments(), _BaseConfig(use_cpu=True)
    assert ours.pmc_config() == pmc_fast.PMCConfig()
    for f in dataclasses.fields(core):
        if f.name not in (
            "output_dir",
            "logging_steps",
            "seed",
            "activation_checkpointing",
            "gradient_checkpointing",
        ):
            if f.name == "bf16" and torch.cuda.is_available():
                continue
            assert getattr(ours, f.name) == getattr(core, f.name), f.name
    for name in ("output_dir", "logging_steps", "gradient_checkpointing"):
        assert getattr(ours, name) == getattr(base, name)


def test_bf16_is_not_the_cpus_default():
    assert PMCConfig(use_cpu=True).bf16 is False
    assert PMCConfig(use_cpu=True, bf16=True).bf16 is True


def test_the_parser_reads_it(tmp_path):
    parser = trl.TrlParser((trl.ScriptArguments, PMCConfig, trl.ModelConfig))
    (tmp_path / "c.yaml").write_text("num_samples: 7\ntemperature: 1.25\nlearning_rate: 3e-5\nselection: soft\n")
    words = (
        f"--use_cpu --lambda 2 --temperature 1 --stop_score 0.05 --seed 3 --top-k 0 --config {tmp_path / 'c.yaml'}"
    )
    words += ' --no_master_weights --model_init_kwargs {"revision":"main"}'
    _, args, _ = parser.parse_args_and_config(words.split())
    pmc = pmc_fast.PMCConfig(
        num_samples=7, retain_weight=2.0, temperature=1.0, top_k=0, selection="soft", stop_score=0.05, seed=3
    )
    assert args.pmc_config() == pmc
    assert (args.learning_rate, args.seed, args.master_weights) == (3e-5, 3, False)
    assert args.model_init_kwargs == {"revision": "main"}
    assert type(parser.parse_args_and_config(["--use_cpu", "--stop_score", "none"])[1].stop_score) is type(None)


def test_help_has_every_setting_with_the_cores_text(monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # narrower, argparse breaks lines at hyphens
    parser = trl.TrlParser((PMCConfig,))
    text = " ".join(parser.format_help().split())
    for f in dataclasses.fields(pmc_fast.PMCConfig):
        assert f"--{f.name}" in text
        assert " ".join(f.metadata["help"].split()) in text
    assert all(a.help for a in parser._actions if a.dest in ("learning_rate", "optim", "warmup_epochs"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_samples": 0}, "num_samples is 0: it must be at least 1"),
        ({"seed": -1}, "seed is -1"),
        ({"model_init_kwargs": "bfloat16"}, "model_init_kwargs is 'bfloat16': it must be a JSON object"),
        ({"temperature": "warm"}, "temperature is 'warm': it must be of type float"),
        ({"selection": "best"}, "selection is 'best': it must be one of argmin, likeliest, bradley_terry, soft"),
    ],
)
def test_bad_values_are_refused(change, message):
    with pytest.raises(PMCError, match=message):
        PMCConfig(use_cpu=True, **change)


# --- the trainer


def test_a_run_is_the_cores_bit_for_bit(trainer_of, core_of):
    ours, core = trainer_of(), core_of()
    ours.train()
    core.train()
    assert isinstance(ours, base_trainer._BaseTrainer)
    assert_same_run(ours, core)


def test_an_adapter_is_the_cores_bit_for_bit(trainer_of, core_of, tmp_path):
    ours = trainer_of(peft_config=peft.LoraConfig(**LORA))
    before = {n: p.detach().clone() for n, p in ours.model.named_parameters()}
    ours.train()
    changed = {n for n, p in ours.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    assert all("lora" in n for n in changed)
    core = core_of(wrap=lambda model: peft.get_peft_model(model, peft.LoraConfig(**LORA)))
    core.train()
    assert_same_run(ours, core)
    ours.save_model()
    assert (tmp_path / "run/adapter_model.safetensors").exists()


@pytest.mark.parametrize("form", ["conversational", "messages", "stream"])
def test_dataset_forms(trainer_of, form):
    user, assistant = ([{"role": role, "content": "{}"}] for role in ("user", "assistant"))

    def say(turns, text):
        return [{**turn, "content": text} for turn in turns]

    def formed(row):
        q, a = say(user, row["prompt"]), say(assistant, row["completion"])
        return {"messages": q + a} if form == "messages" else {"prompt": q, "completion": a}

    plain = trainer_of()
    if form == "stream":
        forget, retain = (rows(given).to_iterable_dataset() for given in (FORGET, RETAIN))
    else:
        forget, retain = ([formed(row) for row in given] for given in (FORGET, RETAIN))
    ours = trainer_of(forget=forget, retain=retain)
    assert ours.pmc.questions == QUESTIONS
    assert ours.pmc.prompts == plain.pmc.prompts
    assert ours.retain == plain.retain


def test_a_conversation_keeps_its_own_system_message(trainer_of, tokenizer, tmp_path):
    """Training and rollouts see what TRL's SFTTrainer would: the template of the row's own messages."""

    def said(n):
        return [{"role": "system", "content": f"Be clerk {n}."}, {"role": "user", "content": f"Is {n} even?"}]

    answer = [{"role": "assistant", "content": "It is."}]
    forget = [{"prompt": said(n), "completion": answer} for n in range(3)]
    retain = [{"messages": said(n) + answer} for n in range(3, 6)]
    trainer = trainer_of(arguments(tmp_path, prompt_format="chat", max_length=100), forget, retain)
    for n, (prompt, kept) in enumerate(zip(trainer.pmc.prompts, trainer.retain, strict=True)):
        own = tokenizer.apply_chat_template(said(n), add_generation_prompt=True, return_dict=False)
        assert prompt == own
        whole = tokenizer.apply_chat_template(said(n + 3) + answer, return_dict=False)
        assert kept.input_ids == whole
        assert "It is." in tokenizer.decode([x for x in kept.labels if x != -100])
    trainer.train()
    stored = trainer.pmc._encode(0, trainer.pmc.store.answer(0)[0][0])
    assert stored.input_ids[: len(trainer.pmc.prompts[0])] == trainer.pmc.prompts[0]


def test_models_by_name_and_by_hand(tiny, tiny_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    by_name = PMCTrainer(str(tiny_dir), forget_dataset=rows(FORGET), retain_dataset=rows(RETAIN))
    assert by_name.args.output_dir == "tiny-PMC"
    assert by_name.model.dtype == torch.float32
    assert by_name.processing_class.eos_token_id == 2
    assert by_name.model.model_tags == ["trl", "pmc-fast", "unlearning"]
    by_hand = PMCTrainer(tiny, arguments(tmp_path), rows(FORGET), rows(RETAIN))
    assert by_hand.processing_class.get_vocab() == by_name.processing_class.get_vocab()
    low = arguments(tmp_path, model_init_kwargs={"dtype": "bfloat16"})
    assert PMCTrainer(str(tiny_dir), low, rows(FORGET), rows(RETAIN)).model.dtype == torch.bfloat16


def test_evaluation_and_paths(trainer_of, tiny_dir):
    trainer = trainer_of(model=tiny_dir, eval_dataset=rows(RETAIN))
    assert {"eval_loss", "eval_recall", "eval_forget_score"} <= set(trainer.evaluate())


def test_resumed_is_uninterrupted(trainer_of, tmp_path):
    args = arguments(tmp_path, save_strategy="steps", save_steps=1)
    whole = trainer_of(args)
    whole.train()
    again = trainer_of(args)
    again.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    assert_same_run(again, whole)
    assert trainer_of(args).find_checkpoint("auto")[0].name == "checkpoint-4"  # the card beside them is none


def test_the_model_card(trainer_of, tmp_path):
    trainer = trainer_of(arguments(tmp_path, save_strategy="steps", save_steps=2))
    card = tmp_path / "run/README.md"
    trainer.train()
    text = card.read_text()
    card.unlink()
    trainer.save_model()
    for content in (text, card.read_text()):
        assert all(f"- {tag}\n" in content for tag in ("trl", "pmc-fast", "unlearning"))
        assert "trained with PMC, a method introduced in [Model Collapse Is Not a Bug" in content
        assert "huggingface.co/papers/2507.04219" in content
        assert "@misc{scholten2025modelcollapse," in content
        assert not any(text in content for text in [*QUESTIONS, "It is secret.", *trainer.pmc.initial_answers])


def test_the_citation_is_the_projects(pytestconfig):
    cited, paper = (pytestconfig.rootpath / "CITATION.cff").read_text(), PMCTrainer._paper
    assert paper["title"] in cited
    assert paper["title"] in paper["citation"]
    assert paper["id"] in cited
    assert paper["id"] in paper["citation"]


def test_trls_usage_ping_names_nothing(trainer_of, tiny_dir, monkeypatch):
    sent = []
    monkeypatch.setattr(base_trainer, "send_telemetry", lambda **what: sent.append(what))
    monkeypatch.delenv("CI", raising=False)
    trainer_of()
    (what,) = sent
    assert what["topic"] == "trl/other"
    assert not any(text in json.dumps(what) for text in [*QUESTIONS, str(tiny_dir), "tiny", "secret"])


def test_refusals(trainer_of, tiny, tiny_dir, tmp_path):
    with pytest.raises(PMCError, match="forget_dataset is empty"):
        trainer_of(forget=[])
    with pytest.raises(PMCError, match="retain_dataset is empty"):
        trainer_of(retain=None)
    with pytest.raises(PMCError, match="retain_dataset, row 1 has no answer"):
        trainer_of(retain=[{"prompt": "Who?"}])
    with pytest.raises(
        PMCError, match=r"args is a pmc_fast\.config\.parts\.PMCConfig: it must be a PMCConfig of pmc_fast\.int"
    ):
        trainer_of(pmc_fast.PMCConfig())
    with pytest.raises(PMCError, match="model is a dict: it must be a model, or the name or directory of one"):
        PMCTrainer({}, arguments(tmp_path), rows(FORGET), rows(RETAIN))
    with pytest.raises(
        PMCError, match="quantization_config is not an argument of PMCTrainer: quantised weights are not"
    ):
        trainer_of(quantization_config=None)
    tool = {"type": "function", "function": {"name": "look_up"}}
    for column, value in (
        ("chat_template_kwargs", {"enable_thinking": False}), ("images", ["a.png"]), ("tools", [tool]),
    ):  # fmt: skip
        for name, given in (("forget", FORGET), ("retain", RETAIN)):
            with pytest.raises(PMCError, match=f"{name}_dataset, row 2.*{column}"):
                trainer_of(**{name: [{**given[0], column: None}, {**given[1], column: value}]})
    with pytest.raises(PMCError, match="peft_config is dict: it must be a"):
        trainer_of(peft_config=LORA)
    adapted = peft.get_peft_model(tiny, peft.LoraConfig(**LORA))
    with pytest.raises(PMCError, match="peft_config is given but the model has an adapter"):
        trainer_of(model=adapted, peft_config=peft.LoraConfig(**LORA))
    tiny.config._name_or_path = str(tmp_path)
    with pytest.raises(PMCError, match=r"no tokenizer is found at .*: pass processing_class"):
        trainer_of(model=tiny)
