"""The architecture as a test: who may import whom, and how long a file may be."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ORDER = ("affine", "algebra", "lift", "compose", "select", "lower")
ASIDE = ("verify", "report", "cost", "errors", "reasons")
MAX_LINES = 400


def sources(*folders: str) -> list[Path]:
    """Every Python file under the folders, in order."""
    return sorted(path for name in folders for path in (ROOT / name).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """The dotted names that a file imports, those inside functions as well."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} uses a relative import"
            module = node.module or ""
            yield from (f"{module}.{alias.name}" for alias in node.names)


def roots(path: Path) -> set[str]:
    """The top-level packages that a file imports."""
    return {name.split(".")[0] for name in imports(path)}


def siblings(path: Path) -> set[str]:
    """The modules of repcompiler that a file of repcompiler imports."""
    parts = (name.split(".") for name in imports(path))
    return {part[1] for part in parts if part[0] == "repcompiler" and len(part) > 1}


def stage(module: str) -> str:
    """The stage that a module belongs to: `lift_conv` belongs to `lift`."""
    return module.split("_")[0]


def compiler_files() -> list[tuple[str, Path]]:
    """(module name, file) for each module of the compiler."""
    top = ROOT / "repcompiler"
    return [
        (path.relative_to(top).parts[0].removesuffix(".py"), path)
        for path in sources("repcompiler")
    ]


def test_compiler_imports_only_torch_its_sympy_and_the_standard_library():
    # The sizes of an exported graph are expressions of sympy, on which torch depends.
    allowed = set(sys.stdlib_module_names) | {"torch", "repcompiler", "sympy"}
    extra = {str(path): roots(path) - allowed for path in sources("repcompiler")}
    assert {path: names for path, names in extra.items() if names} == {}


def test_stages_import_only_earlier_stages():
    wrong = [
        f"{name} imports {other}"
        for name, path in compiler_files()
        if stage(name) in ORDER
        for other in siblings(path)
        if stage(other) in ORDER
        and ORDER.index(stage(other)) > ORDER.index(stage(name))
    ]
    assert wrong == []


def test_verify_report_cost_errors_and_reasons_import_no_stage():
    above = {*ORDER, "compile", "capture"} - {"affine", "algebra"}
    wrong = [
        f"{name} imports {other}"
        for name, path in compiler_files()
        if name in ASIDE
        for other in siblings(path) & above
    ]
    assert wrong == []


def test_certificates_are_checked_without_the_compiler():
    top, own = ROOT / "repcompiler", {"certify", "certops"}
    for name in own:
        path = top / f"{name}.py"
        assert roots(path) <= {"torch", "repcompiler", *sys.stdlib_module_names}
        assert siblings(path) <= own


def test_errors_and_reasons_import_nothing_of_the_compiler():
    top = ROOT / "repcompiler"
    for name in ("errors", "reasons"):
        assert siblings(top / f"{name}.py") == set(), name


@pytest.mark.parametrize("package", ["repcompiler", "fastvit"])
def test_packages_know_neither_each_other_nor_the_command_line(package):
    others = {"repcompiler", "fastvit", "fastvit_cli", "cli"} - {package}
    wrong = {str(path): roots(path) & others for path in sources(package)}
    assert {path: names for path, names in wrong.items() if names} == {}


def test_only_the_command_line_prints():
    wrong = [
        f"{path}:{node.lineno}"
        for path in sources("repcompiler", "fastvit")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]
    assert wrong == []


def test_no_file_is_longer_than_the_limit():
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in sources(
            "repcompiler", "fastvit", "cli", "tests", "examples", "benchmarks"
        )
    }
    assert {name: n for name, n in lengths.items() if n > MAX_LINES} == {}
