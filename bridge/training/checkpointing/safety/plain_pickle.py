"""Reading a pickle as data: nothing that it names is imported, made or called.

Python's own unpickler runs what a file tells it to. This one knows the operations that pickling plain data needs,
and turns every object into a `Record` of what the file says about it: the name of its class, the arguments, the
state. What a record means is for the caller to decide. Only names that the caller lists may occur at all.

The operations are those of `pickletools`, protocols 2 to 5, less those that plain data never needs.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Container
from typing import Any

Name = tuple[str, str]
"""Module and name of something global."""

_PROTOCOLS = range(2, 6)
_LONGEST_INTEGER = 64
"""Bytes."""


class PickleError(ValueError):
    """The bytes are no pickle of plain data."""


class NameNotAllowedError(PickleError):
    """A pickle names something that is not in the caller's list."""

    def __init__(self, name: Name) -> None:
        super().__init__(f"it names {'.'.join(name)!r}")
        self.name = name


class Global:
    """Something global that a pickle names. Never looked up."""

    __slots__ = ("name",)

    def __init__(self, name: Name) -> None:
        self.name = name


class Record:
    """An object as a pickle describes it: something global called with arguments, and then given a state."""

    __slots__ = ("args", "name", "state")

    def __init__(self, name: Name, args: tuple[Any, ...]) -> None:
        self.name = name
        self.args = args
        self.state: Any = None


def parse(data: bytes, allowed: Container[Name]) -> Any:
    """What a pickle holds.

    Args:
        data: the pickle, with nothing after it.
        allowed: what it may name.

    Returns:
        None, booleans, numbers, text, bytes, and tuples, lists and dictionaries of them; objects as `Record`, and
        classes and functions as `Global`. Keys are text, integers and records only. The same list may occur in many
        places, and in itself.

    Raises:
        NameNotAllowedError: it names something else.
        PickleError: it is cut short, garbled, or uses an operation that plain data does not need.
    """
    machine = _Machine(data, allowed)
    operation = 0
    try:
        while operation != _STOP:
            operation = data[machine.position]
            machine.position += 1
            _OPERATIONS[operation](machine)
        (result,) = machine.stack
    except PickleError:
        raise
    except (IndexError, KeyError, ValueError, TypeError, AttributeError, struct.error, OverflowError) as error:
        raise PickleError(f"it is garbled before byte {machine.position}: {type(error).__name__}") from error
    if machine.position != len(data):
        raise PickleError(f"it has {len(data) - machine.position} bytes after its end")
    return result


class _Machine:
    __slots__ = ("allowed", "data", "marks", "memo", "position", "stack")

    def __init__(self, data: bytes, allowed: Container[Name]) -> None:
        self.data = data
        self.allowed = allowed
        self.position = 0
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        # A dictionary, because a file chooses the numbers.

    def take(self, size: int) -> bytes:
        """The next bytes."""
        start, end = self.position, self.position + size
        if end > len(self.data):
            raise PickleError("it is cut short")
        self.position = end
        return self.data[start:end]

    def line(self) -> str:
        """The text up to the next end of a line."""
        return self.take(self.data.index(b"\n", self.position) + 1 - self.position)[:-1].decode()

    def since_mark(self) -> list[Any]:
        """What was put on the stack since the last mark."""
        items = self.stack
        self.stack = self.marks.pop()
        return items


def _stop(machine: _Machine) -> None:
    pass


def _unknown(machine: _Machine) -> None:
    at = machine.position - 1
    raise PickleError(f"it uses an operation that plain data does not need: {machine.data[at]:#04x} at byte {at}")


def _pop(machine: _Machine) -> None:
    # Of a group that is under way, and of what came before it, nothing is there to be dropped.
    machine.stack.pop()


def _protocol(machine: _Machine) -> None:
    version = machine.take(1)[0]
    if version not in _PROTOCOLS:
        raise PickleError(f"it is of protocol {version}")


def _frame(machine: _Machine) -> None:
    machine.take(8)


def _mark(machine: _Machine) -> None:
    machine.marks.append(machine.stack)
    machine.stack = []


def _constant(value: Any) -> Callable[[_Machine], None]:
    def push(machine: _Machine) -> None:
        machine.stack.append(value)

    return push


def _empty_list(machine: _Machine) -> None:
    machine.stack.append([])


def _empty_dict(machine: _Machine) -> None:
    machine.stack.append({})


def _byte(machine: _Machine) -> None:
    machine.stack.append(machine.data[machine.position])
    machine.position += 1


def _number(layout: str) -> Callable[[_Machine], None]:
    reader = struct.Struct(layout)

    def push(machine: _Machine) -> None:
        machine.stack.append(reader.unpack_from(machine.data, machine.position)[0])
        machine.position += reader.size

    return push


