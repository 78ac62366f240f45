"""Load checkpoints as TransformerLens models with unprocessed weights, or as Hugging Face's models as they are.

Here models are made; :mod:`~dfa_lens.models.runner` knows how they are run, and :mod:`~dfa_lens.models.checkpoint`
reads what is on disk. A HookedTransformer is built from a config of ours and Hugging Face's weights, so it can be
another model without a word: what it can't represent is refused by the config, and whatever is made is compared with
Hugging Face's logits.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import einops
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dfa_lens.errors import ModelError, unknown
from dfa_lens.models import backend as classes
from dfa_lens.models import checkpoint as checkpoints
from dfa_lens.models import private

Backend = Literal["auto", "hooked", "bridge", "transformers"]
"""Which class: TransformerLens's "hooked" (HookedTransformer, up to 3.x; Llama and Qwen-2.5) or "bridge"
(TransformerBridge); "transformers", Hugging Face's own model without TransformerLens; or "auto": HookedTransformer for
what it can be, where the installed TransformerLens has it, else a bridge."""

# How far logits may be from Hugging Face's, as a part of their spread: the norm of the difference by that of the logits
# minus their means. A config field that is not translated costs .3 to 1.2; rounding at most 3e-5 in float32, .016 in
# float16 and .044 in bfloat16, in models of up to 80 layers.
_TOLERANCE = {torch.float32: 0.005, torch.float64: 0.005, torch.float16: 0.05, torch.bfloat16: 0.15}
#: ``model_type`` of what can be a HookedTransformer.
HOOKED = ("llama", "qwen2")
_PROMPT_LENGTH = 32
_LONGEST_PROMPT = 128

# Fields of a config that say nothing of how the model computes, or that differ from model to model anyway.
_ORDINARY_FIELDS = {
    *("architectures", "model_type", "transformers_version", "dtype", "torch_dtype", "_name_or_path", "name_or_path"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "initializer_range", "pretraining_tp"),
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"),
    *("attention_dropout", "layer_types"),
}


def transformer_lens_major() -> int:
    """The installed TransformerLens's major version."""
    return int(version("transformer-lens").split(".")[0])


