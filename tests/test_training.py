import json
import warnings
from dataclasses import fields

import pytest
import torch
from helpers import random_model, random_pairs, unchecked

import dfa_lens as dfa
from dfa_lens.errors import AlignmentError, ModelError, PromptError, ScoreError, TrainingError
from dfa_lens.models import hooks, memory
from dfa_lens.models.runner import Runner
from dfa_lens.transfer import store
from dfa_lens.transfer.forms import DepthBand, Full, Kernel, LowRank, Standardised
from dfa_lens.transfer.objectives import Matryoshka, Sparse, TargetSize

SOURCE = dfa.NodeSet.for_sizes(2, 2)


def inputs(n=6, tasks=("a", "b")):
    scores = {t: dfa.controls.random_scores(SOURCE, seed=i) for i, t in enumerate(tasks)}
    pairs = {t: random_pairs(n, 10 + 2 * i, seed=i, ragged=True) for i, t in enumerate(tasks)}
    return scores, pairs


@pytest.mark.parametrize("intervention", ["circuit", "restore", "interpolate"])
@pytest.mark.parametrize("positions", ["answer", "all", "all-padded"])
def test_the_loss_is_its_equation(model, intervention, positions):
    """The first step's loss, computed again example by example from the definition."""
    scores, pairs = inputs()
    options = {"intervention": intervention, "positions": positions, "sparsity_weight": 0.7, "seed": 3}
    alignment = dfa.fit(model, scores, pairs, steps=1, batch_size=12, initial_scale=0.5, **options)
    record = alignment.history[0]
    W0 = 0.5 * torch.randn(6, 15, generator=torch.Generator().manual_seed(3))
    nodes = dfa.NodeSet.heads_and_mlps(model)
    kl, mean_mask = 0.0, 0.0
    width = 12
    for task in scores:
        s = scores[task].values / scores[task].values.norm()
        g = torch.sigmoid(s @ W0)
        mean_mask += len(pairs[task]) * float(g.mean())
        for i in range(len(pairs[task])):
            one = pairs[task][i]
            if positions == "all-padded":
                grow = width - one.clean.shape[1]
                clean, corrupt = (torch.nn.functional.pad(t, (0, grow)) for t in (one.clean, one.corrupt))
                lengths = torch.tensor([width])
            else:
                clean, corrupt, lengths = one.clean, one.corrupt, one.lengths
            into_clean, into_corrupt = {}, {}
            with torch.no_grad():
                expected = Runner(model).run(clean, lengths, hooks.record_hooks(nodes, into_clean), positions="all")
                Runner(model).run(corrupt, lengths, hooks.record_hooks(nodes, into_corrupt))
                gates = hooks.gate_hooks(nodes, g, clean=into_clean, corrupt=into_corrupt, intervention=intervention)
                run_on = corrupt if intervention == "restore" else clean
                found = Runner(model).run(run_on, lengths, gates, positions="all")
            p, q = expected.log_softmax(-1), found.log_softmax(-1)
            each = (p.exp() * (p - q)).sum(-1)[0]
            kl += float(each[-1] if positions == "answer" else each.sum())
    assert record["divergence"] == pytest.approx(kl / 12, rel=1e-4)
    assert record["mask_mean"] == pytest.approx(mean_mask / 12, rel=1e-5)
    assert record["loss"] == pytest.approx(kl / 12 + 0.7 * mean_mask / 12, rel=1e-4)


def test_training_lowers_the_loss(any_model):
    scores, pairs = inputs(tasks=("a",))
    history = dfa.fit(any_model, scores, pairs, steps=60, sparsity_weight=1.0).history
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]
    assert [record["step"] for record in history] == list(range(60))


def test_determinism_and_seeds(any_model):
    scores, pairs = inputs()
    state = torch.get_rng_state()
    first = dfa.fit(any_model, scores, pairs, steps=4, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)  # the global state plays no part
    second = dfa.fit(any_model, scores, pairs, steps=4, seed=1)
    assert torch.equal(first.W, second.W)
    assert not torch.equal(first.W, dfa.fit(any_model, scores, pairs, steps=4, seed=2).W)


@pytest.mark.parametrize("intervention", ["circuit", "restore", "interpolate"])
def test_where_caches_live_changes_nothing(any_model, intervention):
    scores, pairs = inputs()
    options = {"steps": 4, "intervention": intervention, "positions": "all", "batch_size": 5}
    W = {cache: dfa.fit(any_model, scores, pairs, cache=cache, **options).W for cache in ("device", "cpu", "recompute")}
    torch.testing.assert_close(W["cpu"], W["device"])
    torch.testing.assert_close(W["recompute"], W["device"], atol=1e-4, rtol=1e-3)


