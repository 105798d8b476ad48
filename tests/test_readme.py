"""Every page of the tree: its Python runs, its commands exist, its links lead somewhere, its messages are real.

A fence says how its block is run:

- ```python            on the demo model; what an edit writes is undone after each block
- ```python continued  the same, on what the block before has left
- ```python no-download  `from_pretrained` of a published model gives a small random one of ten layers
- ```console demo      every line is executed; other ```console and ```bash blocks are parsed by the command line
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import io
import json
import re
import shlex
import shutil
import textwrap
from pathlib import Path

import pytest
import torch
import typer.main
from transformers import LlamaConfig, LlamaForCausalLM

import kedit_fast
from kedit_fast import Editor, demo
from kedit_fast.methods.presets import make_hparams
from kedit_fast.statistics import memit_npz

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
FENCE = re.compile(r"^( *)```([^\n`]*)\n(.*?)^\1```$", flags=re.MULTILINE | re.DOTALL)
FENCES = {"", "python", "console", "bash", "json", "toml", "bibtex", "text", "cpp"}
MARKS = {"continued", "no-download", "demo"}
PUBLISHED = ("meta-llama/", "Qwen/")
PROGRAMS = ("kedit-fast", "python", "pytest", "pip", "torchrun", "TRITON_INTERPRET=1", "ruff", "pyright", ".ci/run")
PLACEHOLDER = re.compile(r"\[|\]|\||\.\.\.|(^|\s)[A-Z][A-Z_]*(\.[a-z]+)?(\s|$)")
NOT_OF_THE_SOFTWARE = re.compile(
    r"(?<![\w./}>])/(?!usr/)[a-z]\w*/|file:/|\b\w+_review\b|\bissue \d|\b(this|my|\w+'s) session\b", re.I
)
"""Absolute paths of somebody's machine, and words about how the software came to be."""
SKIPPED_FOLDERS = {"build", "dist", "node_modules", "site-packages"}


def pages() -> list[Path]:
    every = (path.relative_to(ROOT) for path in (*ROOT.rglob("*.md"), *ROOT.glob(".github/**/*.md")))
    tools = {path for path in every if path.parts[0] == ".github" or not any(part[0] == "." for part in path.parts)}
    return sorted(path for path in tools if not SKIPPED_FOLDERS & set(path.parts) and "egg-info" not in str(path))


def text_of(page: Path) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[tuple[int, set[str], str]]:
    """Line, marks and text of every fenced block of a language."""
    text, result = text_of(page), []
    for match in FENCE.finditer(text):
        words = match[2].split()
        if words[:1] == [language]:
            line = text[: match.start()].count("\n") + 1
            result.append((line, set(words[1:]), textwrap.dedent(match[3])))
    return result


PAGES = pages()
identify = [pytest.param(page, id=page.as_posix()) for page in PAGES]
WITH_PYTHON = [pytest.param(page, id=page.as_posix()) for page in PAGES if blocks(page, "python")]
WITH_DEMO = [
    pytest.param(page, id=page.as_posix())
    for page in PAGES
    if any("demo" in marks for language in ("console", "bash") for _, marks, _ in blocks(page, language))
]


# Python -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def given(demo_model, demo_statistics, tmp_path_factory):
    """Files that examples take for granted (statistics and json of memit, a text, requests), and a patch."""
    folder = tmp_path_factory.mktemp("given")
    model, tokenizer = demo_model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hparams, _ = make_hparams("memit", model.config)
    stats = folder / "data" / "stats" / "demo" / "wikipedia_stats"
    stats.mkdir(parents=True)
    for second in demo_statistics.layers.values():
        memit_npz.write(stats / f"{second.module}_float32_mom2_100000.npz", second, {}, 100000)
    (folder / "hparams" / "MEMIT").mkdir(parents=True)
    (folder / "kvs").mkdir()
    values = {"layers": list(hparams.layers), "v_num_grad_steps": 8, "v_lr": 0.3, "clamp_norm_factor": 2,
              "kl_factor": 0.0625, "v_weight_decay": 0.5, "mom2_adjustment": True, "mom2_update_weight": 300,
              "model_name": "demo", "mom2_dataset": "wikipedia", "fact_token": "subject_last"}  # fmt: skip
    (folder / "hparams" / "MEMIT" / "demo.json").write_text(json.dumps(values))
    (folder / "wikipedia.txt").write_text("\n".join(demo.corpus(60)), encoding="utf-8")
    shutil.copy(demo.DATA / "requests.jsonl", folder / "requests.jsonl")
    editor = Editor(model, tokenizer, "memit", statistics=demo_statistics, hparams={"v_num_grad_steps": 8})
    editor.edit(demo.requests()[:2], on_error="skip")
    patch = editor.patch()
    model.load_state_dict(before)
    return folder, patch


