# The public names, each once: type checkers read them here, and __init__.py imports each when it is first used.

from . import plots as plots
from . import tasks as tasks
from . import zoo as zoo
from .attribution.attribute import IntegrationWarning as IntegrationWarning
from .attribution.attribute import attribute as attribute
from .attribution.edges import attribute_edges as attribute_edges
from .data import metrics as metrics
from .data import statistics as statistics
from .data.alignment import Alignment as Alignment
from .data.curve import FaithfulnessCurve as FaithfulnessCurve
from .data.edge_alignment import EdgeAlignment as EdgeAlignment
from .data.edges import EdgeScores as EdgeScores
from .data.edges import EdgeSet as EdgeSet
from .data.measurements import Measurements as Measurements
from .data.nodes import Node as Node
from .data.nodes import NodeSet as NodeSet
from .data.pairs import PromptPairs as PromptPairs
from .data.scores import NodeScores as NodeScores
from .errors import DfaError as DfaError
from .estimate import Estimate as Estimate
from .estimate import estimate as estimate
from .evaluation import diagnostics as diagnostics
from .evaluation.check import TaskCheck as TaskCheck
from .evaluation.check import check as check
from .evaluation.faithfulness import faithfulness_curve as faithfulness_curve
from .experiments import study as study
from .models import hooks as hooks
from .models.hooks import prepared as prepared
from .models.loading import load_model as load_model
from .models.runner import ShortCutWarning as ShortCutWarning
from .transfer import controls as controls
from .transfer import edge_forms as edge_forms
from .transfer import forms as forms
from .transfer import objectives as objectives
from .transfer import similarity as similarity
from .transfer.functional import FunctionalAlignment as FunctionalAlignment
from .transfer.functional import fit_functional as fit_functional
from .transfer.measure import measure as measure
from .transfer.recipe import Recipe as Recipe
from .transfer.refine import refine as refine
from .transfer.trainer import Job as Job
from .transfer.trainer import TrainingWarning as TrainingWarning
from .transfer.trainer import fit as fit
from .transfer.trainer import fit_many as fit_many

__version__: str
