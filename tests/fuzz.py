"""Calls every function of the C++ module with sound and with hostile arguments: an answer or one clear error.

    python -m tests.fuzz --seconds 240                 # the long form
    python -m tests.fuzz --module DIR/_cpu.so          # another build, such as one with sanitizers

Arrays lie before a page that must not be touched, or in numpy's own memory (which AddressSanitizer fences): a read
or write past an end kills the process. Needs neither torch nor transformers. The C++ takes addresses and trusts
what lies there; what it can tell from the numbers alone (null, alignment, overlap, order of offsets, ranges of
indices, sizes that no memory has) it refuses, and so does this test expect.
"""

import argparse
import ctypes
import importlib
import importlib.util
import math
import mmap
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

PAGE = mmap.PAGESIZE
LIBC = ctypes.CDLL(None)
LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
MODULE: Any = None  # what `use` chose
COUNTS: Counter[str] = Counter()  # calls of this process, by what became of them

HUGE = st.integers(2**49, 2**63 - 1)
NOT_A_NUMBER = st.sampled_from([None, "3", b"3", [3], 2**64, -(2**64)])
BAD_SIZE = st.integers(-(2**63), -1) | HUGE | NOT_A_NUMBER
BAD: dict[str, st.SearchStrategy[Any]] = {
    "size": BAD_SIZE,
    "stride": st.integers(-(2**63), 0) | HUGE | NOT_A_NUMBER,
    "top_k": st.integers(-(2**63), -1) | NOT_A_NUMBER,
    "top_p": st.sampled_from([math.nan, math.inf, 0.0, -1.0, 1.5, None, "1"]),
    "isa": st.integers(-(2**31), -1) | st.integers(3, 2**31 - 1) | NOT_A_NUMBER,
    "threads": st.integers(-(2**31), 0) | st.integers(5000, 2**31 - 1) | NOT_A_NUMBER,
    "finite": st.sampled_from([math.nan, math.inf, -math.inf, None, "1"]),
    "number": st.sampled_from([None, "1", [1.0]]),
    "optional": NOT_A_NUMBER,
}


def use(path: str | None = None) -> Any:
    """Choose the module to be called: a file, or the package's own."""
    global MODULE
    if path is None:
        MODULE = importlib.import_module("pmc_fast._cpu")
    else:
        spec = importlib.util.spec_from_file_location("_cpu", path)
        MODULE = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(MODULE)
    return MODULE


