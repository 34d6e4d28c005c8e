"""What the names in a pickle of ``torch.save`` mean here: values and functions of our own.

A list of what is allowed, and the only one: names are compared as text. Tensors become
:class:`LazyTensor`, held against the storage in which they say they lie. What a module hangs on its
tensors or dictionaries (hooks, attributes, ``_metadata``) is left out.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_hmem.files import is_shape, is_whole

from .pickle_machine import Function, Opaque, put
from .tensors import ITEM_SIZES, LazyTensor, row_major

# An expanded tensor lies over itself, with strides of 0. Beyond this many times the bytes it lies
# in, a small file would become a large one.
MAX_SHARING = 16
SMALL = 1 << 24  # bytes that need no such limit
MAX_KEY = 512  # characters of a storage's name

STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8",
    "ByteStorage": "U8", "BoolStorage": "BOOL", "ComplexFloatStorage": "C64",
}  # fmt: skip
TYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64",
    "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL", "uint16": "U16",
    "uint32": "U32", "uint64": "U64", "complex64": "C64", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip
NUMPY_CODES = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")


@dataclass(frozen=True)
class StorageClass:
    """A class of storages; dtype None: bytes without a type."""

    dtype: str | None


@dataclass(frozen=True)
class Storage:
    """A storage: ``size`` bytes from ``start`` in the file."""

    path: Path
    dtype: str | None
    start: int
    size: int


def check_reference(reference: Any, length: int) -> tuple[StorageClass, str, int]:
    """Class, key and bytes of the storage that a persistent id of so many parts refers to."""
    if type(reference) is not tuple or len(reference) != length or reference[0] != "storage":
        raise ValueError("its pickle refers to what is no storage")
    kind, key, _, count = reference[1:5]
    if type(kind) is Opaque:
        raise ValueError(f"its pickle has a storage that is a {kind.name!r}, which is not read")
    if type(kind) is not StorageClass:
        raise ValueError("its pickle refers to what is no storage")
    if type(key) is not str or len(key) > MAX_KEY or not is_whole(count):
        raise ValueError("its pickle refers to a wrong storage")
    return kind, key, count * ITEM_SIZES[kind.dtype or "U8"]


class _Type(str):
    """A torch.dtype: as a value its name."""


class _Ordered(dict):
    """An OrderedDict."""

    def set_state(self, state: Any) -> None:
        """Attributes such as a state dict's ``_metadata`` are left out."""


class _NumpyType:
    """numpy.dtype of a number; ``set_state`` tells its byte order."""

    def __init__(self, code: str):
        self.code = code

    def set_state(self, state: Any) -> None:
        if type(state) is not tuple or len(state) < 2 or state[1] not in ("<", "|"):
            raise ValueError("its pickle has a number in another byte order")


def _tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, dtype: str | None, metadata: Any
) -> LazyTensor:
    """The tensor of ``shape`` at element ``offset`` of a storage, if it lies inside."""
    if type(storage) is not Storage or dtype is None or not is_whole(offset):
        raise ValueError("its pickle has a tensor without a storage")
    if metadata:
        raise ValueError("its pickle has a conjugated or negated view")
    # Seen before they are shown: what nests has no end as text.
    if not all(type(v) is tuple and all(type(n) is int for n in v) for v in (shape, strides)):
        raise ValueError("its pickle has a tensor whose shape or strides are no numbers")
    if not is_shape(shape):
        raise ValueError(f"its pickle has a tensor of the shape {str(shape)[:80]}")
    if len(strides) != len(shape) or not all(is_whole(stride) for stride in strides):
        raise ValueError(f"its pickle has a tensor with the strides {str(strides)[:80]}")
    count, item = math.prod(shape), ITEM_SIZES[dtype]
    if not count:
        return LazyTensor(storage.path, storage.start, dtype, shape)
    span = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if (offset + span) * item > storage.size:
        raise ValueError(f"a tensor of the shape {str(shape)[:80]} lies outside its storage")
    if count * item > max(MAX_SHARING * span * item, SMALL):
        raise ValueError(f"a tensor of the shape {str(shape)[:80]} repeats {span} elements")
    # The stride of an axis of one row says nothing.
    plain = all(
        stride == usual or n == 1
        for n, stride, usual in zip(shape, strides, row_major(shape), strict=True)
    )
    start = storage.start + offset * item
    return LazyTensor(storage.path, start, dtype, shape, None if plain else strides)


def _tensor_v1(storage: Any, offset: Any, shape: Any, strides: Any) -> LazyTensor:
    return _tensor_v2(storage, offset, shape, strides, False, None)


def _tensor_v2(
    storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, metadata: Any = None
) -> LazyTensor:
    dtype = storage.dtype if type(storage) is Storage else None
    return _tensor(storage, offset, shape, strides, dtype, metadata)


