"""Functional alignment: on made-up models whose scores are a function of what is measured, and in closed form."""

import copy

import numpy as np
import pytest
import torch
from helpers import unchecked
from sklearn.ensemble import ExtraTreesRegressor

import dfa_lens as dfa
from dfa_lens.errors import AlignmentError, FileError, MeasurementError, ScoreError
from dfa_lens.transfer.functional import LEAST_ROWS
from dfa_lens.transfer.readers import READERS, Attention, Reader, Trees, edge_features, features

NAMES = ["change", "direct-effect", "entropy"]


def measured(layers, heads, seed, scale=1.0):
    nodes = dfa.NodeSet.for_sizes(layers, heads)
    generator = torch.Generator().manual_seed(seed)
    return dfa.Measurements(scale * torch.randn(len(nodes), 3, generator=generator), nodes, NAMES, {"seed": seed})


def law(found, seed=None):
    """Scores that the measurements determine; with a seed, shuffled."""
    values = found["change"].clamp_min(0) * found["direct-effect"].sign() + 0.3 * found["entropy"]
    if seed is not None:
        values = values[torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))]
    return dfa.NodeScores(values, found.nodes, {"method": "law"})


@pytest.fixture(scope="module")
def taught():
    source = {task: measured(6, 7, i) for i, task in enumerate("abcd")}
    return {task: law(found) for task, found in source.items()}, source


def pearson(a, b):
    return dfa.statistics.correlation(a, b).pearson


@pytest.mark.parametrize("reader", ["trees", "attention"])
def test_a_law_is_carried_to_a_model_of_another_size(taught, reader):
    functional = dfa.fit_functional(*taught, reader=reader)
    target = measured(10, 9, 50)
    found = functional.transfer(target)
    assert found.nodes == target.nodes
    assert pearson(found, law(target)) > 0.8
    source = taught[1]
    other = dfa.fit_functional({t: law(source[t], seed=i) for i, t in enumerate(source)}, source, reader=reader)
    assert abs(pearson(other.transfer(target), law(target))) < 0.4


def test_own_scores_teach_as_one_more_task(taught):
    scores, source = taught
    own, target = measured(6, 7, 9), measured(5, 4, 60)
    three = {task: scores[task] for task in "abc"}, {task: source[task] for task in "abc"}
    found = dfa.fit_functional(*three, trees=20, seed=3).transfer(target, law(own), own)
    whole = dfa.fit_functional(three[0] | {"own": law(own)}, three[1] | {"own": own}, trees=20, seed=3)
    assert found == whole.transfer(target)
    assert found.meta["own source scores"] is True


def test_several_sources_teach_together(taught):
    scores, source = taught
    small = measured(2, 3, 77)
    both = dfa.fit_functional(scores | {"e": law(small)}, source | {"e": small}, trees=10)
    assert len(both.table) == 4 * 48 + 8
    for task in range(5):  # every task weighs alike, whatever the scale of its scores
        own = both.table.scores[both.table.group == task]
        torch.testing.assert_close(own.square().mean(), torch.tensor(1.0))


def test_the_scale_of_scores_and_models_does_not_matter(taught):
    """Scores times a constant teach the same; ranks see a target whose measurements are ten times larger."""
    scores, source = taught
    larger = {task: dfa.NodeScores(100 * each.values, each.nodes) for task, each in scores.items()}
    target = measured(5, 4, 60)
    first, second = (dfa.fit_functional(each, source, trees=20).transfer(target) for each in (scores, larger))
    torch.testing.assert_close(first.values, second.values, rtol=1e-4, atol=1e-4)


