"""Values by what they hold: whether two are the same, their fingerprint, how provenance writes them down.

Python's own answers do not work for tensors: ``==`` gives a tensor, ``repr`` leaves most numbers out and ``hash`` goes
by address. What decides whether something may be used again, or has to be made anew, goes by :func:`fingerprint`.
"""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Hashable, Iterator, Mapping, Set
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import PurePath
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dfa_lens.errors import DfaError, short

# --- equality ------------------------------------------------------------------------------------------------------


def same(a: object, b: object) -> bool:
    """Whether two values hold the same, tensors and arrays number by number (in shape, dtype and value)."""
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.detach().cpu(), b.detach().cpu())
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind in "fc")
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same(value, b[key]) for key, value in a.items())
    if (isinstance(a, list) and isinstance(b, list)) or (isinstance(a, tuple) and isinstance(b, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, (Tensor, np.ndarray)) or isinstance(b, (Tensor, np.ndarray)):
        return False
    return bool(a == b)


class ByContent:
    """A class whose ``==`` goes by what an object holds, tensors among it.

    Of a dataclass (declared with ``eq=False``) that is every field but those with ``compare=False``, which are
    provenance; any other class says it in ``_content``. The hash is made of the part that can't change in place, of
    tensors the shape alone: equal objects have equal hashes, and an object stays where it is in a dictionary.
    """

    def _content(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in _compared(self))

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return self is other or same(self._content(), other._content())

    def __hash__(self) -> int:
        return hash((type(self).__qualname__, _steady(self._content())))


def _compared(value: Any) -> list[str]:
    return [field.name for field in fields(value) if field.compare]


def _steady(value: object) -> object:
    """The part of a value that can be hashed and is equal for equal values."""
    if isinstance(value, tuple):
        return tuple(map(_steady, value))
    if isinstance(value, (Tensor, np.ndarray)):
        return tuple(value.shape)
    return value if isinstance(value, Hashable) else None


def float_copy(values: Any, what: str, error: type[DfaError]) -> Tensor:
    """Numbers of any kind as a float32 tensor on the CPU that shares no memory with them; else ``error``."""
    try:
        tensor = torch.as_tensor(np.array(values) if isinstance(values, np.ndarray) else values)
    except (TypeError, ValueError, RuntimeError) as reason:
        raise error(f"{what} must be numbers: {short(reason)}.") from reason
    if tensor.is_complex():
        raise error(f"{what} must be real numbers, not {tensor.dtype}.")
    return tensor.detach().to(device="cpu", dtype=torch.float32, copy=True)


# --- fingerprints --------------------------------------------------------------------------------------------------


def fingerprint(value: object) -> str:
    """32 hexadecimal digits that are equal for equal values, on every machine and in every process.

    Parameters
    ----------
    value:
        Numbers, texts, None, enums, dtypes, devices and paths; tensors and arrays (dtype, shape and bytes);
        mappings (in any order), sequences (a list and a tuple are alike) and sets; dataclasses (type, and the fields
        that count for equality); our node sets, scores and alignments; functions and classes. A function that can be
        imported goes by its module and name; a lambda, one defined in another function or in ``__main__`` also by its
        code, defaults and what it closes over. What a function reads from outside is not seen.

    Raises
    ------
    DfaError
        If the value, or one inside it, is of no such kind: nothing then tells two of them apart.

    Examples
    --------
    >>> import torch
    >>> from dfa_lens.data.content import fingerprint
    >>> fingerprint({"W": torch.zeros(2), "lr": 0.1}) == fingerprint({"lr": 0.1, "W": torch.zeros(2)})
    True
    >>> fingerprint(torch.zeros(1000)) == fingerprint(torch.cat([torch.zeros(999), torch.ones(1)]))
    False
    """
    digest = hashlib.blake2b(digest_size=16)
    try:
        for part in _parts(value):
            digest.update(part)
    except RecursionError:
        raise DfaError("A value that holds itself, or is nested too deeply, has no fingerprint.") from None
    return digest.hexdigest()


def _tagged(tag: str, data: bytes | str = b"") -> bytes:
    """One part, with its kind and length before it, so that no two different sequences of parts are alike."""
    raw = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    return f"{tag}:{len(raw)}:".encode() + raw


def _parts(value: object) -> Iterator[bytes]:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Enum):
        yield _tagged("enum", f"{_name(type(value))}.{value.name}")
    elif value is None or isinstance(value, (bool, int, float, complex)):
        yield _tagged(type(value).__name__, repr(value))
    elif isinstance(value, (torch.dtype, torch.device, PurePath, slice, range)):
        yield _tagged(type(value).__name__, str(value))
    elif isinstance(value, (str, bytes)):
        yield _tagged("str" if isinstance(value, str) else "bytes", value)
    elif isinstance(value, Tensor):
        yield _tagged("tensor", f"{value.dtype} {list(value.shape)}")
        yield _tagged("data", _bytes(value))
    elif isinstance(value, np.ndarray):
        yield from _array(value)
    elif isinstance(value, ByContent):
        yield _tagged("object", _name(type(value)))
        yield from _parts(value._content())
    elif is_dataclass(value) and not isinstance(value, type):
        yield _tagged("dataclass", _name(type(value)))
        for name in _compared(value):
            yield _tagged("field", name)
            yield from _parts(getattr(value, name))
    elif isinstance(value, (Mapping, Set)):
        items = value.items() if isinstance(value, Mapping) else value
        yield _tagged("mapping" if isinstance(value, Mapping) else "set", str(len(value)))
        for each in sorted(fingerprint(item) for item in items):
            yield each.encode()
    elif isinstance(value, (list, tuple)):
        yield _tagged("sequence", str(len(value)))
        for item in value:
            yield from _parts(item)
    else:
        yield from _callable(value)


