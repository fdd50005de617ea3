"""`loadstone doctor`: what it finds, and what it says to do."""

from __future__ import annotations

import json

from loadstone.cli import diagnosis
from loadstone.cli.folders import try_folder
from loadstone.hardware import Device, MemoryLimits
from loadstone.hardware.limits import CgroupLimit


def test_a_well_machine_is_usable_and_everything_is_told(cli):
    """Devices, memory, kernels, versions, disk, network and configuration, as one JSON object."""
    ended = cli("doctor", "--json")
    assert ended.code == 0
    said = json.loads(ended.out)
    assert said["usable"]
    assert sum(device["chosen"] for device in said["devices"]) == 1
    assert said["devices"][-1]["device"] == "cpu"
    assert all(said["absent_devices"].values())
    assert said["memory"]["free_bytes"] > 0
    assert set(said["kernels"]) == {"cpu", "bitsandbytes"}
    assert said["versions"]["torch"]
    assert {place["for"] for place in said["disk"]} == {"downloads", "own cache"}
    assert said["network"]["offline"] is False
    assert said["bundled_model"].endswith(".gguf")


def test_a_broken_configuration_is_a_problem_with_a_remedy(cli, here):
    """What keeps a model from being loaded makes the doctor exit with 5, after everything else was looked at."""
    (here / "loadstone.yaml").write_text("model_config:\n  devise: cpu\n")
    ended = cli("doctor")
    assert ended.code == 5
    assert "loadstone.yaml:2" in ended.out
    assert "what to do" in ended.out
    assert "versions" in ended.out


def found_by(look):
    found = diagnosis.Diagnosis()
    look(found)
    return found


def test_missing_packages_are_named_with_the_command_that_installs_them(monkeypatch):
    """The remedy can be copied into a shell."""
    monkeypatch.setattr(diagnosis, "NEEDED", ("torch", "no-such-package"))
    found = found_by(diagnosis._versions)
    assert not found.is_usable
    assert found.problems[0].remedy.endswith("-m pip install no-such-package")


def test_a_library_that_breaks_on_import_is_a_finding(monkeypatch):
    """A torch that cannot load its own libraries is told with its reason; nothing is raised."""

    def fail(name):
        raise OSError("libcudart.so.12: cannot open shared object file")

    monkeypatch.setattr(diagnosis, "import_module", fail)
    check = diagnosis._torch("2.13.0+cpu")
    assert not check.ok
    assert "libcudart" in check.found
    assert "pip install" in check.remedy


def test_an_old_torch_is_told_before_it_is_imported():
    """The version is enough to know."""
    assert "too old" in diagnosis._torch("2.8.1+cu121").found


def test_a_containers_limit_is_named_when_memory_is_short(monkeypatch):
    """Whoever is short of memory because of a container is told to raise its limit, not to close programs."""
    group = CgroupLimit("/sys/fs/cgroup/box", 1_500_000_000, 700_000_000)
    limits = MemoryLimits(64 * 10**9, 60 * 10**9, (group,), group.limit_bytes, group.free_bytes)
    monkeypatch.setattr(diagnosis, "memory_limits", lambda: limits)
    found = found_by(diagnosis._memory)
    assert found.is_usable  # a small model may still fit
    assert "/sys/fs/cgroup/box" in found.problems[0].found
    assert "container" in found.problems[0].remedy


def test_a_full_disk_says_which_setting_moves_the_cache(monkeypatch):
    """The remedy names the setting."""
    monkeypatch.setattr("loadstone.sources.cache.free_bytes", lambda _: 10**9)
    found = found_by(diagnosis._disk)
    assert [check.name for check in found.problems] == ["downloads"]
    assert "HF_HOME" in found.problems[0].remedy


def test_a_cache_folder_that_cannot_be_made_is_a_problem_with_a_remedy(monkeypatch, here):
    """A file where the folder should be is told, though its rights would allow writing."""
    (here / "file").write_text("mine")
    monkeypatch.setenv("LOADSTONE_HOME", str(here / "file"))
    found = found_by(diagnosis._disk)
    problem = next(check for check in found.problems if check.name == "own cache")
    assert "cannot be made" in problem.found
    assert "LOADSTONE_HOME" in problem.remedy
    assert [place["writable"] for place in found.facts["disk"] if place["for"] == "own cache"] == [False]