def test_features():
    nodes = dfa.NodeSet.for_sizes(3, 1)
    found = features(dfa.Measurements(torch.tensor([[3.0], [1.0], [1.0], [1.0], [9.0], [4.0]]), nodes, ["x"]))
    assert found[:, 0].tolist() == [3, 1, 1, 1, 9, 4]
    torch.testing.assert_close(found[:, 1] * 6, torch.tensor([4.0, 2, 2, 2, 6, 5]))
    assert found[:, 2].tolist() == [0, 0, 0.5, 0.5, 1, 1]
    assert found[:, 3].tolist() == [0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_features_of_edges_by_name(n_kv_heads):
    """Each edge by the names of its ends; a key-value head is the mean of the heads that it serves."""
    edges = dfa.EdgeSet(2, 4, n_kv_heads=n_kv_heads).sample(40, seed=1)
    nodes = dfa.NodeSet.for_sizes(2, 4)
    given = dfa.Measurements(torch.rand(10, 2, generator=torch.Generator().manual_seed(0)), nodes, NAMES[:2])
    phi = dict(zip(nodes.names, features(given), strict=True))
    found = edge_features(given, edges)
    assert found.shape == (40, 2 * 6 + 3)
    for row, edge in zip(found, edges, strict=True):
        name, _, kind = edge.reader.rstrip(">").partition("<")
        layer, _, head = name.partition(".")
        if name == "logits":
            read = torch.zeros(6)
        elif kind in ("k", "v"):
            each = 4 // n_kv_heads
            i = int(head.lstrip("khv"))
            read = torch.stack([phi[f"{layer}.h{h}"] for h in range(i * each, (i + 1) * each)]).mean(0)
        else:
            read = phi[name]
        kinds = torch.tensor([float(kind == each) for each in "qkv"])
        torch.testing.assert_close(row, torch.cat([phi.get(edge.writer, torch.zeros(6)), read, kinds]))
    with pytest.raises(MeasurementError, match="of 10 nodes are not those of the ends of"):
        edge_features(given, dfa.EdgeSet(3, 4))


def test_scores_of_edges_are_learned_from_the_ends():
    """A law of both ends, carried to a model of another size; measurements of the ends in the wrong order do not."""

    def drawn(layers, heads, seed):
        found, edges = measured(layers, heads, seed), dfa.EdgeSet(layers, heads)
        rows = edge_features(found, edges)
        n = (rows.shape[1] - 3) // 2
        return rows, rows[:, 0].clamp_min(0) + rows[:, n] * rows[
            :, -2
        ]  # writer's change; reader's, where keys are read

    rows, scores = (torch.cat(each) for each in zip(*(drawn(3, 3, seed) for seed in range(4)), strict=True))
    trees = ExtraTreesRegressor(20, min_samples_leaf=2, random_state=0).fit(rows, scores)
    rows, truth = drawn(4, 4, 50)
    n = (rows.shape[1] - 3) // 2
    assert np.corrcoef(trees.predict(rows), truth)[0, 1] > 0.85
    swapped = torch.cat([rows[:, n : 2 * n], rows[:, :n], rows[:, 2 * n :]], 1)
    assert np.corrcoef(trees.predict(swapped), truth)[0, 1] < 0.5


def test_the_guard():
    """A node that its group's exact effect calls critical, and that nothing taught, is not left out."""

    def with_share(seed, layers=6):
        plain = measured(layers, 7, seed)
        share = torch.zeros(len(plain))
        return dfa.Measurements(torch.cat([plain.values, share[:, None]], 1), plain.nodes, [*NAMES, "group-share"])

    source = {task: with_share(i) for i, task in enumerate("abc")}
    target = with_share(50)
    target.values[3, 3] = 2.0
    scores = {task: law(found) for task, found in source.items()}
    off, on, twice = (dfa.fit_functional(scores, source, trees=10, guard=guard) for guard in (0, None, 2.0))
    assert on.guard == 1.0 and off != on
    share = torch.zeros(48)
    share[3] = 48**0.5  # of mean square 1
    base = off.transfer(target).values
    torch.testing.assert_close(on.transfer(target).values, base + share)
    torch.testing.assert_close(twice.transfer(target).values, base + 2 * share)
    assert on.transfer(target).ranks()[3] == 1 < off.transfer(target).ranks()[3]
    attention = dfa.fit_functional(scores, source, reader="attention", steps=4)
    W = attention.alignment(target, law(source["a"]), source["a"])
    torch.testing.assert_close(
        W.transfer(law(source["a"])).values,
        attention.transfer(target, law(source["a"]), source["a"]).values,
        rtol=1e-3,
        atol=1e-4,
    )
    with pytest.raises(AlignmentError, match="guard must be a number of at least 0, not -1"):
        dfa.fit_functional(scores, source, trees=2, guard=-1)
    without = {task: found.without("group-share") for task, found in source.items()}
    assert dfa.fit_functional(scores, without, trees=2).guard == 0
    with pytest.raises(MeasurementError, match="The guard needs 'group-share'"):
        dfa.fit_functional(scores, without, trees=2, guard=1)


def test_the_ranking_travels_with_the_scores(taught, tmp_path):
    """By size unless it is fitted or replaced otherwise; the scores themselves are the same, and so is the W of one."""
    target = measured(5, 4, 60)
    size, signed = (dfa.fit_functional(*taught, trees=10, **how) for how in ({}, {"ranking": "signed"}))
    found, other = size.transfer(target), signed.transfer(target)
    assert torch.equal(found.values, other.values) and bool((found.values < 0).any())
    assert (found.ranking, other.ranking) == ("absolute", "signed")
    assert found != other and size != signed
    assert found.order().tolist() == found.values.abs().argsort(descending=True, stable=True).tolist()
    assert list(other.top(3)) == list(found.top(3, ranking="signed")) != list(found.top(3))
    signed.save(tmp_path / "f.safetensors")
    assert dfa.FunctionalAlignment.load(tmp_path / "f.safetensors").ranking == "signed"
    attention = dfa.fit_functional(*taught, reader="attention", steps=2)
    own = law(taught[1]["a"])
    assert attention.alignment(target, own, taught[1]["a"]).transfer(own).ranking == "absolute"
    with pytest.raises(AlignmentError, match="Unknown ranking 'size'"):
        unchecked(dfa.fit_functional)(*taught, trees=2, ranking="size")


def test_sizes_are_learned_where_signs_cancel(tmp_path):
    """Where nothing that is measured says the sign; as if sizes had been given, shares in groups among them."""
    nodes = [dfa.NodeSet.for_sizes(6, 7), dfa.NodeSet.for_sizes(5, 4)]
    generator = torch.Generator().manual_seed(0)

    def made(nodes):
        sign = torch.randint(2, (len(nodes),), generator=generator) * 2.0 - 1
        values = torch.randn(len(nodes), 2, generator=generator)
        share = sign * values[:, :1].abs().T[0]
        return dfa.NodeScores(values[:, 0].abs() * sign.flip(0), nodes), dfa.Measurements(
            torch.stack([values[:, 0], share], 1), nodes, ["change", "group-share"]
        )

    def unsigned(found):
        values = torch.stack([found["change"], found["group-share"].abs()], 1)
        return dfa.Measurements(values, found.nodes, found.names)

    source = {task: made(nodes[0]) for task in "abcd"}
    (truth, target), (own, on_source) = made(nodes[1]), made(nodes[0])
    scores, measurements = ({task: both[i] for task, both in source.items()} for i in (0, 1))
    functional = dfa.fit_functional(scores, measurements, trees=30, learns="sizes")
    found = functional.transfer(target, own, on_source)
    sizes = {task: dfa.NodeScores(each.values.abs(), each.nodes) for task, each in scores.items()}
    by_hand = dfa.fit_functional(sizes, {task: unsigned(each) for task, each in measurements.items()}, trees=30)
    expected = by_hand.transfer(unsigned(target), dfa.NodeScores(own.values.abs(), own.nodes), unsigned(on_source))
    assert torch.equal(found.values, expected.values)
    signed = dfa.fit_functional(scores, measurements, trees=30, guard=0.0).transfer(target)
    right = [np.corrcoef(each.values.abs(), truth.values.abs())[0, 1] for each in (found, signed)]
    assert right[0] > 0.8
    assert right[1] < 0.65
    assert functional.trust(target).interval.shape == (len(target), 2)
    functional.save(tmp_path / "f.safetensors")
    assert dfa.FunctionalAlignment.load(tmp_path / "f.safetensors") == functional != by_hand
    with pytest.raises(AlignmentError, match="Unknown learns 'size'"):
        unchecked(dfa.fit_functional)(scores, measurements, learns="size")
    attention = dfa.fit_functional(scores, measurements, reader="attention", steps=2, learns="sizes")
    with pytest.raises(AlignmentError, match="no linear map of them"):
        attention.alignment(target, own, on_source)


# --- attention -----------------------------------------------------------------------------------------------------


def test_attention_node_by_node(taught):
    """Σ_j K_ij·s_j + f(φ_i), with loops."""
    functional = dfa.fit_functional(*taught, reader="attention", steps=20)
    scores, source = taught
    own, target = measured(6, 7, 9), measured(2, 2, 60)
    found = functional.transfer(target, law(own), own)
    learned = functional.learned
    phi = ((features(target) - learned["mean"]) / learned["spread"]).clamp(-5, 5)
    table = [(features(source[t]), scores[t], 0.0) for t in "abcd"] + [(features(own), law(own), learned["own"])]
    for i in range(len(target)):
        weights, values = [], []
        for raw, given, bonus in table:
            keys = ((raw - learned["mean"]) / learned["spread"]).clamp(-5, 5)
            unit = given.values / given.values.norm() * len(given) ** 0.5
            for j in range(len(given)):
                weights.append(-((learned["widths"] * (phi[i] - keys[j])) ** 2).sum() + bonus)
                values.append(unit[j])
        expected = torch.stack(weights).softmax(0) @ torch.stack(values)
        expected = expected + phi[i] @ learned["linear"] + learned["constant"]
        torch.testing.assert_close(found.values[i], expected, rtol=1e-3, atol=1e-4)


def test_an_attention_is_a_w_and_a_bias(taught):
    functional = dfa.fit_functional(*taught, reader="attention", steps=20)
    own, target = measured(6, 7, 9), measured(4, 5, 60)
    alignment = functional.alignment(target, law(own), own)
    assert isinstance(alignment, dfa.Alignment)
    assert alignment.W.shape == (48, 24) and bool((alignment.W > 0).all())
    torch.testing.assert_close(
        alignment.transfer(law(own)).values, functional.transfer(target, law(own), own).values, rtol=1e-3, atol=1e-4
    )
    with pytest.raises(AlignmentError, match="Only an 'attention' is a linear map of the scores, not 'trees'"):
        dfa.fit_functional(*taught, trees=2).alignment(target, law(own), own)


def test_training_an_attention_helps(taught):
    """On a task that it has not seen."""
    new = measured(6, 7, 99)
    short, long = (dfa.fit_functional(*taught, reader="attention", steps=n).transfer(new) for n in (1, 150))
    assert pearson(long, law(new)) > pearson(short, law(new)) + 0.02


def test_an_attention_needs_two_families(taught):
    with pytest.raises(AlignmentError, match="over families left out in turn: two are needed"):
        dfa.fit_functional(*taught, reader="attention", families=dict.fromkeys("abcd", "one"))


def test_random_state_and_gradients_are_left_alone(taught):
    before = torch.get_rng_state()
    with torch.no_grad():
        first = dfa.fit_functional(*taught, reader="attention", steps=3, seed=5)
        assert not torch.is_grad_enabled()
    assert torch.equal(before, torch.get_rng_state())
    assert first == dfa.fit_functional(*taught, reader="attention", steps=3, seed=5)
    assert not any(value.requires_grad for value in first.learned.values())


# --- trust ---------------------------------------------------------------------------------------------------------


def test_held_out_rows_are_predicted_without_their_family(taught):
    scores, source = taught
    functional = dfa.fit_functional(*taught, trees=10, families={"a": "x", "b": "x"})
    rest = dfa.fit_functional({t: scores[t] for t in "cd"}, {t: source[t] for t in "cd"}, trees=10)
    torch.testing.assert_close(functional.held_out[:48].float(), rest.transfer(source["a"]).values)
    torch.testing.assert_close(functional.held_out[48:96].float(), rest.transfer(source["b"]).values)


def test_intervals_hold_what_they_promise():
    """Each of eight tasks from the other seven: on average as many nodes are inside as was asked for."""
    source = {task: measured(6, 7, i) for i, task in enumerate("abcdefgh")}
    inside = []
    for task, new in source.items():
        others = {other: found for other, found in source.items() if other != task}
        functional = dfa.fit_functional({t: law(found) for t, found in others.items()}, others, trees=30)
        low, high = functional.trust(new, confidence=0.8).interval.T
        truth = law(new).values / law(new).values.norm() * 48**0.5
        inside.append(((truth >= low) & (truth <= high)).float().mean())
    assert 0.72 < float(torch.stack(inside).mean()) < 0.88


def test_what_is_far_from_all_that_taught_shows(taught):
    functional = dfa.fit_functional(*taught, trees=20)
    near, far = functional.trust(measured(6, 7, 8)), functional.trust(measured(6, 7, 8, scale=8.0))
    assert 0.5 < near.distance < 1.5 < far.distance
    assert near.spread > 0 and near.confidence == 0.9
    one = dfa.fit_functional({"a": taught[0]["a"]}, {"a": taught[1]["a"]}, trees=2)
    with pytest.raises(AlignmentError, match="two are needed"):
        one.trust(measured(6, 7, 8))


def test_without_a_family(taught):
    """As if it had never been there: the trees, what an attention learns, and the families that are left."""
    scores, source = taught
    families = {"a": "x", "b": "y", "c": "x", "d": "z"}
    for reader in (Attention(steps=3), Trees(trees=5)):
        whole = dfa.fit_functional(*taught, reader=reader, families=families)
        rest = dfa.fit_functional(
            {t: scores[t] for t in "bd"}, {t: source[t] for t in "bd"}, reader=reader, families=families
        )
        assert whole.without("x") == rest and whole.without("x").meta["families"] == {"b": "y", "d": "z"}
        assert rest.without("x") is rest
    with pytest.raises(AlignmentError, match="Without the family 'y' there is nothing to learn from"):
        rest.without("z").without("y")


@pytest.mark.parametrize("reader", ["trees", "attention"])
def test_importance(reader):
    """Scores are one measurement: shuffling it takes all the correlation, shuffling the others next to none."""
    source = {task: measured(6, 7, i) for i, task in enumerate("abc")}
    scores = {t: dfa.NodeScores(found["direct-effect"], found.nodes) for t, found in source.items()}
    found = dfa.fit_functional(scores, source, reader=reader).importance(repeats=3)
    assert next(iter(found)) == "direct-effect" and set(found) == set(NAMES)
    assert found["direct-effect"] > 0.7
    assert all(abs(found[name]) < 0.1 for name in ("change", "entropy"))
    with pytest.raises(AlignmentError, match="two are needed"):
        dfa.fit_functional({"a": scores["a"]}, {"a": source["a"]}, trees=2).importance()
    with pytest.raises(AlignmentError, match="repeats must be an integer of at least 1, not 0"):
        dfa.fit_functional(scores, source, trees=2).importance(repeats=0)


# --- values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", [Trees(trees=8, leaf=3), Attention(steps=4)])
def test_saving(taught, tmp_path, reader):
    functional = dfa.fit_functional(*taught, reader=reader, seed=2)
    functional.save(tmp_path / "f.safetensors")
    again = dfa.FunctionalAlignment.load(tmp_path / "f.safetensors")
    assert again == functional and again.reader == reader and again.seed == 2
    assert again.meta["tasks"] == list("abcd")
    target = measured(5, 4, 60)
    assert again.transfer(target) == functional.transfer(target)
    assert functional != dfa.fit_functional(*taught, reader=reader, seed=3)
    law(target).save(tmp_path / "s")
    with pytest.raises(FileError, match="not a file of 'dfa_lens functional alignment'"):
        dfa.FunctionalAlignment.load(tmp_path / "s")


def test_a_reader_of_ones_own(taught):
    class Mean(Reader):
        name = "mean"

        def read(self, table, own, target, learned, seed):
            return table.scores.mean().expand(1, len(target))

    READERS.register("mean", Mean)
    found = dfa.fit_functional(*taught, reader="mean").transfer(measured(2, 2, 0))
    assert len(set(found.values.tolist())) == 1


def test_bad_input(taught):
    scores, source = taught
    fit = unchecked(dfa.fit_functional)
    target = measured(5, 4, 60)
    with pytest.raises(AlignmentError, match="need the same tasks"):
        fit(scores, {"a": source["a"]})
    with pytest.raises(AlignmentError, match="Unknown reader 'tree': .*Did you mean 'trees'"):
        fit(scores, source, reader="tree")
    with pytest.raises(AlignmentError, match="'trees' has no option 'steps'; it has leaf, trees"):
        fit(scores, source, steps=3)
    with pytest.raises(AlignmentError, match="trees must be an integer of at least 1, not 0"):
        fit(scores, source, trees=0)
    with pytest.raises(MeasurementError, match="Task 'b' was measured by change, entropy, but 'a' by"):
        fit(scores, source | {"b": source["b"].without("direct-effect")})
    with pytest.raises(ScoreError, match="The scores of task 'b' belong to 8 nodes"):
        fit(scores | {"b": law(measured(2, 3, 0))}, source)
    small = measured(2, 2, 0)
    with pytest.raises(AlignmentError, match=f"6 nodes are too few to learn from: {LEAST_ROWS} are needed"):
        fit({"a": law(small)}, {"a": small})
    functional = fit(scores, source, trees=2)
    with pytest.raises(MeasurementError, match="The target's measurements lack 'direct-effect' .1 of 3"):
        functional.transfer(target.without("direct-effect"))
    with pytest.raises(AlignmentError, match="go together: measurements are missing"):
        functional.transfer(target, scores=law(target))
    with pytest.raises(ScoreError, match="The scores of the task belong to 25 nodes"):
        functional.transfer(target, law(target), measured(2, 3, 0))
    assert repr(functional) == "FunctionalAlignment(trees, 192 nodes of 4 tasks)"
    assert copy.deepcopy(functional) == functional


def test_shipped_models(zoo_source, zoo_target):
    """Names from choices: the ranking is that of exact patching far beyond chance, with no relative to learn from."""
    tasks = ("mcqa", "addition", "arc-easy")
    pairs = {task: dfa.tasks.load(task, zoo_source.tokenizer, n=8) for task in tasks}
    scores = {task: dfa.attribute(zoo_source, each) for task, each in pairs.items()}
    source = {task: dfa.measure(zoo_source, each) for task, each in pairs.items()}
    functional = dfa.fit_functional(scores, source, families=dfa.tasks.FAMILIES, trees=50)
    ioi = dfa.tasks.load("ioi", zoo_target.tokenizer, n=8)
    found = functional.transfer(dfa.measure(zoo_target, ioi))
    assert pearson(found, dfa.attribute(zoo_target, ioi, method="nap")) > 0.6
