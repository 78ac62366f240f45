"""A study written down: a TOML file with what :func:`dfa_lens.study.run` is told.

settings = ["zero-shot", "uniform-s"]
seeds = [0, 1, 2]

[models.llama]
source = "meta-llama/Llama-3.2-1B"
target = "meta-llama/Llama-3.2-3B"
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from dfa_lens import zoo
from dfa_lens.data.curve import Protocol
from dfa_lens.data.files import checked_name, read_bytes
from dfa_lens.errors import DfaError, FileError, short, unknown
from dfa_lens.experiments.experiment import FULL, QUICK, Attribution, Budget, ModelPair
from dfa_lens.experiments.functional import FUNCTIONAL
from dfa_lens.experiments.setting import Regime, Setting
from dfa_lens.experiments.settings import SETTINGS
from dfa_lens.experiments.table import Control
from dfa_lens.models.loading import Backend, load_model
from dfa_lens.tasks.own import FileTask
from dfa_lens.transfer.recipe import Recipe

Made = TypeVar("Made")

Kind = Literal["processes", "local", "slurm"]
"""Where workers run: processes of this machine, submitit's jobs on this machine, or jobs of SLURM by submitit."""

#: The settings that a config may name.
NAMED: dict[str, Setting] = {**SETTINGS, **FUNCTIONAL}


