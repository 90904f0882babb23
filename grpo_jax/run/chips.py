"""What a compiled step asks of a TPU, read from its programs, and the least time that this takes.

TPU programs compile on any machine that has the TPU's compiler (the extra `tpu`); a topology stands for the chips.
"""

import importlib.util
import math
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.interpreters import partial_eval
from jax.stages import Compiled


class Chip(NamedTuple):
    """A chip, by the pages of docs.cloud.google.com/tpu on v5e, v5p and v6e (2026)."""

    memory: float  # bytes
    flops: float  # a second, of bfloat16 products
    bandwidth: float  # bytes per second of its memory
    links: float  # bytes per second to other chips, over all of its links together


CHIPS = {
    "v5e": Chip(16e9, 197e12, 819e9, 200e9),
    "v5p": Chip(95e9, 459e12, 2765e9, 600e9),
    "v6e": Chip(32e9, 918e12, 1640e9, 448e9),
}


class Need(NamedTuple):
    """What a program asks of each chip."""

    flops: float  # of matrix products
    memory: float  # bytes read and written, at least
    sent: dict[str, tuple[int, float]]  # of each kind of collective: how many are run, and the bytes a chip receives

    def seconds(self, chip: Chip) -> dict[str, float]:
        """The least time by what could bound it, each alone; a program takes at least the longest."""
        received = sum(size for _, size in self.sent.values())
        return {
            "compute": self.flops / chip.flops,
            "memory": self.memory / chip.bandwidth,
            "interconnect": received / chip.links,
        }


def devices(topology: str, number: int) -> Sequence[jax.Device]:
    """The first devices of a topology such as `v5p:2x2x1`, which need not be there.

    Raises:
      ImportError: without the TPU's compiler.
      ValueError: for a kind of chip that is not in `CHIPS`, a topology that the compiler refuses, or too few chips.
    """
    if topology.partition(":")[0] not in CHIPS:
        raise ValueError(f"{topology!r} is none of {', '.join(CHIPS)}, with its shape behind a colon: v5p:2x2x1")
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError("the TPU's compiler is not installed: pip install 'grpo-jax[tpu]', on any machine")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"{topology} is no topology of the TPU's compiler: {str(error).splitlines()[0]}") from error
    if number > len(found):
        raise ValueError(f"the mesh has {number} devices and {topology} {len(found)}")
    return found[:number]


# --------------------------------------------------------------- matrix products, from the traced program


def flops(jaxpr: Any, *, turns: int = 1) -> float:
    """Operations of the matrix products of a traced program, over all devices, what is computed again included.

    Where the program is another on each platform, of that for TPUs.

    Args:
      jaxpr: of the program; what nothing reads, as the sweep that only counts, is left out, as XLA does.
      turns: of loops whose number of turns is known only when they run, those of decoding, all together.
    """
    jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _flops(jaxpr, turns / max(1, _loops(jaxpr)))


def _loops(jaxpr: Any) -> int:
    here = sum(eqn.primitive.name == "while" for eqn in jaxpr.eqns)
    return here + sum(
        _loops(inner) for eqn in jaxpr.eqns if eqn.primitive.name != "while" for inner in _inner(eqn.params)
    )


def _flops(jaxpr: Any, turns: float) -> float:
    total = 0.0
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)
        elif name == "ragged_dot_general":  # of experts: a row is multiplied with one group's matrix
            numbers = params["ragged_dot_dimension_numbers"]
            (_, contracted), (_, batch) = numbers.dot_dimension_numbers
            shared = {*contracted, *batch, *numbers.rhs_group_dimensions}
            rows, kernels = (x.aval.shape for x in eqn.invars[:2])
            total += 2 * math.prod(rows) * math.prod(n for axis, n in enumerate(kernels) if axis not in shared)
        elif name == "while":
            total += turns * _flops(params["body_jaxpr"].jaxpr, turns)
        elif name == "cond":
            branches = params["branches"]
            if platforms := params.get("branches_platforms"):
                named = zip(branches, platforms, strict=True)
                branches = [branch for branch, names in named if names is None or "tpu" in names]
            total += max(_flops(branch.jaxpr, turns) for branch in branches)
        else:
            times = params.get("length", 1) if name == "scan" else 1
            if name == "shard_map":
                times = math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
            if name == "pallas_call":
                times = math.prod(params["grid_mapping"].grid)
            total += times * sum(_flops(inner, turns) for inner in _inner(params))
    return total


