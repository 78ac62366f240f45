"""Models that do not fit: offloaded and quantised weights, and blocks that run once more on the way backward."""

import copy
from collections import Counter

import accelerate
import pytest
import torch
from families import hugging_face
from helpers import BACKENDS, random_model, random_pairs
from test_plain import Quantised

import dfa_lens as dfa
from dfa_lens.errors import AlignmentError
from dfa_lens.models import memory
from dfa_lens.models.backend import PlainModel
from dfa_lens.models.runner import Runner

PAIRS = random_pairs(3, 10, ragged=True)
SHARED = dfa.PromptPairs(
    *(torch.randint(1, 90, (2, 12), generator=torch.Generator().manual_seed(i)) for i in (0, 1)),
    PAIRS.answer[:2],
    PAIRS.wrong[:2],
)
SHARED = dfa.PromptPairs(
    SHARED.clean, torch.cat([SHARED.clean[:, :8], SHARED.corrupt[:, 8:]], 1), SHARED.answer, SHARED.wrong
)
NODES = dfa.NodeSet.for_sizes(3, 4)
SCORES = dfa.controls.random_scores(NODES)


def fitted(model, **options):
    return dfa.fit(model, {"task": SCORES}, {"task": SHARED}, steps=2, batch_size=2, **options).W


WORK = {
    "nap": lambda model: dfa.attribute(model, PAIRS, method="nap").values,
    "nap-ig-inputs": lambda model: dfa.attribute(model, PAIRS, steps=2).values,
    "nap-ig-activations": lambda model: dfa.attribute(model, PAIRS, method="nap-ig-activations", steps=2).values,
    "relp": lambda model: dfa.attribute(model, PAIRS, method="relp").values,  # hooks that hand things on to each other
    "edges": lambda model: dfa.attribute_edges(model, PAIRS, method="eap-ig-inputs", steps=2).values.nan_to_num(),
    "measure": lambda model: dfa.measure(model, PAIRS).values.nan_to_num(),
    "curve": lambda model: torch.as_tensor(dfa.faithfulness_curve(model, PAIRS, SCORES, sizes=[0, 5, 15]).faithfulness),
    "fit": fitted,
    "fit at all positions": lambda model: fitted(model, intervention="restore", positions="all"),
}


@pytest.fixture(scope="module")
def expected():
    with pytest.warns(dfa.IntegrationWarning):
        return {name: work(hugging_face("llama")) for name, work in WORK.items()}


def to_cpu(model, folder):
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def to_disk(model, folder):
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    places |= {"model.layers.0": "disk", "model.layers.1": "cpu", "model.layers.2": "disk"}
    accelerate.dispatch_model(model, device_map=places, main_device="cpu", offload_dir=folder)


@pytest.mark.filterwarnings("ignore::dfa_lens.IntegrationWarning")
@pytest.mark.parametrize("offload", [to_cpu, to_disk])
def test_offloaded_weights_give_the_same(offload, expected, unchanged, tmp_path):
    model = copy.deepcopy(hugging_face("llama"))
    offload(model, tmp_path)
    places = [parameter.device for parameter in model.parameters()]
    with unchanged(PlainModel(model)):
        for name, work in WORK.items():
            torch.testing.assert_close(
                work(model), expected[name], atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
            )
    assert places == [parameter.device for parameter in model.parameters()]  # nothing was left where it is used


