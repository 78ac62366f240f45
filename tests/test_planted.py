"""The planted circuits: that the nodes that are said to do a task do it, and that methods find them."""

import functools

import pytest
import torch
from helpers import BACKENDS, unchecked
from sklearn.metrics import roc_auc_score

import dfa_lens as dfa
from dfa_lens.errors import TaskError
from dfa_lens.models.runner import Runner
from dfa_lens.zoo import planted

load = functools.lru_cache(planted.load)


def auroc(side, task, scores):
    return roc_auc_score(side.circuit(task).kept.numpy(), scores.values.numpy())


def test_there_are_six_pairs():
    assert len(planted.names()) == len(set(planted.names())) == 6


@pytest.mark.parametrize("name", planted.names())
def test_sizes_and_correspondence(name):
    pair = load(name)
    assert len(pair.target.nodes) > 2 * len(pair.source.nodes)
    assert pair.source.roles.keys() == pair.target.roles.keys()
    doubled = {role for role, nodes in pair.target.roles.items() if len(nodes) == 2}
    assert doubled == set(planted.RECIPES[name].split) != set()
    assert all(len(nodes) == 1 for nodes in pair.source.roles.values())
    for side in (pair.source, pair.target):
        placed = [node for nodes in side.roles.values() for node in nodes]
        assert len(set(placed)) == len(placed) < len(side.nodes)
        assert all(side.role(node) == role for role, nodes in side.roles.items() for node in nodes)
    heads = [role for role in pair.source.roles if pair.source.roles[role][0].startswith("a")]
    # permuted: a head does not stand where it stands in the source
    assert any(pair.source.roles[role][0] not in pair.target.roles[role] for role in heads)
    taught = {role for task in pair.tasks if task not in pair.held_out for role in pair.source.tasks[task]}
    assert taught == set(pair.source.roles)


@pytest.mark.parametrize("name", planted.names())
def test_every_task_is_solved_both_ways(name):
    pair = load(name)
    found = [pair.pairs(task, split="test", n=24, seed=1) for task in pair.tasks]
    prompts = torch.cat([each for pairs in found for each in (pairs.clean, pairs.corrupt)])
    answers = torch.cat([each for pairs in found for each in (pairs.answer, pairs.wrong)])
    for side in (pair.source, pair.target):
        with torch.no_grad():
            said = Runner(side.model).run(prompts, torch.full(answers.shape, prompts.shape[1])).argmax(-1)
        right = (said == answers).float().reshape(len(pair.tasks), -1).mean(1)
        assert right.min() >= 0.9, dict(zip(pair.tasks, right.tolist(), strict=True))


@pytest.mark.parametrize("name", planted.names())
def test_the_circuit_is_enough_and_every_role_is_needed(name):
    """By running circuits; no score has a part in it."""
    pair = load(name)
    task = pair.held_out[0]
    prompts = pair.pairs(task, n=24)
    circuit = pair.target.circuit(task)
    assert abs(dfa.circuits.run(pair.target.model, prompts, circuit).faithfulness - 1) < 0.15
    for role in pair.target.tasks[task]:
        rest = dfa.Circuit(set(circuit) - set(pair.target.roles[role]), circuit.universe)
        assert dfa.circuits.run(pair.target.model, prompts, rest).faithfulness < 0.75, role


def test_the_norm_divides_by_nearly_the_same_everywhere():
    for name in planted.names():
        model = load(name).target.model
        prompts = load(name).pairs(load(name).tasks[0], n=8)
        last = model.cfg.n_layers - 1
        nodes = dfa.NodeSet.from_points(model, {"blocks.{layer}.hook_resid_post": None})
        with dfa.hooks.record(model, nodes) as found, torch.no_grad():
            model(prompts.clean)
        for layer in (0, last):
            sizes = found[f"blocks.{layer}.hook_resid_post"].norm(dim=-1)
            assert sizes.max() / sizes.min() < 1.02, (name, layer)


@pytest.mark.parametrize("backend", [*BACKENDS, "transformers"])
def test_all_classes_of_models(backend):
    pair = load("gate")
    other = load("gate", backend=backend)
    prompts = pair.pairs("pointed/next", n=4)
    options = {"method": "nap-ig-inputs", "steps": 2}
    mine, theirs = (dfa.attribute(each.target.model, prompts, **options).values for each in (pair, other))
    torch.testing.assert_close(theirs, mine, atol=1e-4, rtol=1e-4)


