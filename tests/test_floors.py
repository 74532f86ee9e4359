"""The rules of the package's structure, read off its syntax trees: who may import what, and where.

Each rule is a function (path in the package, syntax tree) -> [(line, what is wrong)]. It is also shown
snippets that break it and snippets that do not, so that a rule which has gone blind is noticed.
"""

import ast
import sys
from functools import cache
from pathlib import Path, PurePosixPath

import pytest

import fedmetanas_jax

PACKAGE = "fedmetanas_jax"
ROOT = Path(fedmetanas_jax.__file__).parent
LONGEST_FILE = 300

# Imports go down only. Files of one folder may import each other, and so may single files of one floor;
# folders of one floor are siblings that do not know each other. What is not named is at the top.
FLOOR = {
    "core": 0, "tree": 0, "files": 0, "options": 0,
    "data": 1, "models": 1, "nas": 1,
    "local": 2, "maml": 2, "optimizers": 2,
    "engine": 3, "algorithms": 3,
}  # fmt: skip
LIGHT = ("options.py", "files.py", "config.py", "tasks.py")  # imported before a command line is known to make sense
FOLDERS = ("data", "models", "nas", "engine", "algorithms")
TOP = 4


@cache
def package():
    """{path in the package: syntax tree} of every file."""
    paths = sorted(ROOT.rglob("*.py"))
    return {PurePosixPath(p.relative_to(ROOT).as_posix()): ast.parse(p.read_text(), str(p)) for p in paths}


def room(path):
    """The folder or top-level file a path of the package belongs to; the package's own __init__ is ""."""
    first = path.parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def dotted(path):
    """fedmetanas_jax.data.sources of data/sources.py."""
    return ".".join((PACKAGE, *path.with_suffix("").parts)).removesuffix(".__init__")


