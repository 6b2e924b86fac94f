"""The plan of a run's memory, by arithmetic; what is chosen where it does not fit; what the commands print."""

import copy
import dataclasses

import pytest
import torch

from benchmarks import memory as benchmark
from benchmarks.memory import SHAPES, TOFU
from pmc_fast.config import RequestConfig, UnlearnConfig
from pmc_fast.errors import PMCError
from pmc_fast.jobs import memory, memory_limits
from pmc_fast.jobs.held import Held
from pmc_fast.jobs.memory import GIB, Amount, Choice, Memory
from pmc_fast.jobs.memory_limits import Lengths, choose, work_of
from pmc_fast.models import loading
from pmc_fast.models.fsdp import fsdp_launched
from pmc_fast.models.pass_memory import Shape
from pmc_fast.ops.weighted_nll import WORKSPACE
from pmc_fast.pmc.algorithm import PMC
from tests.command_line import run
from tests.pages import ROOT

# parameters, and numbers in the keys and values of a token: 2 x layers x 8 heads x size
NUMBERS = {"1B": (1_235_814_400, 16_384), "3B": (3_212_749_824, 57_344), "8B": (8_030_261_248, 65_536),
           "12B": (12_247_782_400, 81_920)}  # fmt: skip


@pytest.fixture(scope="module")
def published():
    """The published run of a shape on a GPU: bfloat16 parameters with float32 masters."""
    made = {}

    def memory(name):
        if name not in made:
            config = RequestConfig.merge("llama", {})
            made[name] = Memory(
                config, Shape(SHAPES[name], torch.bfloat16), work_of(config, TOFU, "cuda"), "cuda", None
            )
        return made[name]

    return memory


@pytest.mark.parametrize("name", SHAPES)
def test_items_are_what_arithmetic_says(name, published):
    parameters, cached = NUMBERS[name]
    plan = published(name).plan(Choice(8192, cuda_graphs=True, pool_tokens=10_000))
    held = {item.name: item.most for item in plan.items}
    assert held["parameters"] == held["gradients"] == 2 * parameters
    assert held["float32 masters"] == 4 * parameters
    assert held["moments of the optimizer"] == 8 * parameters
    assert held["keys and values of a rollout"] == 10_000 * 2 * cached
    assert not plan.unknown
    config, tokens = SHAPES[name], 16 * (200 + 110)
    heads = config.num_attention_heads * config.head_dim
    # of a layer: inputs of two norms and of the products behind them, q and k and v, attention's output, and three of
    # the MLP; with a norm's statistics and attention's in float32
    row = 4 * config.hidden_size + 2 * heads + 2 * 8 * config.head_dim + 3 * config.intermediate_size
    layers = tokens * config.num_hidden_layers * (2 * row + 4 * (2 + config.num_attention_heads))
    assert held["activations of a training pass"] == pytest.approx(layers, rel=0.02)  # and what is outside layers


def test_a_divergence_holds_another_model_and_logits():
    config = UnlearnConfig(method="icu", batch_size=2, gradient_accumulation_steps=1, max_length=120)
    shape = Shape(SHAPES["1B"], torch.bfloat16)
    made = Memory(config, shape, work_of(config, Lengths(), "cuda"), "cuda", None).plan(
        Choice(8192, cuda_graphs=False)
    )
    held = {item.name: item.most for item in made.items}
    assert held["the untouched model"] == held["parameters"]
    # 24 x 128,256 numbers for each of some 470 targets, and no more than that
    assert held["logits of the divergence"] == WORKSPACE
    small = Memory(config, shape, work_of(config, TOFU, "cuda"), "cuda", None)
    small.work = dataclasses.replace(small.work, targets=Amount(10, 5))
    [logits] = [item for item in small.plan(Choice(8192, cuda_graphs=False)).items if "divergence" in item.name]
    assert (logits.most, logits.expected) == (10 * 24 * 128_256, 5 * 24 * 128_256)


