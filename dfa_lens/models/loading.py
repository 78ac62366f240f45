"""Load Llama and Qwen-2.5 checkpoints as TransformerLens models, with unprocessed weights.

Here models are made; :mod:`~dfa_lens.models.runner` knows how they are run.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from dfa_lens.errors import ModelError, unknown
from dfa_lens.models import backend as classes

Backend = Literal["auto", "hooked", "bridge"]
"""Which TransformerLens class: "hooked" (HookedTransformer, up to 3.x), "bridge" (TransformerBridge), or "auto":
HookedTransformer where the installed TransformerLens has it."""


def transformer_lens_major() -> int:
    """The installed TransformerLens's major version."""
    return int(version("transformer-lens").split(".")[0])


def load_model(
    name_or_path: str | Path,
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
    """Load a Llama or Qwen-2.5 checkpoint for use with dfa_lens.

    Weights stay as they were trained (no folding, no centering): what is attributed is the model itself. The tokenizer
    stays the checkpoint's, too: TransformerLens makes tokenizers add a begin-of-text token wherever one is defined;
    here a prompt gets one only if the checkpoint's own tokenizer adds it.

    Parameters
    ----------
    name_or_path:
        A local checkpoint folder (config, safetensors, tokenizer; no network is used), or a Hugging Face name such
        as "meta-llama/Llama-3.2-1B".
    backend:
        See :data:`Backend`.
    dtype, device:
        Of the weights; the device is the CPU unless said otherwise.
    n_ctx:
        The longest prompt that a HookedTransformer is made for (less, if the checkpoint says less). Its tables grow
        with the square: the 131,072 tokens of Llama-3.2 would need 16 GiB a layer. A bridge has no such tables.
    n_devices:
        Split a HookedTransformer's layers over so many GPUs.
    device_map, max_memory, offload_folder:
        Where the parts of a bridge live, as in Hugging Face's ``from_pretrained`` (accelerate): "auto", or a map from
        module to device, "cpu" or "disk". Disk needs a folder, and TransformerLens 4.

    Returns
    -------
    HookedTransformer or TransformerBridge
        In evaluation mode, with ``.tokenizer`` set.

    Raises
    ------
    ModelError
        If the folder is missing or incomplete, the architecture is neither Llama nor Qwen-2, the backend is not in
        the installed TransformerLens, or the placement is not one that the backend has.

    Examples
    --------
    >>> from pathlib import Path
    >>> import dfa_lens as dfa
    >>> folder = Path(dfa.__file__).parent / "zoo" / "models" / "llama3-tiny-source"
    >>> dfa.load_model(folder).cfg.n_heads
    8
    """
    if backend not in get_args(Backend):
        raise unknown("backend", backend, get_args(Backend), ModelError)
    placed = device_map is not None or max_memory is not None
    if backend == "auto":
        backend = "hooked" if transformer_lens_major() < 4 and not placed else "bridge"
    if backend == "hooked" and transformer_lens_major() >= 4:
        raise ModelError(
            f"TransformerLens {version('transformer-lens')} has no HookedTransformer any more: use backend='bridge', "
            "or install 'transformer-lens<4'."
        )
    _check_placement(backend, device, n_devices, placed)
    placement: dict[str, Any] = {}
    if placed:
        placement = {"device_map": device_map or "auto", "max_memory": max_memory}
        if offload_folder is not None:
            placement["offload_folder"] = str(offload_folder)
    path = Path(name_or_path)
    local = path.is_dir()
    if not local and (path.is_absolute() or str(name_or_path).startswith((".", "~"))):
        raise ModelError(f"There is no folder {path}.")
    if local and not (path / "config.json").is_file():
        raise ModelError(f"{path} is not a checkpoint folder: it has no config.json.")

    from transformers import AutoConfig, AutoModelForCausalLM

    options = {"local_files_only": True} if local else {}
    config = AutoConfig.from_pretrained(str(name_or_path), **options)
    if config.model_type not in ("llama", "qwen2"):
        raise ModelError(f"{name_or_path} is a {config.model_type!r} model; Llama and Qwen-2.5 are supported.")
    try:
        # eager attention: the arithmetic that TransformerLens rebuilds
        with _no_progress_bars():
            hf_model = AutoModelForCausalLM.from_pretrained(
                str(name_or_path), dtype=dtype, attn_implementation="eager", **options, **placement
            )
        tokenizer = _tokenizer_class(path if local else None).from_pretrained(str(name_or_path), **options)
    except (OSError, ValueError) as error:
        raise ModelError(f"{name_or_path} can't be loaded: {error}") from error
    hf_model.eval()
    name = path.name if local else str(name_or_path)
    if backend == "bridge":
        model = _bridge(name, hf_model, tokenizer, dtype, None if placed else device or "cpu")
    else:
        model = _hooked(name, hf_model, tokenizer, dtype, device or "cpu", n_ctx, n_devices)
    _keep_tokenizer(model, tokenizer)
    return model


def _keep_tokenizer(model: Any, tokenizer: Any) -> None:
    """Give the model back the checkpoint's tokenizer, and let ``model.to_tokens`` agree with it.

    Both classes put a copy in its place that begins every prompt with a begin-of-text token if one is defined; a
    bridge does so at every assignment to ``.tokenizer``, hence the private name.
    """
    classes.Backend.of(model).set_tokenizer(tokenizer)
    model.cfg.tokenizer_prepends_bos = model.cfg.default_prepend_bos = bool(tokenizer("").input_ids)


def _check_placement(backend: str, device: Any, n_devices: int, placed: bool) -> None:
    if placed and device is not None:
        raise ModelError("Give device, or device_map and max_memory, not both.")
    if placed and backend == "hooked":
        raise ModelError("A HookedTransformer has no device map: use n_devices, or backend='bridge'.")
    if n_devices > 1 and backend == "bridge":
        raise ModelError("n_devices is for HookedTransformer: give a bridge device_map='auto'.")
    if n_devices > 1 and torch.cuda.device_count() < n_devices:
        raise ModelError(f"n_devices={n_devices}, but there are {torch.cuda.device_count()} GPUs here.")


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Loading a local file is no reason to print; the setting is global in transformers, so it is put back."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def _tokenizer_class(folder: Path | None) -> Any:
    """AutoTokenizer, but for a folder that declares a plain fast tokenizer that one.

    AutoTokenizer of transformers 5 takes the declared class of a Qwen-2 folder for a mistake and puts Qwen's own
    pre-tokenizer in its place, which splits the words of a word-level tokenizer without a warning.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    settings = folder / "tokenizer_config.json" if folder is not None else None
    if settings is not None and settings.is_file():
        declared = json.loads(settings.read_text()).get("tokenizer_class")
        if declared == "PreTrainedTokenizerFast":
            return PreTrainedTokenizerFast
    return AutoTokenizer


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


def _hooked(
    name: str,
    hf_model: Any,
    tokenizer: Any,
    dtype: torch.dtype,
    device: str | torch.device,
    n_ctx: int,
    n_devices: int,
) -> Any:
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained import weight_conversions

    config = hf_model.config
    qwen = config.model_type == "qwen2"
    rope = dict(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ModelError(
            f"{name} scales its rotary embedding by {kind!r}, which HookedTransformer can't: use the bridge."
        )
    d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # HookedTransformer wants None where there is no grouping; the Qwen converter always names the keys as grouped.
    key_value_heads = config.num_key_value_heads
    if key_value_heads == config.num_attention_heads and not qwen:
        key_value_heads = None
    scaling = {}
    if kind == "llama3":
        scaling = {
            "use_NTK_by_parts_rope": True,
            "NTK_by_parts_low_freq_factor": rope["low_freq_factor"],
            "NTK_by_parts_high_freq_factor": rope["high_freq_factor"],
            "NTK_by_parts_factor": rope["factor"],
            "NTK_original_ctx_len": rope["original_max_position_embeddings"],
        }
    cfg = HookedTransformerConfig(
        model_name=name,
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        n_heads=config.num_attention_heads,
        d_head=d_head,
        n_key_value_heads=key_value_heads,
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
        original_architecture="Qwen2ForCausalLM" if qwen else "LlamaForCausalLM",
        dtype=dtype,
        device=str(device) if n_devices == 1 else "cuda",
        n_devices=n_devices,
        init_weights=False,
        **scaling,
    )
    convert = weight_conversions.convert_qwen2_weights if qwen else weight_conversions.convert_llama_weights
    state = convert(hf_model, cfg)
    with warnings.catch_warnings():
        # It was asked for, and the installed version has it.
        warnings.filterwarnings("ignore", "HookedTransformer is deprecated", DeprecationWarning)
        model = HookedTransformer(cfg, deepcopy(tokenizer), move_to_device=False)
        model.load_and_process_state_dict(
            state, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False
        )
    if n_devices > 1:
        model.move_model_modules_to_device()
    else:
        model.to(device, print_details=False)
    model.eval()
    return model