def _inner(params: Any) -> Iterator[Any]:
    for name, value in params.items():
        inner = getattr(value, "jaxpr", value)
        if hasattr(inner, "eqns") and "fwd" not in name and "bwd" not in name:
            yield inner


# --------------------------------------------------------------- collectives, from the compiled program

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_WIDTHS = {
    "pred": 1,
    "s4": 0.5,
    "u4": 0.5,
    "s8": 1,
    "u8": 1,
    "bf16": 2,
    "f16": 2,
    "s16": 2,
    "u16": 2,
    "s64": 8,
    "u64": 8,
}
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_COLLECTIVE = re.compile(rf"= (\(?.*?\)?) ({'|'.join(KINDS)})(-start)?\(")
_CHAIN = re.compile(r'chain_id="(\d+)"')  # of a collective that begins and ends in several computations
_CALLED = re.compile(r"(?:(?:calls|to_apply|condition|body)=%([\w.\-]+)|branch_computations=\{([^}]*)\})")


def collectives(program: Compiled) -> dict[str, tuple[int, float]]:
    """How often each kind of collective runs, and the bytes that a chip receives by it.

    Of `n` chips, a gather brings `(n - 1) / n` of its result, a sum twice that of its operand, a scattered sum once,
    by rings. A loop counts as often as it turns at most, and a collective that begins, goes on and ends in computations
    of their own once.
    """
    text = program.as_text()
    assert text is not None
    bodies, entry = _computations(text)
    found = dict.fromkeys(KINDS, (0, 0.0))
    waiting, counted = [(entry, 1.0)], set()
    while waiting:
        name, times = waiting.pop()
        for line in bodies.get(name, ()):
            match, chain = _COLLECTIVE.search(line), _CHAIN.search(line)
            if match and not (chain and chain[1] in counted):
                counted |= {chain[1]} if chain else set()
                kind, received = _received(name, line, *match.groups())
                count, size = found[kind]
                found[kind] = count + round(times), size + times * received
            of_body = times
            if " while(" in line:
                of_body *= _most_turns(bodies, line)
            for one, several in _CALLED.findall(line):
                names = [one] if one else [name.strip(" %") for name in several.split(",")]
                waiting += [(name, of_body) for name in names]
    return {kind: number for kind, number in found.items() if number[0]}


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    bodies: dict[str, list[str]] = {}
    name = entry = ""
    for line in text.splitlines():
        if match := _HEAD.match(line):
            name = match[2]
            bodies[name] = []
            entry = name if match[1] else entry
        elif name:
            bodies[name].append(line)
    return bodies, entry


def _most_turns(bodies: dict[str, list[str]], loop: str) -> int:
    """What a loop's counter is compared with, over what a turn adds to it."""
    condition, body = (re.findall(rf"{name}=%([\w.\-]+)", loop) for name in ("condition", "body"))
    waiting, limits, counters = [*condition], [1], set()
    while waiting:
        for line in bodies[waiting.pop()]:
            limits += [int(n) for n in re.findall(r"= [su]32\[\]\S* constant\((\d+)\)", line)]
            counters |= {int(n) for n in re.findall(r"= [su]32\[\].* get-tuple-element\(.*index=(\d+)", line)}
            waiting += re.findall(r"calls=%([\w.\-]+)", line)
    steps = [_added(bodies.get(name, []), counter) for name in body for counter in counters]
    return math.ceil(max(limits) / max([1, *steps]))


def _added(body: list[str], counter: int) -> int:
    """What the body of a loop adds to one of its numbers; 0 where it is not read."""
    lines = {match[1]: line for line in body if (match := re.match(r"\s*(?:ROOT )?%([\w.\-]+) = ", line))}
    root = next((line for line in body if line.lstrip().startswith("ROOT")), "")
    of_tuple = re.findall(r"%([\w.\-]+)", root.partition(" tuple(")[2].partition(")")[0])
    name, added = (of_tuple[counter] if counter < len(of_tuple) else ""), 0
    while sum_ := re.search(r" add\(%([\w.\-]+), %([\w.\-]+)\)", lines.get(name, "")):
        name, constant = sum_[1], re.search(r" constant\((\d+)\)", lines.get(sum_[2], ""))
        added += int(constant[1]) if constant else 0
    return added if re.search(rf" get-tuple-element\(.*index={counter}\b", lines.get(name, "")) else 0


