"""The package as pip installs it. Building needs setuptools and pybind11 (the `test` extra) and the source tree."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="no source tree")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the source tree: building in place would leave files behind."""
    folder = tmp_path_factory.mktemp("source") / "kedit_fast"
    ignore = shutil.ignore_patterns(
        ".git", "*.so", "build", "dist", "*.egg-info", "__pycache__", "_build_info.py", ".venv"
    )
    return shutil.copytree(ROOT, folder, ignore=ignore)


def build(source, out, **environment):
    code = f"from setuptools import build_meta as b; print(b.build_wheel({str(out)!r}))"
    return subprocess.run(
        [sys.executable, "-c", code], cwd=source, capture_output=True, text=True, env={**os.environ, **environment}
    )


def install_and_run(wheel, folder, code):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(folder)},
    )


def test_without_a_compiler_the_install_is_pure_python_and_says_so(source, tmp_path):
    done = build(source, tmp_path, CC="/nowhere/cc", CXX="/nowhere/c++")
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("py3-none-any.whl")
    code = (
        "import torch, kedit_fast; from kedit_fast.__main__ import print_environment\n"
        "w = kedit_fast.rank_k_update_(torch.zeros(2, 3), torch.ones(2, 1), torch.ones(3, 1))\n"
        "assert (w == 1).all() and kedit_fast.__file__.startswith(__import__('os').getcwd())"
    )
    ran = install_and_run(wheel, tmp_path / "site", code)
    assert ran.returncode == 0, ran.stderr
    assert "no C++ compiler" in ran.stdout and "cpu     no" in ran.stdout


EDIT_WITHOUT_LOCKS = """
import os, sys
sys.modules["fcntl"] = None  # importing it raises ImportError, as where there is none
for name in ("posix_fallocate", "sched_getaffinity", "posix_fadvise"):  # macOS has none of them
    delattr(os, name)
from pathlib import Path
import torch
from kedit_fast import Editor, demo
from kedit_fast.statistics.corpus import Corpus
from kedit_fast.statistics.resumable import collect_into
from kedit_fast.statistics.store import load_statistics
model, tokenizer = demo.load()
collect_into("statistics", model, tokenizer, Corpus(demo.corpus(40)), [0, 1])
statistics = load_statistics("statistics", model, tokenizer)
editor = Editor(model, tokenizer, "memit", statistics=statistics, layers=[0, 1], hparams={"v_num_grad_steps": 2})
before = [p.clone() for p in model.parameters()]
editor.edit(demo.requests(2), on_error="skip")
assert not all(map(torch.equal, before, model.parameters()))
editor.restore()
assert all(map(torch.equal, before, model.parameters()))
assert not Path("statistics/.lock").exists() and any(Path("statistics").glob("*.safetensors"))
from kedit_fast.backends import probe
print(probe("cpu").reason)
"""


def test_the_pure_wheel_edits_where_there_are_no_file_locks(source, tmp_path):
    done = build(source, tmp_path, KEDIT_FAST_NATIVE="off")
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("py3-none-any.whl")
    ran = install_and_run(wheel, tmp_path / "site", EDIT_WITHOUT_LOCKS)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "KEDIT_FAST_NATIVE=off" in ran.stdout


def test_triton_is_asked_for_only_where_it_has_wheels():
    requirements = re.findall(r'"(triton\b[^"]*)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (marker,) = (Requirement(text).marker for text in requirements)
    assert marker is not None
    for system, machine, wanted in (
        ("Linux", "x86_64", True), ("Linux", "aarch64", True), ("Linux", "ppc64le", False),
        ("Darwin", "arm64", False), ("Darwin", "x86_64", False), ("Windows", "AMD64", False),
    ):  # fmt: skip
        assert marker.evaluate({"platform_system": system, "platform_machine": machine}) == wanted, (system, machine)


def test_a_compiler_that_was_asked_for_must_be_there(source, tmp_path):
    for environment in ({"KEDIT_FAST_NATIVE": "on"}, {"KEDIT_FAST_CUDA": "on"}):
        done = build(source, tmp_path, CC="/nowhere/cc", CXX="/nowhere/c++", **environment)
        assert done.returncode != 0 and "asked for but cannot be built" in done.stderr
    assert build(source, tmp_path, KEDIT_FAST_NATIVE="maybe").returncode != 0


def test_the_source_distribution_holds_all_sources(source, tmp_path):
    import tarfile

    code = f"from setuptools import build_meta as b; print(b.build_sdist({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    wanted = {str(p.relative_to(source)) for folder in ("csrc", "kedit_fast") for p in (source / folder).rglob("*")
              if p.is_file() and "__pycache__" not in p.parts and p.suffix != ".md"}  # fmt: skip
    assert not wanted - names


