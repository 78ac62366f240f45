"""The shipped models: sizes, accuracy, and that every loader sees the same model."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import BACKENDS, unchecked

import dfa_lens as dfa
from dfa_lens.errors import ModelError
from dfa_lens.models.passes import attention_mask
from dfa_lens.models.runner import Runner
from dfa_lens.zoo import SPECS, tokenizer


@pytest.mark.parametrize("name", SPECS)
def test_sizes(name):
    spec = SPECS[name]
    assert sum(f.stat().st_size for f in spec.folder.iterdir()) < 8_000_000
    config = json.loads((spec.folder / "config.json").read_text())
    assert config["num_hidden_layers"] == spec.n_layers
    assert config["num_attention_heads"] == spec.n_heads
    assert config["architectures"] == ["LlamaForCausalLM" if spec.family == "llama3" else "Qwen2ForCausalLM"]
    least = {"paper": (50, 100), "more": (40, 80)}[spec.tasks]
    assert spec.n_nodes >= least[name.endswith("target")]
    card = (spec.folder / "README.md").read_text()
    assert name in card and "Accuracy" in card


def test_targets_are_larger():
    for source, target in dfa.zoo.pairs("all").values():
        assert SPECS[target].n_layers > SPECS[source].n_layers
        assert SPECS[target].n_heads > SPECS[source].n_heads


@pytest.mark.parametrize("name", SPECS)
def test_the_tokenizer_is_that_of_the_tasks(name):
    loaded = dfa.zoo.load(name).tokenizer
    built = tokenizer.build(begin_of_text=SPECS[name].begin_of_text, tasks=SPECS[name].tasks)
    assert loaded.get_vocab() == built.get_vocab()
    text = dfa.tasks.examples(dfa.zoo.solves(name)[-1], n=1)[0].clean
    assert loaded(text)["input_ids"] == built(text)["input_ids"]


@pytest.mark.parametrize("task", dfa.tasks.names())
@pytest.mark.parametrize("name", dfa.zoo.names())
def test_accuracy_on_held_out_prompts(name, task):
    """The right answer is the top prediction for at least 95 %, on the clean and on the corrupt prompt."""
    model = dfa.zoo.load(name)
    pairs = dfa.tasks.load(task, model.tokenizer, split="test", n=200, seed=11)
    with torch.no_grad():
        clean = Runner(model).run(pairs.clean, pairs.lengths).argmax(-1)
        corrupt = Runner(model).run(pairs.corrupt, pairs.lengths).argmax(-1)
    assert (clean == pairs.answer).float().mean() >= 0.95
    assert (corrupt == pairs.wrong).float().mean() >= 0.95


@pytest.mark.parametrize("name", dfa.zoo.names("more"))
def test_accuracy_is_what_was_written_down(name):
    """The models of the further tasks do not solve all of them: which they solve is in their folder."""
    model, written = dfa.zoo.load(name), json.loads((SPECS[name].folder / "accuracy.json").read_text())
    assert tuple(written) == dfa.tasks.names("more")
    for task, expected in written.items():
        pairs = dfa.tasks.load(task, model.tokenizer, split="test", n=128, seed=11)
        with torch.no_grad():
            clean = Runner(model).run(pairs.clean, pairs.lengths).argmax(-1) == pairs.answer
            corrupt = Runner(model).run(pairs.corrupt, pairs.lengths).argmax(-1) == pairs.wrong
        assert abs(clean.float().mean().item() - expected["clean"]) < 0.15
        assert abs(corrupt.float().mean().item() - expected["corrupt"]) < 0.15
        if task in dfa.zoo.solves(name):
            assert (clean & corrupt).float().mean() >= 0.9


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SPECS)
def test_logits_are_those_of_hugging_face(name, backend):
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_pretrained(SPECS[name].folder, attn_implementation="sdpa").eval()
    model = dfa.zoo.load(name, backend=backend)
    pairs = dfa.tasks.load(dfa.zoo.solves(name)[-1], model.tokenizer, split="test", n=8)
    mask = attention_mask(pairs.lengths, pairs.clean.shape[1])
    with torch.no_grad():
        expected = hf(input_ids=pairs.clean, attention_mask=mask).logits[torch.arange(8), pairs.lengths - 1]
        found = Runner(model).run(pairs.clean, pairs.lengths)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_loading_prints_nothing(capfd):
    dfa.zoo.load("qwen2.5-tiny-source")
    out, err = capfd.readouterr()
    assert out == "" and err == ""


def test_bad_input(tmp_path):
    with pytest.raises(ModelError, match="Unknown shipped model 'llama3-tiny': expected one of 'llama3-tiny-source'"):
        dfa.zoo.load("llama3-tiny")
    with pytest.raises(ModelError, match="There is no folder"):
        dfa.load_model("./nowhere")
    with pytest.raises(ModelError, match="has no config.json"):
        dfa.load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ModelError, match="has no vocabulary|can't be loaded"):
        dfa.load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ModelError, match="can't be loaded"):
        dfa.load_model(tmp_path)
    with pytest.raises(ModelError, match="Unknown backend 'hook'"):
        unchecked(dfa.load_model)(tmp_path, backend="hook")


@pytest.mark.slow
def test_training_script(tmp_path, monkeypatch):
    """A few steps: it trains, writes a complete folder that loads, and goes on from a checkpoint."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from dfa_lens.zoo import train

        monkeypatch.setattr(train, "accuracy", partial(train.accuracy, n=16))
        plain = SPECS["qwen2.5-tiny-source"].recipe
        recipe = replace(plain, steps=3, batch_size=8, pairs_per_task=40)
        folder = train.train("qwen2.5-tiny-source", out=tmp_path, work=tmp_path / "work", recipe=recipe, device="cpu")
        longer = replace(recipe, steps=5)
        train.train("qwen2.5-tiny-source", out=tmp_path, work=tmp_path / "work", recipe=longer, device="cpu")
    state = json.loads((tmp_path / "work" / "qwen2.5-tiny-source" / "checkpoint-5" / "trainer_state.json").read_text())
    assert state["global_step"] == 5
    assert set(json.loads((folder / "accuracy.json").read_text())) == set(dfa.tasks.names())
    assert dfa.load_model(folder).cfg.n_layers == 7
    assert sorted(p.name for p in tmp_path.iterdir()) == ["qwen2.5-tiny-source", "work"]
