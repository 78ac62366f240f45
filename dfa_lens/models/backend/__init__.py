"""What a model is to dfa_lens, and how its classes differ.

- :mod:`~dfa_lens.models.backend.protocol`: what is needed of a model.
- :mod:`~dfa_lens.models.backend.lens`: HookedTransformer and TransformerBridge.
- :mod:`~dfa_lens.models.backend.plain`: Hugging Face's models as they are; :mod:`~dfa_lens.models.backend.families`:
  where their parts are.
- :mod:`~dfa_lens.models.backend.gate`: what every function that runs a model goes through.
"""

from dfa_lens.models.backend.families import FAMILIES, Family
from dfa_lens.models.backend.gate import backend_of, is_bridge, neutral, runs, usable
from dfa_lens.models.backend.lens import BridgeBackend, HookedBackend
from dfa_lens.models.backend.plain import PlainBackend, PlainModel
from dfa_lens.models.backend.protocol import (
    AddedPoint,
    AttentionWeights,
    Backend,
    HookedModel,
    HookFunction,
    KeysValues,
    Norm,
)

__all__ = [
    "FAMILIES",
    "AddedPoint",
    "AttentionWeights",
    "Backend",
    "BridgeBackend",
    "Family",
    "HookFunction",
    "HookedBackend",
    "HookedModel",
    "KeysValues",
    "Norm",
    "PlainBackend",
    "PlainModel",
    "backend_of",
    "is_bridge",
    "neutral",
    "runs",
    "usable",
]