def guarded(array: np.ndarray) -> np.ndarray:
    """Return a copy that ends where a page begins that nobody may touch."""
    pages = -(-array.nbytes // PAGE) + 1
    memory = mmap.mmap(-1, (pages + 1) * PAGE)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert LIBC.mprotect(base + pages * PAGE, PAGE, 0) == 0
    copy = np.frombuffer(memory, array.dtype, array.size, pages * PAGE - array.nbytes).reshape(array.shape)
    copy[...] = array
    return copy


class Call:
    """A sound call, argument by argument, and what may be done to each."""

    def __init__(self, data: st.DataObject, name: str) -> None:
        self.data, self.name = data, name
        self.values: dict[str, Any] = {}
        self.kinds: dict[str, str] = {}
        self.arrays: dict[str, np.ndarray] = {}
        self.items: dict[str, int] = {}

    def add(self, kind: str, **values: Any) -> "Call":
        for name, value in values.items():
            self.values[name], self.kinds[name] = value, kind
        return self

    def memory(self, kind: str, **arrays: np.ndarray) -> "Call":
        """Place arrays; kind is "read", "write", "in place" (it may be an input) or "optional" (0 leaves it out)."""
        fenced = self.data.draw(st.booleans(), label="before a guarded page")
        for name, array in arrays.items():
            placed = guarded(array) if fenced else array.copy()
            self.arrays[name], self.items[name] = placed, array.itemsize
            self.add(kind, **{name: placed.ctypes.data})
        return self

    def spoilt(self) -> tuple[dict[str, Any], str]:
        """Return the arguments with one of them made bad, and which."""
        names = [n for n, kind in self.kinds.items() if self._bad(n, kind) is not None]
        name = self.data.draw(st.sampled_from(names), label="spoil")
        value = self.data.draw(self._bad(name, self.kinds[name]), label="with")
        return self.values | {name: value}, name

    def _bad(self, name: str, kind: str) -> st.SearchStrategy[Any] | None:
        if name not in self.items:
            return BAD.get(kind)
        if self.arrays[name].size == 0:
            return None
        here, item = self.values[name], self.items[name]
        bad = NOT_A_NUMBER if kind == "optional" else NOT_A_NUMBER | st.just(0)
        bad |= st.just(here + 1) if item > 1 else st.nothing()
        bad |= st.just(2**64 - item)  # its end is past the last address
        if kind == "write":
            others = [
                (v, n) for n, v in self.values.items() if n in self.arrays and n != name and self.arrays[n].size
            ]
            if others:
                bad |= st.sampled_from([v for v, n in others if self.items[n] >= item] or [0])
        return bad

    def run(self, function: Callable[..., Any], arrange: Callable[[dict[str, Any]], tuple] | None = None) -> None:
        """Call soundly, then with one argument spoilt: the first gives an answer, the second an error."""
        arrange = arrange or (lambda values: tuple(values.values()))
        function(*arrange(self.values))
        COUNTS["sound calls"] += 1
        values, name = self.spoilt()
        refused(f"{self.name}: {name} is {values[name]!r}", lambda: function(*arrange(values)))


def _count_refusal(word: str, error: Exception) -> None:
    text = str(error)
    assert text
    assert word in text
    assert "_M_" not in text, text  # the standard library's words, not ours
    COUNTS["refused calls"] += 1


def refused(what: str, call: Callable[[], Any]) -> None:
    """Expect one clear error."""
    try:
        call()
    except (ValueError, TypeError) as error:
        _count_refusal("", error)
    else:
        raise AssertionError(f"{what}: was not refused")


def how(call: Call) -> Call:
    isa = call.data.draw(st.integers(0, MODULE.best_isa()))
    return call.add("isa", isa=isa).add("threads", threads=call.data.draw(st.integers(1, 3)))


def offsets(data: st.DataObject, parts: int, most: int, kind: Any = np.int64) -> np.ndarray:
    sizes = data.draw(st.lists(st.integers(0, most), min_size=parts, max_size=parts))
    return np.concatenate([[0], np.cumsum(sizes)]).astype(kind)


def normal(data: st.DataObject, kind: Any, *shape: int) -> np.ndarray:
    seed = data.draw(st.integers(0, 2**16))
    return (np.random.default_rng(seed).standard_normal(shape) * 3).astype(kind)


SIZES = st.sampled_from([0, 1, 2, 3, 5, 16, 17, 63, 64, 65, 130])
SOME = st.sampled_from([1, 2, 3, 5, 16, 17, 63, 64, 65, 130])


def nll_rows(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from([np.float32, np.float64]))
    rows, vocab, gap = data.draw(st.integers(0, 4)), data.draw(SOME), data.draw(st.integers(0, 3))
    ends = offsets(data, rows, 3)
    count = int(ends[-1])
    call = Call(data, "nll_rows")
    wide = normal(data, kind, max(0, rows * (vocab + gap) - gap))
    call.memory("write", logits=wide).add("stride" if rows > 1 else "", stride=vocab + gap)
    call.add("size", rows=rows, vocab=vocab)
    if data.draw(st.booleans()):
        call.memory("optional", bias=normal(data, kind, vocab))
    else:
        call.add("", bias=0)
    call.add(
        "number", temperature=data.draw(st.sampled_from([1.0, 0.7])), softcap=data.draw(st.sampled_from([0.0, 9.0]))
    )
    call.add("number", logit_scale=1.5).memory("read", cu_targets=ends)
    call.memory("read", targets=np.random.default_rng(count).integers(0, vocab, count))
    call.memory("read", row_scale=normal(data, kind, count)).memory("write", logps=np.zeros(count, kind))
    call.add("size", num_targets=count).add("", grad=data.draw(st.booleans()))
    function = MODULE.nll_rows_f32 if kind == np.float32 else MODULE.nll_rows_f64
    targets, cu = call.arrays["targets"], call.arrays["cu_targets"]
    how(call).run(function)
    if count:
        keep = targets[0]
        targets[0] = data.draw(st.sampled_from([-1, vocab, -(2**63), 2**63 - 1, -100]))
        refused("nll_rows: a target", lambda: function(*call.values.values()))
        targets[0] = keep
        cu[-1] = data.draw(st.sampled_from([count + 1, 2**63 - 1]))
        refused("nll_rows: cu_targets", lambda: function(*call.values.values()))
    elif rows:
        cu[0] = data.draw(st.sampled_from([-1, 1, -(2**63), 2**63 - 1]))
        refused("nll_rows: cu_targets", lambda: function(*call.values.values()))


def sample_nucleus(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from([np.float32, np.float64]))
    rows, vocab, gap = data.draw(st.integers(0, 4)), data.draw(st.sampled_from([1, 2, 17, 256, 257, 700])), 2
    ends = offsets(data, rows, 3)
    count = int(ends[-1])
    call = Call(data, "sample_nucleus")
    wide = normal(data, kind, max(0, rows * (vocab + gap) - gap))
    if wide.size:
        odd = data.draw(st.sampled_from([None, np.nan, np.inf, -np.inf, 3e38, -3e38]))
        if odd is not None:
            wide[data.draw(st.integers(0, wide.size - 1)) :: 3] = odd
    call.memory("read", logits=wide).add("stride" if rows > 1 else "", stride=vocab + gap)
    call.add("size", rows=rows, vocab=vocab).add(
        "finite", temperature=data.draw(st.sampled_from([0.0, 1.0, 0.9, 1e-30]))
    )
    call.add("top_k", top_k=data.draw(st.sampled_from([0, 1, 2, 50, 256, 2**62])))
    call.add("top_p", top_p=data.draw(st.sampled_from([1.0, 0.95, 1e-9])))
    call.add("", seed=data.draw(st.integers(0, 2**64 - 1))).memory("read", cu_draws=ends)
    for name in ("streams", "samples", "positions"):
        call.memory("read", **{name: np.random.default_rng(count).integers(-(2**63), 2**63 - 1, count)})
    call.memory("write", tokens=np.zeros(count, np.int64), logps=np.zeros(count), mass=np.zeros(rows))
    call.add("size", draws=count)
    function = MODULE.sample_nucleus_f32 if kind == np.float32 else MODULE.sample_nucleus_f64
    how(call).run(function)
    tokens = call.arrays["tokens"]
    assert ((tokens >= -1) & (tokens < vocab)).all()
    if rows:
        call.arrays["cu_draws"][-1] = data.draw(st.sampled_from([-1, count + 1, 2**63 - 1, -(2**63)]))
        refused("sample_nucleus: cu_draws", lambda: function(*call.values.values()))


def decode_attention(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["f32", "f64", "bf16"]))
    number = {"f32": np.float32, "f64": np.float64, "bf16": np.uint16}[kind]
    kv_heads, group, dim = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5)), data.draw(SOME)
    blocks, slots = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 40))
    cu_rows, cu_prefix = offsets(data, blocks, 10, np.int32), offsets(data, blocks, 6, np.int32) + 0
    rows = int(cu_rows[-1])
    random = np.random.default_rng(rows)
    cu_suffix = np.concatenate([[0], np.cumsum(random.integers(1, 4, rows))]).astype(np.int32)
    own = np.repeat(np.arange(blocks), np.diff(cu_rows))
    prefix_len = random.integers(0, np.diff(cu_prefix)[own] + 1).astype(np.int32) if rows else np.zeros(0, np.int32)
    index = {
        "slots": random.integers(0, slots, rows), "prefix_len": prefix_len, "cu_suffix": cu_suffix,
        "suffix": random.integers(0, slots, int(cu_suffix[-1])), "cu_rows": cu_rows, "cu_prefix": cu_prefix,
        "prefix": random.integers(0, slots, int(cu_prefix[-1])),
    }  # fmt: skip
    heads = kv_heads * group
    plain = (lambda *s: normal(data, np.float32, *s).view(np.uint32).__rshift__(16).astype(np.uint16)) if kind == "bf16" else (lambda *s: normal(data, number, *s))  # fmt: skip
    call = Call(data, "decode_attention")
    call.memory("read", q=plain(rows, heads, dim), k=plain(rows, kv_heads, dim), v=plain(rows, kv_heads, dim))
    call.memory("write", k_pool=plain(slots, kv_heads, dim), v_pool=plain(slots, kv_heads, dim))
    call.memory("write", out=np.zeros((rows, heads, dim), number))
    call.add("size", heads=heads, kv_heads=kv_heads, dim=dim)
    call.add("finite", scale=0.2, softcap=data.draw(st.sampled_from([0.0, 7.0])))
    call.add("size", window=data.draw(st.integers(0, 5)))
    call.memory("read", **{name: a.astype(np.int32) for name, a in index.items()})
    call.add("size", rows=rows, blocks=blocks, pool_slots=slots)
    function = getattr(MODULE, f"decode_attention_{kind}")

    def arrange(v: dict[str, Any]) -> tuple:
        strided = [(v[n], h * dim, dim) for n, h in (("q", heads), ("k", kv_heads), ("v", kv_heads))]
        return (
            *strided, v["k_pool"], v["v_pool"], v["out"], (v["heads"], v["kv_heads"], v["dim"]), v["scale"],
            v["softcap"], v["window"], (*(v[n] for n in index), v["rows"], v["blocks"]), v["pool_slots"], v["isa"],
            v["threads"],
        )  # fmt: skip

    how(call).run(function, arrange)
    names = [n for n in index if call.arrays[n].size]
    name = data.draw(st.sampled_from(names))
    array = call.arrays[name]
    at = len(array) - 1 if name.startswith("cu_") else data.draw(st.integers(0, len(array) - 1))
    good = [-1, -(2**31), 2**31 - 1] + ([slots] if name in ("slots", "suffix", "prefix") else [])
    if name in ("cu_suffix", "cu_prefix"):
        good = [-1, -(2**31)]  # how long suffix and prefix are is known to the caller alone
    array[at] = data.draw(st.sampled_from(good))
    refused(f"decode_attention: {name}", lambda: function(*arrange(call.values)))
    short = list(arrange(call.values))
    place = data.draw(st.sampled_from([0, 1, 2, 6, 10]))
    short[place] = data.draw(st.sampled_from([(), short[place][:-1], (*short[place], 0), None, 3]))
    refused("decode_attention: a tuple", lambda: function(*short))