def test_choices_come_in_order_and_bound_what_they_say(published):
    memory = published("3B")
    seen = []
    for free in range(96, 54, -2):
        choice, said = choose(memory, free * GIB)
        most, _ = memory.plan(choice).peak()
        assert most <= free * GIB
        seen.append((choice.cuda_graphs, choice.graph_tokens, choice.max_tokens, choice.checkpointing))
        asked = Choice(8192, True, pool_tokens=int(memory.work.slots.most))
        assert bool(said) == (choice != asked)
        assert all(f"{free:.1f} are free" in text for text in said)
    with pytest.raises(PMCError) as error:
        choose(memory, 48 * GIB)
    assert str(error.value).startswith("the run takes at least ")
    assert "moments of the optimizer 23.9" in str(error.value)
    assert "use --lora, a smaller --batch-size, --num-samples or --max-length, or a larger device" in str(error.value)
    assert seen[0] == (True, None, 8192, False)
    graphs = [k[1] for k in seen if k[0] and k[1]]
    assert graphs
    assert graphs == sorted(graphs, reverse=True)
    assert [k[0] for k in seen] == sorted((k[0] for k in seen), reverse=True)
    packs = [k[2] for k in seen if not k[0]]
    assert packs == sorted(packs, reverse=True)
    assert packs[-1] < 8192
    assert all(k[2] == packs[-1] for k in seen if k[3])


def test_the_smallest_memory_of_all_processes_counts(published):
    memory = published("3B")
    limits = object.__new__(memory_limits.Limits)
    limits.memory, limits.free = memory, 80 * GIB

    class Shown:
        choice, warnings = None, []

        def warn(self, texts, monitor):
            self.warnings = texts

    class Two:
        def gather(self, own):
            return [own, 66 * GIB]

    limits.plan = Shown()
    limits.agree(Two(), None)
    assert limits.plan.choice == choose(memory, 66 * GIB)[0] != choose(memory, 80 * GIB)[0]


def test_a_run_is_bounded_or_refused_before_work(arguments, data, monkeypatch, capsys):
    monkeypatch.setattr(memory_limits, "LIMITED", ("cpu",))
    bounds, engines = [], []
    limit, passes = PMC.limit, Held.passes
    monkeypatch.setattr(PMC, "limit", lambda self, *how: (bounds.append(how), limit(self, *how))[1])

    def recorded(self, choice):
        made = passes(self, choice)
        engines.append(made[0])
        return made

    monkeypatch.setattr(Held, "passes", recorded)
    monkeypatch.setattr(memory_limits, "device_memory", lambda device: (1 << 20, 1 << 30))
    for more in ([], ["--dry-run"]):
        assert run([*arguments, *more]) == 2
        assert "the run takes at least 0.0 GiB of cpu memory" in capsys.readouterr().err
    assert not (data / "out").exists()
    assert not engines
    monkeypatch.setattr(memory_limits, "device_memory", lambda device: (1 << 34, 1 << 34))
    assert run([*arguments, "--no-evaluate"]) == 0
    assert bounds == [(8192, 0)]
    assert engines[0].pool_tokens > 0
    assert "memory:" not in capsys.readouterr().err


def test_the_commands_print_the_plan(arguments, tiny_dir, capsys):
    assert run([*arguments, "--dry-run"]) == 0
    dry = capsys.readouterr().out
    assert "memory    GiB on cpu" in dry
    assert "expected" in dry
    for item in ("parameters", "moments of the optimizer", "keys and values of a rollout", "together, ", "free"):
        assert f"\n          {item}" in dry
    assert not run(["env", "--model", str(tiny_dir), "--preset", "small", "--max-length", "40"])
    bare = capsys.readouterr().out
    assert "expected" not in bare
    assert "activations of a training pass" in bare
    assert run(["env", "--preset", "small"]) == 2
    assert "--model takes a directory" in capsys.readouterr().err
    assert not run(["env", "--model", str(tiny_dir), "--lora"])
    assert "merged weights for rollouts" in capsys.readouterr().out