@pytest.fixture
def configured(monkeypatch):
    """Run setup.py up to its setup() with these environment variables; nothing is built."""

    def call(**environment):
        for name, value in {"KEDIT_FAST_NATIVE": "off", "KEDIT_FAST_CUDA": "off", **environment}.items():
            monkeypatch.setenv(name, value)
        return runpy.run_path(str(ROOT / "setup.py"))

    monkeypatch.setattr("setuptools.setup", lambda **given: None)
    return call


@pytest.mark.parametrize("cuda", ("off", "auto", "on"))
@pytest.mark.parametrize(
    ("value", "named"),
    (("sm_90", "'sm_90'"), ("9.0", "'9.0'"), ("80;9x", "'9x'"), ("80;90aa", "'90aa'"), ("8", "'8'"), ("080", "'080'"),
     ("80a", "'80a'"), ("90f", "'90f'"), ("9000", "'9000'"), ("80;-90", "'-90'"), ("80+PTX", "'80\\+ptx'"),
     ("native", "'native'"), ("", "names no compute"), (" ; ,", "names no compute")),
)  # fmt: skip
def test_a_malformed_architecture_is_refused_by_name(configured, value, named, cuda):
    with pytest.raises(SystemExit, match=rf"KEDIT_FAST_CUDA_ARCHS=.*{named}.*80;90"):
        configured(KEDIT_FAST_CUDA_ARCHS=value, KEDIT_FAST_CUDA=cuda)


@pytest.mark.parametrize(
    ("value", "taken"),
    (("90", ["90"]), ("80;90", ["80", "90"]), ("80, 90", ["80", "90"]), ("80 90a", ["80", "90a"]),
     ("100f;120F", ["100f", "120f"]), ("80;80;90;", ["80", "90"])),
)  # fmt: skip
def test_architectures_with_and_without_a_letter_are_accepted(configured, value, taken):
    assert configured(KEDIT_FAST_CUDA_ARCHS=value)["ARCHS"] == taken


def test_an_architecture_that_nvcc_does_not_have_is_named(configured, tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho compute_80\necho compute_90\n")
    nvcc.chmod(0o755)
    there = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    assert configured(KEDIT_FAST_CUDA_ARCHS="80;90a", KEDIT_FAST_CUDA="on", **there)["built"]["_cuda"] == ""
    with pytest.raises(SystemExit, match=r"KEDIT_FAST_CUDA_ARCHS has 120f, this nvcc 80, 90"):
        configured(KEDIT_FAST_CUDA_ARCHS="80;120f", KEDIT_FAST_CUDA="on", **there)
    noted = configured(KEDIT_FAST_CUDA_ARCHS="80;120f", KEDIT_FAST_CUDA="auto", **there)["built"]["_cuda"]
    assert "120f" in noted


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_a_cuda_module_for_architectures_with_letters_is_built_and_says_them(source, tmp_path):
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        "--build-lib",
        str(tmp_path),
        "--build-temp",
        str(tmp_path),
    ]
    environment = {"KEDIT_FAST_NATIVE": "off", "KEDIT_FAST_CUDA": "on", "KEDIT_FAST_CUDA_ARCHS": "90a"}
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr[-2000:]
    (built,) = (tmp_path / "kedit_fast").glob("_cuda*.so")
    code = (
        "import importlib.util, sys; spec = importlib.util.spec_from_file_location('kedit_fast._cuda', sys.argv[1]);"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module); print(module.architectures())"
    )
    shown = subprocess.run([sys.executable, "-c", code, str(built)], capture_output=True, text=True)
    assert shown.stdout.strip() == "90a", shown.stderr


def test_a_package_index_gets_pictures_and_pages_by_absolute_links(configured, tmp_path, monkeypatch):
    make = configured()["long_description"]
    for name in ("README.md", "pyproject.toml", "kedit_fast/_version.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    monkeypatch.setitem(make.__globals__, "ROOT", tmp_path)
    assert make() == (ROOT / "README.md").read_text(encoding="utf-8")  # no repository is named yet
    with (tmp_path / "pyproject.toml").open("a", encoding="utf-8") as file:
        file.write('\n[project.urls]\nRepository = "https://example.org/one/two/"\n')
    links = re.findall(r"(!?)\[[^\]]*\]\(([^)]+)\)", make())
    assert all(link.startswith(("https://", "#")) for _, link in links)
    pictures = [link for sign, link in links if sign]
    assert pictures and all(link.startswith("https://example.org/one/two/raw/v") for link in pictures)
    assert any(link.startswith("https://example.org/one/two/blob/v") for _, link in links)