def _received(computation: str, line: str, result: str, kind: str, start: str | None) -> tuple[str, float]:
    sizes = _sizes(result)
    if kind == "collective-permute":
        return kind, max(sizes)
    size = max(sizes) if start else sum(sizes)
    n = _group_size(line)
    if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):  # as TPUs' programs have it
        return "reduce-scatter", size * (n - 1) / n
    if kind == "reduce-scatter":
        size *= n
    return kind, size * (n - 1) / n * (2 if kind == "all-reduce" else 1)


def _group_size(line: str) -> int:
    """Of the chips that take part, in any of the ways in which programs write it."""
    if groups := re.search(r"replica_groups=\{\{([\d,]+)\}", line):  # {{0,1},{2,3}}
        return groups[1].count(",") + 1
    if groups := re.search(r"replica_groups=\[\d+,(\d+)\]", line):  # [2,2]<=[4]
        return int(groups[1])
    # mesh['a'=2,'b'=2] {'b'}, and mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'} where their order is another
    if groups := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^{]*\))? \{([^}]*)\}", line):
        sizes = dict(re.findall(r"('\w+')=(\d+)", groups[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'\w+'", groups[2]))
    raise ValueError(f"the chips that take part are not told in a form that is known: {line.strip()[:300]}")


# ------------------------------------------------------------------- memory, from the compiled program


class _Instruction(NamedTuple):
    kind: str
    result: str  # its shape, or those of its tuple
    operands: list[str]
    line: str


# Names of what lies elsewhere, and the ends of what another instruction has begun.
_FREE = {"parameter", "constant", "iota", "tuple", "get-tuple-element", "bitcast", "copy-done", "slice-done"}
_SLICES = ("dynamic-slice", "slice", "gather")  # which read no more than their result


def bytes_of_a_turn(program: Compiled, turns: int) -> float:
    """Bytes that a chip reads from its memory and writes to it in a turn of the loop that turns so often at most.

    Each instruction reads its operands and writes its result, a fusion those of all that is in it; of what is sliced or
    updated in place that part. What lies in the memory on the chip (`S(1)` in a TPU's program) is not counted, and
    loops within count as often as they turn. Of several loops it is the one with the most bytes.

    Raises:
      ValueError: if no loop turns so often.
    """
    text = program.as_text()
    assert text is not None
    bodies, _ = _computations(text)
    read = {name: _instructions(lines) for name, lines in bodies.items()}
    loops = [line for lines in bodies.values() for line in lines if " while(" in line]
    found = [_accessed(bodies, read, _called(line, "body")) for line in loops if _most_turns(bodies, line) == turns]
    if not found:
        raise ValueError(f"no loop of the program turns {turns} times")
    return max(found)


def _instructions(lines: list[str]) -> dict[str, _Instruction]:
    """The instructions of a computation by name, of which the last is its result."""
    found, last = {}, None
    for line in lines:
        if match := re.match(r"\s*(ROOT )?%([\w.\-]+) = (.*)", line):
            of_shape = _closed(match[3]) if match[3].startswith("(") else match[3].index(" ")
            result, rest = match[3][:of_shape], match[3][of_shape:].lstrip()
            kind, _, rest = rest.partition("(")
            operands = rest[: _closed("(" + rest) - 2]
            made = _Instruction(kind, result, re.findall(r"%([\w.\-]+)", operands) or [operands], line)
            found[match[2]] = made
            last = match[2] if match[1] else last
    if last is not None:
        found[last] = found.pop(last)
    return found


def _closed(text: str) -> int:
    """Where the parenthesis that a text begins with has been closed."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return place + 1
    raise ValueError(f"a parenthesis is not closed: {text[:300]}")


def _called(line: str, name: str) -> str:
    return re.findall(rf"{name}=%([\w.\-]+)", line)[0]


def _accessed(bodies: dict[str, list[str]], read: dict[str, dict[str, _Instruction]], name: str) -> float:
    """What the instructions of a computation read and write."""
    total, here = 0.0, read[name]
    for made in here.values():
        if made.kind == "while":
            total += _most_turns(bodies, made.line) * _accessed(bodies, read, _called(made.line, "body"))
        elif made.kind in ("call", "conditional"):
            names = [name.strip(" %") for pair in _CALLED.findall(made.line) for name in ",".join(pair).split(",")]
            total += max(_accessed(bodies, read, name) for name in names if name)
        elif made.kind not in _FREE:
            total += _moved(read, here, made)
    return total


def _moved(read: dict[str, dict[str, _Instruction]], here: dict[str, _Instruction], made: _Instruction) -> float:
    """What one instruction reads and writes."""
    operands = [sum(_sizes(here[name].result, held=True)) for name in made.operands if name in here]
    results = _sizes(made.result, held=True)
    if made.kind == "fusion":
        inner = _called(made.line, "calls")
        parts = [_read(read, inner, n)[0] for n in range(len(operands))]
        written = _written(read, inner)
        return sum(map(min, operands, parts)) + sum(map(min, results, written))
    if made.kind == "copy-start":  # (to, from, its mark)
        return operands[0] + results[0]
    if made.kind == "slice-start":  # ((from), to, its mark)
        return min(operands[0], _sizes(made.result)[1]) + results[1]
    if made.kind in _SLICES:
        return min(operands[0], _sizes(made.result)[0]) + sum(operands[1:]) + results[0]
    if made.kind == "dynamic-update-slice":
        return sum(operands[1:]) + min(results[0], *_sizes(here[made.operands[1]].result))
    return sum(operands) + sum(results)


def _read(read: dict[str, dict[str, _Instruction]], name: str, number: int) -> tuple[float, bool]:
    """Of a fusion's parameter: bytes that are read, infinite for all of it; and whether it is the result as well."""
    here = read[name]
    last = next(reversed(here))
    total, waiting = 0.0, [key for key, x in here.items() if x.kind == "parameter" and x.operands == [str(number)]]
    is_result = last in waiting
    while waiting:
        place = waiting.pop()
        for key, user in here.items():
            for n, operand in enumerate(user.operands):
                if operand != place or user.kind == "parameter":
                    continue
                passes = user.kind == "bitcast"
                if user.kind in _SLICES and n == 0:
                    total += sum(_sizes(user.result))
                elif user.kind == "fusion":
                    part, passes = _read(read, _called(user.line, "calls"), n)
                    total += part
                elif not (passes or (user.kind == "dynamic-update-slice" and n == 0)):
                    total = math.inf
                if passes:
                    waiting.append(key)
                    is_result |= key == last
    return total, is_result


def _written(read: dict[str, dict[str, _Instruction]], name: str) -> list[float]:
    """Of each result of a fusion: bytes that are written, infinite for all of it."""
    here = read[name]

    def of(key: str) -> float:
        made = here[key]
        if made.kind == "bitcast":
            return of(made.operands[0])
        if made.kind == "fusion" and len(found := _written(read, _called(made.line, "calls"))) == 1:
            return found[0]
        return _sizes(here[made.operands[1]].result)[0] if made.kind == "dynamic-update-slice" else math.inf

    last = next(reversed(here))
    return [of(key) for key in here[last].operands] if here[last].kind == "tuple" else [of(last)]


def _sizes(shapes: str, *, held: bool = False) -> list[float]:
    """Bytes of each of the arrays of a shape; with `held` 0 of what does not lie in the chip's memory."""
    sizes = []
    for dtype, dims, layout in re.findall(r"([a-z]+\d*\w*)\[([\d,]*)\](\{[^}]*\})?", shapes):
        elsewhere = held and re.search(r"S\([1-9]", layout) is not None
        width = _WIDTHS.get(dtype, 1 if dtype.startswith("f8") else 4)
        sizes.append(0.0 if elsewhere else width * math.prod(int(n) for n in dims.split(",") if n))
    return sizes


def table(name: str, need: Need, chip: Chip) -> str:
    """A program's needs, a line an item."""
    seconds = need.seconds(chip)
    bound = max(seconds, key=lambda kind: seconds[kind])
    lines = [
        f"{name}, of each chip: at least {seconds[bound]:.3g} s, bound by {bound}",
        f"  matrix products {need.flops / 1e12:.3g} TFLOP: {seconds['compute']:.3g} s",
        f"  memory, at least {need.memory / 2**30:.3g} GiB: {seconds['memory']:.3g} s",
        f"  interconnect: {seconds['interconnect']:.3g} s",
        *(f"    {count} {kind}: {size / 2**30:.3g} GiB" for kind, (count, size) in need.sent.items()),
    ]
    return "\n".join(lines)
