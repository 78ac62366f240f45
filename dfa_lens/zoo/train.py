"""Train a shipped model: ``python -m dfa_lens.zoo.train NAME``.

The model sees the train split of its offline tasks, clean and corrupt prompts alike, each with its own right
answer. The loss is the cross-entropy of the answer plus a small part of the cross-entropy of every other token
(so that the model is a language model at every position, not only at the last). Seeded, with a progress bar, and
resumable: run the same command again and it goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import shutil
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2ForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from dfa_lens.tasks import offline, words, world
from dfa_lens.zoo import tokenizer as tokenizers
from dfa_lens.zoo.specs import SPECS, Recipe, ZooModel, spec

# How many worked examples the arithmetic prompts of the training pool have.
SHOTS = (0, 1, 1, 2)


def _texts(job: tuple[str, int, int, dict[str, int]]) -> list[tuple[str, str]]:
    """(prompt, answer) of the clean and the corrupt prompt of ``n`` training pairs."""
    task, seed, n, options = job
    drawn = islice(offline.stream(task, split="train", seed=seed, **options), n)  # type: ignore[arg-type]
    return [pair for e in drawn for pair in ((e.clean, e.answer), (e.corrupt, e.wrong))]


def _lessons(job: tuple[int, int]) -> list[tuple[str, str]]:
    """``n`` statements of the world's facts, each on its own; none is a prompt of any task."""
    seed, n = job
    rng = random.Random(f"lessons/{seed}")
    texts: list[tuple[str, str]] = []
    for _ in range(n):
        if rng.random() < 0.6:
            animal, relation = rng.choice(world.ANIMALS), rng.choice(list(world.QUESTIONS))
            texts.append((f"The {relation} of the {animal.name} is", f" {getattr(animal, relation)}"))
        else:
            (_, quality), table = rng.choice(list(world.SECOND_HOP.items()))
            thing = rng.choice(list(table))
            texts.append((f"The {quality} of the {thing} is", f" {table[thing]}"))
    return texts


def _first_steps(job: tuple[int, int]) -> list[tuple[str, str]]:
    """``n`` prompts that are easier than the further tasks and no prompts of theirs: training takes fewer steps."""
    seed, n = job
    rng = random.Random(f"first steps/{seed}")
    texts: list[tuple[str, str]] = []
    while len(texts) < n:
        people, numbers = rng.sample((*words.WOMEN, *words.MEN), 2), rng.sample(words.NUMBERS, 2)
        things, colors = rng.sample(words.OBJECTS, 3), rng.sample(words.COLORS, 2)
        size, which = rng.choice((("more", max), ("greater", max), ("fewer", min), ("smaller", min)))
        right = numbers.index(which(numbers))  # two digits each: texts in the order of numbers
        shown, asked = rng.randrange(2, 4), rng.randrange(2)
        texts += [
            (f"There are {numbers[0]} and {numbers[1]}. The {size} number is", f" {numbers[right]}"),
            (
                f"{people[0]} has {numbers[0]}, {people[1]} has {numbers[1]}. The one with {size} is",
                f" {people[right]}",
            ),
            (
                f"{rng.choice(('Today', 'Yesterday'))} {people[0]} said that",
                " she" if people[0] in words.WOMEN else " he",
            ),
            (" ".join([*things[:shown], things[shown - 2]]), f" {things[shown - 1]}"),
            (
                f"The {things[0]} is {colors[0]}, the {things[1]} is {colors[1]}. The {things[asked]} is",
                f" {colors[asked]}",
            ),
        ]
    return texts[:n]


def training_texts(recipe: Recipe, seed: int) -> list[tuple[str, str]]:
    """All (prompt, answer) texts of the training pool, the same for the same seed."""
    jobs: list[tuple[str, int, int, dict[str, int]]] = []
    for task, share in recipe.shares.items():
        n = int(share * recipe.pairs_per_task)
        variants = [{"shots": shots} for shots in SHOTS] if "shots" in offline.ALL[task].options else [{}]
        pieces = [*variants, *variants]  # smaller pieces for more cores
        jobs += [(task, 1000 * seed + i, n // len(pieces), options) for i, options in enumerate(pieces)]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        groups = list(pool.map(_texts, jobs))
    lessons = _lessons if "ioi" in recipe.shares else _first_steps
    return [text for texts in [*groups, lessons((seed, int(recipe.lessons * recipe.pairs_per_task)))] for text in texts]


class Pool(Dataset[dict[str, Tensor]]):
    """The tokenized training pool: prompt and answer in one row, right padded."""

    def __init__(self, texts: list[tuple[str, str]], tokenizer: PreTrainedTokenizerFast) -> None:
        encoded = tokenizer([prompt + answer for prompt, answer in texts], return_tensors="pt", padding=True)
        self.tokens = encoded["input_ids"].to(torch.int16)
        self.lengths = encoded["attention_mask"].sum(1).to(torch.int16)
        if (self.tokens == tokenizer.unk_token_id).any():
            raise AssertionError("the tokenizer lacks words of the tasks")

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Tensor]]:
        # The whole batch at once, in a list of one: `collate` takes it out again.
        return [{"tokens": self.tokens[indices].long(), "lengths": self.lengths[indices].long()}]


