"""The workflows of the repository's host: what they build and run, and that nothing in them changes by itself."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / ".github" / "workflows"
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="no source tree")


def workflow(name: str) -> dict[Any, Any]:
    return yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))


def steps_of(content: dict[Any, Any]) -> list[dict[str, Any]]:
    return [step for job in content["jobs"].values() for step in job["steps"]]


def the_wheel_builder() -> dict[str, str]:
    (step,) = (s for s in steps_of(workflow("wheels.yml")) if s.get("uses", "").startswith("pypa/cibuildwheel@"))
    return step["env"]


def test_ci_runs_what_a_developer_runs():
    content = workflow("ci.yml")
    (job,) = content["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == ["bash .ci/run"]
    triggers = content[True]  # YAML 1.1 reads the word "on" as true
    assert "pull_request" in triggers and triggers["push"]["branches"] == ["main"]
    pythons = {row["python"] for row in job["strategy"]["matrix"]["include"]}
    assert {PYTHONS[0], PYTHONS[-1]} <= pythons <= set(PYTHONS)


def test_wheels_are_built_for_every_python_and_both_architectures():
    environment = the_wheel_builder()
    assert environment["CIBW_BUILD"].split() == [f"cp{version.replace('.', '')}-*" for version in PYTHONS]
    job = workflow("wheels.yml")["jobs"]["linux"]
    rows = {row["arch"]: row["runner"] for row in job["strategy"]["matrix"]["include"]}
    assert set(rows) == {"x86_64", "aarch64"}
    assert rows["aarch64"].endswith("-arm") and not rows["x86_64"].endswith("-arm")  # each on its own processor
    assert job["runs-on"] == "${{ matrix.runner }}" and environment["CIBW_ARCHS_LINUX"] == "${{ matrix.arch }}"


def test_wheels_are_built_in_old_images_and_repaired_with_the_native_module_required():
    environment = the_wheel_builder()
    for arch in ("X86_64", "AARCH64"):
        assert environment[f"CIBW_MANYLINUX_{arch}_IMAGE"] == "manylinux_2_28"
    assert environment["CIBW_REPAIR_WHEEL_COMMAND_LINUX"].startswith("auditwheel repair ")
    assert "KEDIT_FAST_NATIVE=on" in environment["CIBW_ENVIRONMENT"].split()
    assert "kedit-fast demo" in environment["CIBW_TEST_COMMAND"]


def test_the_pure_wheel_is_built_and_run_on_macos():
    job = workflow("wheels.yml")["jobs"]["pure"]
    assert job["runs-on"].startswith("macos-")
    commands = "\n".join(step.get("run", "") for step in job["steps"])
    assert "KEDIT_FAST_NATIVE=off" in commands and "py3-none-any" in commands and "kedit-fast demo" in commands


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("*.yml")))
def test_actions_are_pinned_and_tokens_can_only_read(name):
    content = workflow(name)
    uses = [step["uses"] for step in steps_of(content) if "uses" in step]
    assert uses and all(re.fullmatch(r"[\w.-]+/[\w./-]+@(v\d+\.\d+\.\d+|[0-9a-f]{40})", use) for use in uses)
    assert content["permissions"] == {"contents": "read"}
    runners = re.findall(r"(?:ubuntu|macos|windows)-[\w.]+", (FOLDER / name).read_text(encoding="utf-8"))
    assert runners and not any(runner.endswith("latest") for runner in runners)


def test_classifiers_and_the_requirement_say_the_pythons_that_have_wheels():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert tuple(re.findall(r'"Programming Language :: Python :: (3\.\d+)"', project)) == PYTHONS
    assert f'requires-python = ">={PYTHONS[0]}"' in project