def linear(data: st.DataObject) -> None:
    rows, inner, outer = data.draw(st.sampled_from([0, 1, 3, 7, 97, 260])), data.draw(SIZES), data.draw(SIZES)
    call = Call(data, "linear").memory("read", x=normal(data, np.float32, rows, inner))
    call.memory("read", weight=normal(data, np.float32, outer, inner))
    if data.draw(st.booleans()):
        call.memory("optional", bias=normal(data, np.float32, outer))
    else:
        call.add("", bias=0)
    call.memory("write", y=np.zeros((rows, outer), np.float32)).add("size", rows=rows, inner=inner, outer=outer)
    call.add("isa", isa=data.draw(st.integers(1, MODULE.best_isa()))).add(
        "threads", threads=data.draw(st.integers(1, 3))
    )
    x, weight, y = (call.arrays[n] for n in ("x", "weight", "y"))
    call.run(MODULE.linear_f32)
    expected = x.astype(np.float64) @ weight.T + call.arrays.get("bias", 0)
    np.testing.assert_allclose(y, expected, atol=1e-3, rtol=1e-3)


def norms(data: st.DataObject) -> None:
    rows, size = data.draw(st.integers(0, 5)), data.draw(SIZES)
    call = Call(data, "rms_norm").memory("read", x=normal(data, np.float32, rows, size))
    call.memory("read", weight=normal(data, np.float32, size)).memory(
        "in place", y=np.zeros((rows, size), np.float32)
    )
    call.memory("optional", rstd=np.zeros(rows, np.float32)).add("size", rows=rows, size=size)
    call.add("number", eps=1e-5, offset=0.0)
    how(call).run(MODULE.rms_norm_f32)
    back = Call(data, "rms_norm_backward")
    back.memory("read", dy=normal(data, np.float32, rows, size), x=call.arrays["x"], weight=call.arrays["weight"])
    back.memory("read", rstd=np.ones(rows, np.float32)).memory("optional", dx=np.zeros((rows, size), np.float32))
    back.memory("optional", dweight=np.zeros(size, np.float32)).add("size", rows=rows, size=size).add(
        "number", offset=1.0
    )
    how(back).run(MODULE.rms_norm_backward_f32)


