"""The only folder that touches a model, or knows TransformerLens and transformers.

- :mod:`~dfa_lens.models.backend`: what a model must have, and how HookedTransformer, TransformerBridge and Hugging
  Face's own models differ.
- :mod:`~dfa_lens.models.runner`: one model made ready: its hook points, the short cuts that hold on it, its lock.
- :mod:`~dfa_lens.models.paired_run`: one batch of prompt pairs, run clean, corrupt, and under masks in between.
- :mod:`~dfa_lens.models.hooks`: record, gate and ablate the activations of nodes.
- :mod:`~dfa_lens.models.ablations`: what stands in the place of nodes that are left out.
- :mod:`~dfa_lens.models.memory`: how many examples fit into a pass.
- :mod:`~dfa_lens.models.loading`: checkpoints as models.
- :mod:`~dfa_lens.models.private`: every reach into what other libraries keep to themselves.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submodules=["ablations", "hooks"])