def _long(machine: _Machine) -> None:
    size = machine.take(1)[0]
    if size > _LONGEST_INTEGER:
        raise PickleError(f"it holds an integer of {size} bytes")
    machine.stack.append(int.from_bytes(machine.take(size), "little", signed=True))


def _sized(length: str, convert: Callable[[bytes], Any]) -> Callable[[_Machine], None]:
    reader = struct.Struct(length)

    def push(machine: _Machine) -> None:
        size = reader.unpack_from(machine.data, machine.position)[0]
        machine.position += reader.size
        machine.stack.append(convert(machine.take(size)))

    return push


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


def _tuple_of(size: int) -> Callable[[_Machine], None]:
    def join(machine: _Machine) -> None:
        stack = machine.stack
        if len(stack) < size:
            raise IndexError
        stack[-size:] = [tuple(stack[-size:])]

    return join


def _tuple(machine: _Machine) -> None:
    items = machine.since_mark()
    machine.stack.append(tuple(items))


def _append(machine: _Machine) -> None:
    item = machine.stack.pop()
    _of_type(machine.stack[-1], list).append(item)


def _appends(machine: _Machine) -> None:
    items = machine.since_mark()
    _of_type(machine.stack[-1], list).extend(items)


def _set_item(machine: _Machine) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    _set(_of_type(machine.stack[-1], dict), key, value)


def _set_items(machine: _Machine) -> None:
    items = machine.since_mark()
    target = _of_type(machine.stack[-1], dict)
    for index in range(0, len(items), 2):
        _set(target, items[index], items[index + 1])


def _set(target: dict[Any, Any], key: Any, value: Any) -> None:
    # Hashing a deeply nested tuple would overflow the interpreter's stack.
    if type(key) is not str and type(key) is not int and type(key) is not Record:
        raise PickleError(f"it has a key of type {type(key).__name__}")
    target[key] = value


def _global(machine: _Machine) -> None:
    _push_global(machine, (machine.line(), machine.line()))


def _stack_global(machine: _Machine) -> None:
    name, module = machine.stack.pop(), machine.stack.pop()
    _push_global(machine, (_of_type(module, str), _of_type(name, str)))


def _push_global(machine: _Machine, name: Name) -> None:
    if name not in machine.allowed:
        raise NameNotAllowedError(name)
    machine.stack.append(Global(name))


def _make(machine: _Machine) -> None:
    args = machine.stack.pop()
    machine.stack[-1] = Record(_of_type(machine.stack[-1], Global).name, _of_type(args, tuple))


def _build(machine: _Machine) -> None:
    state = machine.stack.pop()
    _of_type(machine.stack[-1], Record).state = state


def _of_type(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise PickleError(f"it has a {type(value).__name__} where a {kind.__name__} belongs")
    return value


def _memoize(machine: _Machine) -> None:
    machine.memo[len(machine.memo)] = machine.stack[-1]


def _put(layout: str) -> Callable[[_Machine], None]:
    reader = struct.Struct(layout)

    def put(machine: _Machine) -> None:
        machine.memo[reader.unpack_from(machine.data, machine.position)[0]] = machine.stack[-1]
        machine.position += reader.size

    return put


def _get(layout: str) -> Callable[[_Machine], None]:
    reader = struct.Struct(layout)

    def get(machine: _Machine) -> None:
        machine.stack.append(machine.memo[reader.unpack_from(machine.data, machine.position)[0]])
        machine.position += reader.size

    return get


_STOP = ord(".")
_KNOWN: dict[bytes, Callable[[_Machine], None]] = {
    b".": _stop,
    b"0": _pop,
    b"\x80": _protocol,
    b"\x95": _frame,
    b"(": _mark,
    b"N": _constant(None),
    b"\x88": _constant(True),
    b"\x89": _constant(False),
    b")": _constant(()),
    b"]": _empty_list,
    b"}": _empty_dict,
    b"K": _byte,
    b"M": _number("<H"),
    b"J": _number("<i"),
    b"G": _number(">d"),
    b"\x8a": _long,
    b"\x8c": _sized("<B", _text),
    b"X": _sized("<I", _text),
    b"\x8d": _sized("<Q", _text),
    b"C": _sized("<B", bytes),
    b"B": _sized("<I", bytes),
    b"\x8e": _sized("<Q", bytes),
    b"\x85": _tuple_of(1),
    b"\x86": _tuple_of(2),
    b"\x87": _tuple_of(3),
    b"t": _tuple,
    b"a": _append,
    b"e": _appends,
    b"s": _set_item,
    b"u": _set_items,
    b"c": _global,
    b"\x93": _stack_global,
    b"R": _make,
    b"\x81": _make,
    b"b": _build,
    b"\x94": _memoize,
    b"q": _put("<B"),
    b"r": _put("<I"),
    b"h": _get("<B"),
    b"j": _get("<I"),
}
_OPERATIONS = [_KNOWN.get(bytes([code]), _unknown) for code in range(256)]
