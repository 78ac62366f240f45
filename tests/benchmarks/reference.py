"""How closely dfa_lens agrees with the reference numbers: the largest relative deviation of each quantity.

    python tests/benchmarks/reference.py

Relative to the largest absolute value of the quantity; losses and W as absolute deviations. What must hold is in
tests/test_reference.py; this prints by how much it holds.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from test_edge_attribution import SCORES as EDGE_SCORES
from test_edge_attribution import matrix
from test_edge_circuits import CURVES
from test_reference import FOLDER, KINDS, NAMES, RELEASED_TRAINING, SCORES, setting

import dfa_lens as dfa
from dfa_lens.data.curve import MIB_FRACTIONS


def deviation(found: torch.Tensor, expected: torch.Tensor, *, relative: bool = True) -> float:
    gap = (found.double() - expected.double()).abs().max()
    return float(gap / expected.double().abs().max()) if relative else float(gap)


def of_edges(name: str, kind: str) -> dict[str, float]:
    """The same of edges: scores by method and readers, and the faithfulness of all circuits of the curves."""
    model, pairs, *_ = setting(name, kind)
    reference = json.loads((FOLDER / f"edges_{name}.json").read_text())[kind]
    column: dict[str, float] = {}
    for key, options in EDGE_SCORES.items():
        for readers, stored in (("per-head", "scores"), ("grouped", "scores_grouped")):
            found = dfa.attribute_edges(model, pairs, readers=readers, steps=5, batch_size=64, **options)
            expected = matrix(reference[stored][key])
            column[f"edges, {key}, {readers}"] = deviation(found.values.nan_to_num(), expected.nan_to_num())
    for curves, (readers, random, scored, options) in CURVES.items():
        gaps = []
        for which, expected in reference[curves].items():
            ranked, ranking = which.split(".")
            values = reference[random] if ranked == "random" else reference[scored]["eap_ig_inputs.k_1_to_S"]
            scores = dfa.EdgeScores(matrix(values), dfa.EdgeSet.of_model(model, readers=readers))
            curve = dfa.faithfulness_curve(model, pairs, scores, ranking=ranking, **options)
            faithfulness = torch.tensor(expected["faithfulness"], dtype=torch.float64)
            gaps.append(deviation(torch.as_tensor(curve.faithfulness), faithfulness, relative=False))
        column[f"edges, f of {curves} (absolute)"] = max(gaps)
    return column


def main() -> None:
    warnings.simplefilter("ignore", dfa.IntegrationWarning)
    table: dict[str, dict[str, float]] = {}
    for name in NAMES:
        for kind in KINDS:
            model, pairs, nodes, prompts, tensors = setting(name, kind)
            column: dict[str, float] = {}
            for key, options in SCORES.items():
                found = dfa.attribute(model, pairs, nodes=nodes, **options)
                column[key] = deviation(found.values, tensors[key])
            for ranking, values in (
                ("eap_ig_inputs", tensors["eap_ig_inputs.released"]),
                ("random", tensors["random_scores"]),
            ):
                scores = dfa.NodeScores(values, nodes)
                for label, options in (
                    ("released", {"protocol": "mib"}),
                    ("input_kept", {"fractions": MIB_FRACTIONS}),
                ):
                    curve = dfa.faithfulness_curve(model, pairs, scores, **options)
                    expected = prompts[f"eval.{ranking}.{label}"]
                    column[f"CPR, {label}, {ranking}"] = abs(curve.cpr - expected["cpr"])
                    column[f"CMD, {label}, {ranking}"] = abs(curve.cmd - expected["cmd"])
            for heads in ("gated", "noop_heads"):
                source = dfa.NodeScores(tensors["dfa.s"], dfa.NodeSet.for_sizes(2, 3))
                trained = dfa.fit(
                    model,
                    {"task": source},
                    {"task": pairs},
                    steps=5,
                    gate_heads=heads == "gated",
                    initial=tensors["dfa.W0"],
                    **RELEASED_TRAINING,
                )
                losses = torch.tensor([[r["loss"], r["divergence"], r["mask_mean"]] for r in trained.history])
                column[f"dfa.{heads}.losses (absolute)"] = deviation(
                    losses, tensors[f"dfa.{heads}.losses"], relative=False
                )
                column[f"dfa.{heads}.W_final (absolute)"] = deviation(
                    trained.W, tensors[f"dfa.{heads}.W_final"], relative=False
                )
            table[f"{name} {kind}"] = column | of_edges(name, kind)
    print(pd.DataFrame(table).map("{:.1e}".format).to_string())


if __name__ == "__main__":
    main()
