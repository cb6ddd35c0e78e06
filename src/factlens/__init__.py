"""factlens: where does a language model store a fact, and can it be changed there?

    import factlens as fl

    model = fl.load_model()
    trace = fl.trace(model, "The Space Needle is located in the city of", subject="The Space Needle")
    fl.plots.heatmap(trace)

Names are loaded when they are first used, so that `import factlens` and `factlens --help` take no time.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from factlens import claims as claims
    from factlens import editors as editors
    from factlens import effects as effects
    from factlens import executors as executors
    from factlens import gradients as gradients
    from factlens import lenses as lenses
    from factlens import patches as patches
    from factlens import peaks as peaks
    from factlens import plots as plots
    from factlens import reports as reports
    from factlens.alarms import alarm as alarm
    from factlens.averages import average as average
    from factlens.averages import read_run as read_run
    from factlens.benchmarks.atlas_counterfact import counterfact as counterfact
    from factlens.editors.rome import rome as rome
    from factlens.edits import Edit as Edit
    from factlens.edits import applied as applied
    from factlens.edits import apply_permanently as apply_permanently
    from factlens.effects import average_effects as average_effects
    from factlens.effects import average_total_effects as average_total_effects
    from factlens.errors import FactlensError as FactlensError
    from factlens.errors import FactWarning as FactWarning
    from factlens.evaluation import evaluate as evaluate
    from factlens.exports import export as export
    from factlens.facts import Fact as Fact
    from factlens.facts import Rewrite as Rewrite
    from factlens.facts import bundled_facts as bundled_facts
    from factlens.facts import read_facts as read_facts
    from factlens.fingerprints import fingerprint as fingerprint
    from factlens.generation import generate as generate
    from factlens.key_statistics import moment_for as moment_for
    from factlens.knowledge import known_facts as known_facts
    from factlens.models import load_model as load_model
    from factlens.panels import explore as explore
    from factlens.summaries import Summary as Summary
    from factlens.traces import Trace as Trace
    from factlens.tracing import trace as trace

_HOMES = {
    "Edit": "edits",
    "Fact": "facts",
    "FactWarning": "errors",
    "FactlensError": "errors",
    "Rewrite": "facts",
    "Summary": "summaries",
    "Trace": "traces",
    "alarm": "alarms",
    "applied": "edits",
    "apply_permanently": "edits",
    "average": "averages",
    "average_effects": "effects",
    "average_total_effects": "effects",
    "bundled_facts": "facts",
    "counterfact": "benchmarks.atlas_counterfact",
    "evaluate": "evaluation",
    "explore": "panels",
    "export": "exports",
    "fingerprint": "fingerprints",
    "generate": "generation",
    "known_facts": "knowledge",
    "load_model": "models",
    "moment_for": "key_statistics",
    "read_facts": "facts",
    "read_run": "averages",
    "rome": "editors.rome",
    "trace": "tracing",
}
_MODULES = (
    "claims",
    "editors",
    "effects",
    "executors",
    "gradients",
    "lenses",
    "patches",
    "peaks",
    "plots",
    "reports",
)

__all__ = [
    "Edit",
    "Fact",
    "FactWarning",
    "FactlensError",
    "Rewrite",
    "Summary",
    "Trace",
    "alarm",
    "applied",
    "apply_permanently",
    "average",
    "average_effects",
    "average_total_effects",
    "bundled_facts",
    "claims",
    "counterfact",
    "editors",
    "effects",
    "evaluate",
    "executors",
    "explore",
    "export",
    "fingerprint",
    "generate",
    "gradients",
    "known_facts",
    "lenses",
    "load_model",
    "moment_for",
    "patches",
    "peaks",
    "plots",
    "read_facts",
    "read_run",
    "reports",
    "rome",
    "trace",
]


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return import_module(f"factlens.{name}")
    if name in _HOMES:
        found = getattr(import_module(f"factlens.{_HOMES[name]}"), name)
        globals()[name] = found
        return found
    raise AttributeError(
        f"module 'factlens' has no attribute {name!r}; it has {', '.join(__all__)}"
    )


def __dir__() -> list[str]:
    return __all__