def test_backends_agree():
    from helpers import BACKENDS

    if len(BACKENDS) < 2:
        pytest.skip("one backend only")
    scores, pairs = inputs()
    W = [dfa.fit(random_model(b), scores, pairs, steps=5).W for b in BACKENDS]
    torch.testing.assert_close(W[0], W[1], atol=1e-3, rtol=1e-3)


def test_ungated_heads_feel_only_the_sparsity(any_model):
    scores, pairs = inputs(tasks=("a",))
    alignment = dfa.fit(any_model, scores, pairs, steps=10, gate_heads=False, initial_scale=0.0)
    heads = [i for i, node in enumerate(alignment.target) if node.kind == "head"]
    columns = alignment.W[:, heads]
    torch.testing.assert_close(columns, columns[:, :1].expand_as(columns))
    assert alignment.meta["gate_heads"] is False


def test_target_only(any_model):
    _, pairs = inputs()
    mask = dfa.controls.target_only(any_model, pairs, steps=3)
    assert mask.nodes == dfa.NodeSet.heads_and_mlps(any_model)


def test_a_warm_start(any_model):
    """The mask begins at the scores' ranks; with steps of next to nothing it stays there."""
    _, pairs = inputs()
    nodes = dfa.NodeSet.heads_and_mlps(any_model)
    scores = dfa.NodeScores(torch.randn(len(nodes), generator=torch.Generator().manual_seed(0)) ** 3, nodes)
    mask = dfa.controls.target_only(any_model, pairs, steps=1, lr=1e-6, start=scores)
    expected = torch.linspace(2, -2, len(nodes))[scores.ranks() - 1]
    torch.testing.assert_close(mask.values, expected, atol=1e-4, rtol=0)
    other = dfa.NodeScores(torch.rand(5), dfa.NodeSet.for_sizes(1, 4))
    with pytest.raises(ScoreError, match="The scores to start at"):
        dfa.controls.target_only(any_model, pairs, start=other)
    for name, value in {"initial": torch.zeros(1, len(nodes)), "edges": dfa.EdgeSet.of_model(any_model)}.items():
        with pytest.raises(AlignmentError, match=f"start does not go with {name}"):
            dfa.controls.target_only(any_model, pairs, start=scores, **{name: value})


def test_a_failed_training_hands_back_what_it_had(any_model, monkeypatch):
    """The gates become NaN at step 3: the error says where, and carries the W of the steps before."""
    from dfa_lens.transfer.objectives import Masks, Sparse

    class Breaks(Sparse):
        def masks(self, scores, *, temperature, progress, generator):
            found = super().masks(scores, temperature=temperature, progress=progress, generator=generator)
            return Masks(found.gates * float("nan"), found.penalty) if progress >= 0.5 else found

    scores, pairs = inputs()
    with pytest.raises(TrainingError, match="became nan at step 3 on a, b") as caught:
        dfa.fit(any_model, scores, pairs, steps=6, objective=Breaks(1.0), lr=0.05)
    good = caught.value.alignment
    assert len(good.history) == 3
    expected = dfa.fit(any_model, scores, pairs, steps=2, sparsity_weight=1.0, lr=0.05)  # W before the third step
    torch.testing.assert_close(good.W, expected.W)
    with pytest.raises(TrainingError) as caught:
        dfa.fit(any_model, scores, pairs, steps=6, initial=torch.full((6, 15), float("inf")))
    assert caught.value.alignment is None


def test_staying_near_another_alignment(any_model):
    scores, pairs = inputs()
    near = dfa.controls.depth_mean(SOURCE, dfa.NodeSet.heads_and_mlps(any_model))
    free, pulled = (
        dfa.fit(any_model, scores, pairs, steps=30, anchor=near, anchor_weight=pull) for pull in (0.0, 1000.0)
    )
    distance = [float((each.W - near.W).norm()) for each in (free, pulled)]
    assert distance[1] < 0.3 * distance[0]
    assert pulled.meta["anchor_weight"] == 1000.0
    record = dfa.fit(any_model, scores, pairs, steps=1, anchor=near, anchor_weight=2.0, initial=2 * near.W).history[0]
    assert record["loss"] == pytest.approx(record["divergence"] + 10 * record["mask_mean"] + 2.0, rel=1e-4)
    with pytest.raises(AlignmentError, match="between the same source and target nodes"):
        dfa.fit(any_model, scores, pairs, anchor=dfa.controls.depth_mean(SOURCE, SOURCE))


def test_released_options_are_the_modes_by_name(any_model):
    from dfa_lens.transfer.recipe import RELEASED

    scores, pairs = inputs()
    found = dfa.fit(any_model, scores, pairs, steps=2, recipe=RELEASED)
    assert found.stages[0].scaling == "raw"
    assert {k: found.meta[k] for k in ("intervention", "positions", "sparsity_weight", "gate_heads")} == {
        "intervention": "restore",
        "positions": "all-padded",
        "sparsity_weight": 0.1,
        "gate_heads": False,
    }


