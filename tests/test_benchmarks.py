"""The harness: fair order, right statistics, one schema, and no mixing of machines."""

import json

import pytest

from benchmarks import harness, report


def test_rounds_interleave_and_rotate():
    order = []
    contestants = {name: (lambda name=name: order.append(name)) for name in "abc"}
    for number in range(3):
        assert set(harness.time_round(contestants, number)) == set("abc")
    assert "".join(order) == "abcbcacab"


def test_summary_is_medians_and_quartiles():
    summary = harness.summarize([{"a": float(i)} for i in (5, 1, 3, 2, 4)], {"a": 7})
    assert summary["a"]["median_s"] == 3
    assert summary["a"]["quartiles_s"] == [1.5, 4.5]
    assert summary["a"]["rounds_s"] == [5, 1, 3, 2, 4]
    assert summary["a"]["peak_bytes"] == 7


def test_peak_memory_sees_an_allocation():
    size = 64 << 20
    assert harness.peak_bytes(lambda: bytearray(size).find(b"x")) == pytest.approx(size, rel=0.2)


@pytest.fixture
def files(tmp_path):
    results = [
        {"name": "case", "facts": {}, "contestants": harness.summarize([{"a": 2.0, "b": 0.5}], {"a": 1 << 20})}
    ]
    first = harness.write(tmp_path / "one.json", "one", results)
    return [first, harness.write(tmp_path / "two.json", "two", results, seed=3)]


def test_report_prints_ratios(files, capsys):
    report.main([str(f) for f in files])
    shown = capsys.readouterr().out
    assert "| case | a | 2.00 s | 2.00 s - 2.00 s | 1.00 | 1.0 MiB |" in shown
    assert "|  | b | 500.00 ms | 500.00 ms - 500.00 ms | 0.25 | - |" in shown
    assert "### two" in shown


@pytest.mark.parametrize(("key", "field"), [("machine", "cpu"), ("versions", "torch")])
def test_report_refuses_to_mix(files, key, field):
    content = json.loads(files[1].read_text())
    content[key][field] = "another"
    files[1].write_text(json.dumps(content))
    with pytest.raises(SystemExit, match=f"different {key} .{field}: "):
        report.main([str(f) for f in files])


def test_report_refuses_other_files(tmp_path):
    (tmp_path / "a.json").write_text('{"schema": 99}')
    with pytest.raises(SystemExit, match="no result file"):
        report.main([str(tmp_path / "a.json")])
    with pytest.raises(SystemExit, match="can't be read"):
        report.main([str(tmp_path / "b.json")])


def test_runs_end_to_end_are_compared_seed_by_seed(tmp_path, monkeypatch):
    from benchmarks import end_to_end

    def run(method, seed, seconds, quality):
        point = {"step": 60, "seconds": seconds, "unlearn_quality": quality, "utility": 50.0,
                 "sets": {"retain": {"rouge_l_recall": 0.9}, "forget": {"degenerate": 0.0}}}  # fmt: skip
        return {"method": method, "seed": seed, "seconds": seconds, "steps": 60, "curve": [point]}

    runs = [run("reference", 0, 1000.0, 80.0), run("reference", 1, 1200.0, 84.0), run("pmc_fast", 0, 200.0, 81.0)]
    lines = end_to_end.table(runs).splitlines()
    assert "| 0, 1 | 60 | 1100 | 1.00 | 82.0 | 50.0 | 0.900 |" in lines[2]
    assert "| 0 | 60 | 200 | 5.00 | 81.0 | 50.0 | 0.900 |" in lines[3]
    monkeypatch.setattr(end_to_end, "PLOT", tmp_path / "plot.svg")
    end_to_end.plot(runs)
    assert "<svg" in (tmp_path / "plot.svg").read_text()
