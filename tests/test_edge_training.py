"""Training of masks and alignments of edges."""

import json

import pytest
import torch
from helpers import random_model, random_pairs, unchecked

import dfa_lens as dfa
from dfa_lens.errors import AlignmentError, ScoreError, TrainingError
from dfa_lens.models.edge_gates import run_gated
from dfa_lens.models.paired_run import PairedRun
from dfa_lens.models.runner import Runner
from dfa_lens.models.stream import Stream
from dfa_lens.transfer.edge_forms import Bilinear, FreeMask
from dfa_lens.transfer.forms import Kernel

SOURCE = dfa.EdgeSet(2, 2, 1)


def inputs(n=5, tasks=("a", "b")):
    scores = {t: dfa.controls.random_scores(SOURCE, seed=i) for i, t in enumerate(tasks)}
    pairs = {t: random_pairs(n, 8 + 2 * i, seed=i, ragged=True) for i, t in enumerate(tasks)}
    return scores, pairs


@pytest.mark.parametrize("positions", ["answer", "all"])
@pytest.mark.parametrize("readers", ["grouped", "per-head"])
def test_the_loss_is_its_equation(model, positions, readers):
    """The first step's loss, computed again example by example; edges that are left out stay open."""
    scores, pairs = inputs()
    whole = dfa.EdgeSet.of_model(model, readers=readers)
    edges = whole.where(writer="[am]*")
    form = Bilinear(strength=3.0)
    options = {"positions": positions, "sparsity_weight": 0.7, "batch_size": 10, "form": form}
    record = dfa.fit(model, scores, pairs, steps=1, edges=edges, **options).history[0]
    start = dfa.fit(model, scores, pairs, steps=1, edges=edges, lr=1e-12, **options)
    kl, mean_mask = 0.0, 0.0
    runner = Runner(model)
    for task in scores:
        mask = start.mask(scores[task])
        mean_mask += 5 * float(mask[edges.chosen].mean())
        for i in range(5):
            with runner.session(), torch.no_grad():
                run = PairedRun(runner, pairs[task][i], whole.nodes, share_prefix=False, positions="all")
                _, clean = run.record("clean", nodes=False)
                corrupt, _ = run.record("corrupt")
                found = run_gated(Stream(runner, whole), run, mask.nan_to_num(1.0), corrupt)
            p, q = clean.log_softmax(-1), found.log_softmax(-1)
            each = (p.exp() * (p - q)).sum(-1)[0]
            kl += float(each[-1] if positions == "answer" else each.sum())
    assert record["divergence"] == pytest.approx(kl / 10, rel=1e-3)
    assert record["mask_mean"] == pytest.approx(mean_mask / 10, rel=1e-5)
    assert record["loss"] == pytest.approx(kl / 10 + 0.7 * mean_mask / 10, rel=1e-3)


def test_training_lowers_the_loss(model):
    scores, pairs = inputs(tasks=("a",))
    alignment = dfa.fit(model, scores, pairs, steps=25, sparsity_weight=1.0)
    assert alignment.history[-1]["loss"] < 0.8 * alignment.history[0]["loss"]
    assert alignment.source == SOURCE
    assert alignment.target == dfa.EdgeSet.of_model(model)
    assert alignment.transfer(scores["a"]).edges == alignment.target


@pytest.mark.parametrize("form", [Bilinear(), Bilinear(shared=False), Bilinear(bias=True), FreeMask(), "free"])
def test_what_a_form_makes_is_what_comes_out(any_model, form):
    """The mask of the last step is that of the alignment which came out of the step before."""
    scores, pairs = inputs(tasks=("a",))
    options = {"form": form, "batch_size": 5, "shuffle": False}
    short, longer = (dfa.fit(any_model, scores, pairs, steps=n, **options) for n in (2, 3))
    mask = short.mask(scores["a"])[short.target.chosen]
    assert longer.history[2]["mask_mean"] == pytest.approx(float(mask.mean()), rel=1e-5)
    assert short.meta["form"] == ("free" if form == "free" else form.name)


def test_a_start_from_likeness_and_from_an_alignment_of_nodes(any_model):
    """Without steps that move anything, the alignment is W at both ends."""
    scores, pairs = inputs(tasks=("a",))
    target = dfa.EdgeSet.of_model(any_model)
    nodes = dfa.controls.depth_mean(SOURCE.nodes[1:], target.nodes[1:])
    given = {"lr": 1e-12, "steps": 1, "initial_scale": 0.0}
    found = dfa.fit(any_model, scores, pairs, form=Bilinear(start_from=nodes), **given)
    expected = nodes.transfer(scores["a"], edges=target)
    torch.testing.assert_close(found.transfer(scores["a"]).flat, expected.flat)
    alike = dfa.similarity.kind_and_depth(SOURCE.nodes[1:], target.nodes[1:])
    first, second = (
        dfa.fit(any_model, scores, pairs, form=form, **given) for form in (Bilinear(), Bilinear(start_from=alike))
    )
    torch.testing.assert_close(first.stages[0].A, second.stages[0].A)
    torch.testing.assert_close(first.stages[0].B, second.stages[0].B)
    with pytest.raises(AlignmentError, match=r"start_from has shape \[2, 2\]"):
        dfa.fit(any_model, scores, pairs, form=Bilinear(start_from=torch.ones(2, 2)), steps=1)


