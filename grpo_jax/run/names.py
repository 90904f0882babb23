"""Functions by their names on a command line: `module:function`, or `module:maker(arguments)`.

resolve("my_rewards:correct")                          # the function
resolve("grpo_jax.rewards:cosine_length(correct=2)")   # the function that a maker returns
resolve("group_advantages", "grpo_jax.advantages")     # a name without a module is the package's
bound("cispo(max_ratio=4)", "grpo_jax.losses")         # the maker with these arguments, which takes more
"""

import ast
import contextlib
import dataclasses
import functools
import importlib.util
import inspect
import pathlib
import pkgutil
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

from grpo_jax.user_code import put_back

Arguments = tuple[list[Any], dict[str, Any]]


def resolve(name: str, *packages: str) -> Callable[..., Any]:
    """The function with a name.

    Modules are those of the working directory, and those that are installed. What a module
    raises while it is imported passes through, and so does what a maker raises.

    Args:
      name: `module:function`; or `module:maker(arguments)`, for the function that the maker
        returns. The arguments are Python literals: numbers, strings, lists, None and so on.
      packages: the modules of a name without one, the first that has it; none requires `module:`.

    Raises:
      ValueError: for another form, an argument that is no literal, a module or a function
        that does not exist, or a result that cannot be called. The message is one line.
    """
    function, arguments = _find(name, packages)
    if arguments is None:
        return function
    made = function(*arguments[0], **arguments[1])
    if not callable(made):
        raise ValueError(f"{name!r} returns a {type(made).__name__} and not a function")
    return made


def bound(name: str, *packages: str) -> Callable[..., Any]:
    """The function with a name, to which the arguments of the name are given, but which is not called.

    Args:
      name: as in `resolve`.
      packages: as in `resolve`.

    Raises:
      ValueError: as `resolve`; for an argument that the function does not have.
    """
    function, arguments = _find(name, packages)
    if arguments is None:
        return function
    try:
        inspect.signature(function).bind_partial(*arguments[0], **arguments[1])
    except TypeError as error:
        raise ValueError(f"{name!r}: {error}; it has {', '.join(inspect.signature(function).parameters)}") from None
    return functools.partial(function, *arguments[0], **arguments[1])


def required(function: Callable[..., Any]) -> list[str]:
    """The parameters that have no default."""
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def named_in(settings: Any) -> list[ModuleType]:
    """The modules that settings name as `module:function`, for `digests.of_run`: all code that a user has put in.

    What a maker returns may be a function of another module.

    Args:
      settings: a dataclass of names that `resolve` or `bound` have found.
    """
    values = [getattr(settings, field.name) for field in dataclasses.fields(settings)]
    texts = [text for value in values for text in (value if isinstance(value, tuple | list) else [value])]
    named = []
    for text in texts:
        with contextlib.suppress(ValueError):  # of other settings, such as the address of a server
            named += [_parse(text, None)[0]] if isinstance(text, str) else []
    return [sys.modules[module] for module in dict.fromkeys(named) if module in sys.modules]


def _find(name: str, packages: Sequence[str]) -> tuple[Callable[..., Any], Arguments | None]:
    """The function, and the arguments behind it, None without brackets."""
    module, path, arguments = _parse(name, packages[0] if packages else None)
    modules = packages if module in packages and ":" not in name.partition("(")[0] else (module,)
    if str(pathlib.Path.cwd()) not in sys.path:
        sys.path.insert(0, str(pathlib.Path.cwd()))
    with put_back(f"the module {module}"):
        if not _exists(module):
            folder = pathlib.Path.cwd()
            raise ValueError(f"{name!r} names a module {module}, which is neither in {folder} nor installed")
        function = next((found for one in modules if callable(found := _attribute(one, path))), None)
    if function is None:
        raise ValueError(f"{' and '.join(modules)} has no function {path!r}")
    return function, arguments


def _attribute(module: str, path: str) -> Any:
    importlib.import_module(module)  # whose own AttributeError passes through
    try:
        return pkgutil.resolve_name(f"{module}:{path}")
    except AttributeError:
        return None


def make_with(
    make: Callable[..., Any], name: str, stated: Mapping[str, Any], *, offered: Mapping[str, Any] | None = None
) -> Any:
    """Calls a maker with the settings that are stated; its own defaults hold for those that are None.

    Args:
      make: such as `losses.grpo`.
      name: for the message.
      stated: settings; None is not stated.
      offered: settings that the maker gets if it takes them.

    Raises:
      ValueError: for a stated setting that the maker does not have, or has by its name already; for one that it
        requires and nobody has given; for what the maker itself refuses as an argument.
    """
    settings = {name: setting for name, setting in stated.items() if setting is not None}
    known = inspect.signature(make).parameters
    own = [p.name for p in known.values() if p.kind is p.KEYWORD_ONLY or p.kind is p.POSITIONAL_OR_KEYWORD]
    in_name = make.keywords if isinstance(make, functools.partial) else {}
    settings |= {name: setting for name, setting in (offered or {}).items() if name in known and name not in in_name}
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    plain = name.partition("(")[0]
    module = getattr(make.func if isinstance(make, functools.partial) else make, "__module__", None) or ""
    passed_on = {"penalty"} if module.startswith("grpo_jax.") else set(settings)  # to what `**` takes
    if unknown := set(settings) - set(known) - (passed_on if takes_any else set()):
        has = f"{', '.join(own)}, given as '{plain}({own[0]}=...)'" if own else "none"
        raise ValueError(f"the loss {plain} has no setting {', '.join(sorted(unknown))}; it has {has}")
    if twice := sorted(set(in_name) & set(settings)):
        raise ValueError(f"{', '.join(twice)} of the loss {name} is given twice")
    if missing := [each for each in required(make) if each not in settings]:
        raise ValueError(f"the loss {plain} requires {', '.join(missing)}: '{plain}({missing[0]}=...)'")
    try:
        return make(**settings)
    except TypeError as error:
        raise ValueError(f"the loss {name}: {error}") from error


def _parse(name: str, package: str | None) -> tuple[str, str, Arguments | None]:
    """Module, dotted path in it, and the arguments of a maker."""
    head, bracket, rest = name.partition("(")
    module, _, path = head.rpartition(":")
    module = module or package or ""
    if not module or not all(part.isidentifier() for part in (*module.split("."), *path.split("."))):
        raise ValueError(f"a function is named module:function, or module:maker(arguments), got {name!r}")
    if not bracket:
        return module, path, None
    try:
        call = ast.parse(f"maker({rest}", mode="eval").body
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)):
            raise ValueError
        keywords = {keyword.arg or "": ast.literal_eval(keyword.value) for keyword in call.keywords}
        positional = [ast.literal_eval(argument) for argument in call.args]
        if "" in keywords:  # a dict that is unpacked
            raise ValueError
    except (SyntaxError, ValueError, TypeError):
        raise ValueError(
            f"the arguments of a maker are literals, as in module:maker(2, mode='x'), got {name!r}"
        ) from None
    return module, path, (positional, keywords)


def _exists(module: str) -> bool:
    """Whether the module can be found; its packages are imported."""
    if module in sys.modules:
        return True
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # an import within one of its packages
        return False
