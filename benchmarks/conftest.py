"""The `contest` fixture: pytest-benchmark's clockwork around interleaved contestants."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pmc_fast.bench import measure

from . import harness

LONG = ("test_skip",)  # suites of whole runs


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--short", action="store_true", help="a third of the rounds, and fewer of the slow baselines")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--short"):
        for item in items:
            if item.path.stem in LONG:
                item.add_marker(pytest.mark.skip(reason="whole runs take half an hour: not with --short"))


@pytest.fixture(scope="session")
def short(request: pytest.FixtureRequest) -> bool:
    """Whether all suites together are to take half an hour on two cores (`make bench`)."""
    return bool(request.config.getoption("--short"))


@pytest.fixture(scope="module", autouse=True)
def machine_for_ourselves() -> Iterator[None]:
    """Hold the machine's benchmark lock for a whole suite: also what is not timed would disturb other benchmarks."""
    with harness.alone():
        yield


@pytest.fixture(scope="module")
def suite_results(request: pytest.FixtureRequest, short: bool) -> Iterator[list[dict[str, Any]]]:
    results: list[dict[str, Any]] = []
    yield results
    if results:
        suite = Path(request.node.fspath).stem.removeprefix("test_")
        path = harness.RESULTS / f"{suite}.json"
        seed = getattr(request.module, "SEED", 0)
        print(f"\nwrote {harness.write(path, suite, results, seed, {'short': True} if short else None)}")


@pytest.fixture
def contest(benchmark: Any, suite_results: list[dict[str, Any]], short: bool) -> Callable[..., dict[str, Any]]:
    """Measure contestants against each other; the first is what the others' times are divided by."""

    def run(
        name: str,
        contestants: dict[str, measure.Contestant],
        *,
        rounds: int = 11,
        warmup: int = 2,
        memory: bool = True,
        **facts: Any,
    ) -> dict[str, Any]:
        if short:
            rounds, warmup = max(1, rounds // 3), min(warmup, 1)
        measured: list[dict[str, float]] = []
        for number in range(warmup):
            measure.time_round(contestants, number)
        benchmark.pedantic(lambda: measured.append(measure.time_round(contestants, len(measured))), rounds=rounds)
        peaks = {n: measure.peak_bytes(f) for n, f in contestants.items()} if memory else {}
        result = {"name": name, "facts": facts, "contestants": measure.summarize(measured, peaks)}
        benchmark.extra_info["contestants"] = result["contestants"]
        suite_results.append(result)
        return result

    return run
