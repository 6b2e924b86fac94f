"""Rollouts beside other engines: each gives the same distribution, is refused by name, and keeps up with the weights."""

import dataclasses
import json
import math
import sys
import types
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import transformers

from benchmarks import card, card_rollouts, harness, peer_engines, peer_llama, peers, suites
from benchmarks.peer_engines import Task, Unavailable
from benchmarks.settings import Setting
from pmc_fast.bench import measure
from pmc_fast.bench import results as result_files
from pmc_fast.rollout import RolloutEngine

PROMPTS = [[5, 9, 200, 31], [7, 300, 8]]
STOPS = (2, *range(100, 20_000))  # of these weights' tokens so many that answers end at different lengths


@pytest.fixture
def sharp(sharp_dir):
    return transformers.AutoModelForCausalLM.from_pretrained(sharp_dir, dtype=torch.float32).eval()


@pytest.fixture
def task(sharp):
    return Task(sharp, PROMPTS, 6, 8, STOPS, 0, temperature=1.5, top_k=20, top_p=0.8)


def absent(monkeypatch, *modules):
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)


# --- stand-ins for engines that are not installed


def llama_cpp_stand_in():
    """llama-cpp-python's functions as the peer calls them; a GGUF file is loaded and computed by transformers."""
    lib = types.ModuleType("llama_cpp")
    lib.llama_log_callback, lib.llama_log_set = lambda f: f, lambda f, data: None
    lib.llama_backend_init = lambda: None
    lib.llama_model_default_params = lib.llama_context_default_params = types.SimpleNamespace
    lib.llama_model_free = lib.llama_free = lib.llama_batch_free = lib.llama_sampler_free = lambda thing: None

    def load(path, how):
        path = Path(path.decode())
        return transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32
        )

    lib.llama_model_load_from_file = load
    lib.llama_init_from_model = lambda model, how: types.SimpleNamespace(model=model, how=how, histories={}, rows={})
    lib.llama_get_memory = lambda context: context.histories
    lib.llama_memory_clear = lambda histories, data: histories.clear()
    lib.llama_memory_seq_cp = lambda histories, a, b, *places: histories.update({b: list(histories[a])})
    lib.llama_batch_init = lambda size, embedding, most: types.SimpleNamespace(
        n_tokens=0, **{name: [0] * size for name in ("token", "pos", "logits", "n_seq_id")}, seq_id=[[0] for _ in range(size)]
    )  # fmt: skip

    def decode(context, batch):
        assert batch.n_tokens <= context.how.n_batch
        context.rows.clear()
        for i in range(batch.n_tokens):
            [sequence] = batch.seq_id[i][: batch.n_seq_id[i]]
            assert sequence < context.how.n_seq_max
            history = context.histories.setdefault(sequence, [])
            assert batch.pos[i] == len(history)
            history.append(batch.token[i])
            if batch.logits[i]:
                with torch.no_grad():
                    context.rows[i] = context.model(torch.tensor([history])).logits[0, -1].double()
        return 0

    lib.llama_decode = decode
    lib.llama_sampler_chain_default_params, lib.llama_sampler_chain_init = dict, lambda how: []
    lib.llama_sampler_chain_add = list.append
    lib.llama_sampler_init_top_k = lambda k: lambda z: z.masked_fill(z < z.topk(k).values[-1], -math.inf)
    lib.llama_sampler_init_temp = lambda t: lambda z: z / t

    def top_p(p, keep):
        def cut(z):
            order = z.argsort(descending=True)
            mass = z[order].softmax(0).cumsum(0)
            return z.index_fill(0, order[int((mass < p).sum()) + keep :], -math.inf)

        return cut

    lib.llama_sampler_init_top_p = top_p

    def dist(seed):
        g = torch.Generator().manual_seed(seed)
        return lambda z: int(torch.multinomial(z.softmax(0), 1, generator=g))

    lib.llama_sampler_init_dist = dist

    def sample(chain, context, row):
        z = context.rows[row]
        for sampler in chain:
            z = sampler(z)
        return z

    lib.llama_sampler_sample = sample
    return lib


def vllm_stand_in(made):
    """vLLM's LLM and SamplingParams as the peer calls them; a model of its own is loaded and sampled by our engine."""

    class LLM:
        def __init__(self, folder, **how):
            self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            self.model.load_weights = lambda weights: self.model.load_state_dict(dict(weights), strict=False)
            self.how, self.engine, self.resets = how, RolloutEngine(self.model), 0
            made.append(self)

        def generate(self, prompts, how, use_tqdm):
            assert how["ignore_eos"]
            found = self.engine(
                [p["prompt_token_ids"] for p in prompts], num_samples=how["n"], max_new_tokens=how["max_tokens"],
                stop_ids=how["stop_token_ids"], **{k: how[k] for k in ("temperature", "top_k", "top_p")}, seed=torch.initial_seed(),
            )  # fmt: skip
            return [types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=ids) for ids in of]) for of in found.tokens]  # fmt: skip

        def apply_model(self, function):
            return [function(self.model)]

        def reset_prefix_cache(self):
            self.resets += 1

    lib = types.ModuleType("vllm")
    lib.LLM, lib.SamplingParams = LLM, dict
    return lib


