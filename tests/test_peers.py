"""The comparison with other programs: TransformerLens as installed, and stand-ins with the interface of two others."""

import sys
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from helpers import BACKENDS

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
import peers

SIZES = {"n_layers": 2, "d_model": 32, "n_heads": 4, "n_key_value_heads": 2, "d_mlp": 48}
EAP = {
    "graph": """
        import torch

        class Graph:
            @classmethod
            def from_model(cls, model, node_scores=False):
                made = cls()
                made.cfg = model.cfg
                made.nodes_scores = torch.full((1 + model.cfg.n_layers * (model.cfg.n_heads + 1),), float("nan"))
                return made
    """,
    "attribute_node": """
        import torch

        def points(cfg):
            yield "hook_embed"
            for layer in range(cfg.n_layers):
                yield f"blocks.{layer}.attn.hook_result"
                yield f"blocks.{layer}.hook_mlp_out"

        def attribute_node(model, graph, batches, metric, method, ig_steps=None, quiet=False):
            assert model.cfg.use_attn_result and model.cfg.use_hook_mlp_in and model.cfg.ungroup_grouped_query_attention
            print("noise")
            scores = torch.zeros(len(graph.nodes_scores), device="cuda")
            for clean, corrupt, labels in batches:
                clean, corrupt = (model.to_tokens(each) for each in (clean, corrupt))
                lengths = torch.full((len(clean),), clean.shape[1])
                found = {}
                names = list(points(model.cfg))
                with torch.no_grad():
                    logits, first = model.run_with_cache(clean, names_filter=lambda name: name in names)
                    _, second = model.run_with_cache(corrupt, names_filter=lambda name: name in names)
                read = [f"blocks.{name.split('.')[1]}.hook_mlp_in" if "mlp" in name else name for name in names]
                paths = {"EAP": [("hook_embed", 1.0)], "EAP-IG-inputs": [("hook_embed", k / ig_steps) for k in range(1, ig_steps + 1)],
                         "EAP-IG-activations": [(name, k / ig_steps) for name in names for k in range(1, ig_steps + 1)]}[method]
                for moved, fraction in paths:
                    def move(now, hook, fraction=fraction, moved=moved):
                        return second[moved] + fraction * (first[moved] - second[moved]) + 0 * now
                    def keep(gradient, hook):
                        found[hook.name] = gradient
                    with model.hooks(fwd_hooks=[(moved, move)], bwd_hooks=[(name, keep) for name in read]):
                        metric(model(clean), logits, lengths, labels).backward()
                    at = 0
                    for name, place in zip(names, read):
                        part = ((second[name] - first[name]) * found[place]).sum((0, 1, -1))
                        part = part.flatten()
                        scores[at : at + len(part)] += part / len(clean) / len(paths)
                        at += len(part)
            graph.nodes_scores[:] = scores
    """,
}
DFA = {
    "MIB_circuit_track/evaluation.py": """
        import torch

        def evaluate_area_under_curve(model, graph, batches, metrics, quiet=False, level="edge", absolute=True):
            (clean, corrupt, labels), = batches
            clean, corrupt = (model.to_tokens(each) for each in (clean, corrupt))
            lengths = torch.full((len(clean),), clean.shape[1])
            _, cache = model.run_with_cache(corrupt)
            heads = model.cfg.n_heads
            order = graph.nodes_scores.argsort(descending=True, stable=True).tolist()

            def value(kept):
                def at(name, first, many):
                    def hook(now, hook):
                        keep = torch.tensor([float(first + i in kept) for i in range(many)])
                        keep = keep.view(-1, 1) if many > 1 else keep
                        return keep * now + (1 - keep) * cache[name]
                    return name, hook
                taps = [at("hook_embed", 0, 1)]
                for layer in range(model.cfg.n_layers):
                    first = 1 + layer * (heads + 1)
                    taps += [at(f"blocks.{layer}.attn.hook_result", first, heads), at(f"blocks.{layer}.hook_mlp_out", first + heads, 1)]
                with torch.no_grad():
                    return float(metrics(model.run_with_hooks(clean, fwd_hooks=taps), None, lengths, labels))

            every = set(range(len(order)))
            whole, empty = value(every), value(set())
            found = []
            for part in (.001, .002, .005, .01, .02, .05, .1, .2, .5, 1):
                kept = set(order[: int(part * len(order))])
                found.append((value(kept) - empty) / (whole - empty) if 0 in kept else 0.0)
            return [], 0.0, 0.0, 0.0, found, {}
    """,
    "differentiable_alignment/model.py": """
        import torch

        class AlignmentModel(torch.nn.Module):
            def __init__(self, small, large):
                super().__init__()
                self.large = large
                self.W = torch.nn.Parameter(torch.zeros(len(small), len(large)))

            def predict_mask(self, scores):
                return torch.sigmoid(scores @ self.W)

            def get_large_component_mapping(self):
                return {name: i for i, name in enumerate(self.large)}
    """,
    "differentiable_alignment/hooks.py": """
        def get_faithfulness_hooks(model, mask, places, cache):
            def at(name, i, head):
                def hook(now, hook):
                    clean = cache[hook.name]
                    if head is None:
                        return now + mask[i] * (clean - now)
                    out = now.clone()
                    out[:, :, head] = now[:, :, head] + mask[i] * (clean - now)[:, :, head]
                    return out
                return hook
            found = []
            for name, i in places.items():
                layer, _, head = name[1:].partition(".h")
                point = f"blocks.{layer}." + ("attn.hook_result" if head else "hook_mlp_out")
                found.append((point, at(name, i, int(head) if head else None)))
            return found
    """,
    "differentiable_alignment/loss.py": """
        def faithfulness_loss(clean, masked, mask, lambda_sparsity=0.01):
            p, q = clean.log_softmax(-1), masked.log_softmax(-1)
            loss = (p.exp() * (p - q)).sum() / len(clean)
            return loss + lambda_sparsity * mask.mean(), loss, mask.mean()
    """,
}


