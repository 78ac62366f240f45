"""Every operation gives the same numbers with its short cuts as without any, on every model, dtype and setting.

The plain way is the oracle: whole prompts through all blocks, all logits, weights as they lie. ``python
tests/test_short_cuts.py`` prints the table of docs/accuracy.md.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from families import FAMILIES, HOOKED_FAMILIES, family_model
from helpers import BACKENDS, plain_passes, random_pairs

import dfa_lens as dfa
from dfa_lens.models.runner import Runner

MODELS = [(b, f) for b in BACKENDS for f in (HOOKED_FAMILIES if b == "hooked" else FAMILIES)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: of the largest number of an operation's result; on this kind of model the short way rounds as the plain way does
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.02, torch.float16: 0.02}


def prompts(shared: int) -> dfa.PromptPairs:
    """Padded pairs that have their first tokens in common, or none."""
    pairs = random_pairs(4, 12, seed=3)
    corrupt = pairs.corrupt.clone()
    corrupt[:, :shared] = pairs.clean[:, :shared]
    corrupt[:, shared] = pairs.clean[:, shared] % 100 + 1
    return dfa.PromptPairs(pairs.clean, corrupt, pairs.answer, pairs.wrong, torch.tensor([12, 11, 12, 10]))


def mixed(now: torch.Tensor) -> torch.Tensor:
    """What a hook makes of an activation that depends on all positions that it sees."""
    return now + 0.5 * now.mean(1, keepdim=True)


@contextmanager
def somebody_elses_hooks(model: Any) -> Iterator[None]:
    """One on a hook point behind the last block, one of torch's on a module."""
    point = model.hook_dict["unembed.hook_in"]
    point.add_hook(lambda now, hook: mixed(now))
    handle = model.blocks[1].mlp.register_forward_hook(lambda module, args, out: mixed(out))
    try:
        yield
    finally:
        handle.remove()
        point.remove_hooks()


def operations(model: Any, pairs: dfa.PromptPairs) -> dict[str, Callable[[], torch.Tensor]]:
    """Name → what gives its numbers."""
    nodes = dfa.NodeSet.heads_and_mlps(model)
    ranking = dfa.NodeScores(torch.randn(len(nodes), generator=torch.Generator().manual_seed(0)), nodes)
    source = {"a": dfa.controls.random_scores(dfa.NodeSet.for_sizes(2, 2), seed=1)}
    sizes = [0, 3, 8, 12, 15]

    def scores(method: Any) -> Callable[[], torch.Tensor]:
        return lambda: dfa.attribute(model, pairs, method=method, steps=2).values

    def curve(together: int) -> Callable[[], torch.Tensor]:
        options: dict[str, Any] = {"sizes": sizes, "sizes_per_pass": together}
        return lambda: torch.tensor(dfa.faithfulness_curve(model, pairs, ranking, **options).per_example)

    def fit(**options: Any) -> Callable[[], torch.Tensor]:
        return lambda: dfa.fit(model, source, {"a": pairs}, steps=2, batch_size=3, **options).W

    return {
        "nap": scores("nap"),
        "nap-ig-inputs": scores("nap-ig-inputs"),
        "nap-ig-activations": scores("nap-ig-activations"),
        "exact": scores("exact"),
        "curve": curve(1),
        "curve, together": curve(3),
        "fit": fit(),
        "fit, restore": fit(intervention="restore", cache="recompute"),
        "check": lambda: dfa.check(model, pairs).difference,
        "behaviour": lambda: dfa.similarity.cka_similarity(model, pairs, model, pairs),
    }


def deviations(model: Any, pairs: dfa.PromptPairs, plain: Callable[[pytest.MonkeyPatch], None]) -> dict[str, float]:
    """Operation → how far the short way is from the plain one, as a part of the largest number."""
    short = {name: work() for name, work in operations(model, pairs).items()}
    with pytest.MonkeyPatch.context() as patch:
        plain(patch)
        whole = {name: work() for name, work in operations(model, pairs).items()}
    return {name: float((short[name] - whole[name]).abs().max() / whole[name].abs().max()) for name in short}


@pytest.mark.filterwarnings("ignore:.*of the metric's change unexplained")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(("backend", "family"), MODELS, ids=["-".join(model) for model in MODELS])
def test_the_short_way_is_the_plain_way(backend, family, dtype):
    model = family_model(family, backend, dtype)
    for shared in (7, 0):
        pairs = prompts(shared)
        found = deviations(model, pairs, plain_passes)
        assert max(found.values()) <= TOLERANCE[dtype], found


@pytest.mark.filterwarnings("ignore:.*of the metric's change unexplained")
@pytest.mark.parametrize(("backend", "family"), MODELS, ids=["-".join(model) for model in MODELS])
def test_with_somebody_elses_hooks_no_short_cut_is_taken(backend, family):
    """In any dtype: the numbers are those of the plain way, not close to them."""
    model = family_model(family, backend, torch.float32)
    with somebody_elses_hooks(model):
        found = deviations(model, prompts(shared=7), plain_passes)
    assert max(found.values()) <= 1e-6, found


@pytest.mark.parametrize(("backend", "family"), MODELS, ids=["-".join(model) for model in MODELS])
def test_these_models_take_every_short_cut(backend, family):
    """So that the test above compares something."""
    for dtype in DTYPES:
        runner = Runner(family_model(family, backend, dtype))
        cuts = ("answer", "prefix", "start") + (("unembedding",) if backend == "hooked" else ())
        assert [cut for cut in cuts if not runner.allows(cut, 12)] == []
        assert runner.allows_padding(12)


def main() -> None:
    """Print the largest deviation of every operation in every dtype, and how many combinations were run."""
    warnings.simplefilter("ignore", dfa.IntegrationWarning)
    worst: dict[torch.dtype, dict[str, float]] = {dtype: {} for dtype in DTYPES}
    combinations = 0
    for backend, family in MODELS:
        for dtype in DTYPES:
            model = family_model(family, backend, dtype)
            for shared in (7, 0):
                for name, off in deviations(model, prompts(shared), plain_passes).items():
                    worst[dtype][name] = max(worst[dtype].get(name, 0.0), off)
                combinations += 1
    print(f"{combinations} combinations of {len(MODELS)} models, {len(DTYPES)} dtypes, shared beginnings or not\n")
    print("| operation | " + " | ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES) + " |")
    print("| --- " * (len(DTYPES) + 1) + "|")
    for name in worst[torch.float32]:
        print(f"| {name} | " + " | ".join(f"{worst[dtype][name]:.1e}" for dtype in DTYPES) + " |")


if __name__ == "__main__":
    main()