@dataclass(frozen=True)
class Resources:
    """Where workers run, and what each of them is given.

    Attributes
    ----------
    kind:
        See :data:`Kind`.
    gpus, cpus:
        Of each worker; ``gpus`` None: one where the study's device is "cuda", else none. A unit runs on one.
    memory, time:
        Of each worker, in GB and minutes; None: by estimate (:func:`~dfa_lens.experiments.forecast.forecast`).
    options:
        More for submitit's ``update_parameters``: ``slurm_partition``, ``slurm_account``, …
    """

    kind: Kind = "processes"
    gpus: int | None = None
    cpus: int = 1
    memory: float | None = None
    time: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Config:
    """What a TOML file says of a study.

    Attributes
    ----------
    run:
        The arguments of :func:`dfa_lens.study.run`, but for the executor.
    resources:
        The executor.
    """

    run: Mapping[str, Any]
    resources: Resources = field(default_factory=Resources)

    @classmethod
    def read(cls, path: str | Path) -> Config:
        """Read a TOML file.

        All keys may be left out; defaults are those of :func:`dfa_lens.study.run`. Files and folders are relative to
        the file's own folder.

        - ``out``: the folder; ``families``, ``settings`` (names of ``dfa.study.SETTINGS`` and ``FUNCTIONAL``),
          ``seeds``, ``test_tasks``, ``collection``, ``device``, ``dtype``, ``protocol``, ``workers``,
          ``retries``; ``backend``, of all models that do not say their own.
        - ``[budget]``: the fields of :class:`~dfa_lens.experiments.experiment.Budget`; ``quick = true`` starts from
          the quick one.
        - ``[attribution]``: the fields of :class:`~dfa_lens.experiments.experiment.Attribution`.
        - ``[models.NAME]``: a pair of models, ``source`` and ``target`` (shipped, a checkpoint folder or a hub name),
          ``backend``.
        - ``[tasks]``: name = one of our tasks, or a file of prompts.
        - ``[setting.NAME]``: a setting of one's own: ``like`` (a named one to start from), ``regime``, ``control``,
          ``method``, ``ridge``, and ``recipe``, a table with fields of :class:`~dfa_lens.transfer.recipe.Recipe`.
        - ``[executor]``: the fields of :class:`Resources`, with ``[executor.options]``.

        Raises
        ------
        FileError
            If it is missing, or no TOML.
        DfaError
            If a key or a name is unknown, or a value is of another kind: which, in which file.

        Examples
        --------
        >>> import tempfile
        >>> from pathlib import Path
        >>> from dfa_lens.experiments.config import Config
        >>> path = Path(tempfile.mkdtemp()) / "study.toml"
        >>> _ = path.write_text('settings = ["zero-shot"]\\n[budget]\\ntrain = 8\\n')
        >>> config = Config.read(path)
        >>> list(config.run["settings"]), config.run["budget"].train
        (['zero-shot'], 8)
        """
        path = Path(path)
        try:
            content = tomllib.loads(read_bytes(path).decode("utf-8-sig"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise FileError(f"{path} is not TOML: {short(error)}.") from error
        return _Reader(path).config(content)


#: The top level's keys and what each holds; a list is a list of them.
_TOP: dict[str, Any] = {
    "out": str,
    "families": [str],
    "settings": [str],
    "seeds": [int],
    "test_tasks": [str],
    "collection": str,
    "device": str,
    "dtype": str,
    "backend": str,
    "protocol": str,
    "workers": int,
    "retries": int,
    **dict.fromkeys(("budget", "attribution", "models", "tasks", "setting", "executor"), dict),
}
_BUDGET = {**{each.name: int for each in fields(Budget)}, "quick": bool}
_ATTRIBUTION = {"method": str, "steps": int, "mlp_gradient": str, "accumulate": str}
_MODELS = {"source": str, "target": str, "backend": str}
_SETTING = {"like": str, "regime": str, "control": str, "method": str, "ridge": float, "recipe": dict}
_RECIPE = {
    each.name: object for each in fields(Recipe) if each.name not in ("initial", "anchor")
}  # what a text can say; the recipe itself checks the values


_EXECUTOR = {"kind": str, "gpus": int, "cpus": int, "memory": float, "time": int, "options": dict}
#: Values that are one of a few texts.
_CHOICES: dict[str, Any] = {
    "protocol": get_args(Protocol),
    "backend": get_args(Backend),
    "kind": get_args(Kind),
    "regime": get_args(Regime),
    "control": get_args(Control),
    "mlp_gradient": ("output", "input"),
    "accumulate": ("own", "all"),
}


@dataclass(frozen=True)
class _Reader:
    """Makes a config of a file's content; its errors name the file."""

    path: Path

    def config(self, content: dict[str, Any]) -> Config:
        self._check(content, _TOP, "")
        plain = ("seeds", "test_tasks", "collection", "protocol", "workers", "retries")
        run = {name: content[name] for name in plain if name in content}
        run |= {"device": content.get("device", "cpu"), "dtype": self._dtype(content.get("dtype", "float32"))}
        if content.get("workers", 1) < 1:
            raise self._wrong("workers", "at least 1", content["workers"])
        if content.get("retries", 0) < 0:
            raise self._wrong("retries", "0 or more", content["retries"])
        run["out"] = self._beside(content.get("out", "study"))
        run["budget"] = self._budget(content.get("budget", {}))
        run["attribution"] = self._made("attribution", Attribution, content.get("attribution", {}), _ATTRIBUTION)
        run["families"] = self._families(content, {"device": run["device"], "dtype": run["dtype"]})
        run["settings"] = self._settings(content)
        run["tasks"] = self._tasks(content.get("tasks", {}))
        return Config(run, self._made("executor", Resources, content.get("executor", {}), _EXECUTOR))

    def _budget(self, found: dict[str, Any]) -> Budget:
        self._check(found, _BUDGET, "budget")
        given = {name: value for name, value in found.items() if name != "quick"}
        wrong = next((name for name, value in given.items() if value < 1), None)
        if wrong is not None:
            raise self._wrong(f"budget.{wrong}", "at least 1", given[wrong])
        return replace(QUICK if found.get("quick") else FULL, **given)

    def _families(self, content: dict[str, Any], load: dict[str, Any]) -> list[ModelPair] | None:
        own, backend = content.get("models", {}), content.get("backend", "auto")
        names = [*content.get("families", ()), *own]
        given = {} if backend == "auto" else {"backend": backend}
        made = []
        for name in names or (zoo.pairs() if given else ()):
            if name in own:
                found = given | own[name] if isinstance(own[name], dict) else own[name]
                made.append(self._pair(name, found, load))
                continue
            shipped = self._inside("families", ModelPair.of, name)
            sides = {"source": shipped.source, "target": shipped.target}
            made.append(self._pair(name, sides | given, load) if given else shipped)
        return made or None

    def _pair(self, name: str, found: Any, load: dict[str, Any]) -> ModelPair:
        where = f"models.{name}"
        self._inside("models", checked_name, name, "pair of models")
        self._check(found, _MODELS, where)
        missing = next((side for side in ("source", "target") if side not in found), None)
        if missing is not None:
            raise DfaError(f"{self.path}: [{where}] lacks {missing!r}, the name of a model.")
        options = load | {key: found[key] for key in ("backend",) if key in found}

        def loader(side: str) -> str | Callable[[], Any]:
            model = found[side]
            if model in zoo.names("all") and "backend" not in found:
                return model
            known = self._beside(model)
            return functools.partial(load_model, str(known) if known.exists() else model, **options)

        return ModelPair(name, loader("source"), loader("target"))

    def _settings(self, content: dict[str, Any]) -> dict[str, Setting] | None:
        made: dict[str, Setting] = {}
        for name in content.get("settings", ()):
            if name not in NAMED:
                raise unknown(f"setting in {self.path}", name, NAMED)
            made[name] = NAMED[name]
        for name, found in content.get("setting", {}).items():
            where = f"setting.{name}"
            self._check(found, _SETTING, where)
            if found.get("like", "zero-shot") not in NAMED:
                raise unknown(f"setting in {self.path}'s [{where}]", found["like"], NAMED)
            base = NAMED[found.get("like", "zero-shot")]
            given = {key: value for key, value in found.items() if key not in ("like", "recipe")}
            if "recipe" in found:
                given["recipe"] = self._recipe(found["recipe"], base, where)
                given.setdefault("method", name)
            made[name] = self._inside(where, replace, base, **given)
        return made or None

    def _recipe(self, found: dict[str, Any], base: Setting, where: str) -> Recipe:
        self._check(found, _RECIPE, f"{where}.recipe")
        if not isinstance(base.recipe, Recipe):
            raise DfaError(f"{self.path}: [{where}] is like a setting that has no plain recipe to change.")
        given = {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}
        return self._inside(f"{where}.recipe", replace, base.recipe, **given)

    def _tasks(self, found: dict[str, Any]) -> dict[str, Any] | None:
        made: dict[str, Any] = {}
        for name, value in found.items():
            if not isinstance(value, str):
                raise self._wrong(f"tasks.{name}", "the name of a task or of a file", value)
            is_file = Path(value).suffix in (".csv", ".jsonl", ".ndjson", ".json")
            made[name] = FileTask.read(self._beside(value)) if is_file else value
        return made or None

    def _dtype(self, name: str) -> Any:
        import torch

        known = {each: getattr(torch, each) for each in ("float32", "bfloat16", "float16", "float64")}
        if name not in known:
            raise unknown(f"dtype in {self.path}", name, known)
        return known[name]

    # --- what they share -----------------------------------------------------------------------------------------

    def _beside(self, name: str) -> Path:
        return self.path.absolute().parent / name

    def _made(self, where: str, kind: Callable[..., Made], found: dict[str, Any], known: Mapping[str, Any]) -> Made:
        self._check(found, known, where)
        return self._inside(where, kind, **found)

    def _check(self, found: object, known: Mapping[str, Any], where: str) -> None:
        """No unknown key, and every value of its kind."""
        if not isinstance(found, dict):
            raise self._wrong(where, "a table", found)
        for name, value in found.items():
            if name not in known:
                raise unknown(f"key in {self.path}{where and f', [{where}]'}", name, known)
            kind = known[name]
            each = value if isinstance(kind, list) and isinstance(value, list) else [value]
            one = kind[0] if isinstance(kind, list) else kind
            if (isinstance(kind, list) and not isinstance(value, list)) or not all(_is(one, part) for part in each):
                what = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", dict: "a table"}
                plural = f"a list, each {what[one]}" if isinstance(kind, list) else what[one]
                raise self._wrong(f"{where}.{name}" if where else name, plural, value)
            if name in _CHOICES and value not in _CHOICES[name]:
                raise unknown(f"{name} in {self.path}{where and f', [{where}]'}", value, _CHOICES[name])

    def _inside(self, where: str, make: Callable[..., Made], *given: Any, **named: Any) -> Made:
        """What ``make`` makes; its error with the place in the file."""
        try:
            return make(*given, **named)
        except DfaError as error:
            raise type(error)(f"{self.path}, [{where}]: {error}") from error

    def _wrong(self, name: str, wanted: str, value: object) -> DfaError:
        return DfaError(f"{self.path}: {name} must be {wanted}, not {short(repr(value))}.")


def _is(kind: type, value: object) -> bool:
    if kind is object:
        return True
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)