# --- the same distribution


@pytest.mark.parametrize("peer", [peer_engines.Ours, *peers.PEERS.values()], ids=lambda peer: peer.__name__)
def test_each_peer_draws_what_the_model_says(peer, task, monkeypatch):
    """First tokens' frequencies against probabilities computed here; what is cut off is never drawn."""
    monkeypatch.setitem(sys.modules, "llama_cpp", llama_cpp_stand_in())
    monkeypatch.setitem(sys.modules, "vllm", vllm_stand_in([]))
    if peer is peer_llama.LlamaCpp:
        pytest.importorskip("gguf")
    many = dataclasses.replace(task, num_samples=120, new_tokens=3)
    way = peer(many)
    if peer is peer_engines.StaticCompiled:
        way.settings.compile_config.backend = "eager"  # as compiled, without a compiler's minute
    answers = peers.cut(many, way.sample(3))
    for prompt, samples in zip(PROMPTS, answers, strict=True):
        z = task.model(torch.tensor([prompt])).logits[0, -1].double() / task.temperature
        order = z.argsort(descending=True)[: task.top_k]
        p = z[order].softmax(0)
        p = p[p.cumsum(0) - p < task.top_p]
        expected = dict(zip(order.tolist(), (p / p.sum()).tolist(), strict=False))
        drawn = Counter(ids[0] for ids in samples)
        assert set(drawn) <= set(expected)
        assert len(expected) > 2
        statistic = sum((drawn[t] - 120 * q) ** 2 / (120 * q) for t, q in expected.items())
        freedom = len(expected) - 1
        assert statistic < freedom + 5 * math.sqrt(2 * freedom) + 10
    assert {len(ids) for samples in answers for ids in samples} > {3}  # some end before
    found = peers.judge(many, answers)
    assert found["outside"] <= peers.OUTSIDE
    if hasattr(way, "close"):
        way.close()


def test_judged_by_the_models_own_probabilities(task):
    ours = peer_engines.Ours(task)
    found = peers.judge(task, peers.cut(task, ours.sample(1)))
    peers.require_same_distribution(found, found)

    def drawn(**change):
        return peers.judge(task, peer_engines.Ours(dataclasses.replace(task, **change)).sample(1))

    with pytest.raises(Unavailable, match=r"% of its tokens are not among"):
        peers.require_same_distribution(drawn(top_k=0, top_p=1.0, temperature=3.0), found)
    with pytest.raises(Unavailable, match=r"mean log-prob is .*, that of ours"):
        peers.require_same_distribution(drawn(top_k=1), found)


def test_answers_that_were_not_asked_for_are_refused(task):
    two = dataclasses.replace(task, num_samples=1, new_tokens=2, stops=(9,))
    assert peers.cut(two, [[[4, 9, 7, 7]], [[9]]]) == [[[4, 9]], [[9]]]
    with pytest.raises(Unavailable, match=r"gave \[1\] answers to 2 prompts"):
        peers.cut(two, [[[4, 5]]])
    with pytest.raises(Unavailable, match="an answer of 1 tokens ends"):
        peers.cut(two, [[[4]], [[9]]])
    with pytest.raises(Unavailable, match="an answer of 0 tokens ends"):
        peers.cut(two, [[[]], [[9]]])


# --- weights


def test_written_weights_are_the_models(sharp, tmp_path):
    """transformers' own reader of GGUF is the oracle; tiny has fewer key heads than query heads."""
    pytest.importorskip("gguf")
    peer_llama.write_gguf(sharp, tmp_path / "model.gguf")
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    ids = torch.tensor(PROMPTS[0])[None]
    with torch.no_grad():
        torch.testing.assert_close(read(ids).logits, sharp(ids).logits, rtol=1e-5, atol=1e-4)


def test_only_plain_llama_is_written(tmp_path):
    pytest.importorskip("gguf")
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9))
    with pytest.raises(Unavailable, match="model_type 'gpt2'"):
        peer_llama.write_gguf(gpt2, tmp_path / "model.gguf")


@pytest.mark.parametrize("name", ["vLLM", "llama.cpp"])
def test_a_copy_follows_the_weights_after_sync_alone(name, task, monkeypatch):
    made = []
    monkeypatch.setitem(sys.modules, "llama_cpp", llama_cpp_stand_in())
    monkeypatch.setitem(sys.modules, "vllm", vllm_stand_in(made))
    if name == "llama.cpp":
        pytest.importorskip("gguf")
    way = peers.PEERS[name](task)
    before = way.sample(5)
    with torch.no_grad():
        for p in task.model.parameters():
            p.mul_(0.7)
    assert way.sample(5) == before
    way.sync()
    after = way.sample(5)
    assert after != before
    assert after == peers.PEERS[name](task).sample(5)  # one made of the new weights
    if made:
        assert made[0].resets == 1
        assert made[0].how["enable_prefix_caching"]