def test_half_precision_solves_it_too():
    pair = planted.load("induction", dtype=torch.bfloat16)
    prompts = pair.pairs("recalled/next", n=16)
    with torch.no_grad():
        said = Runner(pair.source.model).run(prompts.clean, prompts.lengths).argmax(-1)
    assert (said == prompts.answer).float().mean() >= 0.9


def test_a_seed_moves_the_roles():
    again, other = planted.load("lookup"), planted.load("lookup", seed=1)
    assert again.target.roles == load("lookup").target.roles != other.target.roles
    first, second, third = (next(iter(each.target.model.parameters())) for each in (load("lookup"), again, other))
    assert torch.equal(first, second) and not torch.equal(first, third)


def test_the_splits_share_no_prompt():
    pair = load("lookup")
    train, test = (pair.pairs("first/next", split=split, n=100) for split in ("train", "test"))
    seen = {tuple(row) for side in (train.clean, train.corrupt) for row in side.tolist()}
    assert not seen & {tuple(row) for side in (test.clean, test.corrupt) for row in side.tolist()}
    assert (train.answer != train.wrong).all()


def test_the_tokenizer_reads_the_prompts():
    pair = load("names")
    prompts = pair.pairs("other/next", n=3)
    tokenizer = pair.source.model.tokenizer
    text = " ".join(tokenizer.convert_ids_to_tokens(prompts.clean[0, 1:].tolist()))
    assert tokenizer(text)["input_ids"] == prompts.clean[0].tolist()


@pytest.mark.parametrize("method", ["nap", "nap-ig-inputs", "nap-ig-activations", "exact"])
def test_attribution_finds_what_was_planted(method):
    pair, task = load("induction"), "recalled/copy"
    scores = dfa.attribute(pair.target.model, pair.pairs(task, n=16), method=method, batch_size=16)
    assert auroc(pair.target, task, scores) >= 0.95
    random = [auroc(pair.target, task, dfa.controls.random_scores(pair.target.nodes, seed=i)) for i in range(20)]
    assert 0.3 < sum(random) / 20 < 0.7


def test_w_learns_which_role_is_which():
    """On tasks that combine roles anew; the same training on uniform scores can't."""
    pair = load("lookup")
    others = [task for task in pair.tasks if task not in pair.held_out]
    prompts = {task: pair.pairs(task, n=16) for task in pair.tasks}
    scores = {task: dfa.attribute(pair.source.model, prompts[task], method="nap", batch_size=16) for task in pair.tasks}
    uniform = dfa.controls.uniform(pair.source.nodes)
    seen, right = {task: prompts[task] for task in others}, {}
    for name, given in (("W", scores), ("uniform-s", dict.fromkeys(pair.tasks, uniform))):
        W = dfa.fit(pair.target.model, {task: given[task] for task in others}, seen, steps=40, batch_size=8)
        rows = [W.W[pair.source.nodes.position(nodes[0])].argmax() for nodes in pair.source.roles.values()]
        found = [pair.target.role(pair.target.nodes.names[int(row)]) for row in rows]
        right[name] = sum(a == b for a, b in zip(found, pair.source.roles, strict=True)) / len(found)
        if name == "W":
            for task in pair.held_out:
                assert auroc(pair.target, task, W.transfer(scores[task])) >= 0.95
    assert right["W"] >= 0.8 and right["uniform-s"] <= 0.34


def test_what_is_not_there_is_refused():
    pair = load("lookup")
    with pytest.raises(TaskError, match="planted pair 'look up'.*lookup"):
        planted.load("look up")
    with pytest.raises(TaskError, match="task 'ioi'"):
        pair.pairs("ioi")
    with pytest.raises(TaskError, match="task 'ioi'"):
        pair.source.circuit("ioi")
    with pytest.raises(TaskError, match="split 'validation'"):
        unchecked(type(pair).pairs)(pair, "first/next", split="validation")
    for n in (0, -1, 2.5, True):
        with pytest.raises(TaskError, match="n must be"):
            unchecked(type(pair).pairs)(pair, "first/next", n=n)
    with pytest.raises(dfa.errors.NodeError):
        pair.source.role("a9.h9")
