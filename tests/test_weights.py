"""PEFT's adapters and quantised weights, live: against hooks made by hand, and plain models of the same numbers.

Run by `make test-weights`, in an environment of its own: `requirements/weights.txt` has what is needed beside the rest.
"""

import copy
import logging

import pytest
import torch
from helpers import checkpoint, random_pairs

import dfa_lens as dfa
from dfa_lens.errors import ModelError
from dfa_lens.models import private
from dfa_lens.models.backend import PlainModel

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

PAIRS = random_pairs(3, 10, ragged=True)
N_LAYERS, N_HEADS = 2, 4
NODES = dfa.NodeSet.for_sizes(N_LAYERS, N_HEADS)
SCORES = dfa.controls.random_scores(NODES)
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
#: Widths that every kind of packing can divide.
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": N_HEADS, "num_hidden_layers": N_LAYERS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("weights") / "plain", "llama", SIZES)


def loaded(folder, **options):
    """As a user would: by transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **({"dtype": torch.float32} | options)).eval()


def dequantised(model, folder, numbers):
    """The plain model of what a quantised one holds."""
    plain = loaded(folder)
    changed = 0
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in LINEAR:
            plain.get_submodule(name).weight.data = numbers(module).float()
            changed += 1
    assert changed == N_LAYERS * len(LINEAR)
    return plain


# --- the kinds ---------------------------------------------------------------------------------------------------


def adapted(folder, **options):
    """With an adapter of random numbers and with dropout, in the training mode in which PEFT hands a model out."""
    peft = pytest.importorskip("peft", reason="needs PEFT: make test-weights")
    torch.manual_seed(0)
    options = {"r": 4, "target_modules": ["q_proj", "o_proj", "down_proj"], "lora_dropout": 0.5} | options
    base = options.pop("base", None) or loaded(folder)
    model = peft.get_peft_model(base, peft.LoraConfig(init_lora_weights=False, **options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def lora(folder):
    model = adapted(folder)
    return model, copy.deepcopy(model).merge_and_unload().eval()


def dora_everywhere(folder):
    """Adapters of weights' directions, and one on the unembedding."""
    model = adapted(folder, use_dora=True, target_modules=["v_proj", "up_proj", "lm_head"])
    return model, copy.deepcopy(model).merge_and_unload().eval()


def bits(folder, **options):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: make test-weights")
    from transformers import BitsAndBytesConfig

    return bitsandbytes, loaded(folder, quantization_config=BitsAndBytesConfig(**options))


def four_bits(folder, **options):
    types = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    bitsandbytes, model = bits(folder, load_in_4bit=True, **types, **options)
    numbers = bitsandbytes.functional.dequantize_4bit
    return model, dequantised(model, folder, lambda module: numbers(module.weight.data, module.weight.quant_state))


def four_bits_nested(folder):
    return four_bits(folder, bnb_4bit_use_double_quant=True)


def adapter_on_four_bits(folder):
    """QLoRA."""
    quantised, plain = four_bits(folder)
    model = adapted(folder, base=quantised)
    added = dict(model.named_modules())
    for name, module in plain.named_modules():
        lora = added[f"base_model.model.{name}"] if name else None
        if hasattr(lora, "lora_A"):
            low = lora.lora_B["default"].weight @ lora.lora_A["default"].weight
            module.weight.data = (module.weight + lora.scaling["default"] * low).detach()
    return model, plain