def test_offloaded_weights_are_brought_once_a_block_and_not_kept():
    """With gradients, too: a block's weights are there while it runs, forward and once more on the way backward."""
    model = copy.deepcopy(hugging_face("llama"))
    to_cpu(model, None)
    there = Counter()
    most = 0

    def watch(layer):
        nonlocal most
        there[layer] += 1
        loaded = sum(p.device.type != "meta" for block in model.model.layers for p in block.parameters())
        most = max(most, loaded)

    modules = [block.mlp.down_proj for block in model.model.layers]
    for layer, module in enumerate(modules):
        before = module.forward

        def forward(x, before=before, layer=layer):
            watch(layer)
            return before(x)

        module.forward = forward
    runner = Runner(model)
    with runner.session(), torch.enable_grad():
        runner.state.foreign = "the forwards of this test"  # no trials: they are passes, too
        leaves = []
        start = lambda now: leaves.append(now.detach().clone().requires_grad_(True)) or leaves[0]  # noqa: E731
        runner.run(PAIRS.clean, PAIRS.lengths, [("hook_embed", start)]).logsumexp(-1).sum().backward()
    assert there == {0: 2, 1: 2, 2: 2}
    assert most == 0  # accelerate brings a module's weights when that module runs, and takes them away after it


@pytest.mark.parametrize("backend", [*BACKENDS, "transformers"])
def test_checkpointing_changes_no_number(backend, unchanged):
    model = hugging_face("llama") if backend == "transformers" else random_model(backend, num_hidden_layers=3)
    with unchanged(PlainModel(model) if backend == "transformers" else model):
        for options in ({}, {"intervention": "restore", "positions": "all"}, {"intervention": "interpolate"}):
            found, plain = (fitted(model, checkpointing=each, **options) for each in (True, False))
            torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-4)


def test_checkpointing_needs_less():
    """What autograd keeps of a gated pass: as counted, and as estimated beforehand."""
    model = hugging_face("llama")
    runner = Runner(model)
    nodes = dfa.NodeSet.heads_and_mlps(model)
    kept = {
        each: memory.Footprint(runner, nodes, 48, checkpointing=each).gradient_bytes(8, gated=True)
        for each in (True, False)
    }
    peaks = {}
    pairs = random_pairs(8, 48)
    for each in (True, False):
        work = lambda each=each: dfa.fit(  # noqa: E731
            model, {"task": SCORES}, {"task": pairs}, steps=1, batch_size=8, checkpointing=each, share_prefix=False
        )
        work()  # trials are remembered
        with memory.LiveBytes() as live:
            work()
        peaks[each] = live.peak
    saved, estimated = peaks[False] - peaks[True], kept[False] - kept[True]
    assert kept[True] < 0.6 * kept[False] and peaks[True] < peaks[False]
    assert saved == pytest.approx(estimated, rel=0.5)
    needs = [dfa.estimate(model, pairs, checkpointing=each)["fit"] for each in (True, False)]
    assert needs[0].gradient_bytes < needs[1].gradient_bytes and needs[0].forward > needs[1].forward


def test_checkpointing_is_of_nodes():
    model = hugging_face("llama")
    scores = dfa.attribute_edges(model, PAIRS, method="eap")
    with pytest.raises(AlignmentError, match="checkpointing is for scores of nodes"):
        dfa.fit(model, {"task": scores}, {"task": PAIRS}, steps=1, checkpointing=True)


@pytest.mark.filterwarnings("ignore::dfa_lens.IntegrationWarning")
def test_quantised_weights_give_what_their_numbers_give(unchanged):
    """All linear modules of the blocks in eight bits, beside a plain model with the same numbers."""
    model, plain = copy.deepcopy(hugging_face("llama")), copy.deepcopy(hugging_face("llama"))
    for block, other in zip(model.model.layers, plain.model.layers, strict=True):
        for name, module in list(block.named_modules()):
            if type(module) is torch.nn.Linear:
                parent, _, last = name.rpartition(".")
                setattr(block.get_submodule(parent), last, Quantised(module))
                own = block.get_submodule(name)
                other.get_submodule(name).weight.data = (own.weight * own.scale).detach()
    assert sum(p.dtype == torch.int8 for p in model.parameters()) == 7 * 3
    with unchanged(PlainModel(model)):
        for name in ("measure", "curve", "nap", "fit"):
            torch.testing.assert_close(WORK[name](model), WORK[name](plain), atol=1e-5, rtol=1e-4)
    assert sum(p.dtype == torch.int8 for p in model.parameters()) == 7 * 3
