"""Ctrl-C at a random time, and at a random line of Python, in every operation: is the model as it was?"""

from __future__ import annotations

import contextlib
import gc
import random
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from helpers import BACKENDS, random_model, random_pairs

import dfa_lens as dfa
from dfa_lens.models.runner import Runner

Operation = Callable[[], object]

EVERY_BACKEND = (*BACKENDS, "transformers")

#: Where an interrupt can leave something behind; every fourth try takes the lines of all other files, too.
CRITICAL = ("dfa_lens", "contextlib.py", "hook_points.py", "torch/utils/hooks.py", "grad_mode.py", "autocast_mode.py")


def place(backend: str) -> str:
    """The module that gets a hook point of ours."""
    return "model.layers.1.mlp" if backend == "transformers" else "blocks.1.mlp"


def fresh(backend: str) -> Any:
    """A small model as others leave it: trainable in part, in training mode in part, with gradients and a hook."""
    model = random_model(
        backend, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, hidden_size=16, intermediate_size=24
    )
    for i, parameter in enumerate(model.parameters()):
        parameter.data = parameter.data.contiguous()  # load_model turns them round from the start
        parameter.requires_grad_(i % 3 > 0)
        parameter.grad = torch.ones_like(parameter) if i % 5 == 1 else None
    (model.model.layers if backend == "transformers" else model.blocks)[1].train()
    return model


def state(model: Any) -> dict[str, Any]:
    """All that an operation could change."""
    modules = list(model.named_modules())
    lists = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    lists += ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")
    return {
        "hook points": {name: len(point.fwd_hooks) + len(point.bwd_hooks) for name, point in model.hook_dict.items()},
        "torch hooks": [
            (name, kind, list(getattr(m, kind))) for name, m in modules for kind in lists if getattr(m, kind)
        ],
        "forwards": [(name, id(vars(m)["forward"])) for name, m in modules if "forward" in vars(m)],
        "training": [m.training for _, m in modules],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "gradients": [None if p.grad is None else float(p.grad.sum()) for p in model.parameters()],
        "strides": [(p.stride(), p.dtype) for p in model.parameters()],
        "weights": [hash(p.detach().contiguous().numpy().tobytes()) for p in model.parameters()],
        "random state": hash(torch.get_rng_state().numpy().tobytes()),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
    }


def operations(model: Any, backend: str) -> dict[str, Operation]:
    """Name → a call of everything that runs or changes a model."""
    pairs = random_pairs(2, 8, ragged=True)
    nodes = dfa.NodeSet.heads_and_mlps(model)
    ranking = dfa.controls.random_scores(nodes)
    source = {"a": dfa.controls.random_scores(dfa.NodeSet.for_sizes(1, 2))}
    edge_scores = {"a": dfa.controls.random_scores(dfa.EdgeSet(1, 2))}
    mask = torch.ones(len(nodes), 1)[:, 0]

    def contexts() -> None:
        with dfa.hooks.record(model, nodes) as corrupt:
            model(pairs.corrupt)
        with dfa.hooks.gate(model, nodes, mask, corrupt=corrupt):
            model(pairs.clean)
        with dfa.hooks.ablate(model, nodes, keep=["m0"], corrupt=corrupt):
            model(pairs.clean)

    def held() -> None:
        with dfa.prepared(model):
            dfa.attribute(model, pairs, method="nap")

    def added() -> None:
        name = dfa.hooks.add_hook_point(model, place(backend), "hook_attack")
        dfa.NodeSet.from_points(model, {name: None})
        dfa.hooks.remove_hook_point(model, name)

    def edges(method: str, **options: Any) -> Operation:
        return lambda: dfa.attribute_edges(model, pairs, method=method, **options)

    return {
        **{m: lambda m=m: dfa.attribute(model, pairs, method=m, steps=2) for m in ("nap", "nap-ig-inputs", "exact")},
        "nap-ig-activations": lambda: dfa.attribute(model, pairs, method="nap-ig-activations", steps=2),
        "eap": edges("eap"),
        "eap-ig-inputs": edges("eap-ig-inputs", steps=2),
        "curve": lambda: dfa.faithfulness_curve(model, pairs, ranking, sizes=[0, 2, 4, 6]),
        "check": lambda: dfa.check(model, pairs),
        "fit": lambda: dfa.fit(model, source, {"a": pairs}, steps=2, batch_size=2),
        "fit, recompute": lambda: dfa.fit(model, source, {"a": pairs}, steps=2, batch_size=2, cache="recompute"),
        "fit, edges": lambda: dfa.fit(model, edge_scores, {"a": pairs}, steps=2, batch_size=2),
        "attention features": lambda: dfa.similarity.attention_features(model, nodes),
        "batch size": lambda: dfa.attribute(model, pairs, method="nap", batch_size="auto"),
        "contexts": contexts,
        "prepared": held,
        "hook points": added,
    }