def test_remedies_are_what_can_still_be_changed(published):
    base = published("3B").shape

    def said(**change):
        config = RequestConfig.merge("llama", change)
        shape = copy.copy(base)
        shape.dtype = torch.float32 if config.dtype == "float32" else torch.bfloat16
        with pytest.raises(PMCError) as error:
            choose(Memory(config, shape, work_of(config, TOFU, "cuda"), "cuda", None), GIB)
        return str(error.value).split("free: ")[1]

    lora = {"lora": True, "stack": "s"}
    least = {"batch_size": 1, "num_samples": 1}
    assert said(**lora, **least) == "use a smaller --max-length, or a larger device"
    assert said(**lora, batch_size=1) == "use a smaller --num-samples or --max-length, or a larger device"
    assert said(**lora, **least, dtype="float32") == (
        "use --dtype bfloat16 --param-dtype bfloat16, a smaller --max-length, or a larger device"
    )


@pytest.fixture
def limited(monkeypatch):
    """Memory of the CPU is bounded as a GPU's."""
    monkeypatch.setattr(memory_limits, "LIMITED", ("cpu",))
    monkeypatch.setattr(memory_limits, "device_memory", lambda device: (1 << 34, 1 << 34))


def test_a_run_says_what_is_not_counted(arguments, limited, monkeypatch, capsys):
    def fails(self, *args, **how):
        raise PMCError("its passes depend on numbers")

    monkeypatch.setattr(Shape, "passes", fails)
    monkeypatch.setattr(memory, "MOMENTS", {})
    assert run([*arguments, "--no-evaluate"]) == 0
    err = capsys.readouterr().err
    assert "not counted, so the run may hold more than is said: its passes depend on numbers" in err
    assert "not counted, so the run may hold more than is said: what the optimizer " in err


def test_a_model_that_cant_be_made_without_data_is_not_counted(arguments, limited, monkeypatch, capsys):
    def fails(self):
        raise AttributeError("no numbers\nhere")

    monkeypatch.setattr(Shape, "_sizes", fails)
    for more in (["--dry-run"], ["--no-evaluate"]):
        assert run([*arguments, *more]) == 0
        assert "what llama holds: it can't be made without data (no numbers)" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["true", "1", "yes"])
def test_fsdp_is_asked_for_in_one_way(value, arguments, limited, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", value)
    assert loading.resolve_param_dtype("auto", "auto", torch.device("cuda"), "") == "float32"
    chosen = []
    monkeypatch.setattr(memory_limits, "choose", lambda *how: chosen.append(how))
    assert run([*arguments, "--dry-run"]) == 0
    assert "a process of FSDP holds a part of this, and the run is not bounded" in capsys.readouterr().err

    class Bare:
        class config:
            device = "cpu"

    assert memory_limits.Limits(Bare, None).memory is None
    assert not chosen


def test_an_unreadable_flag_of_fsdp_is_named(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "perhaps")
    with pytest.raises(PMCError, match="ACCELERATE_USE_FSDP can't be read"):
        fsdp_launched()


def test_evaluations_are_not_counted_without_data(tiny_dir, capsys):
    assert run(["env", "--model", str(tiny_dir), "--attack-samples", "9"]) == 2
    assert "No such option" in capsys.readouterr().err
    assert not run(["env", "--model", str(tiny_dir)])
    assert "evaluations are not counted" in capsys.readouterr().out


def test_the_page_has_the_table():
    page = (ROOT / "docs/gpu_status.md").read_text(encoding="utf-8")
    for name, free in (("3B", 12), ("8B", 24)):
        memory = benchmark.memory_of(name, lora=True)
        assert benchmark.row(name, memory, lora=True) in page
        assert choose(memory, free * 10**9)[0].max_tokens == 8192


def test_the_published_run_fits_60_gb(published):
    choice, _ = choose(published("3B"), 60 * 10**9)
    assert not choice.checkpointing
    assert choice.max_tokens >= 1000