def eight_bits(folder):
    """Not only weights are rounded here, but what they are multiplied with: no plain model is the same.

    Without outliers: which columns are some depends on the whole batch, so that two passes of other batches differ.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says so at every pass
    return bits(folder, load_in_8bit=True, llm_int8_threshold=0.0)[1], None


def tensors(folder, config):
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao: make test-weights")
    from transformers import TorchAoConfig

    model = loaded(folder, quantization_config=TorchAoConfig(config(quantization)))
    return model, dequantised(model, folder, lambda module: module.weight.dequantize().detach())


def torchao_eight_bits(folder):
    return tensors(folder, lambda torchao: torchao.Int8WeightOnlyConfig())


def torchao_four_bits(folder):
    return tensors(
        folder,
        lambda torchao: torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=torchao.PerGroup(32)),
    )


KINDS = (
    lora,
    dora_everywhere,
    four_bits,
    four_bits_nested,
    adapter_on_four_bits,
    eight_bits,
    torchao_eight_bits,
    torchao_four_bits,
)


# --- by hand -----------------------------------------------------------------------------------------------------


def values(model, tokens, change):
    """logit(answer) − logit(wrong), under a change of what attention and MLP write to the stream by, or add to it."""
    blocks = [module for module in model.modules() if type(module).__name__ == "LlamaDecoderLayer"]
    handles = []
    for layer, block in enumerate(blocks):
        output, mlp = block.self_attn.o_proj, block.mlp
        handles.append(output.register_forward_pre_hook(lambda _, args, i=layer: (change(f"a{i}", args[0]),)))
        handles.append(mlp.register_forward_hook(lambda _, args, now, i=layer: change(f"m{i}", now)))
    mask = (torch.arange(tokens.shape[1]) < PAIRS.lengths[:, None]).long()
    rows = torch.arange(len(PAIRS))
    with private.unpacked(model):
        logits = model(input_ids=tokens, attention_mask=mask).logits[rows, PAIRS.lengths - 1].float()
    for handle in handles:
        handle.remove()
    return logits[rows, PAIRS.answer] - logits[rows, PAIRS.wrong]


def recorded(model, tokens):
    """What is written there, with its gradients."""
    found = {}

    def keep(name, now):
        found[name] = now if now.requires_grad else now.requires_grad_(True)
        found[name].retain_grad()
        return found[name]

    values(model, tokens, keep).sum().backward()
    for parameter in model.parameters():
        parameter.grad = None
    return found


def nap_by_hand(clean, corrupt):
    scores = []
    for layer in range(N_LAYERS):
        head, mlp = (((clean[name] - corrupt[name]) * clean[name].grad).detach() for name in (f"a{layer}", f"m{layer}"))
        scores += [*head.unflatten(-1, (N_HEADS, -1)).sum((0, 1, 3)).tolist(), mlp.sum().item()]
    return torch.tensor(scores) / len(PAIRS)


def patched(node, there):
    """A change: one node is as it was ``there``."""

    def change(name, now):
        if name != (f"a{node.layer}" if node.kind == "head" else node.name):
            return now
        if node.kind == "mlp":
            return there[name].detach()
        heads = now.unflatten(-1, (N_HEADS, -1)).clone()
        heads[:, :, node.index] = there[name].detach().unflatten(-1, (N_HEADS, -1))[:, :, node.index]
        return heads.flatten(2)

    return change


# --- tests -------------------------------------------------------------------------------------------------------

WORK = {
    "nap-ig-inputs": lambda model: dfa.attribute(model, PAIRS, steps=2).values,
    "nap-ig-activations": lambda model: dfa.attribute(model, PAIRS, method="nap-ig-activations", steps=2).values,
    "relp": lambda model: dfa.attribute(model, PAIRS, method="relp").values,
    "edges": lambda model: dfa.attribute_edges(model, PAIRS, method="eap").values.nan_to_num(),
    "measure": lambda model: dfa.measure(model, PAIRS, groups=0).values.nan_to_num(),
    "curve": lambda model: torch.as_tensor(dfa.faithfulness_curve(model, PAIRS, SCORES, sizes=[0, 3, 10]).faithfulness),
    "fit": lambda model: dfa.fit(model, {"task": SCORES}, {"task": PAIRS}, steps=2, batch_size=2).W,
}


def contents(model):
    """All weights and what belongs to them, to the last bit; a packed four-bit matrix would be another one."""
    found = {}
    for name, parameter in model.named_parameters():
        numbers = parameter.dequantize() if hasattr(parameter, "tensor_data_names") else parameter
        found[name] = (parameter.data_ptr() if numbers is parameter else 0, numbers.detach().clone())
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            found[f"{name} state"] = (0, state.absmax.clone())
    return found


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_run_as_they_are(kind, folder, unchanged):
    model, plain = kind(folder)
    model.eval()
    clean, corrupt = recorded(model, PAIRS.clean), recorded(model, PAIRS.corrupt)
    metric = values(model, PAIRS.clean, lambda name, now: now).detach()
    chosen = NODES[["a0.h1", "m0", "a1.h3"]]
    damage = [(metric - values(model, PAIRS.clean, patched(node, corrupt)).detach()).mean() for node in chosen]
    if kind in (lora, dora_everywhere, adapter_on_four_bits):
        model.train()
    before = contents(model)
    with unchanged(PlainModel(model.get_base_model() if hasattr(model, "peft_config") else model)):
        found = dfa.attribute(model, PAIRS, method="nap").values
        torch.testing.assert_close(found, nap_by_hand(clean, corrupt), atol=2e-4, rtol=2e-4)
        exact = dfa.attribute(model, PAIRS, nodes=chosen, method="exact").values
        torch.testing.assert_close(exact, torch.stack(damage), atol=2e-4, rtol=2e-4)
        for name, work in WORK.items():
            if plain is not None:
                torch.testing.assert_close(
                    work(model), work(plain), atol=1e-4, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}"
                )
            elif name == "edges":
                with pytest.raises(ModelError, match=r"rounds what its weights are multiplied with \(LLM.int8\)"):
                    work(model)
            else:
                assert work(model).isfinite().all()
    after = contents(model)
    assert before.keys() == after.keys()
    for name, (place, numbers) in before.items():
        assert place == after[name][0] and torch.equal(numbers, after[name][1]), name


@pytest.mark.parametrize("kind", [four_bits, eight_bits, torchao_eight_bits], ids=lambda kind: kind.__name__)
def test_a_quantised_checkpoint(kind, folder, tmp_path):
    """Saved as it is, and loaded by name: nothing is packed by the pass with which a model is tried."""
    model, _ = kind(folder)
    expected = dfa.attribute(model, PAIRS, method="nap").values
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    again = dfa.load_model(tmp_path, backend="transformers")
    assert type(again.original_model.model.layers[1].mlp.up_proj) is type(model.model.layers[1].mlp.up_proj)
    torch.testing.assert_close(dfa.attribute(again, PAIRS, method="nap").values, expected, atol=1e-5, rtol=1e-4)


def test_adapters_are_switched(folder):
    """Off, and one for another: what is live counts."""
    model, merged = lora(folder)
    plain = loaded(folder)
    torch.manual_seed(1)
    model.add_adapter("other", model.peft_config["default"])
    torch.nn.init.normal_(model.base_model.model.model.layers[0].self_attn.o_proj.lora_B["other"].weight)
    score = lambda each: dfa.attribute(each, PAIRS, method="nap").values  # noqa: E731
    torch.testing.assert_close(score(model), score(merged), atol=1e-4, rtol=1e-3)
    with model.disable_adapter():
        torch.testing.assert_close(score(model), score(plain), atol=1e-5, rtol=1e-4)
    model.set_adapter("other")
    other = copy.deepcopy(model).merge_and_unload()
    assert not torch.allclose(score(other), score(merged), atol=1e-2)
    torch.testing.assert_close(score(model), score(other), atol=1e-4, rtol=1e-3)


def test_learned_prompts_are_refused(folder):
    peft = pytest.importorskip("peft", reason="needs PEFT: make test-weights")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ModelError, match="puts learned tokens before every prompt"):
        dfa.attribute(peft.get_peft_model(loaded(folder), config), PAIRS)


def test_weights_that_were_packed_are_refused(folder):
    model, _ = four_bits(folder)
    if not private.packing(model):
        pytest.skip("bitsandbytes packs weights on CPUs with AVX512-BF16 only")
    with torch.no_grad():
        model(PAIRS.clean)
    with pytest.raises(ModelError, match="were packed when bitsandbytes ran it on this CPU without gradients"):
        dfa.attribute(model, PAIRS)
