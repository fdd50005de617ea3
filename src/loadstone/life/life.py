"""The life of one manager's model: loaded once however many ask, leased to calls, swapped, let go of, given back.

Two locks: `changing` is held by the one thread that loads or unloads, for as long as that takes; the gate for a moment,
to look at what is there now or to put something else in its place.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum

from loadstone.config import ConfigManager
from loadstone.errors import LoadstoneError, ModelNotLoadedError, handle_exceptions
from loadstone.hardware import DeviceManager
from loadstone.loaded import LoadedModel
from loadstone.memory import forget_frames, give_back, nothing_left_on_failure
from loadstone.planner import Plan
from loadstone.telemetry import emit, timed

from .keep_alive import let_go_when_idle
from .loading import Decided, Ground, Loading
from .pieces import footprint, pieces_of
from .receipt import Receipt
from .retiring import retire
from .tenure import Tenure


class Absence(Enum):
    """Why there is no model."""

    NOT_LOADED = "No model is loaded."
    RELEASED = "The model was let go of because nobody asked anything (engine.keep_alive); the next request loads it."
    SWAPPED = "The model is being loaded anew."


class Life:
    """Holds what `config` says, and at most one model made from it."""

    def __init__(self, config: ConfigManager, devices: DeviceManager) -> None:
        self.config = config
        self.changing = threading.RLock()
        self._devices = devices
        self._gate = threading.Condition()
        self._releasing = threading.RLock()
        self._tenure: Tenure | None = None
        self._absence = Absence.NOT_LOADED
        self._settled = 0  # bytes of the process and its runtime, as the last model's plan counted them

    # -- what is there --------------------------------------------------------------------------------------------

    @property
    def model(self) -> LoadedModel | None:
        """The model, when one is loaded now."""
        tenure = self._tenure
        return None if tenure is None else tenure.model

    def ready(self) -> LoadedModel:
        """Return the model that is loaded now; raise ModelNotLoadedError when none is."""
        if (model := self.model) is None:
            raise self._missing()
        return model

    @contextmanager
    def lease(self) -> Iterator[LoadedModel]:
        """Have the model in a block, at whose end alone it may be unloaded; load it again where it was let go of."""
        tenure, model = self._leased() or self._leased_when_back()
        try:
            yield model
        finally:
            tenure.end()

    def loading(self) -> Loading:
        """Return what loads the configured model, in the place of the one that may be there."""
        return Loading(self.config, self._devices, self._ground())

    # -- loading --------------------------------------------------------------------------------------------------

    def load(self) -> LoadedModel:
        """Return the model, loaded now unless it is there."""
        with self.changing:
            if (model := self.model) is not None:
                return model
            with handle_exceptions("load the model"), nothing_left_on_failure():
                model = self.loading().load()
            self._put(model, self.config)
            return model

    def unload(self, *, cancel: bool = False, reason: str = "asked") -> Receipt:
        """Give the model's memory back; see `ModelManager.unload_model`."""
        with self.changing:
            tenure = self._take(Absence.NOT_LOADED)
            if tenure is None:
                now = footprint()
                return Receipt(None, now, now)
            return retire(tenure, cancel=cancel, reason=reason)

    def reload(self, wanted: ConfigManager, *, reason: str) -> LoadedModel:
        """Load what `wanted` says in the place of what is there; see `ModelManager.reload_model`."""
        with self.changing:
            old = self.model
            emit("reload.begun", model=wanted.config.model.base_model, reason=reason, is_loaded=old is not None)
            if old is None:
                return self._load_first(wanted)
            with timed("reload", model=wanted.config.model.base_model, reason=reason) as told:
                with handle_exceptions("reload the model"), nothing_left_on_failure():
                    loading = Loading(wanted, self._devices, self._ground())
                    decided = loading.decide()  # which may refuse: the old one goes on
                    told["beside"] = is_beside = _fit_together(decided.plan, old)
                    del old
                    return self._swap_beside(loading, decided) if is_beside else self._swap_in_turn(loading, decided)

    def release(self, tenure: Tenure) -> None:
        """Let a model go if it is still there and nobody asks anything of it."""
        with self.changing, self._releasing:
            with self._gate:
                left = tenure.seconds_left()
                if left is None or left > 0 or self._take(Absence.RELEASED, tenure) is None:
                    return
            retire(tenure, reason=f"idle for {tenure.keep_alive:g} s")

    # -- inside ---------------------------------------------------------------------------------------------------

    def _leased(self) -> tuple[Tenure, LoadedModel] | None:
        """Return the model, leased, when it is there."""
        with self._gate:
            tenure = self._tenure
            if tenure is None or tenure.model is None:
                return None
            tenure.begin()
            return tenure, tenure.model

    def _leased_when_back(self) -> tuple[Tenure, LoadedModel]:
        """Return the model, leased, after whoever is changing it; loaded again where it was let go of."""
        if self._absence is Absence.NOT_LOADED:
            raise self._missing()
        with self.changing:
            if (found := self._leased()) is not None:
                return found
            if self._absence is not Absence.RELEASED:
                raise self._missing()  # a reload that failed, or that this thread itself is in
            name = self.config.config.model.base_model
            with timed("reload", model=name, reason="a request, after the model was let go of"):
                self.load()
            found = self._leased()
            assert found is not None  # it cannot go while this thread is changing it
            return found

    def _missing(self) -> ModelNotLoadedError:
        hint = "Call load() first; it loads the configured model."
        return ModelNotLoadedError(self._absence.value, hint=hint if self._absence is Absence.NOT_LOADED else None)

    def _load_first(self, wanted: ConfigManager) -> LoadedModel:
        before, self.config = self.config, wanted
        try:
            return self.load()
        except BaseException:
            self.config = before
            raise

    def _swap_beside(self, loading: Loading, decided: Decided) -> LoadedModel:
        """Load the new model while the old one answers; then let that finish what it has begun."""
        model = loading.build(decided)
        old = self._put(model, loading.config)
        assert old is not None  # nobody else may unload meanwhile
        retire(old, reason="reload")
        return model

    def _swap_in_turn(self, loading: Loading, decided: Decided) -> LoadedModel:
        """Unload the old model, load the new one, and the old one again when that fails; requests wait meanwhile."""
        old_model = self.ready()
        old_model.decoder.settle()  # what is in the store comes back from there
        remains = _remains_of(old_model)
        del old_model
        old = self._take(Absence.SWAPPED)
        assert old is not None  # nobody else may unload meanwhile
        try:
            with handle_exceptions("load the new model"):
                retire(old, reason="reload")
                model = loading.build(decided)
        except BaseException as error:
            self._put_back(remains, error)
            raise
        self._put(model, loading.config)
        return model

    def _put_back(self, remains: Decided, error: BaseException) -> None:
        """Load the model that was there before `error`; when that fails too the error has a note of it."""
        forget_frames(error)
        give_back()
        self._absence = Absence.NOT_LOADED  # unless what follows succeeds
        try:
            with timed("reload.undone", model=remains.spec.name), handle_exceptions("load the model before it again"):
                self._put(Loading(self.config, self._devices).build(remains), self.config)
        except LoadstoneError as failure:
            error.add_note(f"The model before it is gone too: {failure}")

    def _ground(self) -> Ground:
        """Return what a load finds here: the process, and the model that would go."""
        if (model := self.model) is None:
            return Ground(settled=self._settled)
        return Ground(model.plan.device.torch_name, _held(model), footprint(pieces_of(model)).other, self._settled)

    def _put(self, model: LoadedModel, config: ConfigManager) -> Tenure | None:
        """Have calls use `model` from now on; return what they used before."""
        tenure = Tenure(model, config.config.engine.keep_alive, self._gate)
        with self._gate:
            old, self._tenure, self.config = self._tenure, tenure, config
            self._settled = model.plan.runtime_bytes
        if tenure.keep_alive is not None:
            let_go_when_idle(tenure, self.release, self, self._releasing)
        return old

    def _take(self, absence: Absence, only: Tenure | None = None) -> Tenure | None:
        """Have calls find no model from now on; return the one there was, if it is `only`."""
        with self._gate:
            tenure = self._tenure
            if only is not None and tenure is not only:
                return None
            self._tenure, self._absence = None, absence
            return tenure


def _fit_together(decision: Plan, old: LoadedModel) -> bool:
    """Tell whether there is room for what is planned beside the model that it takes the place of."""
    if decision.device.torch_name != old.plan.device.torch_name:
        return True
    return decision.needed_bytes + _held(old) <= decision.allowed_bytes


def _held(model: LoadedModel) -> int:
    """Return the most bytes that a model takes on its device."""
    return sum(model.bytes.values()) + model.plan.activation_bytes


def _remains_of(model: LoadedModel) -> Decided:
    """Return what is needed to load a model again as it was."""
    engine = model.engine
    return Decided(model.spec, model.tokenizer, engine.template, model.plan, {}, model.decoder.entry)