def _tensor_v3(
    storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any,
    metadata: Any = None,
) -> LazyTensor:  # fmt: skip
    if type(dtype) is not _Type:
        raise ValueError("its pickle has a tensor without a type")
    name = TYPES[dtype.removeprefix("torch.")]  # :data:`NAMES` alone makes types
    return _tensor(storage, offset, shape, strides, name, metadata)


def _other_tensor(*ignored: Any) -> LazyTensor:
    """What is a tensor is not passed over as a stranger's class is: the model would lack it."""
    raise ValueError("its pickle has a sparse, nested or quantised tensor, which is not read")


def _parameter(tensor: Any, *ignored: Any) -> LazyTensor:
    if type(tensor) is not LazyTensor:
        raise ValueError("its pickle has a parameter that is no tensor")
    return tensor


def _with_attributes(function: Any, kind: Any, arguments: Any, state: Any) -> LazyTensor:
    """A tensor with attributes of its own: ``function(*arguments)``."""
    if kind is not TENSOR_CLASS or type(arguments) is not tuple or function not in REBUILD:
        raise ValueError("its pickle has a tensor of another class")
    rebuilt: LazyTensor = function(*arguments)
    return rebuilt


def _ordered(pairs: Any = ()) -> _Ordered:
    result = _Ordered()
    if type(pairs) not in (list, tuple) or any(
        type(pair) not in (list, tuple) or len(pair) != 2 for pair in pairs
    ):
        raise ValueError("its pickle has a dictionary of what are no pairs")
    for key, value in pairs:
        put(result, key, value)
    return result


def _size(sizes: Any = ()) -> tuple[int, ...]:
    if type(sizes) not in (list, tuple) or not all(is_whole(n) for n in sizes):
        raise ValueError("its pickle has a wrong size")
    return tuple(sizes)


def _device(kind: Any, index: Any = None) -> str:
    if type(kind) is not str or not (index is None or is_whole(index, 2**16)):
        raise ValueError("its pickle has a wrong device")
    return kind if index is None else f"{kind[:80]}:{index}"


def _encode(text: Any, encoding: Any) -> bytes:
    """How protocol 2 writes bytes."""
    if type(text) is not str or encoding != "latin1":
        raise ValueError("its pickle has wrong bytes")
    return text.encode("latin1")  # UnicodeEncodeError is a ValueError


def _numpy_type(code: Any, *ignored: Any) -> _NumpyType:
    if type(code) is not str or code not in NUMPY_CODES:
        raise ValueError("its pickle has a NumPy type that is no number")
    return _NumpyType(code)


def _numpy_number(kind: Any, data: Any) -> int | float | bool:
    right = type(kind) is _NumpyType and type(data) is bytes
    if not right or len(data) != np.dtype(kind.code).itemsize:
        raise ValueError("its pickle has a wrong NumPy number")
    return np.frombuffer(data, f"<{kind.code}").item()


TENSOR_CLASS = object()  # torch.Tensor and Parameter, named where a tensor has attributes
OTHERS = ("sparse_tensor", "sparse_csr_tensor", "nested_tensor", "qtensor", "wrapper_subclass",
          "meta_tensor_no_storage", "device_tensor_from_numpy", "device_tensor_from_cpu_tensor",
          "xla_tensor")  # fmt: skip
TENSOR_V2, TENSOR_V3 = Function(_tensor_v2, 6, 7), Function(_tensor_v3, 7, 8)
REBUILD = (TENSOR_V2, TENSOR_V3)
NUMBER = Function(_numpy_number, 2, 2)
NAMES: dict[str, Any] = {
    "collections.OrderedDict": Function(_ordered, 0, 1),
    "torch._utils._rebuild_tensor": Function(_tensor_v1, 4, 4),
    "torch._utils._rebuild_tensor_v2": TENSOR_V2,
    "torch._utils._rebuild_tensor_v3": TENSOR_V3,
    "torch._utils._rebuild_parameter": Function(_parameter, 3, 3),
    "torch._utils._rebuild_parameter_with_state": Function(_parameter, 4, 4),
    "torch._tensor._rebuild_from_type_v2": Function(_with_attributes, 4, 4),
    "torch.Tensor": TENSOR_CLASS,
    "torch.nn.parameter.Parameter": TENSOR_CLASS,
    "torch.nn.parameter.Buffer": TENSOR_CLASS,
    "torch.storage.UntypedStorage": StorageClass(None),
    "torch.Size": Function(_size, 0, 1),
    "torch.device": Function(_device, 1, 2),
    "_codecs.encode": Function(_encode, 2, 2),
    "numpy.dtype": Function(_numpy_type, 1, 3),
    "numpy.core.multiarray.scalar": NUMBER,
    "numpy._core.multiarray.scalar": NUMBER,
}
NAMES |= {f"torch._utils._rebuild_{name}": Function(_other_tensor, 0, 20) for name in OTHERS}
NAMES |= {f"torch.{name}": StorageClass(dtype) for name, dtype in STORAGES.items()}
NAMES |= {f"torch.{name}": _Type(f"torch.{name}") for name in TYPES}