def test_metadata_hold_all_that_was_asked_for(any_model):
    """Changing any field of a recipe, the scores, any field of a form of W or of an objective changes what is written down, and only that."""
    scores, pairs = inputs()
    near = dfa.controls.depth_mean(SOURCE, dfa.NodeSet.heads_and_mlps(any_model))
    alike = torch.rand(6, 15, generator=torch.Generator().manual_seed(0))
    changes = {
        "sparsity_weight": 2.0, "lr": 0.2, "steps": 2, "batch_size": 3, "seed": 1, "scaling": "rank", "temperature": (1.0, 0.5),
        "initial": torch.ones(6, 15), "initial_scale": 0.02, "anchor": near, "shuffle": False,
        "form": Kernel({"x": alike}), "objective": TargetSize(0.4), "intervention": "restore", "positions": "all",
        "loss": "probability", "gate_heads": False, "ablation": "zero", "direction": "noising",
    }  # fmt: skip
    forms = (
        Kernel({"x": alike}), Kernel({"x": alike + 1e-6}), Kernel({"y": alike}), Kernel({"x": alike}, strength=0.5),
        Kernel({"x": alike}, free=False), Standardised(0.1), Standardised(0.2), LowRank(1), LowRank(2), DepthBand(0.3),
        DepthBand(0.5), Full(alike), Full(2 * alike),
    )  # fmt: skip
    targets = (
        TargetSize(0.3), TargetSize(0.5), TargetSize(0.3, 5.0), Matryoshka(), Matryoshka(0.2), Matryoshka(sizes="log-uniform"),
        Matryoshka(warm_up=0.25), Matryoshka(straight_through=True), Matryoshka(sparsity_weight=1.0), Sparse(3.0),
    )  # fmt: skip
    jobs = {name: dfa.Job(scores, dfa.Recipe(**({"steps": 1} | {name: value}))) for name, value in changes.items()}
    jobs["scores"] = dfa.Job(scores | {"a": dfa.NodeScores(scores["a"].values + 1, SOURCE)}, dfa.Recipe(steps=1))
    jobs["nothing"] = dfa.Job(scores, dfa.Recipe(steps=1))
    jobs["anchor_weight"] = dfa.Job(scores, dfa.Recipe(steps=1, anchor=near, anchor_weight=2.0))
    jobs |= {f"form {i}": dfa.Job(scores, dfa.Recipe(steps=1, form=form)) for i, form in enumerate(forms)}
    jobs |= {f"objective {i}": dfa.Job(scores, dfa.Recipe(steps=1, objective=each)) for i, each in enumerate(targets)}
    assert {field.name for field in fields(dfa.Recipe)} == changes.keys() | {"anchor_weight"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dfa.TrainingWarning)  # two ranks for two tasks, and masks of ones
        found = {name: alignment.meta for name, alignment in dfa.fit_many(any_model, jobs, pairs).items()}
    written = {name: json.dumps(meta, sort_keys=True) for name, meta in found.items()}
    assert len(set(written.values())) == len(jobs) - 1  # one form is there twice
    assert written["form 0"] == written["form"]
    for name, key in (
        ("lr", "lr"),
        ("temperature", "temperature"),
        ("shuffle", "shuffle"),
        ("steps", "steps"),
        ("loss", "loss"),
    ):
        assert {k for k in found[name] if found[name][k] != found["nothing"][k]} == {key}
    assert found["form 7"]["form_options"] == {"rank": 1}
    assert found["objective"]["objective_options"] == {"fraction": 0.4, "sparsity_weight": 10.0}
    assert found["temperature"]["temperature"] == [1.0, 0.5]


def test_what_is_kept_is_made_once(any_model, monkeypatch):
    """One store for each hook point and one for the clean run's predictions, however many batches fill them."""
    made = []
    monkeypatch.setattr(store, "_Kept", lambda *args, kept=store._Kept: made.append(1) or kept(*args))
    scores, pairs = inputs()
    dfa.fit(any_model, scores, pairs, steps=1, batch_size=2, share_prefix=False)
    assert len(made) == len(dfa.NodeSet.heads_and_mlps(any_model).points) + 1


