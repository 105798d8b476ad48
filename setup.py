"""Builds the native modules. Torch is not needed: they take DLPack capsules.

KEDIT_FAST_NATIVE      auto (default) | on | off    the C++ module kedit_fast._cpu
KEDIT_FAST_CUDA        off (default) | auto | on    the CUDA module kedit_fast._cuda, with nvcc
KEDIT_FAST_CUDA_ARCHS  default "80;90"              compute capabilities (90a, 120f too); the last one also as PTX
KEDIT_FAST_SANITIZE    empty (default)              for example "address,undefined": a build for tests
KEDIT_FAST_CXXFLAGS    empty (default)              further flags for the C++ compiler

auto builds what it can and notes in kedit_fast/_build_info.py why it could not; on makes that an error.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
CSRC = ROOT / "csrc"
X86 = platform.machine() in ("x86_64", "AMD64")
ARM = platform.machine() in ("aarch64", "arm64")
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
X86_FLAGS = {"isa_avx2": AVX2, "isa_avx512": AVX512, "isa_amx": [*AVX512, "-mamx-tile", "-mamx-bf16"]}
ARM_FLAGS: dict[str, list[str]] = {"isa_neon": []}  # NEON is a part of the architecture
ISA_FLAGS = {**X86_FLAGS, **ARM_FLAGS}
STANDARD = ["-std=c++17", "-O3", "-fvisibility=hidden", "-Wall", "-Wno-psabi", "-Wno-maybe-uninitialized"]

built: dict[str, str] = {}  # module -> "" when built, else why not


def switch(name: str, default: str) -> str:
    value = os.environ.get(name, default).lower()
    if value not in ("auto", "on", "off"):
        sys.exit(f"{name} must be auto, on or off, got {value!r}")
    return value


NATIVE, CUDA = switch("KEDIT_FAST_NATIVE", "auto"), switch("KEDIT_FAST_CUDA", "off")


def architectures(text: str) -> list[str]:
    """The compute capabilities in KEDIT_FAST_CUDA_ARCHS; anything else ends the build with a message."""
    names = [name.lower() for name in re.split(r"[;,\s]+", text.strip()) if name]
    for name in names:
        match = re.fullmatch(r"([1-9]\d{1,2})([af]?)", name)
        if not match or int(match[1]) < {"": 50, "a": 90, "f": 100}[match[2]]:
            sys.exit(
                f"KEDIT_FAST_CUDA_ARCHS={text!r}: {name!r} is no compute capability. Write its digits, with ; between "
                "them: 80;90. From 90 on an a may follow (90a, this one alone), from 100 on an f (120f, its family)"
            )
    if not names:
        sys.exit(f"KEDIT_FAST_CUDA_ARCHS={text!r} names no compute capability: write for example 80;90, or unset it")
    return list(dict.fromkeys(names))


ARCHS = architectures(os.environ.get("KEDIT_FAST_CUDA_ARCHS", "80;90"))


def compiler_command() -> list[str]:
    """The command of the C++ compiler that setuptools will call; empty when there is none."""
    from distutils.ccompiler import new_compiler
    from distutils.sysconfig import customize_compiler

    compiler = new_compiler()
    customize_compiler(compiler)
    command = list(getattr(compiler, "compiler_cxx", None) or getattr(compiler, "compiler", None) or [])
    return command if command and shutil.which(command[0]) else []


def compiler_refusal() -> str:
    if NATIVE == "off":
        return "KEDIT_FAST_NATIVE=off"
    return "" if compiler_command() else f"no C++ compiler found (KEDIT_FAST_NATIVE={NATIVE})"


def supported_isas(command: list[str]) -> list[str]:
    """Stems of the isa_*.cpp files whose flags this compiler knows."""
    if ARM:
        return list(ARM_FLAGS)
    if not X86:
        return []
    stems = []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text("#include <immintrin.h>\nint main() { return 0; }\n", encoding="utf-8")
        for stem, flags in X86_FLAGS.items():
            probe = [*command, *flags, "-std=c++17", "-c", str(source), "-o", str(Path(folder) / "probe.o")]
            if subprocess.run(probe, capture_output=True).returncode == 0:
                stems.append(stem)
    return stems


def nvcc_path() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which("nvcc") or shutil.which(str(Path(home) / "bin" / "nvcc"))


def cuda_refusal() -> str:
    if CUDA == "off":
        return "KEDIT_FAST_CUDA=off"
    nvcc = nvcc_path()
    if not nvcc:
        return f"no nvcc found (KEDIT_FAST_CUDA={CUDA})"
    known = re.findall(
        r"compute_(\d+)", subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
    )
    missing = [name for name in ARCHS if known and name.rstrip("af") not in known]
    if missing:
        return f"KEDIT_FAST_CUDA_ARCHS has {', '.join(missing)}, this nvcc {', '.join(known)}"
    return ""


class BuildNative(build_ext):
    """Gives each isa_*.cpp its own flags, compiles .cu files with nvcc, and notes failures as reasons in mode auto."""

    def build_extensions(self):
        plain = self.compiler._compile

        def compile_with_isa(obj, src, ext, cc_args, extra_postargs, pp_opts):
            return plain(obj, src, ext, cc_args, [*extra_postargs, *ISA_FLAGS.get(Path(src).stem, [])], pp_opts)

        self.compiler._compile = compile_with_isa
        super().build_extensions()

    def build_extension(self, ext):
        module = ext.name.rsplit(".", 1)[1]
        required = (CUDA if module == "_cuda" else NATIVE) == "on"
        try:
            import pybind11

            ext.include_dirs.append(pybind11.get_include())
            if module == "_cuda":
                self.add_cuda_objects(ext)
            super().build_extension(ext)
            built[module] = ""
        except Exception as error:
            if required:
                raise
            built[module] = f"build failed: {type(error).__name__}: {error}".splitlines()[0]
            print(f"kedit_fast: {module} not built: {built[module]}", file=sys.stderr)

    def add_cuda_objects(self, ext):
        nvcc = nvcc_path()
        assert nvcc, "checked by cuda_refusal()"
        out = Path(self.build_temp) / "cuda"
        out.mkdir(parents=True, exist_ok=True)
        codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHS]
        codes.append(f"-gencode=arch=compute_{ARCHS[-1]},code=compute_{ARCHS[-1]}")
        for source in sorted((CSRC / "cuda").glob("*.cu")):
            target = out / f"{source.stem}.o"
            flags = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", *codes]
            subprocess.run([nvcc, "-c", str(source), "-o", str(target), *flags], check=True)
            ext.extra_objects.append(str(target))
        # nvcc knows where its libraries are, wherever it is installed and whatever wraps it.
        dry = subprocess.run([nvcc, "--dryrun", "-c", str(source), "-o", str(target)], capture_output=True, text=True)
        ext.library_dirs.extend(re.findall(r'"-L([^"]+)"', dry.stderr + dry.stdout))
        ext.libraries.extend(["cudart_static", "dl", "rt", "pthread"])

    def get_outputs(self):
        return [path for path in super().get_outputs() if Path(path).exists()]

    def copy_extensions_to_source(self):
        self.extensions = [e for e in self.extensions if Path(self.get_ext_fullpath_built(e)).exists()]
        super().copy_extensions_to_source()

    def get_ext_fullpath_built(self, ext):
        return os.path.join(self.build_lib, self.get_ext_filename(self.get_ext_fullname(ext.name)))

    def run(self):
        super().run()
        target = ROOT if self.inplace or self.editable_mode else Path(self.build_lib)
        write_build_info(target / "kedit_fast")


class BuildPython(build_py):
    """Writes the build information of a build without extension modules."""

    def run(self):
        super().run()
        if not self.distribution.ext_modules:
            write_build_info((ROOT if self.editable_mode else Path(self.build_lib)) / "kedit_fast")


def write_build_info(folder: Path) -> None:
    lines = [
        '"""What setup.py built, and why not the rest. Generated."""',
        "",
        f"MODULES = {dict(sorted(built.items()))!r}  # module -> empty when built, else the reason",
        f"CUDA_ARCHS = {ARCHS if built.get('_cuda') == '' else []!r}",
        f"SWITCHES = {{'KEDIT_FAST_NATIVE': {NATIVE!r}, 'KEDIT_FAST_CUDA': {CUDA!r}}}",
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "_build_info.py").write_text("\n".join(lines) + "\n", encoding="utf-8")


def extensions() -> list[Extension]:
    built["_cpu"], built["_cuda"] = compiler_refusal(), cuda_refusal()
    if not built["_cuda"] and not compiler_command():
        built["_cuda"] = "no C++ compiler"
    for module, mode in (("_cpu", NATIVE), ("_cuda", CUDA)):
        if mode == "on" and built[module]:
            sys.exit(f"kedit_fast.{module} was asked for but cannot be built: {built[module]}")
    packing = "sdist" in sys.argv or "egg_info" in sys.argv  # the source distribution carries all of csrc
    files = [str(p.relative_to(ROOT)) for p in sorted(CSRC.rglob("*")) if p.is_file()]
    sanitize = os.environ.get("KEDIT_FAST_SANITIZE", "")
    extra = [f"-fsanitize={sanitize}", "-g", "-fno-omit-frame-pointer"] if sanitize else []
    isas = [] if built["_cpu"] else supported_isas(compiler_command())
    cpu_sources = ["csrc/bind/cpu_module.cpp"]
    for path in [*sorted((CSRC / "common").glob("*.cpp")), *sorted((CSRC / "cpu").glob("*.cpp"))]:
        if packing or path.stem not in ISA_FLAGS or path.stem in isas:
            cpu_sources.append(str(path.relative_to(ROOT)))
    flags = [*STANDARD, *extra, *shlex.split(os.environ.get("KEDIT_FAST_CXXFLAGS", ""))]
    link = [*extra, "-pthread", "-ldl"]
    modules = []
    if packing or not built["_cpu"]:
        modules.append(
            Extension(
                "kedit_fast._cpu",
                cpu_sources,
                depends=files,
                extra_compile_args=flags,
                define_macros=[(f"KF_{stem.upper()}", "1") for stem in isas],
                extra_link_args=link,
                language="c++",
            )
        )
    if not packing and not built["_cuda"]:
        define = [("KEDIT_FAST_CUDA_ARCHS", '"' + ";".join(ARCHS) + '"')]
        modules.append(
            Extension(
                "kedit_fast._cuda",
                ["csrc/bind/cuda_module.cpp"],
                define_macros=define,
                depends=files,
                extra_compile_args=flags,
                extra_link_args=link,
                language="c++",
            )
        )
    return modules


def long_description() -> str:
    """README.md as a package index shows it: pictures and pages by absolute links into the released version.

    They point into the repository that `[project.urls]` of pyproject.toml names; while it names none, links stay as
    they are.
    """
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    repository = re.search(r'^Repository = "(.+?)/?"$', project, re.MULTILINE)
    if repository is None:
        return text
    version = re.search(r'"(.+)"', (ROOT / "kedit_fast" / "_version.py").read_text(encoding="utf-8"))[1]

    def absolute(match: re.Match) -> str:
        kind = "raw" if match[1] else "blob"
        return f"{match[1]}[{match[2]}]({repository[1]}/{kind}/v{version}/{match[3]})"

    return re.sub(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)]+)\)", absolute, text)


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildNative, "build_py": BuildPython},
    long_description=long_description(),
    long_description_content_type="text/markdown",
)
