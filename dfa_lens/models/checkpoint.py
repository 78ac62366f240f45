"""Find and read a Hugging Face checkpoint, and refuse one that is not whole.

transformers fills what a checkpoint lacks with random numbers, leaves out what it has no place for, guesses what a
config does not say, and fails with a dozen kinds of exceptions. Here each of these is one
:class:`~dfa_lens.errors.ModelError`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from importlib.resources import files
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from dfa_lens.errors import DfaError, ModelError, unknown

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""What weights can be held in."""

_STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}

# What puts a prefix before the name of every weight that is saved from inside of it.
_WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "module.": "DataParallel or DistributedDataParallel",
    "base_model.model.": "PEFT",
    "_fsdp_wrapped_module.": "FullyShardedDataParallel",
}
_ADAPTER = "adapter_config.json"
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


@dataclass(frozen=True)
class Checkpoint:
    """Where a checkpoint is: a local folder, or (``folder`` None) the hub.

    ``gguf`` is the file in the folder that is all of it.
    """

    source: str
    folder: Path | None
    gguf: Path | None = None

    @property
    def name(self) -> str:
        """The folder's or the file's own name, or the name on the hub."""
        if self.gguf is not None:
            return self.gguf.name
        return self.folder.name if self.folder is not None else self.source

    @property
    def options(self) -> dict[str, Any]:
        """What every ``from_pretrained`` is told: nobody asks the hub about a folder that is here."""
        own = {"gguf_file": self.gguf.name} if self.gguf is not None else {}
        return own | ({"local_files_only": True} if self.folder is not None else {})


def locate(name_or_path: Any) -> Checkpoint:
    """The checkpoint of that name: a folder, a GGUF file, a shipped model, or a name on the hub, in this order.

    Raises
    ------
    ModelError
        If it is none of them, as far as can be told without asking the hub.
    """
    if not isinstance(name_or_path, str | os.PathLike) or not str(name_or_path).strip():
        raise ModelError(
            f"A model is named by a checkpoint folder, a shipped model or a Hugging Face name, not by {name_or_path!r}."
        )
    name = os.fspath(name_or_path)
    shipped = {folder.name: folder for folder in _shipped()}
    with as_model_error(f"{name!r} names no model"):  # a user that does not exist, a name that is too long
        path = Path(name).expanduser()
        if path.is_file():
            if path.suffix.lower() == ".gguf":
                return Checkpoint(str(path.parent), path.parent, path)
            raise ModelError(f"{path} is a file: give the folder that holds it, config.json and the tokenizer.")
        if path.is_dir() and ((path / "config.json").is_file() or name not in shipped):
            return _folder(path)
    if name in shipped:
        return _folder(shipped[name])
    if isinstance(name_or_path, str) and _HUB_NAME.fullmatch(name):
        return Checkpoint(name, None)
    if isinstance(name_or_path, os.PathLike) or path.is_absolute() or "/" in name or name.startswith("."):
        raise ModelError(f"There is no folder {path}.")
    known = unknown("checkpoint folder or shipped model", name, shipped, ModelError)
    raise ModelError(f"{known} A model on the hub is named 'owner/name'.")


def _folder(path: Path) -> Checkpoint:
    if (path / "config.json").is_file():
        return Checkpoint(str(path), path)
    if (path / _ADAPTER).is_file():
        raise ModelError(_unmerged(path.name))
    others = sorted(path.glob("*.gguf"))
    instead = f" Of its GGUF files, name one: {others[0]}." if others else ""
    raise ModelError(f"{path} is not a checkpoint folder: it has no config.json.{instead}")


def _shipped() -> list[Path]:
    """The folders of the models that ship with the package."""
    home = Path(str(files("dfa_lens"))) / "zoo" / "models"
    return sorted(path for path in home.glob("*") if (path / "config.json").is_file())


def _unmerged(name: str) -> str:
    return (
        f"{name} holds an unmerged LoRA adapter ({_ADAPTER}): the base weights alone are another model, and so is what "
        "the file says without them. Merge it with PEFT (model.merge_and_unload().save_pretrained(folder)), or load a "
        "folder with the base weights alone."
    )