@pytest.fixture(scope="module")
def published(tmp_path_factory, demo_model):
    """A folder with a random Llama of ten layers and the demo's tokenizer, for the names of published models."""
    folder = tmp_path_factory.mktemp("published")
    _, tokenizer = demo_model
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=10,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def namespace(demo_model, demo_statistics, given, tmp_path, monkeypatch):
    """What the examples take for granted: a model, texts, requests, files of memit; and the tensors of a framework."""
    folder, patch = given
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    model, tokenizer = demo_model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    requests = demo.requests()[:6]
    yield {
        "model": model, "tokenizer": tokenizer, "texts": demo.corpus(800), "requests": requests,
        "batches": [requests[:2]], "statistics": demo_statistics, "patch": patch, "torch": torch,
        "kedit_fast": kedit_fast, "rows": torch.randn(500, 48), "K": torch.randn(48, 5), "R": torch.randn(32, 5),
        "weight": torch.randn(32, 48), "mom2_update_weight": 300,
        **{name: getattr(kedit_fast, name) for name in kedit_fast.__all__ if not name.startswith("_")},
    }  # fmt: skip
    restore(model, before)


def restore(model, before) -> None:
    """Weights as they were; no memory beside them; and nothing that an integration has hung on the model."""
    kedit_fast.detach(model)
    model.load_state_dict(before)
    for name in [name for name in vars(model) if name.startswith("_kedit")]:
        vars(model).pop(name)


