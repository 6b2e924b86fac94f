"""Logs that are read a step later: the same numbers, no wait for the device in a step, and no diverged run that ends well."""

import json

import pytest
import torch
import transformers
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pmc_fast import PMCConfig, PMCError, PMCTrainer
from pmc_fast.cuda_graphs.recorder import syncs_with_host
from pmc_fast.trainer import step_logs
from tests.trainer.test_trainer import QUESTIONS, RETAIN, arguments

GPU = torch.cuda.is_available()


@pytest.fixture
def deferred(monkeypatch):
    monkeypatch.setattr(step_logs, "DEFERS", ("cpu", "cuda"))


def made(tiny_dir, tokenizer, path, dtype=torch.float32, pmc=None, **change):
    """A trainer whose questions are all sampled once: later steps are training alone."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=dtype)
    config = PMCConfig(num_samples=2, max_length=40, prompt_format="tags", **(pmc or {}))
    args = arguments(path, **{"num_train_epochs": 4, "use_cpu": not GPU} | change)
    never = lambda initial, candidates, min_len: torch.zeros(len(candidates), len(candidates[0])).numpy()  # noqa: E731
    return PMCTrainer(model, args, QUESTIONS, RETAIN, config, tokenizer, reward=never)


class Events(transformers.TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.seen.append(("begin", state.global_step))

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(("log", state.global_step))

    on_log.__module__ = "transformers.integrations"  # it only reports, as theirs


def history(trainer):
    return [
        {k: v for k, v in r.items() if "second" not in k and "runtime" not in k} for r in trainer.state.log_history
    ]


@pytest.mark.parametrize("how", [{"logging_steps": 2}, {"save_strategy": "steps", "save_steps": 3}], ids=str)
def test_logged_values_are_the_same(how, tiny_dir, tokenizer, tmp_path, monkeypatch):
    found, events = [], []
    for devices in ((), ("cpu", "cuda")):
        monkeypatch.setattr(step_logs, "DEFERS", devices)
        trainer = made(tiny_dir, tokenizer, tmp_path / str(len(devices)), **how)
        trainer.add_callback(seen := Events())
        trainer.train()
        states = sorted((tmp_path / str(len(devices)) / "run").glob("checkpoint-*/trainer_state.json"))
        logs = [len(json.loads(path.read_text())["log_history"]) for path in states]
        found.append((history(trainer), trainer.state.global_step, logs))
        events.append(seen.seen)
    assert found[0] == found[1]
    # "begin" of n is that of the step after n
    late = [
        [n for n in range(3, 8) if ("log", n) in s and s.index(("log", n)) > s.index(("begin", n))] for s in events
    ]
    assert late[0] == []
    assert late[1] == [n for n in range(3, 8) if ("log", n) in events[1] and not ("save_steps" in how and n % 3 == 0)]


class Asks(transformers.TrainerCallback):
    """A user's callback that asks for something when it is told step 3."""

    def __init__(self, what):
        self.what = what

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs and state.global_step == 3:
            setattr(control, self.what, True)