def imports(path, tree):
    """(line, module, is it inside a function?) of every import; `from a import b` counts as a and as a.b."""
    found = []

    def visit(node, lazy):
        if isinstance(node, ast.Import):
            found.extend((node.lineno, alias.name, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = (PACKAGE, *path.parts)[: len(path.parts) + 1 - node.level] if node.level else ()
            module = ".".join((*package, *([node.module] if node.module else [])))
            found.append((node.lineno, module, lazy))
            found.extend((node.lineno, f"{module}.{alias.name}", lazy) for alias in node.names)
        inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(tree, False)
    return found


@cache
def imported_at_once():
    """Modules that some file of the package imports at module level."""
    return {module for path, tree in package().items() for _, module, lazy in imports(path, tree) if not lazy}


def within(module, parent):
    return module == parent or module.startswith(f"{parent}.")


def attributes(tree):
    """(line, dotted name) of every name and attribute that is read: jax.jit, np.random.default_rng, jit."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute):
            yield node.lineno, ast.unparse(node)


# --- Rules ----------------------------------------------------------------------------------------------


def imports_go_down(path, tree):
    here = room(path)
    for line, module, _ in imports(path, tree):
        parts = module.split(".")
        if parts[0] != PACKAGE or len(parts) < 2 or parts[1] == here:
            continue
        there = parts[1]
        mine, other = FLOOR.get(here, TOP), FLOOR.get(there, TOP)
        siblings = mine == other and (here in FOLDERS or there in FOLDERS)
        if other > mine:
            yield line, f"{here or PACKAGE} (floor {mine}) imports {module} (floor {other})"
        elif siblings:
            yield line, f"{here} imports its sibling {module}"


def config_is_light(path, tree):
    """A mistyped name is answered before jax is imported."""
    if str(path) not in LIGHT:
        return
    for line, module, _ in imports(path, tree):
        light = [dotted(PurePosixPath(name)) for name in LIGHT]
        if not (module.split(".")[0] in sys.stdlib_module_names or any(within(module, name) for name in light)):
            yield line, f"imports {module}; the standard library and {', '.join(light)} are allowed"


def only_in(package, allowed):
    """Rule: `package` is imported only where allowed(path, lazily?)."""

    def rule(path, tree):
        for line, module, lazy in imports(path, tree):
            if within(module, package) and not allowed(path, lazy):
                yield line, f"imports {module}{'' if lazy else ' at module level'}"

    return rule


flax_in_models = only_in("flax", lambda path, lazy: room(path) == "models")
orbax_in_checkpoint = only_in("orbax", lambda path, lazy: str(path) == "engine/checkpoint.py" and lazy)
matplotlib_late = only_in("matplotlib", lambda path, lazy: lazy or path.stem in ("picture", "curves"))


def datasets_late(path, tree):
    """At module level only in a file of data/ which is itself imported inside functions alone."""

    def allowed(path, lazy):
        return room(path) == "data" and (lazy or dotted(path) not in imported_at_once())

    return only_in("tensorflow_datasets", allowed)(path, tree)


def written_for_one_client(path, tree):
    """Compiling, batching over clients, devices, host randomness, configs and logs are other floors' work."""
    if room(path) not in ("algorithms", "local", "maml", "optimizers"):
        return
    machinery = {"jit", "pmap", "shard_map"}
    if room(path) != "local":  # which draws the batches of all epochs at once
        machinery.add("vmap")
    modules = ("numpy.random", "random", "logging", "absl.logging", f"{PACKAGE}.config")
    for line, module, _ in imports(path, tree):
        if any(within(module, name) for name in modules) or module.split(".")[-1] in machinery:
            yield line, f"imports {module}"
    for line, name in attributes(tree):
        if name in {f"jax.{word}" for word in machinery} or name in ("np.random", "numpy.random"):
            yield line, f"uses {name}"


def documented(path, tree):
    """A docstring for the file and each public function, class and method."""
    if tree.body and not ast.get_docstring(tree):
        yield 1, "the file has no docstring"

    def visit(body, prefix):
        for node in body:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            if node.name.startswith("_"):
                continue
            if not ast.get_docstring(node):
                yield node.lineno, f"{prefix}{node.name} has no docstring"
            if isinstance(node, ast.ClassDef):
                yield from visit(node.body, f"{node.name}.")

    yield from visit(tree.body, "")


RULES = {
    "imports go down only, and siblings do not know each other": imports_go_down,
    "config imports no jax": config_is_light,
    "flax only in models/": flax_in_models,
    "orbax only in engine/checkpoint.py, when it is needed": orbax_in_checkpoint,
    "tensorflow_datasets only in data/, when it is needed": datasets_late,
    "matplotlib only when it is needed, or in picture.py and curves.py": matplotlib_late,
    "methods are written for one client": written_for_one_client,
    "what is public has a docstring": documented,
}


@pytest.mark.parametrize("name", RULES)
def test_rule_is_kept(name):
    rule = RULES[name]
    broken = [f"{path}:{line}: {what}" for path, tree in package().items() for line, what in rule(path, tree)]
    assert not broken, "\n".join([f"the rule: {name}", *broken])


def test_no_file_is_long():
    lengths = {path: len((ROOT / path).read_text().splitlines()) for path in package()}
    long = [f"{path} has {n} lines" for path, n in lengths.items() if n > LONGEST_FILE]
    assert not long, "\n".join([f"no file is longer than {LONGEST_FILE} lines", *long])


def test_the_package_is_found():
    assert {"core.py", "models/darts.py", "algorithms/fedavg.py"} <= {str(path) for path in package()}


@pytest.mark.parametrize(
    ("rule", "path", "text"),
    [
        (imports_go_down, "nas/x.py", "from fedmetanas_jax import models"),
        (imports_go_down, "data/x.py", "import fedmetanas_jax.nas.mask"),
        (imports_go_down, "engine/x.py", "from fedmetanas_jax.algorithms import ALGORITHMS"),
        (imports_go_down, "models/x.py", "from .. import local"),
        (imports_go_down, "tree.py", "def f():\n    import fedmetanas_jax.build"),
        (config_is_light, "config.py", "def f():\n    import jax"),
        (config_is_light, "config.py", "from fedmetanas_jax.core import Array"),
        (flax_in_models, "nas/x.py", "from flax import linen"),
        (orbax_in_checkpoint, "engine/run.py", "def f():\n    import orbax.checkpoint"),
        (orbax_in_checkpoint, "engine/checkpoint.py", "import orbax.checkpoint"),
        (datasets_late, "build.py", "def f():\n    import tensorflow_datasets"),
        (datasets_late, "data/sources.py", "import tensorflow_datasets as tfds"),
        (matplotlib_late, "engine/run.py", "from matplotlib import figure"),
        (written_for_one_client, "algorithms/x.py", "y = jax.vmap(f)(x)"),
        (written_for_one_client, "maml.py", "from jax import jit"),
        (written_for_one_client, "local.py", "rng = np.random.default_rng(0)"),
        (written_for_one_client, "local.py", "from numpy.random import default_rng"),
        (written_for_one_client, "maml.py", "from fedmetanas_jax.config import Config"),
        (written_for_one_client, "algorithms/x.py", "from absl import logging"),
        (documented, "x.py", "value = 1"),
        (documented, "x.py", '"""File."""\n\n\ndef add(a, b):\n    return a + b'),
        (documented, "x.py", '"""File."""\n\n\nclass A:\n    """A."""\n\n    def f(self):\n        pass'),
    ],
)
def test_rule_sees_what_breaks_it(rule, path, text):
    assert list(rule(PurePosixPath(path), ast.parse(text)))


@pytest.mark.parametrize(
    ("rule", "path", "text"),
    [
        (imports_go_down, "algorithms/x.py", "from fedmetanas_jax.algorithms.fedavg import fedavg"),
        (imports_go_down, "maml.py", "from fedmetanas_jax import local, tree"),
        (imports_go_down, "nas/x.py", "from . import mask\nfrom ..core import Mask"),
        (imports_go_down, "build.py", "from fedmetanas_jax import network, engine"),
        (written_for_one_client, "maml.py", "jax.lax.scan(f, x, jax.random.split(key))"),
        (written_for_one_client, "engine/round.py", "jax.jit(jax.vmap(f))"),
        (orbax_in_checkpoint, "engine/checkpoint.py", "def f():\n    import orbax.checkpoint"),
        (datasets_late, "data/sources.py", "def f():\n    import tensorflow_datasets"),
        (matplotlib_late, "nas/picture.py", "from matplotlib.figure import Figure"),
        (documented, "x.py", '"""File."""\n\n\ndef _inner(a):\n    return a'),
    ],
)
def test_rule_lets_the_allowed_pass(rule, path, text):
    assert not list(rule(PurePosixPath(path), ast.parse(text)))
