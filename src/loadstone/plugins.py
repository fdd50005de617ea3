"""The one door that strategies, devices, sources and architectures come in by, built in or from other packages.

A door has a group of entry points. What is built in is entry points too, written down in code, and goes the same way:
imported when it is first needed, and looked at before it is let in. What cannot be imported, raises, or is not what it
must be is reported once (the event `plugin.warning`, and `loadstone doctor`) and passed over from then on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from loadstone.errors import ConfigurationError
from loadstone.telemetry import emit

Thing = TypeVar("Thing")


@dataclass(frozen=True)
class PlugIn:
    """What came, or did not come, from another package: `problem` says why it is not used, None where it is well."""

    group: str
    name: str
    place: str
    package: str
    problem: str | None = None


class Door(Generic[Thing]):
    """The things of one kind by name: built-ins in their order, then plug-ins, sorted.

    `built_in` are entry points in code ("module:attribute"). `admit` takes the name and what an entry point leads to,
    and returns the thing; whatever it raises is why it is not let in. A name that is built in is no plug-in's.
    """

    def __init__(self, group: str, built_in: Mapping[str, str], admit: Callable[[str, Any], Thing]) -> None:
        self.group, self._admit = group, admit
        self._built_in = {name: EntryPoint(name, place, group) for name, place in built_in.items()}
        self._things: dict[str, Thing] = {}
        self._problems: dict[str, str] = {}

    def register(self, name: str, thing: Thing) -> None:
        """Let in what code made; the last of a name wins."""
        self._problems.pop(name, None)
        self._things[name] = thing

    def names(self) -> tuple[str, ...]:
        """Return the names of all things; a plug-in that was not needed yet may still prove broken."""
        others = {entry.name for entry in self._plug_ins()} | set(self._things)
        names = (*self._built_in, *sorted(others - set(self._built_in)))
        return tuple(name for name in names if name not in self._problems)

    @property
    def problems(self) -> Mapping[str, str]:
        """The things that proved broken so far, each with the reason."""
        return dict(self._problems)

    def find(self, name: str) -> Thing | None:
        """Return the thing called `name`, or None where there is none; raise ConfigurationError where it is broken."""
        if name in self._things:
            return self._things[name]
        entry = self._built_in.get(name) or next((one for one in self._plug_ins() if one.name == name), None)
        if entry is None:
            return None
        thing = self._let_in(entry)
        if thing is None:
            raise ConfigurationError(
                f"{self._told(entry)} cannot be used: {self._problems[name]}",
                hint=f"Update or uninstall {_package(entry)}, or leave {name!r} out.",
            )
        return thing

    def all(self) -> dict[str, Thing]:
        """Return all things by name, without those that are broken."""
        entries = {**{entry.name: entry for entry in reversed(self._plug_ins())}, **self._built_in}
        found = {}
        for name in self.names():
            thing = self._things[name] if name in self._things else self._let_in(entries[name])
            if thing is not None:
                found[name] = thing
        return found

    def set_aside(self, name: str, error: Exception) -> None:
        """Report a plug-in that failed after it was let in, and pass it over from now on; raise for a built-in."""
        if name in self._built_in:
            raise error
        self._things.pop(name, None)
        entry = next((one for one in self._plug_ins() if one.name == name), None)
        self._report(entry or EntryPoint(name, "", self.group), error)

    def plug_ins(self) -> tuple[PlugIn, ...]:
        """Look at each plug-in, and return what was found of them, also of those that are not used."""
        return tuple(self._looked_at())

    def _looked_at(self) -> Iterator[PlugIn]:
        seen = {name: "loadstone" for name in self._built_in}
        for entry in self._plug_ins():
            package = _package(entry)
            if entry.name in seen:
                problem: str | None = f"{seen[entry.name]} has this name already"
            else:
                if entry.name not in self._things:
                    self._let_in(entry)
                problem = self._problems.get(entry.name)
            seen.setdefault(entry.name, package)
            yield PlugIn(self.group, entry.name, entry.value, package, problem)

    def _plug_ins(self) -> list[EntryPoint]:
        return sorted(entry_points(group=self.group), key=lambda entry: entry.name)

    def _let_in(self, entry: EntryPoint) -> Thing | None:
        """Return what an entry point leads to, None where that is broken."""
        if entry.name in self._problems:
            return None
        try:
            thing = self._admit(entry.name, entry.load())
        except (Exception, SystemExit) as error:
            if entry.name in self._built_in:
                raise
            self._report(entry, error)  # a package may fail in any way
            return None
        self._things[entry.name] = thing
        return thing

    def _report(self, entry: EntryPoint, error: BaseException) -> None:
        reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        self._problems[entry.name] = reason
        told = f"{self._told(entry)} is passed over: {reason}"
        emit("plugin.warning", group=self.group, plug_in=entry.name, package=_package(entry), reason=told)

    def _told(self, entry: EntryPoint) -> str:
        return f"the plug-in {entry.name!r} ({self.group}, from {_package(entry)})"


def made(given: Any, kind: type[Thing], name: str) -> Thing:
    """Return an instance of `kind` whose `name` is `name`, from one or from what makes one; raise TypeError else."""
    thing = given() if callable(given) and not isinstance(given, kind) else given
    if not isinstance(thing, kind):
        raise TypeError(f"{given!r} is no {kind.__module__}.{kind.__qualname__}, and makes none")
    if getattr(thing, "name", None) != name:
        raise TypeError(f"its name is {getattr(thing, 'name', None)!r}, and that of its entry point {name!r}")
    return thing


def _package(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else "this program"
