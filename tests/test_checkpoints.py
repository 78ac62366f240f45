"""Checkpoints that are damaged, incomplete, or something else: one ModelError each, and one line on the command line."""

import json
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch
from helpers import BACKENDS, checkpoint, unchecked
from safetensors.torch import load_file, save_file

import dfa_lens as dfa
from dfa_lens import cli
from dfa_lens.errors import ModelError

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 382431384\n"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A checkpoint without fault."""
    return checkpoint(tmp_path_factory.mktemp("checkpoints") / "whole")


@pytest.fixture
def folder(whole, tmp_path):
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "mine"))


def edit(folder, name="config.json", **changes):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rename(folder, new_name):
    """Save the weights under other names; those renamed to None are left out."""
    path = folder / "model.safetensors"
    weights = {new_name(name): weight for name, weight in load_file(path).items()}
    path.unlink()  # the file may be mapped
    save_file({name: weight.contiguous() for name, weight in weights.items() if name}, path, {"format": "pt"})


def add(folder, name, weight):
    path = folder / "model.safetensors"
    weights = load_file(path) | {name: weight}
    path.unlink()
    save_file(weights, path, {"format": "pt"})


def change(folder, name, function):
    add(folder, name, function(load_file(folder / "model.safetensors")[name].clone()))


def cut(path, n_bytes):
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:n_bytes])