def silu_mul(data: st.DataObject) -> None:
    size = data.draw(SIZES)
    call = Call(data, "silu_mul").memory(
        "read", gate=normal(data, np.float32, size), up=normal(data, np.float32, size)
    )
    call.memory("in place", y=np.zeros(size, np.float32)).add("size", size=size)
    how(call).run(MODULE.silu_mul_f32)
    back = Call(data, "silu_mul_backward")
    back.memory("read", dy=normal(data, np.float32, size), gate=call.arrays["gate"], up=call.arrays["up"])
    back.memory("optional", dgate=np.zeros(size, np.float32), dup=np.zeros(size, np.float32)).add("size", size=size)
    how(back).run(MODULE.silu_mul_backward_f32)


def rotary(data: st.DataObject) -> None:
    rows, heads, dim = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 3)), 2 * data.draw(SIZES)
    call = Call(data, "rotary").memory("read", x=normal(data, np.float32, rows, heads, dim))
    call.memory("read", cos=normal(data, np.float32, rows, dim), sin=normal(data, np.float32, rows, dim))
    call.memory("write", y=np.zeros((rows, heads, dim), np.float32)).add("size", rows=rows, heads=heads, dim=dim)
    call.add("", row_stride=heads * dim, head_stride=dim, back=data.draw(st.booleans()))
    how(call).run(MODULE.rotary_f32)
    odd = call.values | {"dim": dim + 1}
    refused("rotary: an odd dim", lambda: MODULE.rotary_f32(*odd.values()))