def load_model(
    name_or_path: str | os.PathLike[str],
    *,
    backend: Backend = "auto",
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    n_ctx: int = 2048,
    n_devices: int = 1,
    device_map: str | Mapping[str, Any] | None = None,
    max_memory: Mapping[Any, Any] | None = None,
    offload_folder: str | Path | None = None,
) -> Any:
    """Load a checkpoint of a decoder for use with dfa_lens: Llama, Qwen-2.5, or what else the backend can.

    Weights stay as they were trained (no folding, no centering): what is attributed is the model itself. The tokenizer
    stays the checkpoint's, too: TransformerLens makes tokenizers add a begin-of-text token wherever one is defined;
    here a prompt gets one only if the checkpoint's own tokenizer adds it.

    Parameters
    ----------
    name_or_path:
        A local checkpoint folder (config, safetensors, tokenizer; no network is used), a GGUF file (needs ``pip install
        gguf``; its weights are dequantised to ``dtype``), a shipped model (:func:`dfa_lens.zoo.names`), or a Hugging
        Face name such as "meta-llama/Llama-3.2-1B".
    backend:
        See :data:`Backend`.
    dtype, device:
        Of the weights: ``torch.float32``, ``bfloat16``, ``float16`` or ``float64``; the device is the CPU unless said
        otherwise.
    n_ctx:
        The longest prompt that a HookedTransformer takes (less, if the checkpoint says less). A bridge takes what the
        checkpoint says.
    n_devices:
        Split a HookedTransformer's layers over so many GPUs.
    device_map, max_memory, offload_folder:
        Where the parts of a bridge or of Hugging Face's model live, as in ``from_pretrained`` (accelerate): "auto", or
        a map from module to device, "cpu" or "disk". Disk needs a folder, and for a bridge TransformerLens 4.

    Returns
    -------
    HookedTransformer, TransformerBridge or :class:`~dfa_lens.models.backend.PlainModel`
        In evaluation mode, with ``.tokenizer`` set.

    Raises
    ------
    ModelError
        If the checkpoint is missing, damaged or incomplete; is no decoder, attends in both directions, or has an
        adapter or code of its own beside it; if the backend is not in the installed TransformerLens, can't
        represent the checkpoint, or gives other logits than Hugging Face's model; if the placement is not one that the
        backend has. See Notes.

    Notes
    -----
    Every TransformerLens model that is returned was compared with Hugging Face's own: the logits of one prompt of 32
    random tokens (more, if a sliding window is longer). They may differ by 0.5 % of their spread in float32 and
    float64, 5 % in float16 and 15 % in bfloat16; those of a real model of 30 layers differ by 0.0003, 0.7 and 4.4 %.

    The weights are held once. Those that the file has in ``dtype`` already stay mapped from it where transformers maps
    them, as in every Hugging Face model: do not write to the file while the model is in use.

    Examples
    --------
    >>> from pathlib import Path
    >>> import dfa_lens as dfa
    >>> folder = Path(dfa.__file__).parent / "zoo" / "models" / "llama3-tiny-source"
    >>> dfa.load_model(folder).cfg.n_heads
    8
    """
    placed = device_map is not None or max_memory is not None
    _check_backend(backend)
    _check_dtype(dtype)
    _check_positive("n_ctx", n_ctx)
    _check_positive("n_devices", n_devices)
    _check_placement(backend, device, n_devices, placed)
    where = None if placed else _existing_device("cpu" if n_devices > 1 else device)
    checkpoint = checkpoints.locate(name_or_path)
    name = checkpoint.name
    with checkpoints.quietly(), _ordinary_torch():
        config = checkpoints.read_config(checkpoint)
        kind = backend
        if backend == "auto":
            hooked = transformer_lens_major() < 4 and config.model_type in HOOKED and not placed
            kind = "hooked" if hooked else "bridge"
        if kind == "hooked":
            _check_representable(name, config, n_ctx)
        tokenizer = checkpoints.read_tokenizer(checkpoint)
        placement = _placement(device_map, max_memory, offload_folder) if placed else {}
        # eager attention is the arithmetic that TransformerLens rebuilds; None is what transformers takes by itself
        kernel = None if kind == "transformers" else "eager"
        hf_model = checkpoints.read_weights(checkpoint, config, dtype, attn_implementation=kernel, **placement)
        if where is not None and not getattr(hf_model, "is_quantized", False):  # those are where they were made
            hf_model.to(where)
        prompt = _prompt(config, n_ctx if kind == "hooked" else None)
        expected = _logits_of_hugging_face(name, hf_model, prompt)
        if kind == "transformers":
            return classes.PlainModel(hf_model, tokenizer, name=name)
        with checkpoints.as_model_error(f"TransformerLens can't make a model of {name}"):
            if kind == "bridge":
                model = _bridge(name, hf_model, tokenizer, dtype, where)
            else:
                model = _hooked(name, hf_model, tokenizer, dtype, where or "cpu", n_ctx)
        del hf_model  # a HookedTransformer has its weights now
        _keep_tokenizer(model, tokenizer)
        _check_logits(name, model, config, prompt, expected)
    if n_devices > 1:
        _spread(model, n_devices)
    return model


def _keep_tokenizer(model: Any, tokenizer: Any) -> None:
    """Give the model back the checkpoint's tokenizer, and let ``model.to_tokens`` agree with it.

    Both classes put a copy in its place that begins every prompt with a begin-of-text token if one is defined; a
    bridge does so at every assignment to ``.tokenizer``, hence the private name.
    """
    classes.backend_of(model).set_tokenizer(tokenizer)
    model.cfg.tokenizer_prepends_bos = model.cfg.default_prepend_bos = bool(tokenizer("").input_ids)


# --- what is asked for -------------------------------------------------------------------------------------------


def _check_backend(backend: Any) -> None:
    """That there is such a backend, and that the installed TransformerLens has it."""
    if backend not in get_args(Backend):
        raise unknown("backend", backend, get_args(Backend), ModelError)
    if backend == "hooked" and transformer_lens_major() >= 4:
        raise ModelError(
            f"TransformerLens {version('transformer-lens')} has no HookedTransformer any more: use backend='bridge', "
            "or install 'transformer-lens<4'."
        )


def _check_dtype(dtype: Any) -> None:
    if dtype not in checkpoints.DTYPES:
        known = ", ".join(str(each) for each in checkpoints.DTYPES)
        raise ModelError(f"dtype has to be one of {known}, not {dtype!r}.")