def overwrite(path, content):
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def shards(folder, *, lost):
    """The weights in two files with an index, one of which is not there."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    files = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({name: weights[name] for name in part}, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in files.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if lost:
        (folder / "model-00002-of-00002.safetensors").unlink()


WEIGHTS = "model.safetensors"
Q = "model.layers.1.self_attn.q_proj.weight"


def nan(weight):
    weight[0, 0] = float("nan")
    return weight


def infinite(weight):
    weight[-1, -1] = float("inf")
    return weight


DAMAGE = {
    # the folder
    "no config": (lambda f: (f / "config.json").unlink(), "is not a checkpoint folder: it has no config.json"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "has no weights: neither model.safetensors nor pytorch_model.bin"),
    "adapter beside the weights": (
        lambda f: (f / "adapter_config.json").write_text('{"peft_type": "LORA"}'),
        "holds an unmerged LoRA adapter .* Merge it with PEFT",
    ),
    "adapter alone": (
        lambda f: (f / "config.json").rename(f / "adapter_config.json"),
        "holds an unmerged LoRA adapter",
    ),
    # config.json
    "config is no JSON": (lambda f: (f / "config.json").write_text("{model_type: llama"), "config.json is no JSON"),
    "config is binary": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "config.json is no JSON"),
    "config is empty": (lambda f: (f / "config.json").write_text(""), "config.json is empty"),
    "config is a pointer": (lambda f: (f / "config.json").write_bytes(POINTER), "config.json is a Git LFS pointer"),
    "config is a list": (lambda f: (f / "config.json").write_text("[1]"), "config.json holds a list"),
    "no model_type": (lambda f: edit(f, model_type=None), "config.json of mine has no model_type"),
    "another model_type": (lambda f: edit(f, model_type="gpt2"), "is not the model that its config.json describes"),
    "a model_type of nobody": (lambda f: edit(f, model_type="lama"), "config.json of mine can't be used.*lama"),
    "a classifier": (
        lambda f: edit(f, architectures=["LlamaForSequenceClassification"]),
        "is a LlamaForSequenceClassification, not a causal language model",
    ),
    "code of its own": (
        lambda f: edit(f, auto_map={"AutoModelForCausalLM": "modeling_mine.Mine"}),
        "comes with code of its own",
    ),
    "a size that is no number": (lambda f: edit(f, hidden_size="48"), "config.json of mine can't be used"),
    "sizes that do not go together": (lambda f: edit(f, num_attention_heads=7), "config.json of mine can't be used"),
    "an activation that there is not": (lambda f: edit(f, hidden_act="swishy"), "mine can't be loaded: .*swishy"),
    "bitsandbytes": (
        lambda f: edit(f, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        "has quantised weights, which HookedTransformer can't|mine can't be loaded: ",
    ),
    "gptq": (
        lambda f: edit(f, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 32}),
        "has quantised weights, which HookedTransformer can't|mine can't be loaded: .*requires optimum",
    ),
    "awq": (
        lambda f: edit(f, quantization_config={"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}),
        "has quantised weights, which HookedTransformer can't|mine can't be loaded: .*requires gptqmodel",
    ),
    # the weight file
    "weights are empty": (lambda f: overwrite(f / WEIGHTS, b""), f"{WEIGHTS} is empty"),
    "weights are a pointer": (lambda f: overwrite(f / WEIGHTS, POINTER), f"{WEIGHTS} is a Git LFS pointer"),
    "weights are cut off": (
        lambda f: cut(f / WEIGHTS, 50_000),
        f"{WEIGHTS} is cut off: it has 50,000 bytes of [0-9,]{{6,}}",
    ),
    "weights are cut off in the header": (lambda f: cut(f / WEIGHTS, 100), "is cut off in its header"),
    "weights are cut off at once": (lambda f: cut(f / WEIGHTS, 5), "is no safetensors file"),
    "weights are a web page": (lambda f: overwrite(f / WEIGHTS, b"<!DOCTYPE html>" * 90), "is no safetensors file"),
    "the header is no JSON": (
        lambda f: overwrite(f / WEIGHTS, (16).to_bytes(8, "little") + b"x" * 64),
        "is no safetensors file: its header can't be read",
    ),
    "a part is missing": (lambda f: shards(f, lost=True), "model-00002-of-00002.safetensors is missing"),
    "the index is no index": (
        lambda f: [(f / WEIGHTS).unlink(), (f / f"{WEIGHTS}.index.json").write_text("{}")],
        "index.json has no weight_map",
    ),
    "a pickle that is none": (
        lambda f: [(f / WEIGHTS).unlink(), (f / "pytorch_model.bin").write_bytes(b"x" * 40)],
        "mine can't be loaded: ",
    ),
    # the weights
    "weights are missing": (
        lambda f: rename(f, lambda name: None if "layers.1.mlp" in name else name),
        r"3 weights are missing \(model.layers.1.mlp.down_proj.weight, .*would be random numbers",
    ),
    "compiled": (
        lambda f: rename(f, lambda name: f"_orig_mod.{name}"),
        r"The names begin with '_orig_mod\.', from torch.compile",
    ),
    "in parallel": (lambda f: rename(f, lambda name: f"module.{name}"), r"begin with 'module\.', from DataParallel"),
    "from peft": (
        lambda f: rename(f, lambda name: f"base_model.model.{name}"),
        r"begin with 'base_model\.model\.', from PEFT",
    ),
    "both": (
        lambda f: rename(f, lambda name: f"module._orig_mod.{name}"),
        r"begin with 'module\._orig_mod\.', from torch.compile in DataParallel",
    ),
    "in a wrapper of mine": (lambda f: rename(f, lambda name: f"net.{name}"), r"begin with 'net\.', from a module"),
    "lora inside": (
        lambda f: rename(f, lambda name: name.replace("q_proj.weight", "q_proj.lora_A.weight")),
        "Merge the LoRA weights",
    ),
    "no unembedding": (
        lambda f: rename(f, lambda name: None if name == "lm_head.weight" else name),
        'lm_head.weight.* has to say so: "tie_word_embeddings": true',
    ),
    "fewer layers than there are": (
        lambda f: edit(f, num_hidden_layers=1),
        r"9 have no place in a LlamaForCausalLM of its config \(model.layers.1",
    ),
    "more layers than there are": (lambda f: edit(f, num_hidden_layers=3), "9 weights are missing"),
    "biases that config.json does not know of": (
        lambda f: add(f, "model.layers.0.self_attn.q_proj.bias", torch.ones(48)),
        r"1 have no place in a LlamaForCausalLM of its config \(model.layers.0.self_attn.q_proj.bias\)",
    ),
    "another shape": (
        lambda f: change(f, Q, lambda weight: weight[:-1].contiguous()),
        f"does not fit its config.json: {Q} has shape 47×48 and should have 48×48",
    ),
    "another width": (lambda f: edit(f, intermediate_size=41), "does not fit its config.json: .* has shape"),
    "nan": (lambda f: change(f, Q, nan), rf"has weights that are NaN or infinite: {Q} \(1 such\)"),
    "infinite": (lambda f: change(f, Q, infinite), rf"has weights that are NaN or infinite: {Q} \(1 such\)"),
    # the tokenizer
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "The tokenizer of mine can't be loaded"),
    "a broken tokenizer": (
        lambda f: (f / "tokenizer.json").write_text('{"version": "1.0"}'),
        "The tokenizer of mine can't be loaded",
    ),
    "tokenizer settings that are no JSON": (
        lambda f: (f / "tokenizer_config.json").write_text("{"),
        "tokenizer_config.json is no JSON",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage(name, folder):
    damage, message = DAMAGE[name]
    damage(folder)
    with pytest.raises(ModelError, match=message) as caught:
        dfa.load_model(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


def test_what_is_no_damage(folder, whole):
    """A head beside the language model's, tables that old checkpoints hold, several files, pickles, another dtype."""
    expected = dfa.load_model(whole).W_U
    weights = load_file(folder / "model.safetensors")
    extra = {"v_head.weight": torch.ones(1, 48), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    (folder / "model.safetensors").unlink()
    save_file(weights | extra, folder / "model.safetensors", {"format": "pt"})
    assert torch.equal(dfa.load_model(folder).W_U, expected)
    shards(folder, lost=False)
    assert torch.equal(dfa.load_model(folder).W_U, expected)
    assert torch.equal(dfa.load_model(folder, dtype=torch.float64).W_U, expected.double())
    for path in folder.glob("model*"):
        path.unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert torch.equal(dfa.load_model(folder).W_U, expected)
    assert torch.equal(dfa.load_model(folder, dtype=torch.bfloat16).W_U, expected.bfloat16())


@pytest.mark.parametrize("said", ["bfloat16", "float32", None])
@pytest.mark.parametrize("kind", ["safetensors", "pickle", "mixed", "other names"])
def test_no_digit_is_lost_to_what_config_json_says_of_the_dtype(kind, said, folder, whole):
    """What the weights are stored in counts, whatever the config says, for every way of reading them."""
    weights = load_file(folder / WEIGHTS)
    if kind == "mixed":  # the norms in float32, the rest in bfloat16
        weights = {name: weight if "norm" in name else weight.bfloat16() for name, weight in weights.items()}
    if kind == "other names":  # as the inner model alone would be saved; its unembedding is the embedding
        weights.pop("lm_head.weight")
        weights = {name.removeprefix("model."): weight for name, weight in weights.items()}
        edit(folder, tie_word_embeddings=True)
    (folder / WEIGHTS).unlink()
    if kind == "pickle":
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        save_file(weights, folder / WEIGHTS, {"format": "pt"})
    edit(folder, dtype=said)
    for dtype in (torch.float32, torch.float64):
        model = dfa.load_model(folder, backend="bridge", dtype=dtype).original_model
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        own = {name.replace("._original_component", ""): weight for name, weight in model.named_parameters()}
        for name, weight in weights.items():
            key = name if name in own else f"model.{name}"
            assert torch.equal(own[key], weight.to(dtype)), name


def test_an_unembedding_is_not_missing_if_it_is_the_embedding(tmp_path):
    folder = checkpoint(tmp_path, "llama", {"tie_word_embeddings": True})
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    model = dfa.load_model(folder)
    assert torch.equal(model.W_U, model.W_E.T)


def test_an_empty_tokenizer_is_none(tmp_path):
    """Qwen-2's is made without its file, and turns every text into no tokens."""
    folder = checkpoint(tmp_path, "qwen2")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="has no vocabulary: is tokenizer.json missing"):
        dfa.load_model(folder)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_that_overflow(backend, folder):
    """Finite in float32, infinite in float16; and finite weights that make infinite activations."""
    change(folder, Q, lambda weight: weight * 1e6)
    assert dfa.load_model(folder, backend=backend).cfg.n_layers == 2
    with pytest.raises(ModelError, match="weights that are NaN or infinite"):
        dfa.load_model(folder, backend=backend, dtype=torch.float16)
    change(folder, Q, lambda weight: weight / 1e6)
    change(folder, "model.layers.0.mlp.up_proj.weight", lambda weight: weight * 1e4)
    change(folder, "model.layers.0.mlp.gate_proj.weight", lambda weight: weight * 1e3)
    with pytest.raises(
        ModelError, match="logits that are NaN or infinite in torch.float16, from weights that are finite"
    ):
        dfa.load_model(folder, backend=backend, dtype=torch.float16)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (None, "A model is named by a checkpoint folder, a shipped model or a Hugging Face name, not by None"),
        ("", "not by ''"),
        ("  ", "not by '  '"),
        (3, "not by 3"),
        (b"whole", "not by b'whole'"),
        ("llama3-tiny-sorce", "expected one of .*'llama3-tiny-source', .*Did you mean 'llama3-tiny-source'"),
        ("llama3", "Unknown checkpoint folder or shipped model 'llama3': expected one of .*'llama3-tiny-source'"),
        ("./nowhere", "There is no folder nowhere"),
        ("/nowhere/at/all", "There is no folder /nowhere/at/all"),
        ("nowhere/at/all", "There is no folder nowhere/at/all"),
        ("~/nowhere", "There is no folder /.*/nowhere"),
        ("~nobody-of-that-name/x", "'~nobody-of-that-name/x' names no model"),
        (Path("owner/name"), "There is no folder owner/name"),
        ("owner/name", "There is no folder owner/name here, and from the Hugging Face hub it can't be loaded"),
        ("x" * 5000, "names no model"),
    ],
)
def test_names(name, message):
    with pytest.raises(ModelError, match=message):
        unchecked(dfa.load_model)(name)