def _take(made: Any, plan: Any, capacity: int, draw: Any) -> None:
    """Pad a plan and draw its tokens, with nonsense thrown in between."""
    draws, rows = plan.draws, plan.logits
    assert len(plan["slots"]) == 0 or 0 <= plan["slots"].min() <= plan["slots"].max() < made.span <= capacity
    bucket = (
        plan.rows + draw(st.integers(0, 3)),
        plan.blocks + 1,
        max(rows, 1),
        max(draws, 1) + draw(st.integers(0, 3)),
    )
    memory = np.zeros(plan.padded_bytes(*bucket), np.uint8)
    odd = list(bucket)
    odd[draw(st.integers(0, 3))] = draw(BAD_SIZE | st.just(0))
    assert isinstance(plan, MODULE.StepPlan)
    refused(f"step_layout {odd}", lambda: MODULE.step_layout(*odd))
    refused(f"StepPlan.pad {odd}", lambda: plan.pad(*odd, made.span, memory))
    refused("StepPlan.pad: no room", lambda: plan.pad(*bucket, made.span, memory[:-1]))
    refused("StepPlan.pad: bad slots", lambda: plan.pad(*bucket, draw(st.sampled_from([-1, 2**31])), memory))
    plan.pad(*bucket, made.span, memory)
    tokens = np.array([draw(st.integers(0, 5)) for _ in range(draws)], np.int64)
    good = (tokens, np.zeros(draws), np.ones(rows))
    bad = draw(st.sampled_from([
        (tokens.astype(np.int32), *good[1:]), (np.zeros(draws + 1, np.int64), *good[1:]), (None, *good[1:]),
        (tokens, np.zeros(draws + 1), good[2]), (tokens, good[1], np.zeros(rows + 1)), (tokens, good[1], None),
        (tokens, good[1].astype(np.float32), good[2]), *([(tokens - 6, *good[1:]), (tokens + 2**31, *good[1:])] if draws else []),
    ]))  # fmt: skip
    refused("advance", lambda b=bad: made.advance(*b))
    made.advance(*good)
    COUNTS["sound calls"] += 1


