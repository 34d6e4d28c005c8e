"""A pickle machine that cannot run code.

A pickle is a program: its opcodes build values on a stack, name classes and functions of any
module, and call them. This machine knows only the opcodes that ``torch.save`` writes, and a name
only if the caller gave a meaning for it: nothing is ever imported, looked up or called but the
caller's own functions on values. What any other name stands for, and what is made with it, is one
:class:`Opaque`, of which nothing is known but that name: an optimiser or a Namespace beside a
model's tensors is passed over. Whatever else a pickle asks for is an error. Sizes are bounded, so a
small file cannot fill the memory.
"""

import struct
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

MAX_PICKLE = 1 << 25  # bytes
MAX_STEPS = 5_000_000  # about 125,000 tensors; and things that functions are given at most
MAX_NAME = 256  # characters of a module or class name
KEYS = (str, int, float, bool, type(None))  # what hashes in a moment: tuples may nest


class Function:
    """A function of ours that a name of the pickle stands for."""

    def __init__(self, call: Callable[..., Any], fewest: int, most: int):
        self.call, self.fewest, self.most = call, fewest, most

    def __call__(self, *arguments: Any) -> Any:
        if not self.fewest <= len(arguments) <= self.most:
            raise ValueError("its pickle calls a function with a wrong number of arguments")
        return self.call(*arguments)


class Opaque:
    """What a name without a meaning stands for, and whatever a pickle makes with it. It is never
    built: its arguments, items and state are dropped."""

    __slots__ = ("name",)

    def __init__(self, name: str):
        self.name = name

    def set_state(self, state: Any) -> None:
        """Nothing is kept of it."""


@runtime_checkable
class Stateful(Protocol):
    """A value that BUILD may give a state."""

    def set_state(self, state: Any) -> None: ...


