"""Run a callback right after a module has been imported, without importing it."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["after_import"]

_lock = threading.RLock()


class _PostImportFinder(MetaPathFinder):
    """Finds nothing itself: asks the other finders, and makes the loader they give call back once."""

    def __init__(self) -> None:
        self.callbacks: dict[str, Callable[[ModuleType], None]] = {}
        self._asking = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of a module waited for, with its loader wrapped; None for every other name."""
        if fullname not in self.callbacks or getattr(self._asking, "now", False):
            return None
        self._asking.now = True  # another finder may itself ask sys.meta_path
        try:
            for finder in sys.meta_path:
                if finder is self or not hasattr(finder, "find_spec"):
                    continue
                spec = finder.find_spec(fullname, path, target)
                if spec is not None:
                    self._wrap(spec, fullname)
                    return spec
        finally:
            self._asking.now = False
        return None

    def _wrap(self, spec: ModuleSpec, fullname: str) -> None:
        # The loader object stays what it is (inspect and importlib.resources ask it for sources); only this
        # one instance executes the module and then calls back.
        loader = spec.loader
        original = getattr(loader, "exec_module", None)
        if loader is None or original is None:
            return

        def exec_module(module: ModuleType) -> None:
            original(module)
            callback = self.callbacks.pop(fullname, None)
            if callback is not None:
                callback(module)

        loader.exec_module = exec_module  # type: ignore[method-assign]


_finder = _PostImportFinder()


def after_import(name: str, callback: Callable[[ModuleType], None]) -> None:
    """Call `callback(module)` once the module `name` has executed; at once if it already has.

    Args:
        name: absolute module name such as `"transformers.quantizers.auto"`. It is not imported here.
        callback: called at most once, in the importing thread, before the import statement returns.
            What it raises is raised by that import statement: catch what must not stop it.

    Calling again with the same name replaces a callback that has not run yet.
    """
    with _lock:
        module = sys.modules.get(name)
        if module is None:
            _finder.callbacks[name] = callback
            if _finder not in sys.meta_path:
                sys.meta_path.insert(0, _finder)
            return
    if getattr(module.__spec__, "_initializing", False):
        module = importlib.import_module(name)  # another thread is at it: wait for its end
    callback(module)