class Target:
    """A model under attack; a new one as soon as it was changed, and the findings by operation and kind."""

    def __init__(self, backend: str, only: tuple[str, ...] | None = None) -> None:
        self.backend, self.only = backend, only
        self.tries = self.hit = 0
        self.others: Counter[str] = Counter()
        self.changed: Counter[str] = Counter()
        self.renew()

    def renew(self) -> None:
        self.model = fresh(self.backend)
        every = operations(self.model, self.backend)
        self.operations = every if self.only is None else {name: every[name] for name in self.only}
        for work in self.operations.values():  # what is remembered of a model is remembered from here on
            work()
        self.before = state(self.model)

    def strike(self, name: str, interrupted: Callable[[Operation], None], where: Callable[[], str]) -> None:
        """One try: the operation under an interrupt, and the model compared with what it was."""
        self.tries += 1
        try:
            interrupted(self.operations[name])
        except KeyboardInterrupt:
            self.hit += 1
            added = f"{place(self.backend)}.hook_attack"
            if added in Runner(self.model).state.added:  # a point is wholly there, or not at all
                dfa.hooks.remove_hook_point(self.model, added)
        except Exception as error:  # torch makes another error of an interrupt in the middle of a recomputation
            self.hit += 1
            self.others[type(error).__name__] += 1
        gc.collect(0)
        after = state(self.model)
        found = [kind for kind, value in self.before.items() if after[kind] != value]
        if found:
            self.changed[f"{self.backend}, {name}: {', '.join(found)} ({where()})"] += 1
            torch.set_grad_enabled(True)
            torch.set_autocast_enabled("cpu", False)
            self.renew()


class Alarm:
    """Ctrl-C after a random time."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.seconds: dict[str, float] = {}

    def interrupt(self, name: str, work: Operation) -> None:
        if name not in self.seconds:
            started = time.perf_counter()
            work()
            self.seconds[name] = time.perf_counter() - started

        def ring(*_: object) -> None:
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGALRM, ring)
        try:
            signal.setitimer(signal.ITIMER_REAL, 1e-5 + self.rng.random() * self.seconds[name])
            work()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


class Lines:
    """Ctrl-C at a random line: between any two lines of Python, those of set-up and tear-down among them."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.counts: dict[tuple[str, bool], int] = {}
        self.place = ""

    def _run(self, work: Operation, everywhere: bool, at: int) -> int:
        seen = 0

        def local(frame: Any, event: str, arg: Any) -> Any:
            nonlocal seen
            if event == "line":
                seen += 1
                if seen == at:
                    self.place = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                    sys.settrace(None)
                    raise KeyboardInterrupt
            return local

        def every(frame: Any, event: str, arg: Any) -> Any:
            file = frame.f_code.co_filename
            return local if everywhere or any(part in file for part in CRITICAL) else None

        before = sys.gettrace()
        sys.settrace(every)
        try:
            work()
        finally:
            sys.settrace(before)
        return seen

    def interrupt(self, name: str, work: Operation) -> None:
        everywhere = self.rng.random() < 0.25
        if (name, everywhere) not in self.counts:
            self.counts[name, everywhere] = self._run(work, everywhere, 0)
        self._run(work, everywhere, self.rng.randint(1, self.counts[name, everywhere]))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    hook = sys.unraisablehook
    sys.unraisablehook = lambda _: None  # an interrupt inside a callback that nobody waits for
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.unraisablehook = hook


def run(
    tries: int,
    kind: str,
    seed: int = 0,
    backends: tuple[str, ...] = EVERY_BACKEND,
    only: tuple[str, ...] | None = None,
) -> dict[str, Any]:
    """``tries`` interrupts of a kind ("times" or "lines") over all operations, or some, and backends."""
    rng = random.Random(f"{seed} {kind}")
    started = time.perf_counter()
    with _quiet():
        targets = [Target(backend, only) for backend in backends]
        ways = [(Alarm if kind == "times" else Lines)(rng) for _ in targets]
        for i in range(tries):
            target, way = targets[i % len(targets)], ways[i % len(targets)]
            name = list(target.operations)[i // len(targets) % len(target.operations)]
            target.strike(
                name,
                lambda work, way=way, name=name: way.interrupt(name, work),
                lambda way=way: getattr(way, "place", ""),
            )
    changed: Counter[str] = sum((target.changed for target in targets), Counter())
    return {
        "tries": tries,
        "interrupted": sum(target.hit for target in targets),
        "as another error": dict(sum((target.others for target in targets), Counter())),
        "models changed": changed.total(),
        "seconds": round(time.perf_counter() - started),
        "which": dict(changed),
        "failed": changed.total(),
    }