@contextmanager
def as_model_error(what: str) -> Iterator[None]:
    """Whatever a library raises inside becomes a ModelError: "``what``: its message".

    The libraries beneath raise OSError, ValueError, RuntimeError, ImportError, KeyError, exceptions of their own and
    plain Exception (tokenizers). The original stays as the cause. Memory that does not suffice is no fault of the
    checkpoint.
    """
    try:
        yield
    except (DfaError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ModelError(f"{what}: {in_short(error)}") from error


def in_short(error: Exception, limit: int = 400) -> str:
    """The message on one line; some list all architectures there are."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


@contextmanager
def quietly() -> Iterator[None]:
    """No progress bars and no reports from transformers: what matters in them is an error of ours.

    Both settings are global in transformers, so they are put back.
    """
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _without_bars(checkpoint: Checkpoint) -> AbstractContextManager[object]:
    """Of a GGUF file transformers draws a progress bar that it can't be told to leave out."""
    return redirect_stderr(StringIO()) if checkpoint.gguf is not None else nullcontext()


# --- config ------------------------------------------------------------------------------------------------------


def read_config(checkpoint: Checkpoint) -> Any:
    """The checkpoint's config, ``LlamaConfig`` say.

    Raises
    ------
    ModelError
        If it can't be read; is no causal language model; comes with code of its own, or with an adapter.
    """
    from transformers import AutoConfig, PretrainedConfig
    from transformers.utils import find_adapter_config_file

    name = checkpoint.name
    problem = f"{name} can't be loaded"
    if checkpoint.gguf is not None:
        written = _read_gguf(checkpoint)
    elif checkpoint.folder is not None:
        written = _json(checkpoint.folder / "config.json")
    else:
        problem = f"There is no folder {name} here, and from the Hugging Face hub it can't be loaded"
        with as_model_error(problem):
            written, _ = PretrainedConfig.get_config_dict(checkpoint.source)
    with as_model_error(problem):
        whole = checkpoint.gguf is not None  # what lies beside such a file is not part of it
        if not whole and find_adapter_config_file(checkpoint.source, **checkpoint.options) is not None:
            raise ModelError(_unmerged(name))
    _check_architecture(name, written)
    with as_model_error(f"The config.json of {name} can't be used"):
        config = AutoConfig.from_pretrained(checkpoint.source, **checkpoint.options)
    if not getattr(config, "is_causal", True):
        raise ModelError(
            f"{name} attends in both directions (is_causal is false in its config.json): its last position does not "
            "predict a next token, and TransformerLens would run it as a causal model."
        )
    return config


def _read_gguf(checkpoint: Checkpoint) -> dict[str, Any]:
    """The config that transformers makes of what a GGUF file says of its model."""
    from transformers import PretrainedConfig
    from transformers.utils import is_gguf_available

    assert checkpoint.gguf is not None
    _check_present(checkpoint.gguf)
    if not is_gguf_available():
        raise ModelError(f"{checkpoint.name} is a GGUF file, which needs a package more: pip install gguf")
    with as_model_error(f"{checkpoint.name} can't be read as a GGUF file"):
        return PretrainedConfig.get_config_dict(checkpoint.source, **checkpoint.options)[0]


def _check_architecture(name: str, written: dict[str, Any]) -> None:
    """Of what config.json says itself: AutoConfig guesses a missing type from the folder's name."""
    kind = written.get("model_type")
    if kind is None:
        raise ModelError(f"The config.json of {name} has no model_type: 'llama' or 'qwen2', say.")
    classes = written.get("architectures") or []
    if classes and not any(str(each).endswith(("ForCausalLM", "LMHeadModel")) for each in classes):
        raise ModelError(
            f"{name} is a {classes[0]}, not a causal language model (LlamaForCausalLM, Qwen2ForCausalLM …)."
        )
    own = written.get("auto_map") or {}
    if isinstance(own, dict) and any(key.startswith("AutoModel") for key in own):
        raise ModelError(
            f"{name} comes with code of its own (auto_map in its config.json), which is not run here; read as a plain "
            f"{kind} it may be another model. If it is one, take auto_map out."
        )


def _json(path: Path) -> dict[str, Any]:
    """A JSON object from a file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path} can't be read: {in_short(error)}") from error
    except ValueError as error:
        _check_present(path)
        raise ModelError(f"{path} is no JSON: {in_short(error)}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds a {type(content).__name__}, not a JSON object.")
    return content


# --- weights -----------------------------------------------------------------------------------------------------


def read_weights(
    checkpoint: Checkpoint,
    config: Any,
    dtype: torch.dtype,
    *,
    attn_implementation: str | None = "eager",
    **placement: Any,
) -> Any:
    """The Hugging Face model, in evaluation mode, with every weight from the checkpoint.

    The weights are held once. Those that are stored in ``dtype`` stay mapped from the file where transformers maps
    them: they take memory as they are read, and are no copy.

    Raises
    ------
    ModelError
        If a file is missing, empty, a Git LFS pointer, or shorter than it says; weights are missing, are under other
        names, have other shapes, have no place in the model, or are not finite.
    """
    from transformers import AutoModelForCausalLM

    if checkpoint.folder is not None and checkpoint.gguf is None:
        _check_files(checkpoint.folder)
    with as_model_error(f"{checkpoint.name} can't be loaded"), _without_bars(checkpoint):
        # Converted by transformers, the whole file stays in memory beside what is made of it.
        folder = None if placement or checkpoint.gguf is not None else _local_folder(checkpoint)
        stored = None if folder is None else _stored_dtype(folder)

        def read(dtype: torch.dtype) -> Any:
            model, report = AutoModelForCausalLM.from_pretrained(
                checkpoint.source,
                config=config,
                dtype=dtype,
                attn_implementation=attn_implementation,
                output_loading_info=True,
                # for the report to say which; transformers' own error leaves it to the log
                ignore_mismatched_sizes=True,
                **checkpoint.options,
                **placement,
            )
            _check_report(checkpoint.name, model, report)
            return model

        model = read(stored or dtype)
        if folder is not None and stored not in (None, dtype):
            if _make_buffers_again(model, stored, dtype):
                _convert(model, folder, dtype)
            else:
                model = read(dtype)
    _check_finite(checkpoint.name, model)
    return model.eval()


def _local_folder(checkpoint: Checkpoint) -> Path:
    """Where the files are: of a checkpoint from the hub, in its cache (the weights after the first time only)."""
    from transformers.utils import cached_file

    return checkpoint.folder or Path(cached_file(checkpoint.source, "config.json")).parent


def _stored_dtype(folder: Path) -> torch.dtype | None:
    """What all weights are stored in; None if they differ, or if that can't be said without reading them."""
    paths = _weight_files(folder)
    if not paths or any(path.suffix != ".safetensors" for path in paths):
        return None
    found = {entry["dtype"] for path in paths for entry in _header(path)[0].values()}
    return _STORED.get(found.pop()) if len(found) == 1 else None


def _make_buffers_again(model: Any, stored: torch.dtype | None, dtype: torch.dtype) -> bool:
    """Make in ``dtype`` what a model computed for itself in the dtype of its file, rounded as that is.

    It is the scale of Gemma's embeddings, beside which its unrounded number stands. False, and nothing is of use, if
    there is anything else; in float32, which no dtype is finer than, there may be: frequencies of rotations are float32
    in every model.
    """
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.dtype == stored:
                number = getattr(module, f"scalar_{name}", None)
                if isinstance(number, (int, float)):
                    setattr(module, name, torch.tensor(number, dtype=dtype, device=buffer.device))
                elif stored != torch.float32:
                    return False
    return True


def _convert(model: Any, folder: Path, dtype: torch.dtype) -> None:
    """Bring the weights to ``dtype``, each read anew from its file.

    What was read from a mapped file counts as memory until the mapping ends, and the model's own ends with its last
    weight. So each gets a mapping of its own, which ends when it has been converted.
    """
    parameters = dict(model.named_parameters())
    for path in _weight_files(folder):
        for name in _header(path)[0].keys() & parameters.keys():
            with safe_open(path, framework="pt") as file:
                parameters.pop(name).data = file.get_tensor(name).to(dtype)
    for parameter in parameters.values():  # under another name in the file
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


def _check_files(folder: Path) -> None:
    """That the weight files are there and whole; transformers says so in other words for each kind of damage."""
    paths = _weight_files(folder)
    if not paths:
        raise ModelError(
            f"{folder} has no weights: neither model.safetensors nor pytorch_model.bin, in one or many parts."
        )
    for path in paths:
        _check_present(path)
        if path.suffix == ".safetensors":
            _check_length(path)


def _weight_files(folder: Path) -> list[Path]:
    """The files that transformers would read, in its order of preference; none if there are none."""
    for single, index in (
        ("model.safetensors", "model.safetensors.index.json"),
        ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ):
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            shards = _json(folder / index).get("weight_map")
            if not isinstance(shards, dict) or not shards:
                raise ModelError(f"{folder / index} has no weight_map.")
            return [folder / name for name in sorted(set(shards.values()))]
    return []


def _check_present(path: Path) -> None:
    if not path.is_file():
        raise ModelError(f"{path} is missing: the checkpoint's index lists it.")
    if path.stat().st_size == 0:
        raise ModelError(f"{path} is empty: was it copied or downloaded to the end?")
    with path.open("rb") as file:
        if file.read(23) == b"version https://git-lfs":
            raise ModelError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in its repository.")


def _check_length(path: Path) -> None:
    """A safetensors file says in its header where its last tensor ends."""
    header, begin = _header(path)
    length = path.stat().st_size
    expected = begin + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if length < expected:
        raise ModelError(
            f"{path} is cut off: it has {length:,} bytes of {expected:,}. Was it copied or downloaded to the end?"
        )


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """What a safetensors file says of its weights, and where in the file they begin."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= path.stat().st_size - 8:
            raise ModelError(f"{path} is no safetensors file, or is cut off in its header.")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            complete = all({"dtype", "data_offsets"} <= entry.keys() for entry in header.values())
        except (ValueError, TypeError, AttributeError):
            complete = False
    if not complete:
        raise ModelError(f"{path} is no safetensors file: its header can't be read.")
    return header, 8 + length


def _check_report(name: str, model: Any, report: dict[str, Any]) -> None:
    """That the weights of the model and those of the checkpoint are the same ones."""
    mismatched = sorted(report["mismatched_keys"])
    if mismatched:
        key, found, expected = mismatched[0]
        raise ModelError(
            f"{name} does not fit its config.json: {key} has shape {_shape(found)} and should have {_shape(expected)} "
            f"({len(mismatched)} such)."
        )
    missing = set(report["missing_keys"])
    unexpected = set(report["unexpected_keys"])
    if not missing:
        # A head beside the language model's, as reward models have, does not touch the logits.
        unexpected = {key for key in unexpected if key.startswith((f"{model.base_model_prefix}.", "lm_head."))}
    if not missing and not unexpected:
        return
    faults = []
    if missing:
        faults.append(f"{len(missing)} weights are missing ({_first(missing)}) and would be random numbers")
    if unexpected:
        faults.append(
            f"{len(unexpected)} have no place in a {type(model).__name__} of its config ({_first(unexpected)})"
        )
    raise ModelError(
        f"{name} is not the model that its config.json describes: {', and '.join(faults)}. "
        + _cause(missing, unexpected)
    )


def _cause(missing: Collection[str], unexpected: Collection[str]) -> str:
    """What may have happened, and what to do."""
    if any(".lora_" in key for key in unexpected):
        return "Merge the LoRA weights with PEFT (model.merge_and_unload()) before you save."
    # longest first: "base_model.model." also ends with the "model." that is part of the names
    for prefix in sorted({key.removesuffix(own) for key in unexpected for own in missing if key.endswith(f".{own}")}):
        makers = " in ".join(maker for mark, maker in _WRAPPERS.items() if mark in prefix) or "a module around it"
        return f"The names begin with {prefix!r}, from {makers}: save the model inside of it, or take the prefix off."
    if set(missing) == {"lm_head.weight"}:
        return 'If the unembedding is the embedding, config.json has to say so: "tie_word_embeddings": true.'
    return "Do config.json and the weights belong together, and were all of them saved?"


def _first(keys: Collection[str], n: int = 3) -> str:
    return ", ".join(sorted(keys)[:n]) + (", …" if len(keys) > n else "")


def _shape(shape: Any) -> str:
    return "×".join(map(str, shape))


def _check_finite(name: str, model: Any) -> None:
    """That no weight is NaN or infinite; weights that are still on disk are not read for it."""
    broken = []
    for key, weight in model.named_parameters():
        if weight.is_meta or weight.numel() == 0 or weight.dtype not in DTYPES:
            continue
        if type(weight) is not torch.nn.Parameter:  # packed numbers that look like floats (torchao)
            continue
        # NaN is both the smallest and the largest number; and unlike isfinite() this takes no memory.
        ends = torch.stack(torch.aminmax(weight.detach()))
        if not ends.isfinite().all():
            broken.append(key)
    if broken:
        raise ModelError(f"{name} has weights that are NaN or infinite: {_first(broken)} ({len(broken)} such).")


# --- tokenizer ---------------------------------------------------------------------------------------------------


def read_tokenizer(checkpoint: Checkpoint) -> Any:
    """The checkpoint's tokenizer.

    Raises
    ------
    ModelError
        If it can't be read, or has no vocabulary.
    """
    with as_model_error(f"The tokenizer of {checkpoint.name} can't be loaded"):
        tokenizer = _tokenizer_class(checkpoint.folder).from_pretrained(checkpoint.source, **checkpoint.options)
        # Without its file Qwen-2's is made without a word, and turns every text into nothing.
        if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
            raise ModelError(f"The tokenizer of {checkpoint.name} has no vocabulary: is tokenizer.json missing?")
    return tokenizer


def _tokenizer_class(folder: Path | None) -> Any:
    """AutoTokenizer, but for a folder that declares a plain fast tokenizer that one.

    AutoTokenizer of transformers 5 takes the declared class of a Qwen-2 folder for a mistake and puts Qwen's own
    pre-tokenizer in its place, which splits the words of a word-level tokenizer without a warning.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    settings = folder / "tokenizer_config.json" if folder is not None else None
    if settings is not None and settings.is_file():
        declared = _json(settings).get("tokenizer_class")
        if declared == "PreTrainedTokenizerFast":
            return PreTrainedTokenizerFast
    return AutoTokenizer