def _bytes(tensor: Tensor) -> bytes:
    try:
        # a clone, since a tensor of one number counts as contiguous whatever its strides, and can't be viewed as bytes
        dense = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        return dense.reshape(-1).view(torch.uint8).numpy().tobytes()
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise DfaError(f"A tensor of layout {tensor.layout} on {tensor.device} has no bytes to compare.") from error


def _array(array: np.ndarray) -> Iterator[bytes]:
    yield _tagged("array", f"{array.dtype.str} {list(array.shape)}")
    if array.dtype.hasobject:
        yield from _parts(array.tolist())
    else:
        yield _tagged("data", array.tobytes())


def _callable(value: object) -> Iterator[bytes]:
    if isinstance(value, functools.partial):
        yield _tagged("partial")
        yield from _parts((value.func, value.args, value.keywords))
    elif isinstance(value, MethodType):
        yield _tagged("method", value.__func__.__qualname__)
        yield from _parts((value.__func__, value.__self__))
    elif isinstance(value, (type, BuiltinFunctionType)):
        yield _tagged("name", _name(value))
    elif isinstance(value, FunctionType):
        yield _tagged("function", _name(value))
        if not _can_be_imported(value):
            cells = [cell.cell_contents for cell in value.__closure__ or ()]
            yield from _code(value.__code__)
            yield from _parts((value.__defaults__, value.__kwdefaults__, cells))
    else:
        raise DfaError(
            f"Nothing tells two objects of type {_name(type(value))} apart: use a dataclass, or a function at module "
            "level."
        )


def _code(code: CodeType) -> Iterator[bytes]:
    yield _tagged("code", code.co_code)
    yield from _parts(code.co_names)
    for constant in code.co_consts:
        yield from _code(constant) if isinstance(constant, CodeType) else _parts(constant)


def _name(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"


def _can_be_imported(function: FunctionType) -> bool:
    """Whether another process finds this very function under its name."""
    found: Any = sys.modules.get(function.__module__) if function.__module__ != "__main__" else None
    for part in function.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is function


# --- provenance ----------------------------------------------------------------------------------------------------


def plain(value: object) -> Any:
    """The value as JSON holds it, for metadata: what is large is named by its fingerprint.

    Dataclasses become mappings with their type, tensors and arrays "float32[2, 3] <fingerprint>", functions and classes
    their names. Never raises: an object that has no fingerprint is named by its type.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> from dfa_lens.data.content import plain
    >>> plain(dfa.forms.LowRank(rank=2))
    {'type': 'LowRank', 'rank': 2}
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Enum):
        return value.name
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (Tensor, np.ndarray)):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)} {_fingerprint_or_nothing(value)}".rstrip()
    if is_dataclass(value) and not isinstance(value, type):
        return {"type": type(value).__name__, **{name: plain(getattr(value, name)) for name in _compared(value)}}
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, (type, FunctionType, BuiltinFunctionType)):
        return _name(value)
    if isinstance(value, (torch.dtype, torch.device, PurePath)):
        return str(value)
    return f"{type(value).__qualname__} {_fingerprint_or_nothing(value)}".rstrip()


def _fingerprint_or_nothing(value: object) -> str:
    try:
        return fingerprint(value)
    except DfaError:
        return ""
