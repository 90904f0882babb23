"""What runs in the sandboxes of `python_tests`: the completion's code in one, the tests in another.

The tests reach the code through a pipe that carries plain data and nothing that could be executed, so that their
verdict is formed where the code has never been: it can lie about what its functions return, and about nothing else.
Standard library only, and one file with a section for each part: a sandbox shows its process the interpreter and this
file, and nothing else of the package that code could look into. Run as

    harness.py program CODE                run the code as a program, on this process's standard input and output
    harness.py subject CODE                run the code, then answer requests on standard input
    harness.py checker TESTS FROM TO       run the tests against the subject at these two files

with open files named by their numbers and limits as JSON in the last argument.
"""

import ast
import builtins
import collections
import contextlib
import ctypes
import functools
import importlib
import itertools
import json
import operator
import os
import platform
import re
import resource
import struct
import symtable
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO

LINE_LIMIT = 1 << 20  # bytes of a message between the tests and the code
ITEM_LIMIT = 100_000  # items that the tests can take of an iterator


# ------------------------------------------------------------------------------------------ limits

# Numbers of system calls, on x86_64 and on aarch64 (-1: it has none); from the kernel's tables.
DENIED = {
    "fork": (57, -1),
    "vfork": (58, -1),
    "ptrace": (101, 117),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "perf_event_open": (298, 241),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "io_uring_setup": (425, 425),
    "flock": (73, 32),  # it locks files that can only be read, against programs outside
}
PROCESSES = ("fork", "vfork")
CLONE, CLONE3 = (56, 220), 435
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}


def seccomp_filter(machine: str, *, processes: bool = False) -> bytes:
    """The BPF program by which the kernel refuses new processes, and other calls that tested code has no use for.

    Limits of processes (`RLIMIT_NPROC`) do not hold for root, whatever user a sandbox shows. Threads are allowed; they
    share the limits of their process.

    Args:
      machine: of `MACHINES`.
      processes: allow new processes, and refuse only the rest.
    """
    column, architecture = MACHINES[machine]
    load, equal, above, bits, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, refuse, missing, kill = 0x7FFF0000, 0x00050000 | 1, 0x00050000 | 38, 0x80000000  # EPERM, ENOSYS
    program = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, kill), (load, 0, 0, 0)]
    program += [(above, 0, 1, 0x40000000), (give, 0, 0, refuse)]  # x32's numbers for the same calls
    for name, numbers in DENIED.items():
        if numbers[column] >= 0 and not (processes and name in PROCESSES):
            program += [(equal, 0, 1, numbers[column]), (give, 0, 0, refuse)]
    if not processes:
        program += [(equal, 0, 1, CLONE3), (give, 0, 0, missing)]  # its flags cannot be seen; libraries then use clone
        program += [(equal, 0, 3, CLONE[column]), (load, 0, 0, 16), (bits, 1, 0, 0x10000), (give, 0, 0, refuse)]
    program += [(give, 0, 0, allow)]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in program)