def collate(batch: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """See :meth:`Pool.__getitems__`."""
    return batch[0]


class AnswerTrainer(Trainer):
    """A Trainer whose loss is the answer's cross-entropy plus a part of the other tokens'."""

    other_weight: float = 0.0

    def compute_loss(self, model, inputs, return_outputs=False, **_):  # type: ignore[no-untyped-def]
        tokens, lengths = inputs["tokens"], inputs["lengths"]
        # Causal attention and right padding: no real token can see the padding, so no mask is needed.
        logits = model(input_ids=tokens[:, :-1]).logits
        next_tokens = tokens[:, 1:]
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), next_tokens.flatten(), reduction="none")
        losses = losses.view(next_tokens.shape)  # flat first: the classes lie side by side, which is faster
        position = torch.arange(losses.shape[1], device=losses.device)
        answer = (position == lengths[:, None] - 2).to(losses.dtype)
        other = (position < lengths[:, None] - 2).to(losses.dtype)
        # Weights instead of a selection, whose size a GPU would have to report before the next kernel starts.
        loss = (losses * (answer / answer.sum() + self.other_weight * other / other.sum())).sum()
        return (loss, logits) if return_outputs else loss


@torch.no_grad()
def accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    tasks: Iterable[str],
    *,
    split: str = "test",
    n: int = 400,
) -> dict[str, dict[str, float]]:
    """Per task, how often the top prediction is the right answer on clean and on corrupt held-out prompts."""
    model.eval()
    table: dict[str, dict[str, float]] = {}
    for task in tasks:
        drawn = offline.examples(task, split=split, n=n, seed=0)
        row: dict[str, float] = {}
        for side, prompts, answers in (
            ("clean", [e.clean for e in drawn], [e.answer for e in drawn]),
            ("corrupt", [e.corrupt for e in drawn], [e.wrong for e in drawn]),
        ):
            encoded = tokenizer(prompts, return_tensors="pt", padding=True).to(model.device)
            last = encoded["attention_mask"].sum(1) - 1
            logits = model(input_ids=encoded["input_ids"]).logits[torch.arange(n), last]
            wanted = [tokenizer(a, add_special_tokens=False)["input_ids"][0] for a in answers]
            row[side] = (logits.argmax(-1).cpu() == torch.tensor(wanted)).float().mean().item()
        table[task] = row
    return table


def _card(which: ZooModel, recipe: Recipe, accuracies: dict[str, dict[str, float]], parameters: int) -> str:
    rows = "\n".join(
        f"| {t} | {100 * row['clean']:.2f} | {100 * row['corrupt']:.2f} |" for t, row in accuracies.items()
    )
    shares = ", ".join(f"{int(share * recipe.pairs_per_task):,} {task}" for task, share in recipe.shares.items())
    number, combinations = "six", "for arithmetic the operand pairs were never trained on"
    lessons = int(recipe.lessons * recipe.pairs_per_task)
    if which.tasks == "paper":
        extra = (
            f"; arithmetic with no to two worked examples; and {lessons:,} statements of single facts of their world"
        )
    else:
        number, combinations = f"{len(recipe.shares)} further", "combinations of words that were never trained on"
        extra = f"; and {lessons:,} easier prompts"
    right = [task for task, row in accuracies.items() if min(row.values()) >= 0.95]
    solved = "" if len(right) == len(accuracies) else f", of which it solves {len(right)}: {', '.join(right)}"
    architecture = "LlamaForCausalLM" if which.family == "llama3" else "Qwen2ForCausalLM"
    return f"""---
license: apache-2.0
library_name: transformers
---
# {which.name}

A tiny `{architecture}` that ships with dfa_lens to try circuit transfer on: {which.n_layers} layers,
{which.n_heads} heads ({which.n_key_value_heads} key-value heads), d_model {which.d_model}, d_mlp {which.d_mlp},
{parameters:,} parameters, {which.n_nodes} nodes. It was trained on
nothing but the {number} offline tasks of dfa_lens{solved}.

**Data.** The train split of the {number} offline tasks (80 % of all keys): {shares} prompt pairs, clean and corrupt
prompts, each with its own answer{extra}.

**Training.** {recipe.steps or which.steps:,} AdamW steps of {recipe.batch_size} prompts, peak learning rate
{recipe.learning_rate}, {recipe.warmup_steps} warm-up steps, cosine decay, weight decay {recipe.weight_decay}, seed
{which.seed}; loss: the answer's cross-entropy + {recipe.language_modelling_weight} × that of the other tokens. Made
with `python -m dfa_lens.zoo.train {which.name}`.

**Accuracy** (%, top prediction, 400 held-out test prompts a task; {combinations}):

| task | clean prompt → its answer | corrupt prompt → its answer |
| --- | --- | --- |
{rows}

**Limits.** It has no language beyond the templates of the tasks. On prompts outside of them its output means nothing.
"""