# --- the measurement


def test_the_static_cache_is_compiled(task, monkeypatch):
    compiled, whole = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: (compiled.append(how["mode"]), whole(f, **how))[1])
    way = peer_engines.StaticCompiled(task)
    way.settings.compile_config.backend = "eager"
    peers.cut(task, way.sample(1))
    assert compiled == ["default"]


def test_peers_are_measured_beside_ours_and_named_where_they_are_not(tiny_dir, tmp_path, monkeypatch, capsys):
    absent(monkeypatch, "vllm", "llama_cpp")
    monkeypatch.setattr(harness, "alone", nullcontext)
    monkeypatch.setattr(peers, "MODELS", {"knows": ("tiny", lambda: tiny_dir)})
    names = [name for name in peers.PEERS if "compiled" not in name]
    asked = ["--peers", *names, "--questions", "2", "--samples", "3", "--max-length", "60", "--rounds", "2"]
    peers.main([*asked, "--models", "knows", "--json", str(tmp_path / "peers.json")])
    document = result_files.read(tmp_path / "peers.json")
    [result] = document["results"]
    assert list(result["contestants"]) == ["pmc_fast", "generate", "generate_batch"]
    assert set(result["facts"]["refused"]) == {"vLLM", "llama.cpp"}
    assert all("ModuleNotFoundError" in why for why in result["facts"]["refused"].values())
    limit = result["facts"]["new_tokens"]
    for way in result["contestants"].values():
        assert len(way["rounds_s"]) == len(way["rounds_tokens_per_s"]) == 2
        assert 6 <= way["tokens"] <= 6 * limit
        assert way["syncs_s"] == []
    assert "llama.cpp: not measured: ModuleNotFoundError" in capsys.readouterr().out
    assert str(tiny_dir) not in json.dumps(document)
    table = peers.table(suites.Suites({"peers": document}))
    assert "| generate_batch (2 rounds) |" in table
    assert "| vLLM: not run | | | | | | |" in table
    assert "llama.cpp: ModuleNotFoundError" in table


class Fixed:
    """A peer with a copy of the weights that draws as ours; what it takes is made up below."""

    def __init__(self, task):
        self.engine, self.syncs = peer_engines.Ours(task), 0
        self.sample = self.engine.sample

    def sync(self):
        self.syncs += 1


class Wrong(Fixed):
    def __init__(self, task):
        super().__init__(dataclasses.replace(task, temperature=50.0, top_k=0, top_p=1.0))


@pytest.mark.parametrize(
    ("seconds", "rounds"), [(math.inf, {"pmc_fast": 7, "slow": 2, "near": 7}), (40.0, {"pmc_fast": 6, "slow": 2, "near": 6})]
)  # fmt: skip
def test_slow_peers_take_part_in_fewer_rounds_and_the_time_is_kept(seconds, rounds, task, monkeypatch):
    monkeypatch.setattr(peers, "PEERS", {"slow": Fixed, "near": Fixed, "wrong": Wrong})
    takes = {"pmc_fast": 1.0, "slow": 9.0, "near": 2.0, "": 0.5}

    def time_round(contestants, number, device):
        for run in contestants.values():
            run()
        return {name: takes[name] for name in contestants}

    monkeypatch.setattr(measure, "time_round", time_round)
    found = peers.compare(task, list(peers.PEERS), 7, seconds)
    assert {name: len(way["rounds_s"]) for name, way in found["contestants"].items()} == rounds
    assert "not among those that top_k and top_p keep" in found["facts"]["refused"]["wrong"]
    for name in ("slow", "near"):
        assert found["contestants"][name]["syncs_s"] == [0.5] * rounds[name]
    document = result_files.document("peers", [{"name": "a"} | found], 0)
    line = peers.table(suites.Suites({"peers": document})).splitlines()[4]
    assert line.startswith(
        f"| slow (2 rounds) | {found['contestants']['slow']['tokens_per_s']:,.0f} | 9.00 s | 500 ms |"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a card, benchmarks/card.sh runs it in full")
def test_the_cards_block_runs_on_the_cpu(monkeypatch):
    absent(monkeypatch, "vllm")
    monkeypatch.setattr(card_rollouts, "PEERS", dict.fromkeys(("generate", "vLLM")))
    probe = card.Probe("tiny", quick=True)
    card_rollouts.peers(probe)
    by_name = {r["name"]: r for r in probe.results}
    assert list(by_name) == ["peers: pmc_fast", "peers: generate", "peers: vLLM: not measured"]
    assert "ModuleNotFoundError" in by_name["peers: vLLM: not measured"]["why"]
    assert by_name["peers: generate"]["rounds"] == 2


def test_questions_and_limits_are_those_of_the_demo(tiny_dir):
    setting = Setting(tiny_dir, ["forget20"], 3)
    task = peers.task_of(setting, 5, 90, 0.9)
    assert max(map(len, task.prompts)) + task.new_tokens == 90
    assert task.stops == tuple(setting.encoder.stops)