@pytest.mark.parametrize("what", ["should_save", "should_evaluate", "should_training_stop"])
def test_a_callback_that_acts_on_a_log_acts_at_its_step(what, deferred, tiny_dir, tokenizer, tmp_path):
    trainer = made(tiny_dir, tokenizer, tmp_path, save_strategy="no")
    trainer.eval_dataset = trainer.encode_eval(RETAIN)
    trainer.add_callback(Asks(what))
    trainer.train()
    assert [p.name for p in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-3"] * (what == "should_save")
    evaluated = [r["step"] for r in trainer.state.log_history if "eval_loss" in r]
    assert evaluated == [3] * (what == "should_evaluate")
    assert trainer.state.global_step == (3 if what == "should_training_stop" else 8)


def test_a_trainer_that_acts_on_a_log_acts_at_its_step(deferred, tiny_dir, tokenizer, tmp_path, monkeypatch):
    def log(self, logs, *args):
        self.control.should_save |= "loss" in logs and self.state.global_step == 3
        return PMCTrainer.log(self, logs, *args)

    trainer = made(tiny_dir, tokenizer, tmp_path, save_strategy="no")
    trainer.__class__ = type("Own", (PMCTrainer,), {"log": log})
    trainer.train()
    assert [p.name for p in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-3"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_run_that_is_cut_short_has_logged_its_last_step(error, deferred, tiny_dir, tokenizer, tmp_path):
    trainer = made(tiny_dir, tokenizer, tmp_path)

    class Ends(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 4:
                raise error("in step 5")

    trainer.add_callback(Ends())
    with pytest.raises(error, match="in step 5"):
        trainer.train()
    assert [r["step"] for r in trainer.state.log_history if "loss" in r] == [1, 2, 3, 4]


def test_what_needs_a_steps_numbers_has_them(deferred, tiny_dir, tokenizer, tmp_path):
    rule = {"stop_score": 1.0, "stop_retain_loss": 1e9, "stop_steps": 2}
    trainer = made(tiny_dir, tokenizer, tmp_path, pmc=rule)
    trainer.train()
    assert trainer.state.global_step == 3  # all five questions are visited after two steps
    assert [r["step"] for r in trainer.state.log_history if "loss" in r] == [1, 2, 3]


@pytest.mark.parametrize(("save", "epochs"), [(1, 4), (3, 2), (3, 4)])
def test_a_diverged_step_is_never_saved_and_never_ends_a_run(save, epochs, deferred, tiny_dir, tokenizer, tmp_path):
    """The loss of step 4, the last of two epochs, is not a number."""
    how = {"save_strategy": "steps", "save_steps": save, "num_train_epochs": epochs}
    trainer = made(tiny_dir, tokenizer, tmp_path, **how)

    class Spoils(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == 3:
                trainer._step["loss"] *= torch.nan

    trainer.add_callback(Spoils())
    with pytest.raises(PMCError, match="training diverged at step 4 of"):
        trainer.train()
    assert trainer.state.global_step in (4, 5)
    saved = {int(p.name.split("-")[1]) for p in (tmp_path / "run").glob("checkpoint-*")}
    assert max(saved) <= 3


class Device:
    """Takes tensors that come from the model's parameters for a device's, and notes what would wait for it.

    A CPU has no copies between devices: what is seen is the call, such as `.to(device)` of a tensor that comes from no
    parameter. The inside of custom ops, whose CUDA code is another one, is not seen.
    """

    READS = (
        "item",
        "tolist",
        "cpu",
        "numpy",
        "__bool__",
        "__float__",
        "__int__",
        "__index__",
        "__array__",
        "__contains__",
    )

    def __init__(self, model):
        self.waits, self._kept, self._ids = [], [], set()
        for p in (*model.parameters(), *model.buffers()):
            self.add(p)
        device = self

        class Calls(TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):
                return device.call(func, args, kwargs or {})

        class Operations(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                return device.operation(func, args, kwargs or {})

        self._modes = (Calls(), Operations())

    def __enter__(self):
        for mode in self._modes:
            mode.__enter__()

    def __exit__(self, *error):
        for mode in reversed(self._modes):
            mode.__exit__(*error)

    def add(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self._ids:
            self._ids.add(storage._cdata)
            self._kept.append(storage)  # or its address might be another's later

    def has(self, value):
        if isinstance(value, (list, tuple)):
            return any(map(self.has, value))
        return isinstance(value, torch.Tensor) and value.untyped_storage()._cdata in self._ids

    def call(self, func, args, kwargs):
        name = getattr(func, "__name__", "")
        to = [a for a in (*args[1:], kwargs.get("device")) if isinstance(a, (str, torch.device))]
        if name == "to" and to:
            own = self.has(args[0])
            leaves = own and "cpu" in to
            if (leaves or not own) and not kwargs.get("non_blocking"):
                self.waits.append(f"to {to[0]}")
            if leaves or not own:
                moved = func(*args, **kwargs).clone()
                self._ids.discard(moved.untyped_storage()._cdata) if leaves else self.add(moved)
                return moved
        waits = {
            "tensor": bool(kwargs.get("device")),
            "copy_": self.has(args[:1]) != self.has(args[1:]) and not kwargs.get("non_blocking"),
            "repeat_interleave": self.has(args) and kwargs.get("output_size") is None,
            **dict.fromkeys(self.READS, self.has(args[:1])),
        }
        if waits.get(name):
            self.waits.append(name)
        return func(*args, **kwargs)

    def operation(self, func, args, kwargs):
        own = self.has(args)
        if own and syncs_with_host(func, args):
            self.waits.append(str(func))
        out = func(*args, **kwargs)
        for tensor in out if isinstance(out, (list, tuple)) else [out]:
            if own and isinstance(tensor, torch.Tensor):
                self.add(tensor)
        return out


class Watch(transformers.TrainerCallback):
    """Watches from the start of one step to that of another, which logs, metrics and data are part of."""

    def __init__(self, watch, steps=(3, 5)):
        self.watch, self.steps = watch, steps

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.steps[0]:
            for master in (p for group in kwargs["optimizer"].param_groups for p in group["params"]):
                self.watch.add(master)
            self.watch.__enter__()
        if state.global_step == self.steps[1]:
            self.watch.__exit__(None, None, None)


@pytest.fixture
def as_on_a_device(monkeypatch):
    """Leave out checks that look at numbers on the CPU alone, where that costs nothing."""
    import importlib

    front = importlib.import_module("pmc_fast.ops.weighted_nll")
    monkeypatch.setattr(front, "check_ranges", lambda *a: None)
    monkeypatch.setattr(front, "_times", lambda saved, upstream, dtype: (saved * upstream).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_host_waits_for_nothing_in_a_step(dtype, deferred, as_on_a_device, tiny_dir, tokenizer, tmp_path):
    trainer = made(tiny_dir, tokenizer, tmp_path, dtype)
    device = Device(trainer.model)
    trainer.add_callback(Watch(device))
    trainer.train()
    assert device.waits == []
    assert len(device._ids) > 100  # it has seen the passes


def test_waits_are_seen(tiny_dir, tokenizer, tmp_path, as_on_a_device, monkeypatch):
    """The same steps with logs at once wait for their numbers."""
    monkeypatch.setattr(step_logs, "DEFERS", ())
    trainer = made(tiny_dir, tokenizer, tmp_path)
    device = Device(trainer.model)
    trainer.add_callback(Watch(device))
    trainer.train()
    assert "item" in device.waits
    weight, host = next(trainer.model.parameters()).detach(), torch.ones(3)
    device.waits.clear()
    with device:
        bool((weight * 2).sum() > 0)
        weight.cpu()
        host.to(weight.device)
        torch.tensor([1.0], device=weight.device)
        weight[weight > 0]
        (weight > 0).nonzero()
        host.tolist(), host.to(weight.device, non_blocking=True)
    found = ["__bool__", "aten._local_scalar_dense.default", "cpu", "to cpu", "tensor", "aten.index.Tensor"]
    assert device.waits == [*found, "aten.nonzero.default"]


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gpus_host_waits_for_nothing_in_a_step(dtype, tiny_dir, tokenizer, tmp_path):
    class Errors:
        add = staticmethod(lambda tensor: None)

        def __enter__(self):
            torch.cuda.set_sync_debug_mode("error")

        def __exit__(self, *error):
            torch.cuda.set_sync_debug_mode("default")

    trainer = made(tiny_dir, tokenizer, tmp_path, dtype, bf16=dtype == torch.float32)
    trainer.add_callback(Watch(Errors()))
    try:
        trainer.train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
