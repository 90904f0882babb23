"""Which module may import which, and what an import loads."""

import ast
import functools
import graphlib
import pathlib
import subprocess
import sys

import pytest

import grpo_jax

PACKAGE = pathlib.Path(__file__).parents[1] / "grpo_jax"
AROUND = ("grpo_jax.run", "grpo_jax.study")


def module_name(path: pathlib.Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
FOUNDATIONS = {"grpo_jax.types", "grpo_jax.statistics", "grpo_jax.protocols"} & MODULES.keys()


def for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def statements(tree: ast.Module, *, in_functions: bool) -> list[ast.AST]:
    """The nodes of a module, without those for type checkers and, unless asked for, without functions' bodies."""
    nodes, waiting = [], [tree]
    while waiting:
        node = waiting.pop()
        nodes.append(node)
        for child in ast.iter_child_nodes(node):
            is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            if not for_type_checkers(child) and (in_functions or not is_function):
                waiting.append(child)
    return nodes


@functools.cache
def imports(module: str, *, in_functions: bool = False) -> frozenset[str]:
    """The package's modules that a module imports; `from grpo_jax import losses` is an import of grpo_jax.losses."""
    names = set()
    for node in statements(ast.parse(MODULES[module].read_text()), in_functions=in_functions):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level or node.module is None:
                raise AssertionError(f"{module} has a relative import")
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= members | ({node.module} if members - MODULES.keys() else set())
    return frozenset((names & MODULES.keys()) - {module})


def inside(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def test_no_module_imports_itself_through_others():
    graph = {module: imports(module) for module in MODULES}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError with the cycle


@pytest.mark.parametrize("module", [m for m in MODULES if not inside(m, *AROUND)])
def test_the_algorithm_imports_neither_run_nor_study(module):
    assert not [m for m in imports(module, in_functions=True) if inside(m, *AROUND)]


@pytest.mark.parametrize("module", [m for m in MODULES if inside(m, "grpo_jax.losses")])
def test_losses_know_only_types_statistics_and_protocols(module):
    allowed = (*FOUNDATIONS, "grpo_jax.losses")
    assert not [m for m in imports(module, in_functions=True) if not inside(m, *allowed)]


@pytest.mark.parametrize("module", sorted(FOUNDATIONS))
def test_the_foundations_import_only_one_another(module):
    assert imports(module, in_functions=True) <= FOUNDATIONS


def test_each_name_of_the_package_is_there_for_readers_and_for_type_checkers():
    for name in grpo_jax.__all__:
        assert getattr(grpo_jax, name) is not None
    (types,) = filter(for_type_checkers, ast.parse(MODULES["grpo_jax"].read_text()).body)
    declared = {alias.asname: node.module for node in types.body for alias in node.names}
    assert declared == {name: f"grpo_jax.{module}" for name, module in grpo_jax._HOME.items()}


# One after the other: what a statement loads by itself is among what it and those before it have loaded.
STATEMENTS = {
    "import grpo_jax": "flax optax orbax transformers matplotlib rich grpo_jax.losses grpo_jax.models",
    "import grpo_jax.losses": "flax optax orbax transformers matplotlib rich grpo_jax.models",
    "import grpo_jax.rewards": "transformers flax orbax grpo_jax.models grpo_jax.data",
    "import grpo_jax.data, grpo_jax.tasks": "transformers flax orbax grpo_jax.models",
}


def test_an_import_loads_only_what_it_names():
    """In a process of its own, since this one has loaded everything already."""
    program = "import sys\n" + "".join(
        f"{statement}\nprint({statement!r}, *(name for name in {not_loaded.split()} if name in sys.modules))\n"
        for statement, not_loaded in STATEMENTS.items()
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == list(STATEMENTS)
