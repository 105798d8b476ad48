"""The package as pip installs it. Building needs setuptools and pybind11 (the `test` extra) and the source tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

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
              if p.is_file() and "__pycache__" not in p.parts}  # fmt: skip
    assert not wanted - names
