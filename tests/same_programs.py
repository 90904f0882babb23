"""`jax.jit` of the tests: functions that are alike share one jitted function, so that their programs are traced once.

Most runs that tests start make a step that another run has made, and to trace and lower it takes seconds. Functions are
alike if their code is the same and so are their settings: numbers, texts, what compares equal, and functions that are
alike; lists and dicts by what they hold when `jax.jit` is called. Arrays, sets, empty lists and other objects are alike
only if they are the same, and so is what tests have put in place of something that the code looks up by name.
"""

import dataclasses
import functools
import types
import weakref
from collections.abc import Mapping

import pytest


class Alike:
    """`jit`, once for functions that are alike.

    Attributes:
      jit: of JAX.
      known: by what a function is made of, the jitted one, and what must live as long as it does.
      patches: of the tests.
    """

    def __init__(self, jit):
        self.jit, self.known, self.patches = jit, {}, weakref.WeakSet()

    def __call__(self, function, /, **options):
        kept = []
        key = _key((function, options, self.replaced()), {}, kept)
        if key not in self.known:
            self.known[key] = self.jit(function, **options), kept
        return self.known[key][0]

    def replaced(self):
        """What tests have put in the place of something else, and not taken away again."""
        places = [(target, name) for patch in self.patches for target, name, _ in patch._setattr]
        return tuple((_Same(target), name, _Same(getattr(target, name, None))) for target, name in places)

    def install(self):
        def setattr(patch, *arguments, **settings):
            replace(patch, *arguments, **settings)
            self.patches.add(patch)

        replace, pytest.MonkeyPatch.setattr = pytest.MonkeyPatch.setattr, setattr


class _Same:
    """An object that nothing else is alike to, whatever it is equal to."""

    def __init__(self, x):
        self.x = x

    def __eq__(self, other):
        return self.x is other.x

    def __hash__(self):
        return id(self.x)


def _key(x, known, kept):
    if id(x) in known:
        return known[id(x)]
    known[id(x)] = "within itself", len(known)
    kept.append(x)
    known[id(x)] = _made_of(x, lambda y: _key(y, known, kept))
    return known[id(x)]


def _made_of(x, of):
    if isinstance(x, types.FunctionType):
        cells = tuple(_cell(cell, of) for cell in x.__closure__ or ())
        return id(x.__code__), cells, of(x.__defaults__), of(x.__kwdefaults__), of(vars(x))
    if isinstance(x, types.MethodType):
        return of(x.__func__), of(x.__self__)
    if isinstance(x, functools.partial):
        return of(x.func), of(x.args), of(x.keywords)
    if isinstance(x, Mapping):
        return type(x), tuple((of(name), of(value)) for name, value in x.items())
    if isinstance(x, tuple | frozenset) or (isinstance(x, list) and x):  # an empty one is for what a test writes down
        return type(x), tuple(map(of, x))
    if isinstance(x, float):
        return repr(x)
    if dataclasses.is_dataclass(x) and type(x).__dataclass_params__.frozen and type(x).__dataclass_params__.eq:
        return type(x), tuple(of(getattr(x, field.name, None)) for field in dataclasses.fields(x))
    if isinstance(x, types.ModuleType | type) or type(x).__eq__ is object.__eq__ or not _hashable(x):
        return id(x)
    return type(x), x


def _cell(cell, of):
    try:
        return of(cell.cell_contents)
    except ValueError:  # not filled yet
        return None


def _hashable(x):
    try:
        hash(x)
    except TypeError:
        return False
    return True
