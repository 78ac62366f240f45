# The public names, each once: type checkers read them here, and __init__.py imports each when it is first used.

from . import controls as controls
from . import diagnostics as diagnostics
from . import features as features
from . import metrics as metrics
from . import objectives as objectives
from . import parameterisation as parameterisation
from . import plots as plots
from . import statistics as statistics
from . import study as study
from . import tasks as tasks
from . import zoo as zoo
from .alignment import Alignment as Alignment
from .attribution import IntegrationWarning as IntegrationWarning
from .attribution import attribute as attribute
from .behaviour import Behaviour as Behaviour
from .errors import DfaError as DfaError
from .faithfulness import FaithfulnessCurve as FaithfulnessCurve
from .faithfulness import faithfulness_curve as faithfulness_curve
from .models import hooks as hooks
from .models.hooks import prepared as prepared
from .models.loading import load_model as load_model
from .models.runner import ShortCutWarning as ShortCutWarning
from .nodes import Node as Node
from .nodes import NodeSet as NodeSet
from .planning import Estimate as Estimate
from .planning import estimate as estimate
from .prompts import PromptPairs as PromptPairs
from .scores import NodeScores as NodeScores
from .training import Job as Job
from .training import TrainingWarning as TrainingWarning
from .training import fit as fit
from .training import fit_many as fit_many

__version__: str
