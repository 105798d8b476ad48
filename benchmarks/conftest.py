from __future__ import annotations


def pytest_addoption(parser):
    parser.addoption("--cases", choices=("all", "small"), default="all", help="real shapes, or odd tiny ones")
    parser.addoption("--device", default="cpu", help="cpu or cuda")


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        from benchmarks.cases import OPS, SMALL

        cases = OPS if metafunc.config.getoption("--cases") == "all" else SMALL
        metafunc.parametrize("case", cases, ids=str)
