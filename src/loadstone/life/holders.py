"""Who still refers to an object: variables, attributes and containers by name, as far as Python can tell.

Python's garbage collector knows which objects refer to one, and running functions are asked for their variables. What
C code holds (an array of NumPy's, a queue) nobody knows: that is "unknown". Knows no model; stops when its time is up.
"""

# No closure and no generator here may have the object that is looked for: the collector would find them as its holders.

from __future__ import annotations

import gc
import inspect
import sys
import threading
import time
from collections.abc import Mapping
from types import CellType, FrameType, FunctionType, GeneratorType, ModuleType
from typing import Any

UNKNOWN = "unknown: nothing that Python's garbage collector sees"
OUT_OF_TIME = "unknown: looking for it took too long"
DEEPEST = 4  # holders of holders, up to a variable
_CONTAINERS = (list, tuple, set, frozenset)


class Search:
    """Looks for holders, for at most `seconds` in all and a moment more; names at most `most` of each object.

    Frames of modules whose names begin with `ours` are its caller's own, and not named.
    """

    def __init__(self, *, seconds: float, most: int = 3, ours: str = "loadstone") -> None:
        self._until = time.monotonic() + seconds
        self._most, self._ours = most, ours
        self._skipped: set[int] = {id(vars(self))}

    def skip(self, mine: object) -> None:
        """Leave out `mine`, a container that the caller keeps the objects in."""
        self._skipped.add(id(mine))

    def holders(self, target: object) -> tuple[str, ...]:
        """Return who refers to `target`, in words."""
        if self._is_late:
            return (OUT_OF_TIME,)
        found = dict.fromkeys([*_variables(target, self._ours), *self._referring(target, self._most, 0)])
        return tuple(found)[: self._most] or (OUT_OF_TIME if self._is_late else UNKNOWN,)

    @property
    def _is_late(self) -> bool:
        return time.monotonic() > self._until

    def _referring(self, target: object, most: int, depth: int) -> list[str]:
        """Return up to `most` of those that refer to `target`, each with who has it in turn."""
        found: list[str] = []
        referrers = gc.get_referrers(target)
        self.skip(referrers)
        for one in referrers:
            if len(found) == most or self._is_late:
                break
            if id(one) in self._skipped or type(one) is FrameType:
                continue
            if _is_of_module(one):
                found.append(f"variable {_key_of(one, target)} of module {one['__name__']}")
                continue
            holder = (_owner_of(one) if type(one) is dict else None) or one
            found.append(self._chain(holder, _link(holder, target), depth))
        return found

    def _chain(self, holder: object, name: str, depth: int) -> str:
        """Say of `holder`, in which the object has this name, who has it."""
        self.skip(holder)  # or a cycle would be gone through again and again
        above = _variables(holder, self._ours)[:1]
        if not above and depth < DEEPEST and not self._is_late:
            above = self._referring(holder, 1, depth + 1)
        return f"{name}, held by {above[0]}" if above else name


def _is_of_module(holder: object) -> bool:
    return type(holder) is dict and "__name__" in holder and "__builtins__" in holder


def _owner_of(names: object) -> object | None:
    """Return the object whose attributes are this dictionary."""
    for one in gc.get_referrers(names):
        if type(one) is not FrameType and _attributes(one) is names:
            return one  # type: ignore[no-any-return]
    return None


def _link(holder: object, target: object) -> str:
    """Return how `holder` refers to `target`, in words."""
    kind = type(holder)
    if kind is dict:
        return f"item {_key_of(holder, target)} of a dict"  # type: ignore[arg-type]
    if kind in _CONTAINERS:
        return f"a {kind.__name__}"
    if kind is CellType:
        return "a variable of an enclosing function"
    if kind is FunctionType or kind is GeneratorType:
        return f"{kind.__name__} {holder.__qualname__}"  # type: ignore[attr-defined]
    if issubclass(kind, ModuleType):
        return f"module {holder.__name__}"  # type: ignore[attr-defined]
    name = _key_of(_attributes(holder), target)
    of = f"a {kind.__module__}.{kind.__qualname__}"
    return of if name is None else f"attribute {name} of {of}"


def _key_of(names: Mapping[Any, Any], target: object) -> str | None:
    for key, value in [*names.items()]:
        if value is target:
            return repr(key)[:60]
    return None


def _attributes(holder: object) -> Mapping[str, object]:
    try:
        found = object.__getattribute__(holder, "__dict__")
    except AttributeError:  # it has slots, or is of C
        return {}
    return found if type(found) is dict else {}


def _variables(target: object, ours: str) -> list[str]:
    """Return the variables of running functions, in all threads, that are `target`."""
    threads = {thread.ident: thread.name for thread in threading.enumerate()}
    found: list[str] = []
    for number, top in sys._current_frames().items():
        frame: FrameType | None = top
        while frame is not None:
            module = str(frame.f_globals.get("__name__", ""))
            is_ours = module == ours or module.startswith(f"{ours}.")
            if frame.f_code.co_flags & inspect.CO_OPTIMIZED and not is_ours:  # a function, and not a module or class
                for name in _names_in(frame, target):
                    where = f"{frame.f_code.co_qualname}() of {module}"
                    found.append(f"variable {name!r} of {where}, which runs in {threads.get(number, 'a thread')}")
            frame = frame.f_back
    return found


def _names_in(frame: FrameType, target: object) -> list[str]:
    found: list[str] = []
    values = frame.f_locals
    for name, value in values.items():
        if value is target:
            found.append(name)
    # Before Python 3.13 this is a copy that the frame keeps until it ends: it would hold whatever the function drops
    # later. Where nobody else has it (the frame, this name, and the call's argument) it is emptied.
    if sys.version_info < (3, 13) and sys.getrefcount(values) <= 3:
        values.clear()
    return found
