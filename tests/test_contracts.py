"""What holds for every module of both packages: their imports, their size, their documentation, their registries."""

import ast
import builtins
import importlib
import re
from collections import defaultdict
from functools import cache

import pytest
from support import ROOT, commands
from support.networks import random_network

PACKAGES = {"edge_ssm": ROOT / "edge_ssm", "edge_ssm_build": ROOT / "tools" / "edge_ssm_build"}
LINES = 400
LONGER = {
    "edge_ssm.engines.cpu.kernel": "one compilation unit: the kernel's parts are inlined into each other",
    "edge_ssm.engines.cpu.simd": "one compilation unit: the kernel's vector operations",
    "edge_ssm.service.settings": "every setting of a run is declared there, once",
    "edge_ssm.engines.cuda.kernels": "one compilation unit: the kernel's parts are inlined into each other",
}
"""Modules that may be longer, and why."""
SHARED = {"__init__", "base", "registry"}
"""Modules of a registry's folder that hold no entry of their own. The others that do not are named below."""
NO_ENTRY = {
    "edge_ssm.io.sinks": {"formats", "queue"},
    "edge_ssm.io.sources": {"device"},
    "edge_ssm.io.codecs": {"iio", "lines"},
}


def _modules():
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            yield ".".join(part for part in parts if part != "__init__"), path


MODULES = dict(_modules())
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}
each_module = pytest.mark.parametrize("module", MODULES)


def _is_private(name):
    return name.startswith("_") and not name.endswith("__")


def _of_the_packages(name):
    return name.split(".")[0] in PACKAGES