def test_trying_a_folder_leaves_nothing_behind(here):
    """Neither a file nor the folders above it; what was there stays."""
    try_folder(here / "a" / "b" / "cache")
    assert list(here.iterdir()) == []
    (here / "kept").mkdir()
    try_folder(here / "kept")
    assert list(here.rglob("*")) == [here / "kept"]


def test_offline_settings_are_told_and_the_token_is_not(monkeypatch):
    """Offline is a choice and no problem; that there is a token is told, never the token."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    found = found_by(diagnosis._network)
    assert found.problems == []
    assert found.facts["network"]["offline"] is True
    assert found.facts["network"]["token"] is True
    assert "hf_secret" not in json.dumps(found.facts)


def test_kernels_that_cannot_be_had_cost_speed_and_nothing_else(monkeypatch):
    """A processor without AVX2 is told so, and is still usable."""
    monkeypatch.setattr(diagnosis, "_kernel_problem", lambda: "this CPU's vector unit is DEFAULT")
    monkeypatch.setattr(diagnosis, "_import_problem", lambda _: None)
    found = diagnosis.Diagnosis(facts={"devices": []})
    diagnosis._kernels(found)
    assert found.is_usable
    assert "AVX2" in found.problems[0].remedy


def test_kernels_that_a_capable_processor_lacks_are_not_blamed_on_it(monkeypatch):
    """With AVX2 the reason is another one, and the advice says nothing of AVX2."""
    monkeypatch.setattr(diagnosis, "_kernel_problem", lambda: "NotADirectoryError: cache")
    monkeypatch.setattr(diagnosis, "_import_problem", lambda _: None)
    found = diagnosis.Diagnosis(facts={"devices": [{"device": "cpu", "capabilities": ["avx2"]}]})
    diagnosis._kernels(found)
    assert "AVX2" not in found.problems[0].remedy
    assert "own cache" in found.problems[0].remedy


def test_a_device_that_was_passed_over_is_told_why():
    """Beside the chosen one, each other device has its reason."""
    best = Device("cuda", 0, "big", 2, 2, passed_over=("mps: no such thing", "cpu: slower"))
    assert diagnosis._device_facts(Device("cpu", None, "small", 1, 1), best)["passed_over"] == "slower"
    assert diagnosis._device_facts(best, best)["passed_over"] == ""


def test_the_store_is_told_with_its_size_and_limit(cli, store_folder, small_model, monkeypatch):
    """Folder, writable or not, entries, bytes and limit; looking makes nothing."""
    monkeypatch.setenv("LOADSTONE_STORE__MAX_SIZE", "5GB")
    facts = found_by(diagnosis._store).facts["store"]
    assert (facts["entries"], facts["total_bytes"], facts["writable"]) == (0, 0, True)
    assert not store_folder.exists()
    cli("pull", str(small_model))
    found = found_by(diagnosis._store)
    assert found.facts["store"]["entries"] == 1
    assert found.facts["store"]["total_bytes"] > 0
    assert found.facts["store"]["max_size_bytes"] == 5 * 10**9
    assert found.checks[0].ok
    assert f"of at most 5 GB at {store_folder}" in found.checks[0].found


def test_a_store_that_cannot_be_written_is_a_note_with_a_remedy(monkeypatch, here):
    """Models can be loaded all the same."""
    (here / "file").write_text("mine")
    monkeypatch.setenv("LOADSTONE_STORE__FOLDER", str(here / "file" / "store"))
    found = found_by(diagnosis._store)
    assert found.is_usable
    assert "cannot be written" in found.problems[0].found
    assert "LOADSTONE_STORE__FOLDER" in found.problems[0].remedy
    assert found.facts["store"]["writable"] is False


def test_a_store_that_is_switched_off_is_a_choice(monkeypatch):
    """And no problem."""
    monkeypatch.setenv("LOADSTONE_STORE__ENABLED", "false")
    found = found_by(diagnosis._store)
    assert found.problems == []
    assert "LOADSTONE_STORE__ENABLED" in found.checks[0].found
