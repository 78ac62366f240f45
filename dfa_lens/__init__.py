"""dfa_lens: carry a circuit from a small language model to a large one.

Differentiable Faithfulness Alignment (arXiv 2604.24302) as a plugin to TransformerLens. Import it beside the model::

    import dfa_lens as dfa

Every name below is imported when it is first used, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dfa_lens import (
        controls,
        diagnostics,
        features,
        metrics,
        objectives,
        parameterisation,
        plots,
        statistics,
        study,
        tasks,
        zoo,
    )
    from dfa_lens.alignment import Alignment
    from dfa_lens.attribution import IntegrationWarning, attribute
    from dfa_lens.behaviour import Behaviour
    from dfa_lens.errors import DfaError
    from dfa_lens.faithfulness import FaithfulnessCurve, faithfulness_curve
    from dfa_lens.models import hooks
    from dfa_lens.models.hooks import prepared
    from dfa_lens.models.loading import load_model
    from dfa_lens.models.runner import ShortCutWarning
    from dfa_lens.nodes import Node, NodeSet
    from dfa_lens.planning import Estimate, estimate
    from dfa_lens.prompts import PromptPairs
    from dfa_lens.scores import NodeScores
    from dfa_lens.training import Job, TrainingWarning, fit, fit_many

__version__ = "0.1.0"

# name → the module that has it; None: the name is that module itself
_HOME: dict[str, str | None] = {
    "Alignment": "alignment",
    "Behaviour": "behaviour",
    "DfaError": "errors",
    "Estimate": "planning",
    "FaithfulnessCurve": "faithfulness",
    "IntegrationWarning": "attribution",
    "Job": "training",
    "Node": "nodes",
    "NodeScores": "scores",
    "NodeSet": "nodes",
    "PromptPairs": "prompts",
    "ShortCutWarning": "models.runner",
    "TrainingWarning": "training",
    "attribute": "attribution",
    "controls": None,
    "diagnostics": None,
    "estimate": "planning",
    "faithfulness_curve": "faithfulness",
    "features": None,
    "fit": "training",
    "fit_many": "training",
    "hooks": "models",
    "load_model": "models.loading",
    "metrics": None,
    "objectives": None,
    "parameterisation": None,
    "plots": None,
    "prepared": "models.hooks",
    "statistics": None,
    "study": None,
    "tasks": None,
    "zoo": None,
}

__all__ = [
    "Alignment",
    "Behaviour",
    "DfaError",
    "Estimate",
    "FaithfulnessCurve",
    "IntegrationWarning",
    "Job",
    "Node",
    "NodeScores",
    "NodeSet",
    "PromptPairs",
    "ShortCutWarning",
    "TrainingWarning",
    "__version__",
    "attribute",
    "controls",
    "diagnostics",
    "estimate",
    "faithfulness_curve",
    "features",
    "fit",
    "fit_many",
    "hooks",
    "load_model",
    "metrics",
    "objectives",
    "parameterisation",
    "plots",
    "prepared",
    "statistics",
    "study",
    "tasks",
    "zoo",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOME[name]
    value = import_module(f"{__name__}.{name}") if home is None else getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