@contextlib.contextmanager
def no_download(folder: Path):
    """While it lasts, the names of published models stand for `folder`."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    with pytest.MonkeyPatch.context() as patched:
        for loader in (AutoConfig, AutoModelForCausalLM, AutoTokenizer):
            original = loader.from_pretrained

            def local(name, *args, original=original, **options):
                return original(str(folder) if str(name).startswith(PUBLISHED) else name, *args, **options)

            patched.setattr(loader, "from_pretrained", local)
        yield


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_the_python_of_a_page_runs(page, namespace, published):
    model = namespace["model"]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for line, marks, block in blocks(page, "python"):
        if "continued" not in marks:
            restore(model, before)
        code = compile("\n" * line + block, str(page), "exec")
        with no_download(published) if "no-download" in marks else contextlib.nullcontext():
            exec(code, namespace)


def test_enough_pages_have_examples():
    assert sum(len(blocks(page, "python")) for page in PAGES) >= 15


@pytest.mark.parametrize("page", identify)
def test_a_fence_says_what_it_is(page):
    for match in FENCE.finditer(text_of(page)):
        language, *marks = match[2].split() or [""]
        assert language in FENCES and set(marks) <= MARKS, f"{page}: ```{match[2]}"
    assert text_of(page).count("```") == 2 * len(FENCE.findall(text_of(page)))


# Commands -----------------------------------------------------------------------------------------------------------


def command_lines(page: Path, demo_blocks: bool = False) -> list[str]:
    """Logical lines of console, bash and indented blocks; a continuation is joined to its line."""
    text, parts = text_of(page), []
    for match in FENCE.finditer(text):
        language, *marks = match[2].split() or [""]
        if language in ("console", "bash") and (not demo_blocks or "demo" in marks):
            parts.append(textwrap.dedent(match[3]))
    if not demo_blocks:
        parts += re.findall(r"(?:^ {4}\S.*\n(?:^ {4,}.*\n)*)", FENCE.sub("\n", text), flags=re.MULTILINE)
    lines: list[str] = []
    for part in parts:
        part = re.sub(r"^ {4}", "", part, flags=re.MULTILINE) if part.startswith("    ") else part
        for line in part.splitlines():
            line = line.removeprefix("$ ")
            if lines and (lines[-1].endswith("\\") or (line.startswith("  ") and lines[-1].startswith("kedit-fast"))):
                lines[-1] = lines[-1].removesuffix("\\") + " " + line.strip()
            else:
                lines.append(line)
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def group_of(app):
    return app if hasattr(app, "make_context") else typer.main.get_command(app)


def sub_commands(group, context) -> dict:
    if not hasattr(group, "list_commands"):
        return {}
    lazy = getattr(group, "lazy_commands", ())
    return {
        name: group.load(name) if name in lazy else group.get_command(context, name)
        for name in group.list_commands(context)
    }


def options_of(command) -> set[str]:
    return {"--help"} | {name for each in command.params for name in (*each.opts, *each.secondary_opts)}


def parse(command, words: list[str], name: str) -> None:
    """Parse as a run would, without running."""
    if known := sub_commands(command, command.context_class(command)):
        if "collect" in known and words[:1] and words[0] not in known:  # `stats MODEL` collects
            words = ["collect", *words]
        assert words and words[0] in known, f"{name}: no command {words[:1]}"
        parse(known[words[0]], words[1:], words[0])
        return
    try:
        command.make_context(name, list(words))
    except Exception as error:  # click's own, or those of the click inside typer
        raise AssertionError(f"{name} {' '.join(words)}: {error}") from error


def check_options(command, line: str) -> None:
    """That every command and option that a synopsis names exists."""
    context = command.context_class(command)
    commands = [command]
    line = re.sub(r"\s#.*", "", line)
    for _ in range(2):
        known = sub_commands(commands[0], context)
        names = re.match(r"\s*([a-z]+(?:\s*\|\s*[a-z]+)*)(?=\s|$|;)", line)
        alternatives = re.split(r"\s*\|\s*", names[1]) if names else []
        if not known or (alternatives and not set(alternatives) & set(known)):
            break
        if not alternatives:  # `stats MODEL` collects
            commands = [known.get("collect", commands[0])]
            break
        assert set(alternatives) <= set(known), f"no command {set(alternatives) - set(known)} in {line!r}"
        line, commands = line[names.end() :], [known[name] for name in alternatives]
    accepted = set().union(*(options_of(each) for each in commands))
    accepted |= set().union(*(options_of(each) for each in sub_commands(commands[0], context).values()), set())
    for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", line):
        assert option in accepted, f"no option {option} in {line!r}"


def benchmark_command(name: str):
    module = importlib.import_module(name)
    app = getattr(module, "app", None)
    if app is None:
        app = typer.Typer()
        app.command()(module.main)
    return group_of(app)


def check_line(line: str) -> None:
    from kedit_fast.cli.main import app

    bare = re.sub(r"\s#.*", "", line)
    for part in re.split(r"\s(?:&&|;)\s", bare):
        if (here := re.search(r"(?:^|\s)kedit-fast\s+(.*)", part)) and "pip install" not in part:
            command, arguments = group_of(app), re.sub(r"\s*[<>]\s*\S+$", "", here[1])
            if PLACEHOLDER.search(arguments) or "$" in arguments:
                check_options(command, arguments)
            else:
                parse(command, shlex.split(arguments), "kedit-fast")
        if here := re.search(r"python3? -m ([\w.]+)(.*)", part):
            assert importlib.util.find_spec(here[1]), f"no module {here[1]}"
            if here[1].startswith("benchmarks."):
                check_options(benchmark_command(here[1]), here[2])
        if here := re.match(r"\s*(?:[A-Z_]+=\S+ )*(?:python3? -m )?pytest(\s.*)?$", part):
            for word in (here[1] or "").split():
                if "/" in word or word in ("tests", "benchmarks"):
                    assert list(ROOT.glob(word.split("::")[0])), f"no {word}"
        if part.strip().startswith("pip install"):
            extras = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
            for names in re.findall(r"(?:kedit-fast|\.)\[([a-z,-]+)\]", part):
                assert all(re.search(rf"^{name} = \[", extras, re.MULTILINE) for name in names.split(",")), part


@pytest.mark.parametrize("page", identify)
def test_the_commands_of_a_page_exist(page):
    for line in command_lines(page):
        if line.split()[0].startswith(PROGRAMS) or "kedit-fast " in line:
            check_line(line)


@pytest.mark.parametrize(
    "line",
    [
        "kedit-fast edit m --request r.jsonl --out o",
        "kedit-fast stats show d --pgn x",
        "kedit-fast edit MODEL [--requets FILE]",
        "kedit-fast nothing",
        "python -m benchmarks.run --sweet all",
        "pytest tests/nothing",
        'pip install "kedit-fast[nothing]"',
        "python -m kedit_fast.nothing",
    ],
)
def test_a_wrong_command_is_noticed(line):
    with pytest.raises(AssertionError):
        check_line(line)


def run_line(line: str, variables: dict[str, str]) -> None:
    """One line of a demo block: a variable, Python, a command, or the first lines of a file."""
    from kedit_fast.cli.main import app

    name = re.match(r"(\w+)=\$\((.*)\)$", line)
    line = name[2] if name else re.sub(r"\$(\w+)", lambda found: variables[found[1]], line)
    line, _, target = line.partition(" > ")
    words, out = shlex.split(line, comments=True), io.StringIO()
    with contextlib.redirect_stdout(out):
        if words[:2] == ["python", "-c"]:
            exec(words[2], {})
        elif words[0] == "head":
            print(*Path(words[3]).read_text(encoding="utf-8").splitlines()[: int(words[2])], sep="\n")
        else:
            assert words[0] == "kedit-fast", line
            with pytest.raises(SystemExit) as stop:
                group_of(app).main(args=words[1:], prog_name="kedit-fast")
            assert not stop.value.code, line
    if name:
        variables[name[1]] = out.getvalue().strip()
    if target:
        Path(target.strip()).write_text(out.getvalue(), encoding="utf-8")


@pytest.mark.parametrize("page", WITH_DEMO)
def test_commands_on_the_demo_model_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    variables: dict[str, str] = {}
    for line in command_lines(page, demo_blocks=True):
        run_line(line, variables)


# Links, messages, size ----------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to headings."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("\n", text_of(page)), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", identify)
def test_the_links_of_a_page_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("\n", text_of(page))):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        place = (ROOT / page).parent / path if path else ROOT / page
        assert place.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(place.resolve().relative_to(ROOT)), f"{page}: {target}"


@pytest.mark.parametrize(
    "text",
    ["see /home/me/model", "`/data/x.txt`", "(/opt/y/z)", "file:///srv/a", "issue 3", "in this session", "a_review"],
)
def test_what_is_not_of_the_software_is_noticed(text):
    assert NOT_OF_THE_SOFTWARE.search(text)


@pytest.mark.parametrize("page", identify)
def test_a_page_speaks_of_the_software_alone(page):
    assert not NOT_OF_THE_SOFTWARE.search(text_of(page))


def test_the_readme_is_short_and_begins_with_the_two_commands():
    lines = text_of(Path("README.md")).splitlines()
    assert len(lines) <= 250
    first = "\n".join(lines[:40])
    assert "pip install -c constraints.txt . && kedit-fast demo" in first
    assert 'pip install -c constraints.txt ".[test]" && pytest tests -n 2 --dist loadfile' in first


def test_the_readme_leads_to_every_page():
    linked = set(re.findall(r"\]\(([^)\s#]+\.md)", text_of(Path("README.md"))))
    assert linked >= {page.as_posix() for page in PAGES if page.name == "README.md"} - {"README.md"}


def strings_of_the_source() -> str:
    """Every string of the package, the values of f-strings left out, one a line."""
    strings = []
    for path in (ROOT / "kedit_fast").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                strings.append("".join(str(v.value) if isinstance(v, ast.Constant) else "\0" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                strings.append(node.value)
    return "\n".join(strings)


def test_the_messages_of_the_troubleshooting_table_are_real():
    section = text_of(Path("README.md")).split("## Troubleshooting\n")[1].split("\n## ")[0]
    messages = re.findall(r"^\| `([^`]+)` \|", section, flags=re.MULTILINE)
    assert len(messages) >= 8
    source = strings_of_the_source()
    for message in messages:
        for part in message.split("..."):
            assert part.strip() in source, f"{part.strip()!r} is in no message"


def test_the_methods_table_names_every_method():
    from kedit_fast.methods.registry import RECIPES

    section = text_of(Path("README.md")).split("## Methods\n")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| `([\w-]+)` \|(.*)$", section, flags=re.MULTILINE))
    assert set(rows) == set(RECIPES)
    for name, row in rows.items():
        assert f"https://arxiv.org/abs/{re.search(r'arXiv ([0-9.]+)', RECIPES[name].source)[1]}" in row


ROOMS = [page for page in PAGES if page.name == "README.md" and page.parts[0] == "kedit_fast" and len(page.parts) > 2]


@pytest.mark.parametrize("page", [pytest.param(page, id=page.as_posix()) for page in (*ROOMS, Path("tests/README.md"))])
def test_a_page_names_the_files_of_its_room(page):
    room, text = ROOT / page.parent, text_of(page)
    files = room.glob("*.py") if page.parts[0] == "tests" else room.rglob("*.py")
    files = [path for path in files if path.parent == room or not (path.parent / "README.md").exists()]
    unnamed = [path.relative_to(room).as_posix() for path in files if not path.name.startswith("__")]
    words = {word.strip("_") for word in re.findall(r"\w+", text)}  # an op's name ends in _ where it writes
    assert not [name for name in unnamed if name not in text and Path(name).stem.strip("_") not in words]


def test_the_table_of_public_names_is_complete():
    section = text_of(Path("kedit_fast/README.md")).split("## Public names\n")[1].split("\n## ")[0]
    named = set(re.findall(r"`(\w+)`", "\n".join(line.split("|")[1] for line in section.splitlines() if "|" in line)))
    assert named == set(kedit_fast.__all__)
