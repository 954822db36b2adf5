"""The layout of the package, from its source: layers, circles, places, sizes, docstrings."""

import ast
import functools
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "zegformer_jax"
NAME = PACKAGE.name
# Imports run down this list, never up.
LAYERS = (
    "cli",
    "segmenter",
    "export",
    "compilation",
    "training",
    "evaluation",
    "experiment",
    "input",
    "pretrained",
    "segmentation",
    "text",
    "models",
    "drawing",
    "runtime",
)
BASE = {"__init__", "_version"}  # the lazy API and the version: importable from anywhere
TOP_LEVEL = BASE | {"export", "segmenter"}  # modules beside the packages
CONFIG_READERS = {"cli", "experiment"}  # layers that know `ConfigDict`
MODULE_LINES, FUNCTION_LINES = 300, 60  # at most
# A docstring begins with a verb or with the noun that it describes.
CLAUSES = {"What", "Whether", "Which", "How", "Where", "When", "As", "Of", "Gives"}
# Where functions are compiled: training, evaluation and prediction; text embeddings,
# which are made once; and the placing and hashing of arrays. All others are pure.
JITS = {
    "training.loop",
    "evaluation.evaluator",
    "segmenter",
    "export",
    "experiment.models",
    "runtime.checkpoints",
    "runtime.mesh",
}


class Module(NamedTuple):
    """A module of the package: its dotted name below the package, and its source."""

    name: str
    source: str

    @property
    def layer(self) -> str:
        """The first part of the name."""
        return self.name.partition(".")[0]


def read_modules() -> list[Module]:
    modules = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        modules.append(Module(name or "__init__", path.read_text("utf-8")))
    return modules


parse = functools.cache(ast.parse)


def imports_of(module: Module) -> Iterator[str]:
    """Dotted names that a module imports anywhere, `zegformer_jax.a.b.c` for a name c as well."""
    for node in ast.walk(parse(module.source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module.name}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def inner_imports(module: Module, names: set[str]) -> set[str]:
    """The modules of the package that a module imports."""
    found = set()
    for full in imports_of(module):
        if full.split(".")[0] == NAME:
            name = full.removeprefix(NAME).lstrip(".")
            while name and name not in names:
                name = name.rpartition(".")[0]
            found.add(name or "__init__")
    return found - {module.name}


def graph(modules: list[Module]) -> dict[str, set[str]]:
    names = {module.name for module in modules}
    return {module.name: inner_imports(module, names) for module in modules}


def upward(modules: list[Module]) -> list[str]:
    """Imports against the order of the layers."""
    found = []
    edges = graph(modules)
    for name in edges.keys() - BASE:
        for other in edges[name] - BASE:
            first, second = (LAYERS.index(x.partition(".")[0]) for x in (name, other))
            if first > second:
                found.append(f"{name} imports {other}")
    return found


def circles(modules: list[Module]) -> list[str]:
    """Modules that are reached from themselves."""
    edges = {name: imported - {"__init__"} for name, imported in graph(modules).items()}
    edges.pop("__init__", None)
    while removable := [name for name, imported in edges.items() if not imported & edges.keys()]:
        for name in removable:
            del edges[name]
    return sorted(edges)


def misplaced(modules: list[Module]) -> list[str]:
    """TensorFlow, Orbax, configs, flags and jits outside their places."""
    found = []
    for module in modules:
        roots = {name.split(".")[0] for name in imports_of(module)}
        if roots & {"tensorflow", "tensorflow_datasets"} and module.layer != "input":
            found.append(f"{module.name} imports TensorFlow")
        if "orbax" in roots and module.name != "runtime.checkpoints":
            found.append(f"{module.name} imports Orbax")
        if roots & {"argparse", "absl"} and module.layer != "cli":
            found.append(f"{module.name} knows flags")
        if "ConfigDict" in module.source and module.layer not in CONFIG_READERS:
            found.append(f"{module.name} reads a config")
        if _calls(module, "jit") and module.name not in JITS:
            found.append(f"{module.name} jits")
    return found


def oversized(modules: list[Module]) -> list[str]:
    """Modules and functions with too many lines."""
    found = [x.name for x in modules if len(x.source.splitlines()) > MODULE_LINES]
    for module in modules:
        for node in ast.walk(parse(module.source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                if node.end_lineno - node.lineno + 1 > FUNCTION_LINES:
                    found.append(f"{module.name}.{node.name}")
    return found


def clauses(modules: list[Module]) -> list[str]:
    """Docstrings that begin with a clause."""
    nodes = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    found = []
    for module in modules:
        for node in ast.walk(parse(module.source)):
            text = ast.get_docstring(node) if isinstance(node, nodes) else None
            if text and text.split()[0] in CLAUSES:
                found.append(f"{module.name}: {text.splitlines()[0]}")
    return found


def _calls(module: Module, name: str) -> bool:
    return any(
        isinstance(node, ast.Attribute)
        and node.attr == name
        and isinstance(node.value, ast.Name)
        and node.value.id == "jax"
        for node in ast.walk(parse(module.source))
    )


MODULES = read_modules()


def test_imports_run_down():
    assert upward(MODULES) == []


def test_there_is_no_circle():
    assert circles(MODULES) == []


def test_every_module_is_in_a_layer():
    assert {module.layer for module in MODULES} <= {*LAYERS, *BASE}
    assert {path.stem for path in PACKAGE.glob("*.py")} <= TOP_LEVEL


def test_everything_is_in_its_place():
    """TensorFlow, Orbax, flags, configs, compiled functions; the method needs none of them."""
    assert misplaced(MODULES) == []


def test_modules_and_functions_are_short():
    assert oversized(MODULES) == []


def test_docstrings_begin_with_a_verb_or_a_noun():
    assert clauses(MODULES) == []


def changed(name: str, more: str) -> list[Module]:
    """The modules, with lines added to one of them."""
    assert name in {module.name for module in MODULES}
    return [
        module._replace(source=f"{module.source}\n{textwrap.dedent(more)}")
        if module.name == name
        else module
        for module in MODULES
    ]


@pytest.mark.parametrize(
    "check, name, more",
    [
        (upward, "models.grouper", "from zegformer_jax.segmentation import zegformer"),
        (upward, "input.pipeline", "def f():\n    import zegformer_jax.training.loop"),
        (circles, "models.normalise", "from zegformer_jax.models.grouper import Grouper"),
        (misplaced, "models.grouper", "import tensorflow as tf"),
        (misplaced, "segmentation.zegformer", "from ml_collections import ConfigDict"),
        (misplaced, "training.step", "import argparse"),
        (misplaced, "segmentation.zegformer", "run = jax.jit(len)"),
        (misplaced, "training.step", "import orbax.checkpoint"),
        (clauses, "training.step", 'def f():\n    """What it is."""'),
        (oversized, "models.normalise", "# a comment\n" * MODULE_LINES),
        (oversized, "models.normalise", "def f():\n" + "    f()\n" * FUNCTION_LINES),
    ],
)
def test_what_is_wrong_is_found(check, name, more):
    assert len(check(changed(name, more))) > len(check(MODULES))