def _check_positive(what: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelError(f"{what} has to be a whole number of 1 or more, not {value!r}.")


def _placement(device_map: Any, max_memory: Any, offload_folder: Any) -> dict[str, Any]:
    """What ``from_pretrained`` is told of where the parts of a model live."""
    placement = {"device_map": device_map or "auto", "max_memory": max_memory}
    return placement | ({} if offload_folder is None else {"offload_folder": str(offload_folder)})


def _existing_device(device: Any) -> torch.device:
    """The device, if something can be put on it."""
    try:
        where = torch.device("cpu" if device is None else device)
        torch.empty(1, device=where)
    # AssertionError: a torch without CUDA says so by this
    except (AssertionError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        reason = checkpoints.in_short(error, 100)
        raise ModelError(f"Nothing can be put on the device {device!r} here: {reason}") from error
    if where.type == "meta":
        raise ModelError("A model on the device 'meta' has no weights, so it can't be run.")
    return where


def _check_placement(backend: Any, device: Any, n_devices: Any, placed: bool) -> None:
    if placed and device is not None:
        raise ModelError("Give device, or device_map and max_memory, not both.")
    if placed and backend == "hooked":
        raise ModelError("A HookedTransformer has no device map: use n_devices, or backend='bridge'.")
    if n_devices > 1 and (backend in ("bridge", "transformers") or transformer_lens_major() >= 4):
        raise ModelError("n_devices is for HookedTransformer: give any other model device_map='auto'.")
    if n_devices > 1 and torch.cuda.device_count() < n_devices:
        raise ModelError(f"n_devices={n_devices}, but there are {torch.cuda.device_count()} GPUs here.")


@contextmanager
def _ordinary_torch() -> Iterator[None]:
    """Loading does not depend on what the caller has set: torch's modes, a default device.

    Through weights that are made in inference mode there is no gradient, ever after; and the comparison with Hugging
    Face's logits is one of the two models as they are.
    """
    with classes.neutral(torch.device("cuda")), torch.device("cpu"):  # on a GPU, too: a device map may name one
        yield


# --- comparing with Hugging Face's model -------------------------------------------------------------------------


def _prompt(config: Any, n_ctx: int | None) -> Int[Tensor, "1 pos"]:
    """Random tokens, the same for every model; more than fit into a sliding window, unless that is very long.

    ``n_ctx`` is the most that the model takes, None if there is no limit but the checkpoint's own.
    """
    length = max(_PROMPT_LENGTH, min(_window(config) + 8, _LONGEST_PROMPT))
    length = min(length, getattr(config, "max_position_embeddings", None) or length, n_ctx or length)
    return torch.randint(config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))


def _window(config: Any) -> int:
    """The length of the checkpoint's sliding window, 0 if it has none."""
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    return (getattr(config, "sliding_window", None) or 0) if slides else 0


def _logits_of_hugging_face(name: str, hf_model: Any, prompt: Int[Tensor, "1 pos"]) -> Float[Tensor, "pos vocab"]:
    """What Hugging Face's model says, before its weights are handed over."""
    device = hf_model.get_input_embeddings().weight.device
    if device.type == "meta":  # accelerate brings the tokens to where it brings the weights
        device = torch.device("cpu")
    tokens = prompt.to(device)
    problem = f"{name} can't be run by Hugging Face's transformers"
    with torch.no_grad(), private.unpacked(hf_model), checkpoints.as_model_error(problem):
        logits = hf_model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits[0]
    if not logits.isfinite().all():
        raise ModelError(
            f"{name} gives logits that are NaN or infinite in {logits.dtype}, from weights that are finite: "
            "load it in torch.bfloat16 or torch.float32."
        )
    return logits


def _check_logits(
    name: str, model: Any, config: Any, prompt: Int[Tensor, "1 pos"], expected: Float[Tensor, "pos vocab"]
) -> None:
    """That a TransformerLens model is the model that Hugging Face has read."""
    tokens = prompt.to(classes.backend_of(model).device)
    with torch.no_grad(), checkpoints.as_model_error(f"TransformerLens can't run {name}"):
        found = model(tokens, attention_mask=torch.ones_like(tokens))[0]
    difference, tolerance = _difference(found, expected), _TOLERANCE[expected.dtype]
    if not difference <= tolerance:  # NaN is a difference too
        raise ModelError(
            f"As a {type(model).__name__}, {name} is another model than in Hugging Face's transformers: its logits are "
            f"off by {difference:.2g} of their spread (rounding in {expected.dtype} explains {tolerance}). "
            f"{_suspects(config)} "
            + ("This checkpoint can't be used." if classes.is_bridge(model) else "Use backend='bridge'.")
        )


def _difference(found: Float[Tensor, "pos vocab"], expected: Float[Tensor, "pos vocab"]) -> float:
    """The norm of the difference, by that of the logits' deviations from their mean at each position."""
    expected = expected.double()
    spread = (expected - expected.mean(-1, keepdim=True)).norm()
    difference = (found.to(expected) - expected).norm()
    return float(difference / spread.clamp(min=torch.finfo(torch.float32).tiny))


def _suspects(config: Any) -> str:
    """What the checkpoint's config says beside a plain one of its class."""
    fields = {key: value for key, value in config.to_diff_dict().items() if key not in _ORDINARY_FIELDS}
    listing = ", ".join(f"{key}={value!r}" for key, value in sorted(fields.items()))
    return f"Its config differs from a plain {type(config).__name__} in {listing or 'nothing but sizes'}."


# --- TransformerBridge -------------------------------------------------------------------------------------------


def _bridge(name: str, hf_model: Any, tokenizer: Any, dtype: torch.dtype, device: str | torch.device | None) -> Any:
    """``device`` None: accelerate has placed the parts."""
    from transformer_lens.model_bridge import TransformerBridge

    where: dict[str, Any] = {}
    if device is not None:
        hf_model.to(device)
        where["device"] = str(device)
    try:
        # a copy, because special tokens are added to it
        model = TransformerBridge.boot_transformers(
            name, hf_model=hf_model, tokenizer=deepcopy(tokenizer), dtype=dtype, **where
        )
    except ValueError as error:
        raise ModelError(f"{name} can't be placed so: {error}") from error
    model.eval()
    return model


# --- HookedTransformer -------------------------------------------------------------------------------------------


def _check_representable(name: str, config: Any, n_ctx: int) -> None:
    """That a HookedTransformer can be the model that the config describes, before gigabytes are read.

    Raises
    ------
    ModelError
        Naming everything that it has no place for.
    """
    if config.model_type not in HOOKED:
        raise ModelError(
            f"{name} is a {config.model_type!r} model, and as a HookedTransformer only Llama and Qwen-2.5 are loaded: "
            "use backend='bridge' or 'transformers'."
        )
    lacks = []
    if getattr(config, "mlp_bias", False):
        lacks.append("biases inside its MLPs (mlp_bias)")
    window, longest = _window(config), min(config.max_position_embeddings, n_ctx)
    if 0 < window < longest:
        lacks.append(f"a sliding window of {window} tokens (with n_ctx={window} it would make no difference)")
    kind = _rope(config)[0]
    if kind not in ("default", "llama3"):
        lacks.append(f"a rotary embedding scaled by {kind!r}")
    if getattr(config, "quantization_config", None) is not None:
        lacks.append("quantised weights")
    if lacks:
        raise ModelError(f"{name} has {' and '.join(lacks)}, which HookedTransformer can't: use backend='bridge'.")


def _rope(config: Any) -> tuple[str, dict[str, Any]]:
    """The kind of the rotary embedding, and its parameters, however the config spells them."""
    rope = dict(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {})
    return str(rope.get("rope_type", rope.get("type", "default"))), rope


def _hooked(
    name: str, hf_model: Any, tokenizer: Any, dtype: torch.dtype, device: str | torch.device, n_ctx: int
) -> Any:
    """A HookedTransformer that takes over the weights of a Hugging Face model, where they are."""
    from accelerate import init_empty_weights  # type: ignore[import-untyped]
    from transformer_lens import HookedTransformer

    cfg = _hooked_config(name, hf_model.config, dtype, device, n_ctx)
    with warnings.catch_warnings(), init_empty_weights(include_buffers=False):
        # It was asked for, and the installed version has it.
        warnings.filterwarnings("ignore", "HookedTransformer is deprecated", DeprecationWarning)
        # a copy, because special tokens are added to it
        model = HookedTransformer(cfg, deepcopy(tokenizer), move_to_device=False)
    _take_over(model, _hooked_weights(hf_model, cfg))
    return model.to(device, print_details=False).eval()


def _hooked_config(name: str, config: Any, dtype: torch.dtype, device: str | torch.device, n_ctx: int) -> Any:
    """What the Hugging Face config says, in TransformerLens's words."""
    from transformer_lens import HookedTransformerConfig

    kind, rope = _rope(config)
    d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    grouped = config.num_key_value_heads != config.num_attention_heads
    scaling = {}
    if kind == "llama3":
        scaling = {
            "use_NTK_by_parts_rope": True,
            "NTK_by_parts_low_freq_factor": rope["low_freq_factor"],
            "NTK_by_parts_high_freq_factor": rope["high_freq_factor"],
            "NTK_by_parts_factor": rope["factor"],
            "NTK_original_ctx_len": rope["original_max_position_embeddings"],
        }
    return HookedTransformerConfig(
        model_name=name,
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        n_heads=config.num_attention_heads,
        d_head=d_head,
        # None: every head has keys and values of its own
        n_key_value_heads=config.num_key_value_heads if grouped else None,
        d_mlp=config.intermediate_size,
        d_vocab=config.vocab_size,
        n_ctx=min(config.max_position_embeddings, n_ctx),
        act_fn=config.hidden_act,
        eps=config.rms_norm_eps,
        normalization_type="RMS",
        final_rms=True,
        gated_mlp=True,
        positional_embedding_type="rotary",
        rotary_dim=d_head,
        rotary_base=rope.get("rope_theta", getattr(config, "rope_theta", None) or 10000.0),
        rotary_adjacent_pairs=False,
        original_architecture="Qwen2ForCausalLM" if config.model_type == "qwen2" else "LlamaForCausalLM",
        dtype=dtype,
        device=str(device),
        init_weights=False,
        **scaling,
    )


@torch.no_grad()
def _hooked_weights(hf_model: Any, cfg: Any) -> dict[str, Tensor]:
    """Hugging Face's weights under HookedTransformer's names and with its axes; biases that there are not are left out.

    All are views, so nothing is held twice, and the matrices lie in memory as HookedTransformer reads them: it asks for
    ``W.T.contiguous()`` on every pass, which copies a matrix that lies the other way. The exception is an unembedding
    that is also the embedding: whoever changes one of HookedTransformer's two does not mean the other.
    """
    base, unembed = hf_model.model, hf_model.lm_head.weight
    if unembed.data_ptr() == base.embed_tokens.weight.data_ptr():
        unembed = unembed.clone()
    weights = {"embed.W_E": base.embed_tokens.weight, "ln_final.w": base.norm.weight, "unembed.W_U": unembed.T}
    key_value = "_" if cfg.n_key_value_heads is not None else ""
    for layer, block in enumerate(base.layers):
        attention, mlp = block.self_attn, block.mlp
        here = {
            "ln1.w": block.input_layernorm.weight,
            "ln2.w": block.post_attention_layernorm.weight,
            "mlp.W_in": mlp.up_proj.weight.T,
            "mlp.W_gate": mlp.gate_proj.weight.T,
            "mlp.W_out": mlp.down_proj.weight.T,
            "attn.W_O": einops.rearrange(attention.o_proj.weight, "m (n h) -> n h m", h=cfg.d_head),
        }
        if attention.o_proj.bias is not None:
            here["attn.b_O"] = attention.o_proj.bias
        for name, projection in (("Q", attention.q_proj), ("K", attention.k_proj), ("V", attention.v_proj)):
            prefix = "attn." if name == "Q" else f"attn.{key_value}"
            here[f"{prefix}W_{name}"] = einops.rearrange(projection.weight, "(n h) m -> n m h", h=cfg.d_head)
            if projection.bias is not None:
                here[f"{prefix}b_{name}"] = einops.rearrange(projection.bias, "(n h) -> n h", h=cfg.d_head)
        weights |= {f"blocks.{layer}.{name}": weight for name, weight in here.items()}
    return {name: weight.detach() for name, weight in weights.items()}


def _take_over(model: Any, weights: Mapping[str, Tensor]) -> None:
    """Put weights into a model whose own are on the meta device; biases that are not given are zero."""
    unexpected = model.load_state_dict(weights, strict=False, assign=True).unexpected_keys
    if unexpected:
        raise ModelError(f"HookedTransformer has no place for {unexpected[0]!r} ({len(unexpected)} such).")
    device = next(iter(weights.values())).device
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            module, _, last = name.rpartition(".")
            if not last.lstrip("_").startswith("b_"):
                raise ModelError(f"HookedTransformer expects a weight {name!r}, which the checkpoint does not have.")
            zeros = torch.zeros_like(parameter, device=device, requires_grad=parameter.requires_grad)
            setattr(model.get_submodule(module), last, torch.nn.Parameter(zeros))


def _spread(model: Any, n_devices: int) -> None:
    """Give each of several GPUs its part of the layers of a HookedTransformer."""
    model.cfg.device, model.cfg.n_devices = "cuda", n_devices
    model.move_model_modules_to_device()
