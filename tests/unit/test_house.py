"""The rules of the house, checked on the source itself: size budget, imports, start-up, generated documents."""

from __future__ import annotations

import ast
import functools
import importlib.util
import resource
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("edgelm", "exporter", "runtime", "targets")
MODULE_LINES, FUNCTION_LINES, FUNCTION_P90, PARAMETERS = 600, 100, 40, 8
HEAVY = (
    "torch",
    "transformers",
    "onnx",
    "onnxruntime",
    "optimum",
    "llama_cpp",
    "numpy",
    "pydantic",
    "rich",
    "tokenizers",
)

Function = ast.FunctionDef | ast.AsyncFunctionDef


def modules() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


@functools.cache
def trees() -> dict[str, ast.Module]:
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8")) for path in modules()}


@functools.cache
def functions() -> list[tuple[str, Function]]:
    return [
        (f"{name}:{node.lineno} {node.name}", node)
        for name, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, Function)
    ]


def test_modules_stay_small() -> None:
    lines = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in modules()}
    assert {name: count for name, count in lines.items() if count > MODULE_LINES} == {}


def test_every_module_says_what_it_does() -> None:
    assert [name for name, tree in trees().items() if not ast.get_docstring(tree)] == []


def test_functions_stay_small() -> None:
    sizes = {name: (node.end_lineno or 0) - node.lineno + 1 for name, node in functions()}
    assert {name: size for name, size in sizes.items() if size > FUNCTION_LINES} == {}
    assert statistics.quantiles(sizes.values(), n=10)[-1] <= FUNCTION_P90


def test_functions_take_few_parameters() -> None:
    # A click command has one parameter per option: the command line's width is CLI.md's, not the function's choice.
    def is_command(node: Function) -> bool:
        return any("command" in ast.unparse(decorator) for decorator in node.decorator_list)

    def count(node: Function) -> int:
        return len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs)

    assert {name: count(node) for name, node in functions() if count(node) > PARAMETERS and not is_command(node)} == {}


def test_no_keyword_tunnels() -> None:
    assert [name for name, node in functions() if node.args.kwarg is not None] == []


def imported_by(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after a statement."""
    code = f"{statement}\nimport sys\nprint('\\n'.join(sorted({{name.split('.')[0] for name in sys.modules}})))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def help_statement(arguments: list[str]) -> str:
    quietly = (
        "import contextlib, io\nfrom edgelm.cli.app import run_cli\nwith contextlib.redirect_stdout(io.StringIO()):"
    )
    return f"{quietly} run_cli({[*arguments, '--help']!r})"


def test_help_imports_nothing_heavy() -> None:
    assert imported_by(help_statement([])) & set(HEAVY) == set()


def test_help_takes_less_than_a_third_of_a_second() -> None:
    # CPU time of the quickest of five: the promise is about our imports, not about who else uses the machine.
    def cpu_seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "edgelm", "--help"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(cpu_seconds() for _ in range(5)) < 0.3


def test_every_command_shows_help_without_heavy_imports() -> None:
    from edgelm.cli.app import COMMANDS

    heavy = {"torch", "transformers", "onnx", "optimum", "llama_cpp", "onnxruntime"}
    loaded = {name: imported_by(help_statement([name])) & heavy for name in COMMANDS}
    assert loaded == {name: set() for name in COMMANDS}


@pytest.mark.parametrize("package", ["runtime", "targets"])
def test_the_device_side_never_loads_the_export_side(package: str) -> None:
    names = [
        str(path.relative_to(ROOT).with_suffix("")).replace("/", ".")
        for path in modules()
        if path.parts[-2] != "report"
    ]
    wanted = [name.removesuffix(".__init__") for name in names if name.split(".")[0] == package]
    loaded = imported_by("\n".join(f"import {name}" for name in wanted))
    # uvicorn imports click for its own command line, so only the rooms without the server can be free of it.
    assert loaded & {"torch", "transformers", "onnx", "optimum", "exporter", "rich"} == set()
    without_server = [name for name in wanted if not name.startswith("runtime.server.")]
    assert "click" not in imported_by("\n".join(f"import {name}" for name in without_server))


def test_command_reference_is_current() -> None:
    spec = importlib.util.spec_from_file_location("write_docs", ROOT / "scripts" / "write_docs.py")
    assert spec is not None
    assert spec.loader is not None
    write_docs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(write_docs)
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == write_docs.cli_reference(), "run: make docs"


def test_dependencies_are_justified_and_pinned() -> None:
    tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [name for names in project["optional-dependencies"].values() for name in names]
    names = {entry.split(">=")[0].strip() for entry in [*project["dependencies"], *extras]}
    explained = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").lower().replace("_", "-")
    assert {name for name in names if f"`{name}`" not in explained} == set()
    assert {name for name in names if f"\n{name.lower().replace('_', '-')}==" not in pins} == set()


def test_both_environments_pin_alike() -> None:
    """All but what comes with the other version of transformers."""
    first, second = (
        {line.split("==")[0].lower().replace("_", "-"): line for line in sorted(text.splitlines()) if "==" in line}
        for text in ((ROOT / name).read_text("utf-8") for name in ("constraints.txt", "constraints-transformers5.txt"))
    )
    other = {name for name in first.keys() & second.keys() if first[name].lower() != second[name].lower()}
    assert other == {"transformers", "tokenizers", "huggingface-hub"}