def _statements(tree):
    """Yield all nodes but those below ``if TYPE_CHECKING``."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            waiting.extend(node.orelse)
        else:
            waiting.extend(ast.iter_child_nodes(node))


def _imports(module):
    """Yield (line, module or its name, name in it or None, the name that it gets here)."""
    for node in _statements(TREES[module]):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, None, alias.asname or alias.name
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                here = module.split(".") if MODULES[module].name == "__init__.py" else module.split(".")[:-1]
                source = ".".join([*here[: len(here) - node.level + 1], *filter(None, [source])])
            for alias in node.names:
                yield node.lineno, source, alias.name, alias.asname or alias.name


@each_module
def test_no_module_uses_another_one_s_private_names(module):
    wrong, aliases = [], {}
    for line, source, name, alias in _imports(module):
        if not _of_the_packages(source):
            continue
        if name is None or f"{source}.{name}" in MODULES:
            aliases[alias] = source if name is None else f"{source}.{name}"
        elif _is_private(name) and source != module:
            wrong.append(f"line {line}: {name} of {source}")
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Attribute) and _is_private(node.attr) and ast.unparse(node.value) in aliases:
            wrong.append(f"line {node.lineno}: {node.attr} of {aliases[ast.unparse(node.value)]}")
    assert not wrong, "\n".join(wrong)


def _dependencies():
    graph = {}
    for module in MODULES:
        targets = set()
        for _, source, name, _ in _imports(module):
            target = f"{source}.{name}" if f"{source}.{name}" in MODULES else source
            targets |= {target} & set(MODULES)
        graph[module] = targets - {module}
    return graph


def _cycles(graph):
    """Return the strongly connected components of more than one module (Tarjan, 1972)."""
    index, low, stack, found = {}, {}, [], []

    def visit(node):
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in graph[node]:
            if target not in index:
                visit(target)
            if target in stack:
                low[node] = min(low[node], low[target])
        if low[node] == index[node]:
            component = {stack.pop()}
            while node not in component:
                component.add(stack.pop())
            if len(component) > 1:
                found.append(component)

    for node in graph:
        if node not in index:
            visit(node)
    return found


def test_no_modules_import_each_other_in_a_circle():
    """Imports inside functions count: they only hide a circle."""
    graph = _dependencies()
    circles = []
    for component in _cycles(graph):
        edges = [f"{a} -> {b}" for a in sorted(component) for b in sorted(graph[a] & component)]
        circles.append("\n".join(edges))
    assert not circles, "\n\n".join(circles)


@each_module
def test_a_module_fits_in_a_reader_s_head(module):
    assert module in LONGER or len(MODULES[module].read_text().splitlines()) <= LINES


def test_modules_that_may_be_longer_exist():
    assert set(LONGER) <= set(MODULES)


@cache
def _classes():
    found = defaultdict(list)
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                found[node.name].append((module, node))
    return found


def _is_documented_in_a_base(module, node, method):
    for base in node.bases:
        text = ast.unparse(base.value if isinstance(base, ast.Subscript) else base)
        name = text.rpartition(".")[2]
        for where, parent in _classes().get(name, []):
            for each in parent.body:
                if isinstance(each, ast.FunctionDef) and each.name == method and ast.get_docstring(each):
                    return True
            if _is_documented_in_a_base(where, parent, method):
                return True
        if name not in _classes() and hasattr(_external(module, text), method):
            return True
    return False


def _external(module, text):
    """Return a class of another package, by the text that names it; None if it cannot be found."""
    first, *rest = text.split(".")
    value = getattr(builtins, first, None)
    for _, source, name, alias in _imports(module):
        if alias in (text, first):
            try:
                value = importlib.import_module(source)
            except ImportError:
                return None
            value = value if name is None else getattr(value, name, None)
            rest = [] if alias == text and name is not None else rest
    for part in rest:
        value = getattr(value, part, None)
    return value


def _undocumented(module, body, prefix="", owner=None):
    for node in body:
        if isinstance(node, (ast.If, ast.Try)):
            yield from _undocumented(module, [*node.body, *node.orelse], prefix, owner)
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or node.name.startswith("_"):
            continue
        decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
        excused = any(re.search(r"\.setter$|\boverload$", decorator) for decorator in decorators)
        excused = excused or any(re.search(r"\.(command|group)\(.*\bhelp=", decorator) for decorator in decorators)
        if owner is not None and not ast.get_docstring(node):
            excused = excused or _is_documented_in_a_base(module, owner, node.name)
        if not ast.get_docstring(node) and not excused:
            yield f"line {node.lineno}: {prefix}{node.name}"
        if isinstance(node, ast.ClassDef):
            yield from _undocumented(module, node.body, f"{prefix}{node.name}.", node)


@each_module
def test_what_is_public_is_documented(module):
    tree = TREES[module]
    missing = [] if ast.get_docstring(tree) or not tree.body else ["the module itself"]
    missing += _undocumented(module, tree.body)
    assert not missing, "\n".join(missing)


REGISTRIES = [module for module in MODULES if module.rpartition(".")[2] in ("registry", "entries")]


@pytest.mark.parametrize("module", REGISTRIES)
def test_a_registry_names_each_entry_once_and_only_modules_that_exist(module):
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Dict) and all(isinstance(key, ast.Constant) for key in node.keys):
            keys = [key.value for key in node.keys]
            assert len(keys) == len(set(keys)), keys
        if isinstance(node, ast.Constant) and re.fullmatch(r"edge_ssm(_build)?(\.\w+)+", str(node.value)):
            owner, _, name = node.value.rpartition(".")
            assert node.value in MODULES or name in vars(importlib.import_module(owner)), node.value


@pytest.mark.parametrize("module", [module for module in REGISTRIES if not module.startswith("edge_ssm.engines.")])
def test_every_module_beside_a_registry_has_an_entry(module):
    """Engines have folders of their own, and a test of their own below."""
    package = module.rpartition(".")[0]
    siblings = {name.rpartition(".")[2] for name in MODULES if name.rpartition(".")[0] == package}
    siblings -= SHARED | NO_ENTRY.get(package, set())
    words = set(re.findall(r"\w+", MODULES[module].read_text()))
    assert siblings <= words, siblings - words


def _named_classes(package, suffix):
    """Return {name: [classes]} of the classes with an attribute ``name`` whose own names end in ``suffix``."""
    found = defaultdict(list)
    for module, tree in TREES.items():
        for node in tree.body if module.startswith(package) else []:
            if isinstance(node, ast.ClassDef) and node.name.endswith(suffix):
                for line in node.body:
                    target = getattr(line, "target", None) or (getattr(line, "targets", None) or [None])[0]
                    value = getattr(line, "value", None)
                    if getattr(target, "id", "") == "name" and isinstance(value, ast.Constant):
                        found[value.value].append(f"{module}.{node.name}")
    return found


def test_every_engine_is_registered_once_under_its_own_name():
    from edge_ssm.engines.registry import ENGINES

    classes = _named_classes("edge_ssm.engines", "Engine")
    assert {name: [f"{entry.module}.{entry.cls}"] for name, entry in ENGINES.items()} == {
        name: classes[name] for name in classes
    }


def test_every_meter_is_registered_once_under_its_own_name():
    from edge_ssm.hardware.meters.registry import METERS

    classes = _named_classes("edge_ssm.hardware.meters", "Meter")
    assert {name: len(where) for name, where in classes.items() if name in METERS} == dict.fromkeys(METERS, 1)


def test_every_codec_makes_a_decoder_and_has_a_name_of_its_own():
    from edge_ssm.io.codecs import registry
    from edge_ssm.io.codecs.base import FrameDecoder

    assert len(set(registry.FORMATS)) == len(registry.FORMATS)
    for name in registry.FORMATS:
        assert isinstance(registry.decoder(name, random_network().input), FrameDecoder)


def test_sources_and_sinks_have_schemes_of_their_own():
    from edge_ssm.io.sinks import registry as sinks
    from edge_ssm.io.sources import registry as sources

    for registry in (sources, sinks):
        assert len(set(registry.SCHEMES)) == len(registry.SCHEMES)


def test_the_commands_servers_import_modules_that_exist():
    """What is missing there is passed over, and would only cost time."""
    names = {name for names in commands.PRELOADED.values() for name in names if _of_the_packages(name)}
    assert names <= set(MODULES), names - set(MODULES)