def test_a_file_is_not_a_folder(folder):
    with pytest.raises(ModelError, match="is a file: give the folder that holds it"):
        dfa.load_model(folder / "model.safetensors")


def test_shipped_models_by_name(tmp_path, monkeypatch):
    """A folder of that name in the working directory comes first only if it is a checkpoint."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "qwen2.5-tiny-source").mkdir()
    assert dfa.load_model("qwen2.5-tiny-source").cfg.n_layers == dfa.zoo.SPECS["qwen2.5-tiny-source"].n_layers
    shutil.copytree(dfa.zoo.SPECS["llama3-tiny-source"].folder, "qwen2.5-tiny-source", dirs_exist_ok=True)
    assert dfa.load_model("qwen2.5-tiny-source").cfg.n_layers == dfa.zoo.SPECS["llama3-tiny-source"].n_layers


def test_from_the_hub_s_cache(folder, tmp_path, monkeypatch):
    """By its name on the hub, without a network; an adapter is found there too."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--owner--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    shutil.copytree(folder, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    expected = dfa.load_model(folder)
    assert torch.equal(dfa.load_model("owner/name").W_U, expected.W_U)
    assert torch.equal(dfa.load_model("owner/name", dtype=torch.bfloat16).W_U, expected.W_U.bfloat16())
    (snapshot / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="owner/name holds an unmerged LoRA adapter"):
        dfa.load_model("owner/name")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float32"}, "dtype has to be one of torch.float32, .*, not 'float32'"),
        ({"dtype": torch.int8}, "not torch.int8"),
        ({"dtype": None}, "not None"),
        ({"n_ctx": 0}, "n_ctx has to be a whole number of 1 or more, not 0"),
        ({"n_ctx": 2.5}, "not 2.5"),
        ({"n_ctx": True}, "not True"),
        ({"n_devices": 0}, "n_devices has to be a whole number of 1 or more"),
        ({"device": "gpu"}, "Nothing can be put on the device 'gpu' here"),
        ({"device": 1.5}, "Nothing can be put on the device 1.5"),
        ({"device": "cuda:63"}, "Nothing can be put on the device 'cuda:63'"),
        ({"device": "meta"}, "has no weights"),
        ({"backend": None}, "Unknown backend None"),
        ({"device_map": "nonsense"}, "mine can't be loaded: .*nonsense"),
        ({"max_memory": {"cpu": "much"}}, "mine can't be loaded: .*much"),
    ],
)
def test_options(options, message, folder):
    with pytest.raises(ModelError, match=message):
        unchecked(dfa.load_model)(folder, **options)


