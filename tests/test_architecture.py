"""The rules of the house that no linter knows; the import arrows are in pyproject.toml (import-linter)."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "edge_llm"
MODULES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 450
DRAWERS = re.compile(r"utils?|helpers?|common|misc|base|manager|registry")

# One door per foreign thing: what may import it, as paths below edge_llm/.
DOORS = {
    "llama_cpp": r"engine/(native|vocabulary)\.py",  # vocabulary: its sandboxed chat formatter
    "psutil": r"machine\.py",
    "kubernetes": r"cluster/kubernetes(_jobs)?\.py",
    "onnxruntime": r"bench/accuracy/similarity\.py",
    "aiohttp": r"(worker|cluster|bench(/serve)?|gateway|commands)/\w+\.py",
    "click": r"(cli\.py|commands/.*)",
    "rich": r"commands/.*",
    "prometheus_client": r"(exposition|(gateway|worker)/metrics)\.py",
    "gguf": r"(catalogue/gguf|engine/(quantize|random_model))\.py",  # reads, requantizes, writes
    "huggingface_hub": r"catalogue/fetch\.py",
    "yaml": r"(config|catalogue/manifest|cluster/static|doctor/k3s|gateway/keys|plan/\w+)\.py",
}
# Who reads the environment: settings, what runs before settings, and the door to the library that is set up by it.
ENVIRONMENT_READERS = r"(config|bootstrap|image/build|engine/native|bench/\w+|commands/\w+)\.py"
# serving announces readiness to `up`; measure and score are processes of their own whose answer is their output
PRINTERS = r"(cli|commands/\w+|bootstrap|serving|engine/asked|bench/bandwidth)\.py"


def below(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imported(tree: ast.Module) -> Iterator[str]:
    """Top-level names of everything imported anywhere in a module, late imports included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def each_module() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", MODULES, ids=below)


def test_the_scan_sees_the_package() -> None:
    assert {"cli.py", "engine/native.py", "gateway/openai.py", "kv/frames.py"} <= {below(path) for path in MODULES}


@each_module()
def test_a_module_is_a_page_not_a_drawer(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES
    assert not DRAWERS.fullmatch(path.stem)


@each_module()
def test_a_module_says_what_it_owns_unless_it_is_a_package_marker(path: Path) -> None:
    tree = tree_of(path)
    if path.name != "__init__.py":
        assert ast.get_docstring(tree), "the header says what the module owns and refuses to know"
        return
    body = [node for node in tree.body if not isinstance(node, ast.Expr)]
    allowed = {"__version__"} if path.parent == PACKAGE else set()
    names = {
        target.id
        for node in body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    assert len(body) == len(names)
    assert names <= allowed, "packages re-export nothing: import the module that owns the name"


@each_module()
def test_foreign_things_have_one_door(path: Path) -> None:
    for name in set(imported(tree_of(path))) & DOORS.keys():
        assert re.fullmatch(DOORS[name], below(path)), f"{name} is imported outside its door"


@each_module()
def test_the_environment_is_read_where_settings_are_parsed(path: Path) -> None:
    reads = {
        node.attr
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os"
    } & {"environ", "getenv", "environb"}
    assert not reads or re.fullmatch(ENVIRONMENT_READERS, below(path))


@each_module()
def test_only_commands_print(path: Path) -> None:
    calls = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)]
    prints = [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
    assert not prints or re.fullmatch(PRINTERS, below(path)), f"print in lines {prints}"


@each_module()
def test_nothing_is_global(path: Path) -> None:
    assert not [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Global)]


def test_bootstrap_runs_before_any_package_exists() -> None:
    tree = tree_of(PACKAGE / "bootstrap.py")
    standard = {"argparse", "collections", "contextlib", "fcntl", "hashlib", "importlib", "os", "pathlib", "platform"}
    standard |= {"re", "shutil", "subprocess", "sys", "tempfile", "time", "typing", "__future__"}
    assert set(imported(tree)) <= standard


def test_test_files_have_unique_names() -> None:
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