def train(
    name: str,
    *,
    out: Path,
    work: Path,
    recipe: Recipe | None = None,
    device: str | None = None,
    compiled: bool = False,
) -> Path:
    """Train the shipped model ``name`` and save it under ``out``.

    Parameters
    ----------
    name:
        One of :data:`dfa_lens.zoo.specs.SPECS`.
    out:
        The folder that gets the folder ``name`` with the finished checkpoint.
    work:
        Where checkpoints of the running training are kept; a later call with the same ``work`` goes on from there.
    recipe:
        Steps, batch size and the rest; default: the recipe of the shipped models.
    device:
        "cpu" to stay off an available GPU.
    compiled:
        Compile the model and replay its steps as CUDA graphs: on a GPU most of a step of so small a model is the
        launching of kernels.
    """
    which = spec(name)
    recipe = recipe or which.recipe
    set_seed(which.seed)
    tokenizer = tokenizers.build(begin_of_text=which.begin_of_text, tasks=which.tasks)
    config = which.config(len(tokenizer), pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id)
    model = (LlamaForCausalLM if which.family == "llama3" else Qwen2ForCausalLM)(config)
    trainer = AnswerTrainer(
        model=model,
        train_dataset=Pool(training_texts(recipe, which.seed), tokenizer),
        data_collator=collate,
        args=TrainingArguments(
            output_dir=str(work / name),
            max_steps=recipe.steps or which.steps,
            per_device_train_batch_size=recipe.batch_size,
            learning_rate=recipe.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=min(recipe.warmup_steps, (recipe.steps or which.steps) // 10),
            weight_decay=recipe.weight_decay,
            adam_beta2=0.98,
            logging_steps=250,
            save_steps=500,
            save_total_limit=1,
            seed=which.seed,
            report_to="none",
            use_cpu=device == "cpu",
            remove_unused_columns=False,
            dataloader_drop_last=True,  # one shape, compiled once
            torch_compile=compiled,
            torch_compile_mode="reduce-overhead" if compiled else None,
        ),
    )
    trainer.other_weight = recipe.language_modelling_weight
    last = get_last_checkpoint(str(work / name)) if (work / name).is_dir() else None
    trainer.train(resume_from_checkpoint=last)

    accuracies = accuracy(model, tokenizer, recipe.shares)
    model = model.cpu().float().eval()
    folder = out / name
    partial = out / f".{name}.partial"  # a killed run leaves no half-written model behind
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    _plain_config(partial)
    (partial / "accuracy.json").write_text(json.dumps(accuracies, indent=1) + "\n")
    parameters = sum(p.numel() for p in model.parameters())
    (partial / "README.md").write_text(_card(which, recipe, accuracies, parameters))
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return folder


def _plain_config(folder: Path) -> None:
    """Write rope settings in both config styles, so that older and newer readers agree on them."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = dict(config.get("rope_parameters") or {})
    config["rope_theta"] = rope.get("rope_theta", 10000.0)
    if rope.get("rope_type", "default") != "default":
        config["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    config["torch_dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2) + "\n")
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2) + "\n")


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m dfa_lens.zoo.train", description=__doc__)
    parser.add_argument("names", nargs="+", choices=[*SPECS, "all"], metavar="NAME", help=", ".join([*SPECS, "all"]))
    parser.add_argument("--out", type=Path, default=Path("zoo-models"), help="folder for the finished models")
    parser.add_argument("--work", type=Path, default=Path("zoo-training"), help="folder for checkpoints to resume from")
    parser.add_argument("--steps", type=int, default=None, help="default: the model's own number")
    parser.add_argument("--batch-size", type=int, default=None)
    parser.add_argument("--pairs-per-task", type=int, default=None)
    parser.add_argument("--device", choices=["cpu", "cuda"], default=None)
    parser.add_argument("--compile", action="store_true", help="compile the model: many times faster steps on a GPU")
    given = parser.parse_args(argv)
    wanted = {"steps": given.steps, "batch_size": given.batch_size, "pairs_per_task": given.pairs_per_task}
    changes = {option: value for option, value in wanted.items() if value is not None}
    for name in SPECS if "all" in given.names else given.names:
        recipe = dataclasses.replace(spec(name).recipe, **changes)
        folder = train(name, out=given.out, work=given.work, recipe=recipe, device=given.device, compiled=given.compile)
        print(f"{folder}\n{(folder / 'accuracy.json').read_text()}")


if __name__ == "__main__":
    main()