def test_where_caches_live_and_what_trains_together_changes_nothing(any_model):
    scores, pairs = inputs()
    options = {"steps": 3, "batch_size": 4}
    plain = dfa.fit(any_model, scores, pairs, **options)
    assert dfa.fit(any_model, scores, pairs, **options) == plain
    for more in ({"cache": "cpu"}, {"cache": "recompute"}, {"share_prefix": False}):
        other = dfa.fit(any_model, scores, pairs, **options, **more)
        torch.testing.assert_close(other.stages[0].A, plain.stages[0].A, atol=2e-3, rtol=1e-2)
    jobs = {
        "a": dfa.Job({"a": scores["a"]}, dfa.Recipe(**options)),
        "both": dfa.Job(scores, dfa.Recipe(**options, objective="matryoshka")),
    }
    together = dfa.fit_many(any_model, jobs, pairs, jobs_per_pass=2)
    for name, job in jobs.items():
        alone = dfa.fit(any_model, job.scores, {t: pairs[t] for t in job.scores}, recipe=job.recipe)
        torch.testing.assert_close(together[name].stages[0].B, alone.stages[0].B, atol=2e-3, rtol=1e-2)
        assert together[name].meta == alone.meta


def test_a_free_mask(any_model, unchanged):
    """Better than any mask of one number; each edge has its own."""
    _, pairs = inputs(tasks=("a",))
    edges = dfa.EdgeSet.of_model(any_model)
    with unchanged(any_model):
        mask = dfa.controls.target_only(any_model, pairs, edges=edges, steps=30, sparsity_weight=1.0)
    assert mask.edges == edges
    assert mask.meta["form"] == "free"
    options = {"protocol": "mib", "sizes": [0, 95, 190]}
    curve = dfa.faithfulness_curve(any_model, pairs["a"], mask, **options)
    random = dfa.faithfulness_curve(any_model, pairs["a"], dfa.controls.random_scores(edges), **options)
    assert curve.kl[1] < 0.5 * random.kl[1]


def test_a_failed_training_hands_back_what_it_had(any_model):
    from dfa_lens.transfer.objectives import Masks, Sparse

    class Breaks(Sparse):
        def masks(self, scores, *, temperature, progress, generator):
            found = super().masks(scores, temperature=temperature, progress=progress, generator=generator)
            return Masks(found.gates * float("nan"), found.penalty) if progress >= 0.5 else found

    scores, pairs = inputs()
    with pytest.raises(TrainingError, match="became nan at step 2 on a, b") as caught:
        dfa.fit(any_model, scores, pairs, steps=4, objective=Breaks(1.0))
    assert isinstance(caught.value.alignment, dfa.EdgeAlignment)
    assert len(caught.value.alignment.history) == 2


def test_metadata_hold_all_that_was_asked_for(any_model):
    scores, pairs = inputs(tasks=("a",))
    alike = torch.rand(6, 15, generator=torch.Generator().manual_seed(0))
    forms = (
        Bilinear(), Bilinear(alike), Bilinear(2 * alike), Bilinear(strength=2.0), Bilinear(shared=False),
        Bilinear(bias=True), FreeMask(),
    )  # fmt: skip
    jobs = {str(i): dfa.Job(scores, dfa.Recipe(steps=1, form=form)) for i, form in enumerate(forms)}
    found = [json.dumps(each.meta, sort_keys=True) for each in dfa.fit_many(any_model, jobs, pairs).values()]
    assert len(set(found)) == len(forms)
    assert json.loads(found[0])["form_options"] == {"start_from": None, "strength": 1.0, "shared": True, "bias": False}


def test_bad_input(any_model):
    scores, pairs = inputs()
    nodes = {t: dfa.controls.random_scores(SOURCE.nodes[1:]) for t in pairs}
    for options, message in (
        ({"intervention": "restore"}, "intervention must be 'circuit', not 'restore'"),
        ({"gate_heads": False}, "gate_heads must be True, not False"),
        ({"initial": torch.zeros(6, 15)}, "initial is of an alignment of nodes"),
        ({"form": Kernel()}, "The form 'kernel' is one of W"),
        ({"form": "kernel"}, "Unknown edge form 'kernel'"),
        ({"nodes": dfa.NodeSet.heads_and_mlps(any_model)}, "name the target's edges"),
        ({"edges": SOURCE}, "is not of this target"),
    ):
        with pytest.raises(AlignmentError, match=message):
            unchecked(dfa.fit)(any_model, scores, pairs, steps=1, **options)
    for options, message in (
        ({"form": "free"}, "The form 'free' is one of edges"),
        ({"edges": dfa.EdgeSet.of_model(any_model)}, "name the target's nodes"),
    ):
        with pytest.raises(AlignmentError, match=message):
            unchecked(dfa.fit)(any_model, nodes, pairs, steps=1, **options)
    with pytest.raises(AlignmentError, match="scores of task 'b' are NodeScores, others are EdgeScores"):
        unchecked(dfa.fit)(any_model, scores | {"b": nodes["b"]}, pairs)
    with pytest.raises(ScoreError, match="scores of task 'b' belong to the EdgeSet"):
        dfa.fit(any_model, scores | {"b": dfa.controls.uniform(dfa.EdgeSet(3, 3))}, pairs)
    jobs = {"x": dfa.Job(scores, dfa.Recipe(steps=1)), "y": dfa.Job(nodes, dfa.Recipe(steps=1))}
    with pytest.raises(AlignmentError, match="train them apart"):
        unchecked(dfa.fit_many)(any_model, jobs, pairs)


def test_half_precision():
    scores, pairs = inputs(tasks=("a",))
    model = random_model().to(torch.bfloat16)
    history = dfa.fit(model, scores, pairs, steps=15, sparsity_weight=1.0).history
    assert history[-1]["loss"] < history[0]["loss"]