def test_a_bug_keeps_its_cause(folder, monkeypatch):
    """What a library raised is the cause of our error, and memory that does not suffice is not ours to explain."""
    import transformers

    def fail(error):
        monkeypatch.setattr(
            transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: (_ for _ in ()).throw(error)
        )

    fail(KeyError("layers"))
    with pytest.raises(ModelError, match="mine can't be loaded: 'layers'") as caught:
        dfa.load_model(folder)
    assert isinstance(caught.value.__cause__, KeyError)
    fail(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        dfa.load_model(folder)


@pytest.mark.parametrize(
    "name",
    ["weights are cut off", "compiled", "another shape", "bitsandbytes", "a broken tokenizer", "config is no JSON"],
)
def test_the_command_line_says_it_in_one_line(name, folder, monkeypatch, capfd):
    damage, message = DAMAGE[name]
    damage(folder)
    assert run_command_line(folder, monkeypatch) == 2
    out, err = capfd.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and err.startswith("dfa-lens: ")
    with pytest.raises(ModelError, match=message):
        raise ModelError(err.removeprefix("dfa-lens: "))


@pytest.mark.parametrize("name", ["llama3-tiny-sorce", "owner/name"])
def test_the_command_line_on_names(name, monkeypatch, capfd):
    assert run_command_line(name, monkeypatch) == 2
    err = capfd.readouterr().err
    assert len(err.splitlines()) == 1 and err.startswith("dfa-lens: ") and name in err


def run_command_line(model, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["dfa-lens", "doctor", "--model", str(model)])
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # the command line replaces it
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return stopped.value.code