class Machine:
    """Runs one pickle; ``run`` returns its value or raises ValueError.

    names: what "module.name" means: a :class:`Function`, or a value as it is; any other name is
    :class:`Opaque`.
    persistent: makes a value of a persistent id. at: where in ``data`` the pickle begins.
    """

    def __init__(
        self, data: bytes, names: Mapping[str, Any], persistent: Callable[[Any], Any], at: int = 0
    ) -> None:
        self.data, self.names, self.persistent, self.at = data, names, persistent, at
        self.given = 0
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self, whole: bool = True) -> Any:
        """The value; ``whole``: nothing may come after it, else what does begins at ``at``."""
        if len(self.data) > MAX_PICKLE:
            raise ValueError(f"its pickle of {len(self.data)} bytes is larger than {MAX_PICKLE}")
        for _ in range(MAX_STEPS):
            opcode = self.take(1)
            if opcode == b".":
                return self.finish(whole)
            step = STEPS.get(opcode)
            if step is None:
                raise ValueError(f"its pickle has an opcode torch.save does not write: {opcode!r}")
            step(self)
        raise ValueError(f"its pickle takes more than {MAX_STEPS} steps")

    def finish(self, whole: bool) -> Any:
        value = self.pop()
        if self.stack or self.marks or (whole and self.at != len(self.data)):
            raise ValueError("its pickle goes on after its end")
        return value

    def take(self, length: int) -> bytes:
        start, self.at = self.at, self.at + length
        if self.at > len(self.data):
            raise ValueError("its pickle ends too early")
        return self.data[start : self.at]

    def number(self, form: struct.Struct) -> Any:
        return form.unpack(self.take(form.size))[0]

    def line(self) -> str:
        end = self.data.find(b"\n", self.at, self.at + MAX_NAME + 1)
        if end < 0:
            raise ValueError("its pickle has a name without an end")
        return self.take(end + 1 - self.at)[:-1].decode()

    def top(self) -> Any:
        if not self.stack:
            raise ValueError("its pickle takes a value where none is")
        return self.stack[-1]

    def pop(self) -> Any:
        self.top()
        return self.stack.pop()

    def pop_mark(self) -> list[Any]:
        if not self.marks:
            raise ValueError("its pickle takes a mark where none is")
        values, self.stack = self.stack, self.marks.pop()
        return values

    # What follows is one method per opcode, or per family of opcodes.

    def protocol(self) -> None:
        version = self.take(1)[0]
        if not 2 <= version <= 5:
            raise ValueError(f"its pickle has protocol {version}")

    def mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def tuple_of(self, length: int) -> None:
        values = [self.pop() for _ in range(length)]
        self.stack.append(tuple(reversed(values)))

    def tuple_of_mark(self) -> None:
        values = tuple(self.pop_mark())  # first: it changes which list the stack is
        self.stack.append(values)

    def extend(self, values: list[Any]) -> None:
        if type(self.top()) is list:
            self.top().extend(values)
        elif type(self.top()) is not Opaque:
            raise ValueError("its pickle appends to what is no list")

    def add_items(self) -> None:
        """Of a set, which is :class:`Opaque`: nothing of a model is one."""
        self.pop_mark()
        if type(self.top()) is not Opaque:
            raise ValueError("its pickle adds to what is no set")

    def frozen_set(self) -> None:
        self.pop_mark()
        self.stack.append(Opaque("builtins.frozenset"))

    def byte_array(self) -> None:
        self.take(self.number(U64))
        self.stack.append(Opaque("builtins.bytearray"))

    def set_item(self) -> None:
        value, key = self.pop(), self.pop()
        self.set_items([key, value])

    def set_items(self, values: list[Any]) -> None:
        target = self.top()
        if type(target) is Opaque:
            return
        if not isinstance(target, dict) or len(values) % 2:
            raise ValueError("its pickle puts items into what is no dictionary")
        for key, value in zip(values[::2], values[1::2], strict=True):
            put(target, key, value)

    def put(self, index: int) -> None:
        self.memo[index] = self.top()

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise ValueError("its pickle recalls a value it has not kept")
        self.stack.append(self.memo[index])

    def name(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise ValueError("its pickle has a name that is no text")
        full = f"{module[:MAX_NAME]}.{name[:MAX_NAME]}"
        self.stack.append(self.names[full] if full in self.names else Opaque(full[:80]))

    def stack_name(self) -> None:
        name, module = self.pop(), self.pop()
        self.name(module, name)

    def reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        if type(function) is Opaque:
            self.stack.append(function)
            return
        if not isinstance(function, Function) or type(arguments) is not tuple:
            raise ValueError("its pickle calls what is no function")
        # Kept values may be given again and again, each time to be copied.
        self.given += sum(len(a) for a in arguments if isinstance(a, list | tuple | str))
        if self.given > MAX_STEPS:
            raise ValueError(f"its pickle calls functions with more than {MAX_STEPS} things")
        self.stack.append(function(*arguments))

    def new(self, num_arguments: int) -> None:
        """An object of a class. None of ours is one: functions alone have a meaning."""
        for _ in range(num_arguments):
            self.pop()
        if type(self.top()) is not Opaque:
            raise ValueError("its pickle makes an object of what is no class")

    def build(self) -> None:
        state, target = self.pop(), self.top()
        if not isinstance(target, Stateful):
            raise ValueError("its pickle sets the state of what has none")
        target.set_state(state)


def put(target: dict[Any, Any], key: Any, value: Any) -> None:
    """Adds an item; ValueError for a key that is there already or is no plain value."""
    if type(key) not in KEYS:
        raise ValueError(f"its pickle has a key that is a {type(key).__name__}")
    if key in target:
        raise ValueError(f"its pickle has the key {str(key)[:80]!r} twice")
    target[key] = value


U8, U16, I32, U32, U64, F64 = (struct.Struct(form) for form in ("B", "<H", "<i", "<I", "<Q", ">d"))


def _push(make: Callable[[Machine], Any]) -> Callable[[Machine], None]:
    return lambda machine: machine.stack.append(make(machine))


def _number(form: struct.Struct) -> Callable[[Machine], None]:
    return _push(lambda machine: machine.number(form))


def _bytes(form: struct.Struct) -> Callable[[Machine], None]:
    return _push(lambda machine: machine.take(machine.number(form)))


def _text(form: struct.Struct) -> Callable[[Machine], None]:
    return _push(lambda machine: machine.take(machine.number(form)).decode())


STEPS: dict[bytes, Callable[[Machine], None]] = {
    b"\x80": Machine.protocol,
    b"\x95": lambda machine: machine.number(U64),  # FRAME: only a hint for buffering
    b"(": Machine.mark,
    b"N": _push(lambda machine: None),
    b"\x88": _push(lambda machine: True),
    b"\x89": _push(lambda machine: False),
    b"K": _number(U8),
    b"M": _number(U16),
    b"J": _number(I32),
    b"\x8a": _push(
        lambda machine: int.from_bytes(machine.take(machine.take(1)[0]), "little", signed=True)
    ),
    b"G": _number(F64),
    b"\x8c": _text(U8),
    b"X": _text(U32),
    b"\x8d": _text(U64),
    b"C": _bytes(U8),
    b"B": _bytes(U32),
    b"\x8e": _bytes(U64),
    b"]": _push(lambda machine: []),
    b"}": _push(lambda machine: {}),
    b"\x8f": _push(lambda machine: Opaque("builtins.set")),
    b"\x90": Machine.add_items,
    b"\x91": Machine.frozen_set,
    b"\x96": Machine.byte_array,
    b")": _push(lambda machine: ()),
    b"\x85": lambda machine: machine.tuple_of(1),
    b"\x86": lambda machine: machine.tuple_of(2),
    b"\x87": lambda machine: machine.tuple_of(3),
    b"t": Machine.tuple_of_mark,
    b"a": lambda machine: machine.extend([machine.pop()]),
    b"e": lambda machine: machine.extend(machine.pop_mark()),
    b"s": Machine.set_item,
    b"u": lambda machine: machine.set_items(machine.pop_mark()),
    b"q": lambda machine: machine.put(machine.number(U8)),
    b"r": lambda machine: machine.put(machine.number(U32)),
    b"\x94": lambda machine: machine.put(len(machine.memo)),
    b"h": lambda machine: machine.get(machine.number(U8)),
    b"j": lambda machine: machine.get(machine.number(U32)),
    b"c": lambda machine: machine.name(machine.line(), machine.line()),
    b"\x93": Machine.stack_name,
    b"R": Machine.reduce,
    b"\x81": lambda machine: machine.new(1),
    b"\x92": lambda machine: machine.new(2),
    b"b": Machine.build,
    b"Q": _push(lambda machine: machine.persistent(machine.pop())),
}