@pytest.mark.parametrize("loss", ["kl", "logit-difference"])
def test_trainings_together_give_what_they_give_alone(any_model, loss):
    scores = {t: dfa.controls.random_scores(SOURCE, seed=i) for i, t in enumerate("abc")}
    pairs = {t: random_pairs(5, 8 + i, seed=i, ragged=True) for i, t in enumerate("abc")}
    jobs = {
        "one": ({"a": scores["a"]}, dfa.Recipe(steps=4, seed=1, batch_size=3, loss=loss)),
        "two": dfa.Job(
            {t: scores[t] for t in "bc"}, dfa.Recipe(steps=6, objective="matryoshka", form="kernel", loss=loss)
        ),
        "three": dfa.Job(scores, dfa.Recipe(steps=3, seed=2, form="full+bias", sparsity_weight=2.0, loss=loss)),
    }
    for jobs_per_pass in (1, 2, 3):
        found = dfa.fit_many(any_model, jobs, pairs, jobs_per_pass=jobs_per_pass)
        for name, job in jobs.items():
            own, recipe = job if isinstance(job, tuple) else (job.scores, job.recipe)
            alone = dfa.fit(any_model, own, {t: pairs[t] for t in own}, recipe=recipe)
            torch.testing.assert_close(found[name].W, alone.W, atol=2e-3, rtol=1e-3)
            assert len(found[name].history) == recipe.steps
            assert found[name].meta == alone.meta
    assert dfa.fit_many(any_model, {}, pairs) == {}


def test_warnings(any_model):
    scores, pairs = inputs()
    with pytest.warns(dfa.TrainingWarning, match="100% of the mask is below .01 or above .99"):
        dfa.fit(any_model, scores, pairs, steps=1, initial=torch.full((6, 15), 1.0), temperature=1e-3)
    equal = dfa.NodeScores(torch.full((6,), 0.5), SOURCE)
    with pytest.warns(dfa.TrainingWarning, match="All source scores of task 'a' are equal"):
        dfa.fit(any_model, {"a": equal}, {"a": pairs["a"]}, steps=1)
    dfa.fit(any_model, {"a": dfa.controls.uniform(SOURCE)}, {"a": pairs["a"]}, steps=1)  # a control says so itself
    with pytest.raises(AlignmentError, match="All source scores are zero"):
        dfa.fit(any_model, {"a": dfa.NodeScores(torch.zeros(6), SOURCE)}, {"a": pairs["a"]}, steps=1)


@pytest.mark.parametrize("share_prefix", [True, False])
def test_more_memory_than_there_is(any_model, share_prefix, monkeypatch):
    """Said before anything is kept, and never where it would have fitted: what is kept is counted."""
    scores, pairs = inputs()
    options = {"steps": 1, "share_prefix": share_prefix}
    asked = []
    monkeypatch.setattr(memory, "require_room", lambda device, least, *words: asked.append(least))
    kept = []
    keep = store.ExampleStore._keep

    def look(self, rows, made, axes):
        kept.extend(each for run in made.runs.values() for each in run.values())
        return keep(self, rows, made, axes)

    monkeypatch.setattr(store.ExampleStore, "_keep", look)
    dfa.fit(any_model, scores, pairs, **options)
    held = sum(each.numel() * each.itemsize for each in kept)
    assert 0.3 * held < asked[0] <= held
    monkeypatch.undo()
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    with pytest.raises(ModelError, match=r"The runs of 1[0-9] training pairs, .*: take cache='cpu' or 'recompute'"):
        dfa.fit(any_model, scores, pairs, **options)
    dfa.fit(any_model, scores, pairs, cache="recompute", **options)


def test_bad_input(any_model):
    scores, pairs = inputs()
    with pytest.raises(AlignmentError, match="Task 'b' is in scores but not in pairs"):
        dfa.fit(any_model, scores, {"a": pairs["a"]})
    with pytest.raises(AlignmentError, match="Task 'b' is in pairs but not in scores"):
        dfa.fit(any_model, {"a": scores["a"]}, pairs)
    with pytest.raises(AlignmentError, match="There is no task: pairs are empty"):
        dfa.fit(any_model, {}, {})
    with pytest.raises(ScoreError, match="scores of task 'b' belong to 12 nodes"):
        dfa.fit(any_model, scores | {"b": dfa.controls.random_scores(dfa.NodeSet.for_sizes(3, 3))}, pairs)
    for name, value in (("lr", 0.0), ("temperature", -1.0), ("sparsity_weight", -0.1), ("steps", 0), ("batch_size", 0)):
        with pytest.raises(AlignmentError, match=f"{name} must be"):
            dfa.fit(any_model, scores, pairs, **{name: value})
    with pytest.raises(AlignmentError, match="Unknown cache 'disk'"):
        unchecked(dfa.fit_many)(any_model, {}, pairs, cache="disk")
    with pytest.raises(AlignmentError, match=r"initial has shape \[2, 2\]"):
        dfa.fit(any_model, scores, pairs, initial=torch.zeros(2, 2))
    foreign = random_pairs(4, vocabulary=400)
    with pytest.raises(PromptError, match="Task 'a': .*vocabulary has 101"):
        dfa.fit(any_model, {"a": scores["a"]}, {"a": foreign})
    with pytest.raises(TrainingError, match="The loss became nan at step 0 on a, b"):
        dfa.fit(any_model, scores, pairs, initial=torch.full((6, 15), float("inf")))