def trie(data: st.DataObject) -> None:
    """Whole rollouts of random draws, with nonsense thrown in between: they still end, and free all slots."""
    draw = data.draw
    refused("RolloutTrie", lambda: MODULE.RolloutTrie(draw(BAD_SIZE | st.just(2**31)), [], 0))
    refused("RolloutTrie", lambda: MODULE.RolloutTrie(10, draw(st.sampled_from([None, [2**31], ["a"], 3])), 0))
    refused("RolloutTrie", lambda: MODULE.RolloutTrie(10, [], draw(BAD_SIZE)))
    ids, capacity = st.integers(-3, 5), draw(st.integers(1, 30))
    match, share = draw(st.sampled_from([0, 1, 3, 2**31 - 1])), draw(st.booleans())
    made = MODULE.RolloutTrie(capacity, draw(st.lists(ids, max_size=2)), match, share)
    asked = []
    for _ in range(draw(st.integers(0, 5))):
        question = {
            "prompt": draw(st.lists(ids, max_size=6)), "stream": draw(st.integers(-(2**63), 2**63 - 1)),
            "samples": draw(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=4)),
            "max_new": draw(st.integers(-2, 8) | st.sampled_from([2**31 - 1, 2**63 - 1, -(2**63)])),
            "drafts": draw(st.lists(st.lists(ids, max_size=6), max_size=2)),
            "positions": draw(st.just([]) | st.lists(st.integers(0, 9) | st.sampled_from([-1, 2**63 - 1]), max_size=6)),
        }  # fmt: skip
        longest = len(question["prompt"]) + max(0, question["max_new"] - 1)
        places = question["positions"]
        sound = question["prompt"] and question["max_new"] < 2**31
        sound = sound and (question["max_new"] <= 0 or longest <= capacity)
        sound = sound and (not places or len(places) == len(question["prompt"])) and all(0 <= p < 10 for p in places)
        if sound:
            assert made.add(**question) == len(asked)
            asked.append(question)
            COUNTS["sound calls"] += 1
        else:
            refused(f"RolloutTrie.add {question}", lambda q=question: made.add(**q))
        odd = question | {
            draw(st.sampled_from(sorted(question))): draw(st.sampled_from([None, "ab", [[[2**31]]], 1.5]))
        }
        refused("RolloutTrie.add", lambda q=odd: made.add(**q))
    none, nothing = np.zeros(0, np.int64), np.zeros(0)
    while True:
        refused("plan", lambda: made.plan(draw(BAD_SIZE | st.just(0)), 0))
        refused("plan", lambda: made.plan(1, draw(BAD_SIZE)))
        limits = draw(st.integers(1, 12) | st.just(2**31 - 1)), draw(st.integers(0, 12))
        plan = made.plan(*limits)
        if plan is None:
            assert made.plan_ahead(*limits) is None
            break
        refused("plan_ahead", lambda: made.plan_ahead(draw(BAD_SIZE | st.just(0)), 0))
        ahead = made.plan_ahead(*limits) if draw(st.booleans()) else None
        for step in (plan, ahead):
            if step is not None:
                _take(made, step, capacity, draw)
    assert made.in_use == 0
    made.advance(none, nothing, nothing)
    for number, question in enumerate(asked):
        samples = made.results(number)
        assert len(samples) == len(question["samples"])
        assert all(len(tokens) <= max(0, question["max_new"]) for tokens, *_ in samples)
    refused("results", lambda: made.results(draw(BAD_SIZE | st.just(len(asked)))))
    assert made.counters()["peak_slots"] <= capacity


PROPERTIES = {
    f.__name__: f
    for f in (
        nll_rows, sample_nucleus, decode_attention, linear, norms, silu_mul, rotary, trie
    )
}  # fmt: skip
NEED_AVX2 = ("linear",)


def fuzz(name: str, examples: int, *, derandomize: bool = False) -> None:
    """Try one property on so many random examples."""
    if name in NEED_AVX2 and MODULE.best_isa() < 1:
        return

    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=derandomize,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.data())
    def tried(data: st.DataObject) -> None:
        COUNTS["examples"] += 1
        PROPERTIES[name](data)

    tried()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--module", help="the compiled module (default: the package's)")
    parser.add_argument("--seconds", type=float, default=0, help="go on that long")
    parser.add_argument("--examples", type=int, default=25, help="of each function, in each round")
    parser.add_argument("--only", choices=list(PROPERTIES))
    a = parser.parse_args()
    use(a.module)
    start = time.perf_counter()
    while True:
        for name in [a.only] if a.only else PROPERTIES:
            fuzz(name, a.examples)
        if time.perf_counter() - start >= a.seconds:
            break
    counts = ", ".join(f"{n} {what}" for what, n in COUNTS.items())
    print(f"{counts} in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
