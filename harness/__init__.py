"""The study engine: one YAML file becomes planned, dispatched, journalled and tracked training runs."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = ["load_study", "make_plan"]

if TYPE_CHECKING:
    from harness.plan.plan import make_plan
    from harness.study.schema import load_study
else:
    _PLACES = {
        "load_study": "harness.study.schema:load_study",
        "make_plan": "harness.plan.plan:make_plan",
    }

    def __getattr__(name: str) -> Any:
        """Import a name of `__all__` when it is first used."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module, _, attribute = _PLACES[name].partition(":")
        return getattr(import_module(module), attribute)
