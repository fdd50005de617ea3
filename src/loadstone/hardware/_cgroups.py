"""Finds the control groups above this process, of both versions; knows folders, not what their files mean.

Formats: the kernel's Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/, and proc(5) for the files in
/proc.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

PROC_ROOT = Path("/proc")
CGROUP_ROOT = Path("/sys/fs/cgroup")


def groups_above(
    controller: str, *, proc_root: Path = PROC_ROOT, cgroup_root: Path = CGROUP_ROOT
) -> Iterator[tuple[int, Path]]:
    """Yield (version, folder) of each group in which `controller` ("memory", "cpu") holds this process.

    The process's own group comes first and the root last. Folders that cannot be seen from here are left
    out, which is how a container sees its parents; where there are no control groups at all, nothing is
    yielded.
    """
    for line in _read(proc_root / "self" / "cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, separator, path = rest.partition(":")
        if not separator:
            continue
        if number == "0" and controllers == "":
            root = _mount_root(proc_root, "cgroup2", "")
            yield from ((2, folder) for folder in _walk(cgroup_root, path, root))
        elif controller in controllers.split(","):
            root = _mount_root(proc_root, "cgroup", controller)
            for name in dict.fromkeys((controller, controllers)):
                if (cgroup_root / name).is_dir():
                    yield from ((1, folder) for folder in _walk(cgroup_root / name, path, root))
                    break


def _walk(top: Path, path: str, mount_root: str) -> Iterator[Path]:
    """Yield the folders from `path` under `top` up to `top` itself, those that exist."""
    # Without a namespace of its own a container is told its path on the host; its mount starts further down.
    inside = PurePosixPath("/" + path.strip("/"))
    if mount_root != "/" and inside.is_relative_to(mount_root):
        inside = PurePosixPath("/") / inside.relative_to(mount_root)
    # "/.." is how a namespace names what lies above it: not to be seen from here.
    parts = [part for part in inside.parts if part not in ("/", "..")]
    for length in range(len(parts), -1, -1):
        folder = top.joinpath(*parts[:length])
        if folder.is_dir():
            yield folder


def _mount_root(proc_root: Path, kind: str, controller: str) -> str:
    """Return which folder of the hierarchy is mounted, mountinfo's fourth field; "/" when unknown."""
    for line in _read(proc_root / "self" / "mountinfo").splitlines():
        left, separator, right = line.partition(" - ")
        fields, about = left.split(), right.split()
        if not separator or len(fields) < 5 or len(about) < 3 or about[0] != kind:
            continue
        if kind == "cgroup2" or controller in about[2].split(","):
            return fields[3]
    return "/"


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def read_numbers(file: Path) -> list[int | None]:
    """Return the numbers of a one-line file, None for "max"; empty when it cannot be read."""
    numbers: list[int | None] = []
    for word in _read(file).split():
        try:
            numbers.append(None if word == "max" else int(word))
        except ValueError:
            return []
    return numbers


def read_table(file: Path) -> dict[str, int]:
    """Return the lines `name number` of a file such as memory.stat; empty when it cannot be read."""
    table: dict[str, int] = {}
    for line in _read(file).splitlines():
        name, _, number = line.partition(" ")
        if number.strip().isdigit():
            table[name] = int(number)
    return table