def confine(memory: int, output: int, seconds: int) -> None:
    """Limits this process, for good: address space, a file's size, processor time, open files, and the system calls."""
    limits = {
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_FSIZE: output,
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    for what, value in limits.items():
        hard = resource.getrlimit(what)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(what, (value, value))
    if sys.platform == "linux" and platform.machine() in MACHINES:
        program = seccomp_filter(platform.machine())
        code = ctypes.create_string_buffer(program, len(program))
        header = ctypes.create_string_buffer(struct.pack("HL", len(program) // 8, ctypes.addressof(code)))
        prctl = ctypes.CDLL(None, use_errno=True).prctl
        no_new_privileges, set_seccomp, mode_filter = 38, 22, 2
        nothing = ctypes.c_ulong(0)
        if prctl(no_new_privileges, ctypes.c_ulong(1), nothing, nothing, nothing) or prctl(
            set_seccomp, ctypes.c_ulong(mode_filter), header, nothing, nothing
        ):
            raise OSError(ctypes.get_errno(), "the kernel refused the filter of system calls")


# ------------------------------------------------------------------------------------------ plain data


class NotPlain(TypeError):
    """A value that is not plain data."""


# Classes of the standard library whose values are plain data: their modules, how a value is told in other plain data,
# and how it is made again. (A datetime is a date, so that it comes first.)
CLASSES: dict[str, tuple[str, Callable[[Any], Any], Callable[[Any, Any], Any]]] = {
    "Fraction": ("fractions", lambda value: (value.numerator, value.denominator), lambda kind, told: kind(*told)),
    "Decimal": ("decimal", str, lambda kind, told: kind(told)),
    "datetime": ("datetime", lambda value: value.isoformat(), lambda kind, told: kind.fromisoformat(told)),
    "date": ("datetime", lambda value: value.isoformat(), lambda kind, told: kind.fromisoformat(told)),
    "time": ("datetime", lambda value: value.isoformat(), lambda kind, told: kind.fromisoformat(told)),
    "timedelta": (
        "datetime",
        lambda value: (value.days, value.seconds, value.microseconds),
        lambda kind, told: kind(*told),
    ),
    "deque": ("collections", lambda value: (list(value), value.maxlen), lambda kind, told: kind(*told)),
    "range": ("builtins", lambda value: (value.start, value.stop, value.step), lambda kind, told: kind(*told)),
}
VIEWS: dict[str, tuple[Any, Callable[[list[Any]], Any]]] = {
    "keys": (type({}.keys()), lambda items: dict.fromkeys(items).keys()),
    "values": (type({}.values()), lambda items: dict(enumerate(items)).values()),
    "items": (type({}.items()), lambda items: dict(items).items()),
}


@functools.lru_cache(maxsize=64)
def _named_tuple(name: str, *fields: str) -> type:
    return collections.namedtuple(name, fields)  # it refuses what is no name


def pack(value: Any, keep: Callable[[Any], Any]) -> Any:
    """Plain data as what JSON can hold; of what else is in it, what `keep` gives for it, such as a number.

    Plain data are numbers (also `Fraction` and `Decimal`), text, bytes, dates and times, lists, tuples (also named
    ones), sets, dictionaries and their views, ranges and deques. Subclasses lose their class: a `Counter` arrives as a
    dictionary.
    """
    if value is None or type(value) is bool:
        return value
    if isinstance(value, int):
        return int(value) if abs(value) < 2**63 else {"int": hex(value)}  # decimals of a long one take quadratic time
    if isinstance(value, float | str):
        return float(value) if isinstance(value, float) else str(value)
    if isinstance(value, bytes | bytearray):
        return {"bytes": bytes(value).hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, dict):
        return {"dict": [[pack(k, keep), pack(v, keep)] for k, v in value.items()]}
    if isinstance(value, tuple) and (fields := getattr(value, "_fields", None)):
        return {"named": [type(value).__name__, list(map(str, fields)), [pack(item, keep) for item in value]]}
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            items = [pack(item, keep) for item in value]
            return items if kind is list else {kind.__name__: items}
    for name, (module, tell, _) in CLASSES.items():
        # A value's module is loaded.
        if isinstance(value, getattr(sys.modules.get(module), name, ())):
            return {name: pack(tell(value), keep)}
    for name, (view, _) in VIEWS.items():
        if isinstance(value, view):
            return {name: [pack(item, keep) for item in value]}
    return {"coroutine" if isinstance(value, types.CoroutineType) else "object": keep(value)}


def unpack(value: Any, get: Callable[[Any], Any]) -> Any:
    """The value that `pack` was given, with `get` of what `keep` gave."""
    if isinstance(value, list):
        return [unpack(item, get) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "object":
        return get(content)
    if kind == "coroutine":
        return _awaited(get(content))
    if kind == "int":
        return int(content, 16)
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind == "complex":
        return complex(*content)
    if kind == "dict":
        return {unpack(k, get): unpack(v, get) for k, v in content}
    if kind == "named":
        return _named_tuple(content[0], *content[1])(*(unpack(item, get) for item in content[2]))
    if kind in CLASSES:
        module, _, make = CLASSES[kind]
        return make(getattr(importlib.import_module(module), kind), unpack(content, get))
    if kind in VIEWS:
        return VIEWS[kind][1]([unpack(item, get) for item in content])
    return {"tuple": tuple, "set": set, "frozenset": frozenset}[kind](unpack(item, get) for item in content)


async def _awaited(remote: Any) -> Any:
    """A coroutine of the code, as the tests wait for it: it runs where the code is."""
    return vars(remote)["_subject"].ask("await", remote)


def _waited_for(coroutine: Any) -> Any:
    import asyncio

    return asyncio.run(coroutine)


# ------------------------------------------------------------------------------------------ the code


def program(source: str) -> None:
    """Runs the code as a program. What it prints is all that counts."""
    module = types.ModuleType("__main__")
    sys.modules["__main__"], sys.argv = module, ["program.py"]
    vars(builtins).update(exit=sys.exit, quit=sys.exit)  # of `site`, without which the interpreter starts
    print("ready", 1, flush=True)
    exec(compile(source, "program.py", "exec"), vars(module))


def _leave(value: Any, name: str | None, message: str) -> None:
    """Ends a `with` block of the tests, with the exception that ended it."""
    kind = getattr(builtins, name or "", Exception)
    error = None if name is None else kind(message) if isinstance(kind, type) else Exception(message)
    value.__exit__(None if error is None else type(error), error, None)


def subject(source: str) -> None:
    """Runs the code, then does what the tests request, one request a line. Ends if the code does."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(null, number)
    replies.write(b'"ready"\n')
    replies.flush()
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    exec(compile(source, "solution.py", "exec"), vars(module))
    objects: list[Any] = [vars(module)]
    operations: dict[str, Callable[..., Any]] = {
        "item": operator.getitem,
        "attribute": getattr,
        "call": lambda function, arguments, named: function(*arguments, **named),
        "list": lambda value: list(itertools.islice(value, ITEM_LIMIT)),
        "length": len,
        "truth": bool,
        "text": str,
        "description": repr,
        "hash": hash,
        "next": lambda value: list(itertools.islice(value, 1)),
        "operate": lambda name, one, other: getattr(operator, name)(one, other),
        "instance": isinstance,
        "subclass": issubclass,
        "set attribute": setattr,
        "set item": operator.setitem,
        "delete item": operator.delitem,
        "enter": lambda value: value.__enter__(),
        "exit": _leave,
        "await": _waited_for,
    }

    numbers: dict[int, int] = {}  # by identities, which stay as long as the objects do

    def keep(value: Any) -> Any:
        if isinstance(value, type) and issubclass(value, BaseException):
            return lineage(value)
        if id(value) not in numbers:
            numbers[id(value)] = len(objects)
            objects.append(value)
        return numbers[id(value)]

    def told_of(told: Any) -> Any:
        return getattr(builtins, told["builtin"]) if isinstance(told, dict) else objects[told]

    def lineage(kind: type[BaseException]) -> dict[str, Any]:
        """Of an exception's class, the names of all classes that it derives from, and which of them are the code's."""
        own = [cls for cls in kind.__mro__ if cls.__module__ != "builtins"]
        for cls in own:
            if id(cls) not in numbers:
                numbers[id(cls)] = len(objects)
                objects.append(cls)
        names = [cls.__name__ for cls in kind.__mro__]
        return {"names": names, "own": [[numbers[id(cls)], cls.__name__] for cls in own]}

    for line in requests:
        try:
            request = json.loads(line)
            value = operations[request["do"]](*unpack(request["with"], told_of))
            reply = {"value": pack(value, keep)}
        except Exception as error:
            reply = {"raised": lineage(type(error)), "error": keep(error), "message": str(error)[:1000]}
        line = json.dumps(reply).encode() + b"\n"
        if len(line) > LINE_LIMIT:
            message = f"a result of {len(line)} bytes is above the limit of {LINE_LIMIT}"
            line = (
                json.dumps(
                    {"raised": {"names": ["OverflowError"], "own": []}, "message": message, "refused": message}
                ).encode()
                + b"\n"
            )
        replies.write(line)
        replies.flush()


# ------------------------------------------------------------------------------------------ the tests


class Gone(BaseException):
    """The code's process has ended, or says what is no answer. No `except Exception` of a test holds it up."""


class Subject:
    """The process of the code, as the tests reach it."""

    def __init__(self, replies: BinaryIO, requests: BinaryIO) -> None:
        self.replies, self.requests = replies, requests
        self.asked = self.gone = self.unusable = False
        self.refused = ""  # why a result did not come
        self.kinds: dict[int, type[Exception]] = {}  # the code's exceptions, by the numbers of their classes

    def read(self) -> Any:
        line = self.replies.readline(LINE_LIMIT)
        if not line.endswith(b"\n"):
            raise Gone
        return json.loads(line)

    def ask(self, what: str, *arguments: Any) -> Any:
        packed = pack(arguments, self._told)
        self.asked = True
        try:
            if self.gone:
                raise Gone
            self.requests.write(json.dumps({"do": what, "with": packed}).encode() + b"\n")
            self.requests.flush()
            reply = self.read()
            value = unpack(reply.get("value"), self._object)
            error = self._raised(reply) if "raised" in reply else None
            self.refused = str(reply.get("refused", self.refused))
        except BaseException as error:  # a closed pipe, or whatever else than an answer it wrote
            self.gone = True
            raise Gone from error
        if error is not None:
            raise error
        return value

    def _object(self, told: Any) -> Any:
        return self._kind(told) if isinstance(told, dict) else Remote(self, told)

    def _kind(self, lineage: Mapping[str, Any]) -> type[Exception]:
        """The class that stands for a class of the code's exceptions: the same one each time, so that it catches."""
        kind = _usual([str(name) for name in lineage["names"]])
        for number, name in reversed(lineage["own"]):
            if number not in self.kinds:
                self.kinds[int(number)] = type(str(name), (kind,), {"__getattr__": _attribute_of})
            kind = self.kinds[number]
        return kind

    def _raised(self, reply: Mapping[str, Any]) -> Exception:
        error = self._kind(reply["raised"])(str(reply.get("message", "")))
        vars(error)["_remote"] = Remote(self, reply["error"]) if "error" in reply else None
        return error

    def _told(self, value: Any) -> Any:
        """How the code is told of an object of its own, or of a builtin exception.

        All that it can have sent is among them, or its answer could make tests unusable.
        """
        if isinstance(value, Exception):
            value = vars(value).get("_remote") or value
        if isinstance(value, types.CoroutineType) and value.cr_code is _awaited.__code__:
            if value.cr_frame is None:
                raise NotPlain("a coroutine that was waited for")
            value = value.cr_frame.f_locals["remote"]
        if isinstance(value, Remote):
            return int(vars(value)["_number"])
        if isinstance(value, type) and issubclass(value, Exception):
            own = [number for number, kind in self.kinds.items() if kind is value]
            if own or getattr(builtins, value.__name__, None) is value:
                return own[0] if own else {"builtin": value.__name__}
        self.unusable = True
        raise NotPlain(f"a {type(value).__name__} cannot be passed from the tests to the code")


def _usual(names: Sequence[str]) -> type[Exception]:
    """The builtin exception that an exception of the code is: its class, or the first of its bases that is one.

    RuntimeError for StopIteration: it would end an iteration of the tests early, with success.
    """
    usual = (ArithmeticError, AssertionError, AttributeError, LookupError, NameError, OSError, RuntimeError, TypeError)
    for name in names:
        kind = getattr(builtins, name, None)
        if isinstance(kind, type) and issubclass(kind, (*usual, ValueError)):
            return kind
    return RuntimeError if {"StopIteration", "StopAsyncIteration"} & set(names) else Exception


def _attribute_of(error: Exception, name: str) -> Any:
    """An attribute that an exception of the code has there."""
    remote = vars(error).get("_remote")
    if name.startswith("__") or remote is None:
        raise AttributeError(name)
    return getattr(remote, name)


class Remote:
    """An object of the code that is not plain data: the code is asked whatever the tests do with it.

    But for what would let an object pass tests whose answer it does not know, by what it is compared with. Operators
    and comparisons with plain data are not passed on: an object equals none. Those of two objects of the code are,
    since it could as well have returned equal data; `!=` is `not ==`, so that it does not know what is wished. `in`
    goes through the items, and a `with` block never holds up an exception.
    """

    def __init__(self, subject: Subject, number: Any) -> None:
        vars(self).update(_subject=subject, _number=number)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._subject.ask("call", self, arguments, named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._subject.ask("attribute", self, name)

    def __getitem__(self, key: Any) -> Any:
        return self._subject.ask("item", self, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._subject.ask("set item", self, key, value)

    def __delitem__(self, key: Any) -> None:
        self._subject.ask("delete item", self, key)

    def __setattr__(self, name: str, value: Any) -> None:
        self._subject.ask("set attribute", self, name, value)

    def __iter__(self) -> Any:
        return iter(self._subject.ask("list", self))

    def __len__(self) -> int:
        return self._subject.ask("length", self)

    def __bool__(self) -> bool:
        return self._subject.ask("truth", self)

    def __next__(self) -> Any:
        for item in self._subject.ask("next", self):
            return item
        raise StopIteration

    def __str__(self) -> str:
        return self._subject.ask("text", self)

    def __repr__(self) -> str:
        return self._subject.ask("description", self)

    def __hash__(self) -> int:
        return self._subject.ask("hash", self)

    def __eq__(self, other: Any) -> Any:
        return self._subject.ask("operate", "eq", self, other) if isinstance(other, Remote) else NotImplemented

    def __instancecheck__(self, instance: Any) -> bool:
        return isinstance(instance, Remote) and self._subject.ask("instance", instance, self)

    def __subclasscheck__(self, subclass: Any) -> bool:
        return isinstance(subclass, Remote) and self._subject.ask("subclass", subclass, self)

    def __enter__(self) -> Any:
        return self._subject.ask("enter", self)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: Any) -> None:
        self._subject.ask("exit", self, kind and kind.__name__, str(error or ""))


def _between_two(name: str) -> Callable[[Remote, Any], Any]:
    def operate(one: Remote, other: Any) -> Any:
        return vars(one)["_subject"].ask("operate", name, one, other) if isinstance(other, Remote) else NotImplemented

    return operate


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and_", "or_", "xor", "lt", "le"):
    setattr(Remote, f"__{_name.strip('_')}__", _between_two(_name))


Function = ast.FunctionDef | ast.AsyncFunctionDef
COMPOUND = (ast.For, ast.While, ast.If, ast.With, ast.Try, ast.TryStar, ast.Match)


def opened_up(tree: ast.Module) -> ast.Module:
    """The tests with the asserts behind `if __name__ == "__main__"` at the top level: no condition hides them there."""
    guards = ("__name__ == '__main__'", "'__main__' == __name__")
    body: list[ast.stmt] = []
    for statement in tree.body:
        guard = isinstance(statement, ast.If) and ast.unparse(statement.test) in guards and asserts(statement)
        body += statement.body if isinstance(statement, ast.If) and guard else [statement]
    return ast.Module(body, [])


def asserts(node: ast.AST) -> bool:
    """Whether there is an assert in it that runs with it, not one within a function or a class."""
    inner = [child for child in ast.iter_child_nodes(node) if not isinstance(child, Function | ast.ClassDef)]
    return isinstance(node, ast.Assert) or any(map(asserts, inner))


def is_test(statement: ast.stmt) -> bool:
    """Whether a statement of the tests is a test; the others prepare."""
    if isinstance(statement, Function):
        return statement.name.startswith("test") and not required(statement)
    if isinstance(statement, COMPOUND):
        return asserts(statement)
    call = isinstance(statement, ast.Expr) and not isinstance(statement.value, ast.Constant)
    if call and re.fullmatch(r"(unittest\.)?main\(.*\)", ast.unparse(statement), re.DOTALL):
        return False  # the methods are the tests
    return isinstance(statement, ast.Assert) or call


def required(function: Function, *, method: bool = False) -> list[str]:
    """The parameters of a function that have no default, without the `self` of a method."""
    given = function.args
    positional = [parameter.arg for parameter in (*given.posonlyargs, *given.args)]
    positional = positional[: len(positional) - len(given.defaults)]
    bound = method and not any(ast.unparse(decorator) == "staticmethod" for decorator in function.decorator_list)
    keywords = zip(given.kwonlyargs, given.kw_defaults, strict=True)
    return positional[bound:] + [parameter.arg for parameter, default in keywords if default is None]


def _methods(case: ast.ClassDef) -> list[Function]:
    return [node for node in case.body if isinstance(node, Function)]


def test_methods(tree: ast.Module) -> dict[str, list[str]]:
    """The test methods of the classes that hold tests.

    Those derive from unittest's TestCase, directly or through others of the tests; or they are pytest's, by a name that
    begins with `Test`, and without an `__init__`.
    """
    own: dict[str, list[str]] = {}
    cases: dict[str, list[str]] = {}
    for statement in tree.body:
        if isinstance(statement, ast.ClassDef):
            bases = [ast.unparse(base) for base in statement.bases]
            inherited = [name for base in bases for name in own.get(base, [])]
            written = [method.name for method in _methods(statement)]
            tests = [name for name in written if name.startswith("test")]
            own[statement.name] = list(dict.fromkeys(inherited + tests))
            unittests = any(base.rpartition(".")[2].endswith("TestCase") or base in cases for base in bases)
            if unittests or (statement.name.startswith("Test") and "__init__" not in written):
                cases[statement.name] = own[statement.name]
    return cases


def not_run(tree: ast.Module) -> str:
    """What looks like a test and would not be run as one, with the reason; empty where there is nothing such."""
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    cases = test_methods(tree)
    functions: list[tuple[Function, bool]] = []
    for statement in tree.body:
        if isinstance(statement, Function) and statement.name not in used:
            functions.append((statement, False))
        elif isinstance(statement, ast.ClassDef):
            tests = [method for method in _methods(statement) if method.name.startswith("test")]
            if tests and statement.name not in used and statement.name not in cases:
                return f"the class {statement.name} with {tests[0].name} is neither a TestCase nor called Test..."
            functions += [(method, True) for method in tests if statement.name in cases]
    for function, method in functions:
        if function.name.startswith("test") and not (method and function.decorator_list):  # patch gives arguments
            if missing := required(function, method=method):
                return f"{function.name} takes {', '.join(missing)}, which nothing gives it"
            if any(isinstance(node, ast.Yield | ast.YieldFrom) for node in ast.walk(function)):
                return f"{function.name} yields, so that a call runs nothing of it"
    return ""


def asked_for(source: str) -> set[str]:
    """The names that the tests use and do not define: the code's.

    Builtins are Python's, or the code could put its own `all` or `abs` into a test of something else. Where a single
    builtin is all that the tests name, as in `assert sum(10, 15) == 6`, it is what they test.
    """
    module = symtable.symtable(source, "tests.py", "exec")
    used, own, tables = set(), set(), [module]
    for table in tables:
        tables += table.get_children()
        for symbol in table.get_symbols():
            if table is module or symbol.is_global():
                used |= {symbol.get_name()} if symbol.is_referenced() else set()
                own |= {symbol.get_name()} if symbol.is_assigned() or symbol.is_imported() else set()
    names = used - own
    return names - set(dir(builtins)) or (names if len(names) == 1 else set())


def imports_solution(tree: ast.Module) -> bool:
    """Whether the tests import what they test, from the module `solution`."""
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    return any("solution" in (getattr(node, "module", None), *(alias.name for alias in node.names)) for node in imports)


def checker(source: str, replies: BinaryIO, requests: BinaryIO) -> None:
    """Runs the tests against the subject: a line with their number, then one for each that passed."""
    verdict = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)

    def unusable(reason: str) -> None:
        print("unusable", " ".join(reason.split())[:1000], file=verdict)

    try:
        tree = opened_up(ast.parse(source))
        starred = any(isinstance(node, ast.ImportFrom) and node.names[0].name == "*" for node in ast.walk(tree))
        names = asked_for(source) if starred or not imports_solution(tree) else set()
        methods = test_methods(tree)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return unusable(f"the tests are no Python: {error}")
    total = sum(map(is_test, tree.body)) + sum(map(len, methods.values()))
    if reason := not_run(tree):
        return unusable(reason)
    if not total:
        return unusable("there is no test")
    if not names and not imports_solution(tree):
        return unusable("the tests name nothing that the code would define")
    code = Subject(replies, requests)
    if code.read() != "ready":
        return None
    print("ready", total, file=verdict)
    scope: dict[str, Any] = {"__name__": "tests"}
    namespace = Remote(code, 0)
    defined: dict[str, Any] = {}
    for name in sorted(names):
        with contextlib.suppress(LookupError, Gone):  # a NameError where a test uses it
            defined[name] = namespace[name]
    solution = types.ModuleType("solution")
    sys.modules["solution"] = solution
    vars(solution)["__getattr__"] = functools.partial(_attribute, namespace)
    (vars(solution) if imports_solution(tree) else scope).update(defined)
    plain = {name for name, value in defined.items() if not isinstance(value, Remote)}
    code.asked = False
    for number, statement in enumerate(tree.body):
        # Data where a function is wanted fails without a question to the code.
        code.asked |= any(isinstance(node, ast.Name) and node.id in plain for node in ast.walk(statement))
        if not is_test(statement) and "main(" in ast.unparse(statement) and isinstance(statement, ast.Expr):
            continue  # unittest.main()
        try:
            exec(compile(ast.Module([statement], []), "tests.py", "exec"), scope)
            if isinstance(statement, ast.ClassDef):
                for name in methods.get(statement.name, []):
                    if _succeeds(scope[statement.name], name) and not code.gone:
                        print("passed", number, file=verdict)
                if code.unusable:
                    return unusable("what the tests pass to the code is no plain data")
            if is_test(statement) and isinstance(statement, Function):
                _run(scope[statement.name])
        except (Exception, SystemExit, Gone) as error:
            missing = isinstance(error, NameError) and error.name in names
            if code.unusable or not (is_test(statement) or code.asked or missing):
                return unusable(f"{type(error).__name__}: {error}")
            if not is_test(statement):
                print("spoiled", number, file=verdict)
                return None  # what later tests need is not there
        else:
            if is_test(statement) and not code.gone:
                print("passed", number, file=verdict)
        finally:
            if code.refused:
                print("refused", " ".join(code.refused.split())[:200], file=verdict)
                code.refused = ""
    return None


def _succeeds(case: type, method: str) -> bool:
    """Whether a test method of a class passes; one that skips itself does not."""
    import unittest

    if issubclass(case, unittest.TestCase):
        result = unittest.TestResult()
        test = case(method)
        if not isinstance(test, unittest.IsolatedAsyncioTestCase):
            setattr(test, method, functools.partial(_run, getattr(test, method)))
        unittest.TestSuite([test]).run(result)
        return result.wasSuccessful() and not result.skipped
    try:
        instance = case()
        for name in ("setup_class", "setup_method", method, "teardown_method"):
            function = getattr(instance, name, None)
            if function is not None:
                # pytest gives those around a test the test, where they take it.
                takes = name.endswith("_method") and function.__code__.co_argcount > 1
                _run(function, *([getattr(instance, method)] if takes else []))
    except (Exception, SystemExit, Gone):
        return False
    return True


def _run(function: Callable[..., Any], *arguments: Any) -> None:
    """Calls a test, and waits for one that is async."""
    result = function(*arguments)
    if isinstance(result, types.CoroutineType):
        _waited_for(result)


def _attribute(namespace: Remote, name: str) -> Any:
    try:
        return namespace[name]
    except LookupError:
        raise AttributeError(name) from None


def _source(number: str) -> str:
    with os.fdopen(int(number), "rb") as file:
        file.seek(0)
        return file.read().decode()


def main(role: str, file: str, *rest: str) -> None:
    """Plays one of the three roles."""
    limits: Mapping[str, int] = json.loads(rest[-1])
    source = _source(file)
    confine(**limits)
    if role == "program":
        program(source)
    elif role == "subject":
        subject(source)
    else:
        checker(source, os.fdopen(int(rest[0]), "rb"), os.fdopen(int(rest[1]), "wb"))


if __name__ == "__main__":
    main(*sys.argv[1:])
