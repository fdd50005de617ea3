"""The door of plug-ins: who comes in, who is reported and passed over, and that nobody else suffers from it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import loadstone
from loadstone import ConfigurationError, Event
from loadstone.checkpoint.architectures import ARCHITECTURES, find_gguf_architecture, known_architectures
from loadstone.cli import diagnosis
from loadstone.hardware.probes import DEVICES
from loadstone.plugins import Door, PlugIn, made
from loadstone.quantization import STRATEGIES, find_strategy, known_strategies
from loadstone.quantization.none import NoQuantization
from loadstone.sources import SOURCES

DOORS = (STRATEGIES, DEVICES, SOURCES, ARCHITECTURES)
BROKEN = {
    "broken_import": "import no_such_library",
    "broken_exit": "import sys; sys.exit(3)",
    "broken_type": "thing = 7",
    "broken_call": "def thing(): raise RuntimeError('not today')",
    "broken_name": "pass",
}


def install(folder: Path, group: str, modules: dict[str, str], package: str = "acme") -> None:
    """Write a package as an installer leaves it: modules, and the metadata that names its entry points."""
    about = folder / f"{package}-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = [f"{name} = {package}_{name}:thing" for name in modules]
    (about / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines]) + "\n")
    for name, code in modules.items():
        (folder / f"{package}_{name}.py").write_text(code)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that packages are found in, and doors that know nothing of earlier tests."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    for door in DOORS:
        monkeypatch.setattr(door, "_things", dict(door._things))
        monkeypatch.setattr(door, "_problems", {})
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("acme"):
            del sys.modules[name]


STRATEGY = """
from loadstone.quantization.none import NoQuantization
from loadstone.sources import SOURCES
class thing(NoQuantization):
    name = {name!r}
    summary = "as it is, under another name"