@pytest.fixture
def setting(monkeypatch):
    """Small; what a stand-in puts into sys is taken out again."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    made = peers.Setting(SIZES, 4)
    made.sizes = {**SIZES, "d_vocab": len(made.tokenizer)}
    yield made
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("eap", "MIB_circuit_track", "differentiable_alignment"):
            del sys.modules[name]


def write(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text))


def differences(works):
    return {work.name: work.difference(work.ours(), work.theirs()) for work in works}


@pytest.mark.filterwarnings("ignore")
def test_transformer_lens(setting, capsys):
    works = list(peers.transformer_lens(setting))
    found = differences(works)
    assert list(found) == ["nap, ours in batches of 1", "nap, ours in batches of 4", "exact, heads"]
    assert max(found.values()) < 1e-4
    row = peers.compare(works[0], setting, 1)
    assert row["ratio"] == row["theirs"] / row["ours"] > 0 and row["their_peak"] > row["peak"] > 0


@pytest.mark.skipif("hooked" not in BACKENDS, reason="other programs take a HookedTransformer")
@pytest.mark.filterwarnings("ignore")
def test_programs_by_path(setting, tmp_path, capsys):
    write(tmp_path / "EAP-IG" / "src" / "eap", {f"{name}.py": text for name, text in EAP.items()} | {"__init__.py": ""})
    write(tmp_path, DFA)
    works = list(peers.dfa_circuits(setting, str(tmp_path)))
    assert [work.name for work in works] == [
        "nap",
        "nap-ig-inputs(5)",
        "nap-ig-activations(1)",
        "curve",
        "fit, 4 steps",
        "fit, 4 steps, heads gated",
    ]
    found = differences(works)
    assert all(found[name] < 1e-3 for name in found), found
    assert "noise" not in capsys.readouterr().out
    # and a program that computes something else is found out
    wrong = (
        (tmp_path / "EAP-IG" / "src" / "eap" / "attribute_node.py")
        .read_text()
        .replace('}.hook_mlp_in"', '}.hook_mlp_out"')
    )
    (tmp_path / "EAP-IG" / "src" / "eap" / "attribute_node.py").write_text(wrong)
    for name in [name for name in sys.modules if name.partition(".")[0] == "eap"]:
        del sys.modules[name]
    (again,) = [work for work in peers.nodes_of_eap(setting, str(tmp_path / "EAP-IG" / "src")) if work.name == "nap"]
    assert again.difference(again.ours(), again.theirs()) > 0.01


def test_where_there_is_no_gpu():
    assert peers.quietly(lambda: torch.zeros(2, device="cuda").to("cuda").device.type)() in ("cpu", "cuda")


def test_apart():
    assert peers.apart([1.0, 2.0], [2.0, 4.0], up_to_a_factor=True) == pytest.approx(0, abs=1e-12)
    assert peers.apart([1.0, 2.0], [1.0, 1.0]) == 0.5
