"""What can be checked of .github/ and of the wheels' settings without running them: actionlint and zizmor check the rest."""

import re
import tomllib

import pytest
import yaml

from tests.pages import ROOT

WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CUDA_WHEEL = tomllib.loads((ROOT / "cuda_wheel/pyproject.toml").read_text())
HOSTS = {"download.pytorch.org", "developer.download.nvidia.com", "pypi.org"}  # that files outside docs/ may name


def jobs(workflow):
    return yaml.safe_load(workflow.read_text())["jobs"]


def steps():
    return [s for w in WORKFLOWS for job in jobs(w).values() for s in job.get("steps", [])]


def test_there_is_a_workflow_for_each_purpose():
    assert {w.stem for w in WORKFLOWS} == {"docs", "gpu", "lint", "release", "test", "wheels"}


def test_actions_are_pinned_to_a_commit_and_its_version():
    """One commit of each, so that none is forgotten when it is raised."""
    pinned = {}
    for workflow in WORKFLOWS:
        for line in workflow.read_text().splitlines():
            if not (used := re.search(r"uses: *(.*)", line)) or used[1].startswith("./"):
                continue
            found = re.fullmatch(r"([\w./-]+)@([0-9a-f]{40}) # (v\d+\.\d+\.\d+)", used[1])
            assert found, f"{workflow.name}: {line.strip()}"
            assert pinned.setdefault(found[1], found.groups()[1:]) == found.groups()[1:], line
    assert "actions/checkout" in pinned


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda w: w.stem)
def test_permissions_are_the_fewest(workflow):
    assert yaml.safe_load(workflow.read_text())["permissions"] == {}
    for name, job in jobs(workflow).items():
        asked = job["permissions"]
        if asked != {"contents": "read"}:  # publishing alone, behind an approval
            assert (asked, job["environment"]) == ({"id-token": "write"}, "pypi"), name
        assert "timeout-minutes" in job or "uses" in job


def test_no_step_keeps_credentials_or_runs_what_a_stranger_wrote():
    for step in steps():
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False
        assert "${{" not in step.get("run", ""), step["run"]
    assert not any("pull_request_target" in w.read_text() for w in WORKFLOWS)


def test_every_python_version_is_tested_and_has_wheels():
    legs = [
        leg
        for job in jobs(ROOT / ".github/workflows/test.yml").values()
        for leg in job["strategy"]["matrix"]["include"]
    ]
    pinned = {leg["python"] for leg in legs if leg["install"] == "-c constraints.txt"}
    for settings in (PROJECT, CUDA_WHEEL):
        built = settings["tool"]["cibuildwheel"]["build"]
        assert {f"cp{version.replace('.', '')}-*" for version in pinned} == set(built)
        assert settings["project"]["requires-python"] == f">={min(pinned, key=lambda v: int(v[2:]))}"
    lowest = next(leg for leg in legs if "lowest" in leg["name"])
    allowed = dict(re.fullmatch(r"([\w-]+)>=([\d.]+)", d).groups() for d in PROJECT["project"]["dependencies"])
    for package in ("torch", "transformers"):
        release = allowed[package] if "." in allowed[package] else f"{allowed[package]}.0"
        assert f"{package}=={release}.*" in lowest["install"].split()


def test_both_packages_are_one_version():
    version = PROJECT["project"]["version"]
    assert CUDA_WHEEL["project"]["version"] == version
    assert PROJECT["project"]["optional-dependencies"]["cuda"] == [f"pmc_fast_cuda=={version}"]


def test_the_gpu_job_runs_the_cards_command():
    runs = [s["run"] for s in jobs(ROOT / ".github/workflows/gpu.yml")["card"]["steps"] if "run" in s]
    assert 'bash benchmarks/card.sh "$MINUTES"' in runs


def test_files_name_public_hosts_alone():
    settings = [
        ROOT / name
        for name in ("pyproject.toml", "cuda_wheel/pyproject.toml", "cuda_wheel/README.md", ".pre-commit-config.yaml")
    ]
    for file in [*(ROOT / ".github").rglob("*.*"), *settings]:
        assert set(re.findall(r"https?://([^/\s\"']+)", file.read_text())) <= HOSTS, file