"""


def warnings(events: list[Event]) -> list[str]:
    return [event.fields["plug_in"] for event in events if event.name == "plugin.warning"]


# Who comes in


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.group)
def test_built_ins_are_entry_points_and_all_of_them_come_in(door: Door) -> None:
    assert list(door.all())[: len(door._built_in)] == list(door._built_in)
    assert all(entry.group == door.group for entry in door._built_in.values())


def test_a_plug_in_is_known_found_and_told_of(site: Path) -> None:
    install(site, STRATEGIES.group, {"plain": STRATEGY.format(name="plain")})
    assert known_strategies() == (*STRATEGIES._built_in, "plain")
    assert find_strategy("plain").summary.startswith("as it is")
    assert STRATEGIES.plug_ins() == (PlugIn(STRATEGIES.group, "plain", "acme_plain:thing", "acme 1.0"),)


def test_a_plug_in_is_not_imported_before_it_is_needed(site: Path) -> None:
    install(site, STRATEGIES.group, {"plain": STRATEGY.format(name="plain")})
    known_strategies()
    find_strategy("4bit")
    assert "acme_plain" not in sys.modules


def test_an_instance_comes_in_as_well_as_a_class() -> None:
    plain = NoQuantization()
    assert made(plain, NoQuantization, "none") is plain
    assert isinstance(made(NoQuantization, NoQuantization, "none"), NoQuantization)


def test_what_code_registered_goes_before_an_entry_point(site: Path) -> None:
    install(site, "acme.things", {"one": "thing = 1"})
    door: Door[int] = Door("acme.things", {}, lambda name, found: found)
    door.register("one", 2)
    assert door.find("one") == 2


def test_an_architecture_of_a_plug_in_is_found_by_its_gguf_name(site: Path) -> None:
    code = "from loadstone.checkpoint import Architecture\nthing = Architecture('herd', gguf_name='herd')"
    install(site, ARCHITECTURES.group, {"herd": code, "broken": BROKEN["broken_import"]})
    found = find_gguf_architecture("herd")
    assert found is not None
    assert found.name == "herd"
    assert "herd" in known_architectures()


# Who does not


@pytest.mark.parametrize(
    ("door", "how"),
    [
        pytest.param(door, how, id=f"{door.group}-{how}")
        for door in DOORS
        for how in ("broken_import", "broken_exit", "broken_type", "broken_call")
        if (door, how) != (DEVICES, "broken_call")  # whose function is called when devices are looked for
    ],
)
def test_a_broken_plug_in_is_reported_once_and_passed_over(
    door: Door, how: str, site: Path, events: list[Event]
) -> None:
    install(site, door.group, {how: BROKEN[how]})
    for _ in range(2):
        assert list(door.all()) == list(door._built_in)
    assert warnings(events) == [how]
    assert how not in door.names()
    (plug_in,) = door.plug_ins()
    assert plug_in.problem == door.problems[how]


@pytest.mark.parametrize("how", list(BROKEN))
def test_a_broken_strategy_that_is_asked_for_is_an_error_with_a_remedy(how: str, site: Path) -> None:
    code = STRATEGY.format(name="another") if how == "broken_name" else BROKEN[how]
    install(site, STRATEGIES.group, {how: code})
    for _ in range(2):
        with pytest.raises(ConfigurationError, match=f"the plug-in '{how}'.*acme 1.0.*cannot be used") as caught:
            find_strategy(how)
        assert "uninstall acme 1.0" in str(caught.value.hint)


def test_a_built_in_name_is_not_taken_over(site: Path) -> None:
    install(site, STRATEGIES.group, {"4bit": STRATEGY.format(name="4bit")})
    assert type(find_strategy("4bit")).__module__ == "loadstone.quantization.nf4"
    (plug_in,) = STRATEGIES.plug_ins()
    assert plug_in.problem == "loadstone has this name already"
    assert list(STRATEGIES.all()) == list(STRATEGIES._built_in)


def test_the_second_package_of_a_name_is_told_of(site: Path) -> None:
    for package in ("acme", "acme2"):
        install(site, STRATEGIES.group, {"plain": STRATEGY.format(name="plain")}, package)
    problems = {plug_in.package: plug_in.problem for plug_in in STRATEGIES.plug_ins()}
    assert sorted(problems.values(), key=str) == [None, next(one for one in problems.values() if one)]
    assert "has this name already" in str(problems)


def test_a_built_in_that_fails_is_no_plug_in() -> None:
    """Its own error comes out: nothing is passed over that should be there."""
    door: Door[object] = Door("acme.things", {"one": "no_such_module:thing"}, lambda name, found: found)
    with pytest.raises(ModuleNotFoundError):
        door.find("one")
    with pytest.raises(ZeroDivisionError):
        door.set_aside("one", ZeroDivisionError())


# Where it is seen


def test_a_strategy_that_fails_in_a_plan_is_reported_and_left_out_of_it(site: Path, events: list[Event]) -> None:
    code = STRATEGY.format(name="moody") + "    def weight_bytes(self, *_, **__): raise ValueError('no idea')\n"
    install(site, STRATEGIES.group, {"moody": code})
    for _ in range(2):
        found = loadstone.plan("smollm2", machine="cpus=4,ram=16GB,bandwidth=40GB/s")
        assert [row.strategy for row in found.rows] == list(STRATEGIES._built_in)
    assert warnings(events) == ["moody"]


def test_the_doctor_tells_of_every_plug_in_and_of_what_is_wrong_with_it(site: Path) -> None:
    install(site, STRATEGIES.group, {"plain": STRATEGY.format(name="plain")})
    install(site, DEVICES.group, {"npu": BROKEN["broken_import"]}, "acme2")
    found = diagnosis.Diagnosis()
    diagnosis._plug_ins(found)
    assert found.is_usable
    (problem,) = found.problems
    assert problem.name == "plug-in npu"
    assert "no_such_library" in problem.found
    assert "acme2 1.0" in problem.remedy
    told = {one["name"]: one["problem"] for one in found.facts["plug_ins"]}
    assert told["plain"] is None
    assert found.facts["known"]["strategies"] == [*STRATEGIES._built_in, "plain"]


def test_a_report_names_group_package_and_reason(events: list[Event], monkeypatch: pytest.MonkeyPatch) -> None:
    entry = SimpleNamespace(name="one", value="m:x", dist=None)
    monkeypatch.setattr("loadstone.plugins.entry_points", lambda group: [entry])
    Door("acme.things", {}, made).set_aside("one", ValueError("first line\nsecond"))
    (event,) = events
    assert event.fields["reason"] == (
        "the plug-in 'one' (acme.things, from this program) is passed over: ValueError: first line"
    )
