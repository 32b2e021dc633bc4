"""Imports run one way, and only the project's own command is lazy."""
import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import visionattn

ROOT = Path(visionattn.__file__).parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}


def modules():
    """The package's files by their module names."""
    names = {}
    for file in sorted(ROOT.rglob("*.py")):
        parts = file.relative_to(ROOT.parent).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return names


def imported(name, file, known):
    """Modules of ours that a file imports, in functions too; a package is left out where its submodule is meant."""
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join(parts[:len(parts) - node.level + 1] + ([base] if base else []))
            for alias in node.names:
                target = f"{base}.{alias.name}"
                if target in known or base in known:
                    yield target if target in known else base


def circles(graph):
    """Groups of nodes that reach each other: what remains when nodes without edges to or from others are taken away."""
    graph = {node: set(targets) for node, targets in graph.items()}
    while True:
        targets = set().union(*graph.values())
        free = {node for node in graph if not graph[node] or node not in targets}
        if not free:
            return sorted(graph)
        graph = {node: edges - free for node, edges in graph.items() if node not in free}
        if not graph:
            return []


def test_the_search_for_circles_finds_them():
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == ["b", "c"]


def test_imports_have_no_circle():
    known = modules()
    assert len(known) > 50
    assert circles({name: set(imported(name, file, known)) - {name} for name, file in known.items()}) == []


@pytest.mark.parametrize(("lower", "higher"), [
    ("runtime", {"ops", "layers", "models", "dense", "heads", "data", "tasks", "weights", "export", "predict", "cli"}),
    ("ops", {"layers", "models", "dense", "heads", "data", "tasks", "weights"}),
    ("layers", {"models", "dense", "heads", "data", "tasks", "weights"}),
    ("models", {"dense", "heads", "data", "tasks", "weights"}),
    ("heads", {"tasks", "export"}), ("adapters", {"data", "tasks", "export"}), ("data", {"tasks", "export"}),
    ("tasks", {"export", "demo", "cli"}),
])
def test_lower_floors_know_nothing_of_higher_ones(lower, higher):
    known = modules()
    for name, file in known.items():
        if f"{name}.".startswith(f"visionattn.{lower}."):
            rooms = {target.split(".")[1] for target in imported(name, file, known) if "." in target}
            assert not rooms & higher, name


# Who registers the zoo: everybody but the command

CHECK = "import sys, visionattn; print('timm' in sys.modules)\n"


def run(*argv, cwd=None):
    result = subprocess.run([sys.executable, *map(str, argv)], capture_output=True, text=True, env=ENVIRONMENT, cwd=cwd,
                            check=True)
    return result.stdout.split()[-1]


@pytest.mark.parametrize("options", [["-m", "visionattn_lab.go", "-m", "visionattn"], ["-m", "lab.visionattn"]])
def test_modules_of_others_register_the_zoo(options, tmp_path):
    (tmp_path / "visionattn_lab").mkdir()
    (tmp_path / "visionattn_lab" / "__init__.py").write_text("import visionattn\n")
    (tmp_path / "visionattn_lab" / "go.py").write_text(CHECK)
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "__init__.py").write_text("")
    (tmp_path / "lab" / "visionattn.py").write_text(CHECK)
    assert run(*options, cwd=tmp_path) == "True"


def test_scripts_called_like_the_command_register_the_zoo(tmp_path):
    (tmp_path / "visionattn").write_text(CHECK)
    assert run("visionattn", cwd=tmp_path) == "True"


@pytest.mark.parametrize("options", [["-m", "visionattn"], ["-mvisionattn"], ["-Bm", "visionattn"],
                                     ["-W", "ignore", "-X", "utf8", "-m", "visionattn"]])
def test_the_module_as_a_command_is_lazy(options):
    result = subprocess.run([sys.executable, "-X", "importtime", *options, "--version"], capture_output=True, text=True,
                            env=ENVIRONMENT, check=True)
    assert "visionattn.cli" in result.stderr
    assert "timm" not in result.stderr


def test_the_installed_command_is_lazy():
    command = Path(sys.executable).parent / "visionattn"
    if not command.exists():
        pytest.skip("the command is not installed beside this interpreter")
    result = subprocess.run([sys.executable, "-X", "importtime", command, "--version"], capture_output=True, text=True,
                            env=ENVIRONMENT, check=True)
    assert "visionattn.cli" in result.stderr
    assert "timm" not in result.stderr


# Without PyTorch

REFUSING = """
import sys


class Refusing:
    names = {"torch", "torchvision", "timm", "lightning", "pycocotools", "jsonargparse"}

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Refusing())
"""


def refusing(*lines):
    """What a Python without PyTorch prints that runs these lines."""
    return subprocess.run([sys.executable, "-c", REFUSING + "\n".join(lines)], capture_output=True, text=True,
                          env=ENVIRONMENT, check=False)


def test_the_runtime_needs_no_torch():
    modules_of_runtime = [name for name in modules() if name.startswith("visionattn.runtime")]
    assert len(modules_of_runtime) > 5
    lines = [f"import {name}" for name in modules_of_runtime]
    result = refusing("import visionattn", *lines, "from visionattn.cli import main", "main(['--help'])",
                      "assert main(['demo']) == 1", "visionattn.models")
    assert "commands:" in result.stdout
    assert "visionattn: error: this needs the package torch: pip install visionattn" in result.stderr
    assert result.stderr.splitlines()[-1] == (
        "ModuleNotFoundError: visionattn's models need the package timm: pip install visionattn")
