"""What a model would take and how fast it would be, told before anything is loaded: from headers alone.

Every strategy is planned by the same planner that a load asks, so what is told here is what a load does. Knows neither
torch nor weights; a GPU of this machine is only looked at through torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from .checkpoint import ModelSpec, inspect
from .config import ConfigManager, LoadConfig, LoadstoneConfig
from .errors import ConfigurationError, LoadstoneError, ResourceError, handle_exceptions
from .folders import cache_folder
from .hardware import Device, MemorySettings, get_device_manager, process_rss
from .hardware.speeds import Speeds, machine_speeds
from .light import OWN_FORM, light_files
from .planner import Expected, Machine, Plan, expect, find_machine
from .planner import plan as decide
from .planner.accuracy import allowance_of, kind_of, read_records
from .planner.deciding import allowed_for
from .planner.own import kept_name, own_strategy
from .planner.runtime import BARE, TORCH, Allowance, runtime_bytes
from .quantization import AUTO, STRATEGIES, find_strategy
from .quantization.base import Strategy
from .sources import Headers, resolve_headers
from .store import open_store

FITS, FITS_WITH_LESS, DOES_NOT_FIT = "fits", "fits with less", "does not fit"
UNBOUNDED = 2**62

_YAML = (".yaml", ".yml")


@dataclass(frozen=True)
class Row:
    """One strategy: what it takes with `plan.context`, and what is expected of it.

    Where it does not fit, `plan` is what it would take with the context that is wished for.
    """

    strategy: str
    summary: str
    fits: bool
    plan: Plan
    expected: Expected
    in_store: bool


@dataclass(frozen=True)
class Forecast:
    """What `loadstone.plan` tells: the model, the machine, the plan, and each strategy beside it.

    `verdict` is "fits" (as wished), "fits with less" (less context than by default, or only what `would_fit` names), or
    "does not fit". `plan` is what a load would do, None where it would be refused: then `refusal` says why. `machine`
    is the one that was asked about, None for this one. `missing_bytes` would have to be fetched first. `learned` is
    what earlier loads here taught of what a process takes beside all that can be counted.
    """

    spec: ModelSpec
    verdict: str
    plan: Plan | None
    refusal: ResourceError | None
    rows: tuple[Row, ...]
    speeds: Speeds
    machine: Machine | None
    device: Device
    allowed_bytes: int
    file_bytes: int
    missing_bytes: int
    learned: Allowance

    @property
    def chosen(self) -> Row | None:
        """The row of the plan."""
        return next((row for row in self.rows if self.plan and row.strategy == self.plan.strategy), None)

    @property
    def would_fit(self) -> tuple[str, ...]:
        """What fits instead, in words; empty where the plan is all that was wished for."""
        if self.refusal is not None:
            return self.refusal.would_fit
        if self.verdict == FITS:
            return ()
        return tuple(
            f"quantization {row.strategy} with context {row.plan.context}"
            for row in self.rows if row.fits and self.plan and row.strategy != self.plan.strategy
        )  # fmt: skip


def plan(
    model_or_config: str | os.PathLike[str] | Mapping[str, Any] | ConfigManager | LoadstoneConfig | None = None,
    *,
    machine: str | None = None,
    **settings: Any,
) -> Forecast:
    """Tell whether a model fits, in what, and how fast it would be; nothing is loaded, and no weights are fetched.

    `model_or_config` is a model (a folder, a file, a Hub id, "smollm2"), or a configuration: a .yaml file, a mapping, a
    ConfigManager; None is the configured model. `settings` are those of `model_config` (quantization, context,
    max_memory …) and go over it. `machine` names or describes another machine than this: "rtx-3060-12gb",
    "cpus=4,ram=16GB,bandwidth=40GB/s".

    Of a model on a Hub only headers are read. Raises ConfigurationError, SourceError or CheckpointError; that a model
    does not fit is told, not raised.
    """
    with handle_exceptions("plan the model"):
        there = None if machine is None else find_machine(machine)
        return _Forecasting(_configured(model_or_config, settings), there).forecast()


def _configured(given: Any, settings: Mapping[str, Any]) -> ConfigManager:
    is_model = isinstance(given, (str, os.PathLike)) and not os.fspath(given).endswith(_YAML)
    configured = ConfigManager(None if is_model else given)
    said = {f"model_config.{name}": value for name, value in settings.items()}
    if is_model:
        wish = configured.config.model
        if wish.revision is not None and os.fspath(given) != wish.base_model:
            said = {"model_config.revision": None, **said}  # it is the configured model's, not this one's
        said["model_config.base_model"] = os.fspath(given)
    return configured.with_overrides(said) if said else configured


class _Forecasting:
    """One forecast in the making: the wish, the files, and the device that is planned for."""

    def __init__(self, configured: ConfigManager, machine: Machine | None) -> None:
        self.wish, self.machine = configured.config.model, machine
        self.store = open_store(configured.config.store)
        if self.wish.strategy != AUTO:
            find_strategy(self.wish.strategy)  # before anything is fetched
        devices = get_device_manager()
        if machine is None:
            self.device = devices.resolve(self.wish.device, require=self.wish.require)
        elif self.wish.device in (AUTO, machine.device.kind):
            self.device = machine.device
        else:
            raise _another_device(self.wish.device, machine)
        self.settings: MemorySettings = devices.optimize_memory_settings(
            self.device, compute_dtype=self.wish.compute_dtype
        )  # fmt: skip
        self.headers = self._headers(configured)
        self.spec = inspect(self.headers.files, self.headers.remote).leaving_alone(self.wish.left_alone)
        # Of a model without its original weights only their list is here.
        self.file_bytes = self.headers.file_bytes or sum(one.nbytes for one in self.spec.tensors.values())
        self.resident = process_rss() if machine is None and self.device.kind == "cpu" else 0
        has_torch = machine is None and "torch" in sys.modules  # which a load's process has
        process = (self.resident if machine is None else BARE) + (0 if has_torch else TORCH)
        records = read_records(cache_folder()) if machine is None else []
        self.learned = allowance_of(records, kind_of(self.device, self.settings))
        self.runtime_bytes = runtime_bytes(
            self.spec, self.device.kind, process, is_ready=False, rest=self.learned.bytes
        )  # fmt: skip
        self._is_in_store = cache(self._look_in_store)  # asked for every way of every row
        self.speeds = machine.speeds if machine else machine_speeds(self.device, self._place())

    def forecast(self) -> Forecast:
        """Return all that is told."""
        plan, refusal = self._decided(self.wish)
        rows = tuple(self._rows(plan))
        return Forecast(
            spec=self.spec,
            verdict=self._verdict(plan, refusal),
            plan=plan,
            refusal=refusal,
            rows=rows,
            speeds=self.speeds,
            machine=self.machine,
            device=self.device,
            allowed_bytes=rows[0].plan.allowed_bytes if plan is None else plan.allowed_bytes,
            file_bytes=self.file_bytes,
            missing_bytes=self.headers.missing_bytes,
            learned=self.learned,
        )

    def _headers(self, configured: ConfigManager) -> Headers:
        wish = self.wish
        light = light_files(wish, self.store)
        if light is not None:
            return Headers.of_local(light)
        retry = configured.config.retry
        return resolve_headers(wish.base_model, revision=wish.revision, offline=wish.offline, retry=retry)

    def _decided(
        self, wish: LoadConfig, strategy: str | None = None
    ) -> tuple[Plan | None, ResourceError | None]:  # fmt: skip
        try:
            return self._plan(wish, self.device, strategy), None
        except ResourceError as error:
            return None, error

    def _plan(self, wish: LoadConfig, device: Device, strategy: str | None = None) -> Plan:
        return decide(
            wish, self.spec, device, self.settings, runtime_bytes=self.runtime_bytes, resident_bytes=self.resident,
            is_kept=self._is_in_store, strategy=strategy, learned=self.learned,
        )  # fmt: skip

    def _rows(self, chosen: Plan | None) -> Iterator[Row]:
        """Yield a row a strategy; a plug-in that fails keeps nobody from a plan."""
        for name, strategy in STRATEGIES.all().items():
            try:
                yield self._row(strategy, chosen)
            except LoadstoneError:
                raise
            except Exception as error:  # noqa: BLE001 - whatever a plug-in raises
                STRATEGIES.set_aside(name, error)

    def _row(self, strategy: Strategy, chosen: Plan | None) -> Row:
        name = strategy.name
        wish = self.wish.model_copy(update={"force": False})
        found = chosen if chosen and chosen.strategy == name else self._decided(wish, name)[0]
        fits = found is not None and not found.forced
        found = found or self._priced(wish, name)
        is_kept = self.store is not None and type(strategy).layout is not Strategy.layout
        expected = expect(found, self.spec, self.speeds, file_bytes=self.file_bytes, is_kept=is_kept)
        return Row(name, strategy.summary, fits, found, expected, self._is_in_store(name))

    def _priced(self, wish: LoadConfig, strategy: str) -> Plan:
        """Return what a strategy that does not fit would take, as it would on a device without end."""
        endless = replace(self.device, total_bytes=UNBOUNDED, free_bytes=UNBOUNDED, largest_buffer_bytes=None)
        found = self._plan(wish.model_copy(update={"max_memory": None}), endless, strategy)
        return replace(found, device=self.device, allowed_bytes=allowed_for(wish, self.device, self.resident)[0])

    def _verdict(self, plan: Plan | None, refusal: ResourceError | None) -> str:
        if plan is None:
            return FITS_WITH_LESS if refusal is not None and refusal.would_fit else DOES_NOT_FIT
        if plan.forced:
            return DOES_NOT_FIT
        wished = self._priced(self.wish, plan.strategy)
        return FITS if plan.context >= wished.context and plan.streams >= wished.streams else FITS_WITH_LESS

    def _look_in_store(self, strategy: str) -> bool:
        """Tell whether the store of this machine has the weights kept this way."""
        if self.store is None or self.machine is not None:
            return False
        wish, names = self.wish, [strategy]
        if strategy == own_strategy(self.spec):
            names.append(OWN_FORM)
        if any(self.store.find_light(wish.base_model, wish.revision, name) for name in names):
            return True
        return not self.headers.remote and self.store.has(self.spec, kept_name(self.spec, strategy))

    def _place(self) -> Path:
        """Return the largest file of the model, to read a little of, or the folder that it would be in."""
        files = [file for file in self.headers.files.weights if file not in self.headers.remote]
        return max(files, key=lambda file: file.stat().st_size, default=self.headers.files.folder)


def _another_device(device: str, machine: Machine) -> ConfigurationError:
    return ConfigurationError(
        f"device {device!r} is not one of {machine.name}, which is planned for on {machine.device.kind}",
        key="model_config.device",
        hint="Leave the device out, or describe the machine: cpus=4,ram=16GB,bandwidth=40GB/s.",
    )
