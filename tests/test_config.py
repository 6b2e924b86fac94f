"""Settings: ranges, presets, files and flags, each layer over the one before."""

import dataclasses

import pytest

from pmc_fast.cli.main import cli
from pmc_fast.config import (
    PRESETS,
    SHARED,
    CompareConfig,
    EvaluateConfig,
    PMCConfig,
    RequestConfig,
    UnlearnConfig,
    VerifyConfig,
)
from pmc_fast.errors import PMCError


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("num_samples", 0), ("num_samples", 2.5), ("num_samples", True), ("temperature", 0.0), ("top_k", -1),
        ("top_p", 0.0), ("top_p", 1.01), ("top_p", float("nan")), ("retain_weight", -1.0), ("min_len", -1),
        ("max_length", 1), ("prompt_format", "alpaca"), ("system_prompt", None), ("num_epochs", 0.0),
        ("batch_size", 0), ("learning_rate", 0.0), ("weight_decay", -0.1), ("min_quality", 101.0),
        ("dtype", "int8"), ("general", "a.jsonl"), ("accidents", "no"), ("learning_rate", "1e-5"), ("attack_samples", -1),
        ("attack_temperature", 0.0), ("attack_top_p", 1.5), ("leak_threshold", 0.0), ("confidence", 1.0),
        ("skip_threshold", 1.0),
    ],
)  # fmt: skip
def test_values_out_of_range_are_named(setting, value):
    with pytest.raises(PMCError, match=f"^{setting} is {value!r}: it must be".replace("(", "\\(")):
        UnlearnConfig(**{setting: value})


def test_gates_need_the_evaluation():
    with pytest.raises(PMCError, match="min_utility is 50"):
        UnlearnConfig(min_utility=50.0, evaluate=False)
    with pytest.raises(PMCError, match="attack_samples is 9: it must be left out, or evaluate left on"):
        UnlearnConfig(attack_samples=9, evaluate=False)


def test_a_stopping_score_that_is_never_reached_is_refused():
    with pytest.raises(PMCError, match=r"stop_score is 0\.05: it must be at least resample_above, 0\.1"):
        PMCConfig(stop_score=0.05, resample_above=0.1)
    PMCConfig(stop_score=0.1, resample_above=0.1)


def test_layers_override_each_other():
    config = UnlearnConfig.merge("phi", {"num_samples": 7, "top_p": 0.9}, {"top_p": 0.8})
    assert (config.num_samples, config.top_p, config.temperature, config.prompt_format) == (7, 0.8, 1.25, "tags")
    with pytest.raises(PMCError, match="preset 'gpt' is unknown"):
        UnlearnConfig.merge("gpt")
    with pytest.raises(PMCError, match="setting 'lamda' is unknown"):
        UnlearnConfig.merge(None, {"lamda": 1})


def test_published_presets():
    """Numbers of the paper's appendix."""
    llama, phi = UnlearnConfig.merge("llama"), UnlearnConfig.merge("phi")
    assert (llama.num_samples, llama.temperature, llama.top_k, llama.top_p, llama.retain_weight) == (
        20,
        0.9,
        50,
        0.95,
        1.25,
    )
    assert (llama.num_epochs, llama.batch_size, llama.gradient_accumulation_steps) == (30, 8, 2)
    assert (phi.num_samples, phi.temperature, phi.top_k, phi.top_p, phi.retain_weight) == (5, 1.25, 50, 0.95, 1.5)
    assert (phi.num_epochs, phi.batch_size, phi.gradient_accumulation_steps) == (40, 16, 4)
    for name in PRESETS:
        assert UnlearnConfig.merge(name).weight_decay == 0.01


def fields(config):
    return {f.name: f for f in dataclasses.fields(config)}


@pytest.mark.parametrize("config", [RequestConfig, EvaluateConfig, VerifyConfig, CompareConfig])
def test_every_field_has_a_help_text(config):
    for f in fields(config).values():
        assert len(f.metadata["help"]) > 10, f.name


def test_settings_are_composed_of_what_each_command_reads():
    assert not issubclass(EvaluateConfig, PMCConfig)
    training = {
        "num_samples",
        "retain_weight",
        "num_epochs",
        "learning_rate",
        "output",
        "resume",
        "lora",
        "skip_threshold",
    }
    assert not training & fields(EvaluateConfig).keys()
    own = {"lora", "stack", "lora_r", "lora_alpha", "lora_target", "keep_private"}
    assert fields(RequestConfig).keys() - fields(UnlearnConfig).keys() == own
    for part in (PMCConfig, EvaluateConfig):  # a name means the same everywhere
        for name in fields(part).keys() & fields(RequestConfig).keys() - {"max_degenerate", "retain_weight"}:
            theirs, ours = fields(part)[name], fields(RequestConfig)[name]
            assert (theirs.default, theirs.type, theirs.metadata) == (ours.default, ours.type, ours.metadata), name


@pytest.mark.parametrize(
    ("command", "config", "more"),
    [
        ("unlearn", RequestConfig, {"config_file", "preset", "dry_run", "json_file"}),
        ("evaluate", EvaluateConfig, {"json_file", "rows_file", "report_file"}),
        ("verify", VerifyConfig, {"json_file", "files"}),
    ],
)
def test_commands_hide_no_setting_and_add_none(command, config, more):
    assert {p.name for p in cli.commands[command].params} == fields(config).keys() | more | {"log_level"}


def test_compare_has_its_own_settings_and_those_that_runs_share():
    own = fields(CompareConfig).keys()
    assert not own & set(SHARED)
    given = {p.name for p in cli.commands["compare"].params}
    assert given == own | set(SHARED) | {"preset", "dry_run", "json_file", "log_level"}


def test_paths_expand_the_home_directory(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    config = RequestConfig(model="~/m", general=["~/a.jsonl", "b.jsonl"], system_prompt="~")
    assert (config.model, config.general, config.system_prompt) == (
        "/home/ann/m",
        ["/home/ann/a.jsonl", "b.jsonl"],
        "~",
    )
    with pytest.raises(PMCError, match=r"retain '\\udcff' is not UTF-8"):
        UnlearnConfig(retain="\udcff")
