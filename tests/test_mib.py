"""MIB's data sets: the real loading code on small folders of our own in the published schema."""

import json

import pytest
import torch
from helpers import byte_level_tokenizer

import dfa_lens as dfa
from dfa_lens.errors import TaskError
from dfa_lens.tasks import mib, world

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def ioi_row(i):
    """Every third row has a subject of several tokens; every fifth a corrupt prompt of another length."""
    receiver, giver, third = (world.NAMES[(3 * i + k) % 90] for k in range(3))
    if i % 3 == 0:
        giver = f"Anneliese{i}"
    place, thing = world.PLACES[i % 30], world.OBJECTS[i % 60]
    text = "Then, {a} and {b} went to the {place}. {s} gave a {thing} to"
    prompt = text.format(a=receiver, b=giver, s=giver, place=place, thing=thing)
    flipped = text.format(a=receiver, b=giver, s=receiver, place=place, thing=thing)
    if i % 5 == 0:
        flipped = flipped.replace("gave a", "gave a very nice")
    people = {"subject": giver, "indirect_object": receiver, "random_c": third, "object": thing, "place": place}
    other = people | {"subject": receiver, "indirect_object": giver}
    choices = {"choices": [receiver, giver], "answerKey": 0}
    return {
        "template": text,
        "metadata": people | {"random_a": third, "random_b": third},
        "prompt": prompt,
        **choices,
        "s2_io_flip_counterfactual": {"prompt": flipped, "metadata": other, **choices, "answerKey": 1},
        "abc_counterfactual": {
            "prompt": text.format(a=third, b=third, s=third, place=place, thing=thing),
            "metadata": other,
            **choices,
        },
    }


def mcqa_row(i):
    options = [world.COLORS[(i + k) % 27] for k in range(4)]
    right = i % 4
    stem = f"Question: A {world.OBJECTS[i % 60]} is {options[right]}. What color is a {world.OBJECTS[i % 60]}?"

    def block(letters):
        lines = [f"{letter}. {option}" for letter, option in zip(letters, options, strict=True)]
        return "\n".join([stem, *lines, "Answer:"])

    first, second = LETTERS[:4], LETTERS[4 + i % 10 : 8 + i % 10]
    record = {"choices": {"label": list(first), "text": options}, "answerKey": right}
    other = {"choices": {"label": list(second), "text": options}, "answerKey": right}
    return {
        "dataset": "copycolors",
        "dataset_specific_id": str(i),
        "idx": i,
        "prompt": block(first),
        **record,
        "symbol_counterfactual": {"prompt": block(second), **other},
        "noun_counterfactual": {"prompt": block(first).replace("a ", "the "), **record},
    }


def arithmetic_row(i, operator="+"):
    """Every seventh row has no counterfactual; every fourth is of the other operator."""
    a, b = 10 + (7 * i) % 89, 10 + (5 * i) % 79
    a, b = max(a, b), min(a, b)
    sign = operator if i % 4 else "-" if operator == "+" else "+"
    name = {"+": "sum of", "-": "difference between"}[sign]

    def record(a, b):
        return {"prompt": f"The {name} {a} and {b} is ", "label": str(a + b if sign == "+" else a - b)}

    other = record(a + 1, b) if i % 7 else None
    return {
        "idx": i,
        "template": "The … is ",
        **record(a, b),
        "operator": sign,
        "num_digit": 2,
        "operand1": a,
        "operand2": b,
        "random_counterfactual": other,
        "ones_op1_counterfactual": record(a + 2, b),
    }


def subtraction_row(i):
    return arithmetic_row(i, "-")


def arc_row(i):
    row = mcqa_row(i)
    del row["noun_counterfactual"]
    return {"arc_id": f"Mercury_{i}", "question": row["prompt"].split("\n")[0], "label": "A", **row}


ROWS = {
    "ioi": ("ioi", ioi_row),
    "mcqa": ("copycolors_mcqa", mcqa_row),
    "addition": ("arithmetic_addition", arithmetic_row),
    "subtraction": ("arithmetic_subtraction", subtraction_row),
    "arc-easy": ("arc_easy", arc_row),
    "arc-challenge": ("arc_challenge", arc_row),
}


def write(folder, rows, *, kind="parquet", config=None, n=60):
    """A data set folder as the hub lays it out: data files by split, and a card that names the configs."""
    import datasets

    inner = folder / (config or "data")
    inner.mkdir(parents=True)
    for offset, split in enumerate(mib.SPLITS):
        table = datasets.Dataset.from_list([rows(1000 * offset + i) for i in range(n)])
        if kind == "parquet":
            table.to_parquet(inner / f"{split}-00000-of-00001.parquet")
        else:
            (inner / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in table))
    if config is not None:
        files = "\n".join(f"      - split: {split}\n        path: {config}/{split}-*.parquet" for split in mib.SPLITS)
        card = f"---\nconfigs:\n  - config_name: {config}\n    data_files:\n{files}\n---\n"
        (folder / "README.md").write_text(card)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mib")
    for name, (directory, rows) in ROWS.items():
        write(folder / directory, rows, config=mib.TASKS[name].config, kind="parquet" if name != "arc-easy" else "json")
    return folder


@pytest.fixture(scope="module")
def llama():
    return byte_level_tokenizer("llama")


@pytest.fixture(scope="module")
def qwen():
    return byte_level_tokenizer("qwen")


def load(name, tokenizer, root, **options):
    return dfa.tasks.load(name, tokenizer, collection="mib", path=root, **options)


def test_the_stand_ins_have_the_habits_of_the_originals(llama, qwen):
    assert len(llama("7 46 123 1234", add_special_tokens=False)["input_ids"]) == 1 + 2 + 2 + 3
    assert len(qwen("7 46 123", add_special_tokens=False)["input_ids"]) == 1 + 3 + 4
    assert llama("7")["input_ids"][0] == llama.bos_token_id
    assert qwen("7")["input_ids"] == qwen("7", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("split", mib.SPLITS)
@pytest.mark.parametrize("name", ROWS)
def test_all_splits_of_all_tasks(name, split, root, llama):
    pairs = load(name, llama, root, split=split, n=None)
    assert len(pairs) + sum(pairs.dropped.values()) == 60
    assert (pairs.clean[:, 0] == llama.bos_token_id).all()
    assert (pairs.clean[:, 1:] != llama.bos_token_id).all()
    assert torch.equal(pairs.lengths, pairs.corrupt_lengths)
    again = load(name, llama, root, split=split, n=None)
    assert torch.equal(pairs.clean, again.clean)
    some = load(name, llama, root, split=split, n=5, seed=3)
    assert len(some) == 5


def test_ioi_keeps_names_of_equal_length(root, llama):
    pairs = load("ioi", llama, root, n=None)
    rows = [ioi_row(i) for i in range(60)]

    def n_tokens(text):
        return len(llama(f" {text}", add_special_tokens=False)["input_ids"])

    even = [
        row
        for row in rows
        if len({n_tokens(row["metadata"][k]) for k in ("subject", "indirect_object", "random_c")}) == 1
    ]
    assert pairs.dropped["names of different lengths"] == 60 - len(even) == 20
    kept = [i for i in range(60) if rows[i] in even and i % 5]
    assert pairs.dropped["different lengths"] == len(even) - len(kept)
    assert len(pairs) == len(kept)
    texts = {llama.decode(row[:n], skip_special_tokens=True) for row, n in zip(pairs.clean, pairs.lengths, strict=True)}
    assert texts == {rows[i]["prompt"] for i in kept}
    for clean, answer, wrong in zip(pairs.clean, pairs.answer, pairs.wrong, strict=True):
        row = next(r for r in rows if r["prompt"] == llama.decode(clean, skip_special_tokens=True).strip())
        assert llama.decode(answer) == f" {row['metadata']['indirect_object']}"
        assert llama.decode(wrong) == f" {row['metadata']['subject']}"


def test_choices_are_bare_labels(root, llama):
    pairs = load("mcqa", llama, root, n=10)
    for i in range(10):
        assert llama.decode(pairs.answer[i]) in "ABCD"
        assert [llama.decode(x) for x in pairs.choices[i]] == list("ABCD")
        assert int(pairs.wrong[i]) in pairs.corrupt_choices[i].tolist()
        assert llama.decode(pairs.wrong[i]) not in "ABCD"


def test_arithmetic_needs_results_of_one_token(root, llama, qwen):
    """Llama-3 keeps the additions; Qwen-2.5, with one digit a token, keeps none, and says why."""
    pairs = load("addition", llama, root, n=None)
    assert pairs.dropped == {"no counterfactual": 9, "other operator": 12}
    assert len(pairs) == 39
    assert all(len(llama.decode(x)) >= 2 for x in pairs.answer)
    with pytest.raises(TaskError, match=r"None of 60 prompts of 'addition'.*result of several tokens: 39"):
        load("addition", qwen, root, n=None)
    small = load("subtraction", qwen, root, n=None)  # the one-digit differences
    assert all(qwen.decode(x).isdigit() for x in small.answer)
    assert small.dropped["result of several tokens"] > 0


def test_coverage_says_what_each_tokenizer_keeps(root, llama, qwen):
    table = dfa.tasks.coverage({"llama": llama, "qwen": qwen}, path=root).set_index(["task", "tokenizer"])
    assert (table["kept"] + table["dropped"] == 60).all()
    assert table.loc[("addition", "llama"), "kept"] == 39
    assert table.loc[("addition", "qwen"), "kept"] == 0
    assert table.loc[("addition", "qwen"), "result of several tokens"] == 39
    assert table.loc[("mcqa", "qwen"), "kept"] == 60


def test_any_counterfactual_by_name(root, llama):
    default = load("ioi", llama, root, n=6)
    abc = load("ioi", llama, root, n=6, counterfactual="abc_counterfactual")
    short = load("ioi", llama, root, n=6, counterfactual="abc")
    assert torch.equal(abc.corrupt, short.corrupt)
    assert not torch.equal(abc.corrupt[:, : default.corrupt.shape[1]], default.corrupt[:, : abc.corrupt.shape[1]])


def test_length_policies(root, llama):
    dropped = load("ioi", llama, root, n=None)
    kept = load("ioi", llama, root, n=None, different_lengths="pad-left-aligned")
    assert len(kept) == len(dropped) + dropped.dropped["different lengths"]
    assert (kept.corrupt_lengths != kept.lengths).sum() == dropped.dropped["different lengths"]
    from dfa_lens.errors import PromptError

    with pytest.raises(PromptError, match=r"clean has \d+ tokens, corrupt \d+"):
        load("ioi", llama, root, n=None, different_lengths="error")


def test_a_data_set_s_own_folder(root, llama):
    one = dfa.tasks.load("ioi", llama, collection="mib", path=root / "ioi", n=8)
    assert torch.equal(one.clean, load("ioi", llama, root, n=8).clean)


def test_reading_prints_nothing(root, llama, capfd):
    load("arc-challenge", llama, root, n=4)
    out, err = capfd.readouterr()
    assert out == "" and err == ""


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "oio"}, "Unknown task 'oio'.*Did you mean 'ioi'"),
        ({"split": "dev"}, "Unknown split 'dev': expected one of 'train', 'validation', 'test'"),
        ({"counterfactual": "s3_flip"}, "Unknown counterfactual for 'ioi' 's3_flip'.*'s2_io_flip_counterfactual'"),
        ({"n": 500}, r"has only about \d+ distinct prompts .*left out: .*names of different lengths: 20"),
        ({"shots": 2}, "Unknown option for 'ioi' of MIB 'shots'"),
    ],
)
def test_bad_input(given, message, root, llama):
    options = {"name": "ioi", "tokenizer": llama} | given
    with pytest.raises(TaskError, match=message):
        load(options.pop("name"), options.pop("tokenizer"), root, **options)


def test_fewer_are_welcome_if_said_so(root, llama):
    assert len(load("ioi", llama, root, n=500, allow_fewer=True)) == len(load("ioi", llama, root, n=None))


def test_a_missing_column_is_named(tmp_path, llama):
    def without(column):
        return lambda i: {key: value for key, value in ioi_row(i).items() if key != column}

    write(tmp_path / "a" / "ioi", without("metadata"), n=3)
    with pytest.raises(TaskError, match=r"a/ioi, split 'train', has no column 'metadata'; it has 'template', 'prompt'"):
        load("ioi", llama, tmp_path / "a")

    def broken(i):
        row = ioi_row(i)
        row["metadata"] = {"subject": "Eva", "indirect_object": "Max"}
        return row

    write(tmp_path / "b" / "ioi", broken, n=3)
    with pytest.raises(TaskError, match="or its row lacks 'random_c'"):
        load("ioi", llama, tmp_path / "b")


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("ioi", lambda row: row["metadata"].update(subject=None), "missing value"),
        ("ioi", lambda row: row.update(prompt=None), "missing"),
        ("mcqa", lambda row: row.update(answerKey=None), "missing value"),
        ("mcqa", lambda row: row["choices"]["label"].__setitem__(1, None), "missing value"),
        ("addition", lambda row: row.update(label=None), "missing value"),
    ],
)
def test_rows_with_gaps_are_left_out_and_counted(tmp_path, llama, name, change, reason):
    """A gap is no word: " None" would be a name, and "None" a result."""
    folder, rows = ROWS[name]

    def gappy(i):
        made = rows(i)
        if i % 6 == 1:
            change(made)
        return made

    write(tmp_path / folder, gappy, config=mib.TASKS[name].config)
    whole = dfa.tasks.coverage({"llama": llama}, tasks=[name], path=tmp_path).iloc[0]
    rows_with_one = [
        i for i in range(60) if i % 6 == 1 and (name != "addition" or i % 7)
    ]  # the rest has no counterfactual
    assert whole[reason] == len(rows_with_one)
    pairs = dfa.tasks.load(name, llama, n=None, collection="mib", path=tmp_path)
    assert pairs.dropped[reason] == len(rows_with_one)
    words = [llama.decode([int(token)]) for token in torch.cat([pairs.answer, pairs.wrong])]
    assert not any("None" in word or "nan" in word for word in words)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("mcqa", lambda row: row.update(answerKey="A"), "does not have the form of mib-bench/copycolors_mcqa: invalid"),
        ("mcqa", lambda row: row.update(choices="A, B"), "does not have the form of mib-bench/copycolors_mcqa: string"),
        ("ioi", lambda row: row.update(metadata="x"), "does not have the form of mib-bench/ioi"),
        ("addition", lambda row: row.update(random_counterfactual="x"), "does not have the form of mib-bench/arith"),
    ],
)
def test_rows_of_another_form_are_refused(tmp_path, llama, name, change, message):
    folder, rows = ROWS[name]

    def other(i):
        made = rows(i)
        change(made)
        return made

    write(tmp_path / folder, other, config=mib.TASKS[name].config)
    with pytest.raises(TaskError, match=message) as caught:
        dfa.tasks.load(name, llama, n=4, collection="mib", path=tmp_path)
    assert len(str(caught.value)) < 400


def test_half_a_download_is_refused(tmp_path, llama):
    write(tmp_path / "ioi", ioi_row, n=3)
    file = next((tmp_path / "ioi").rglob("train*.parquet"))
    whole = file.read_bytes()
    for content, message in (
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer, not the data"),
        (b"", "is empty: download"),
        (whole[: len(whole) // 2], "can't be read. Was it downloaded completely"),
    ):
        file.write_bytes(content)
        with pytest.raises(TaskError, match=message):
            load("ioi", llama, tmp_path, n=2)
    file.write_bytes(whole)
    (file.parent / "train.parquet.incomplete").write_bytes(b"")
    with pytest.raises(TaskError, match="was left by a download that did not finish"):
        load("ioi", llama, tmp_path, n=2)
    with pytest.raises(TaskError, match="There is no folder"):
        load("ioi", llama, tmp_path / "nowhere")


def test_without_a_network_it_says_so(llama):
    """Tests run with the hub switched off."""
    with pytest.raises(TaskError, match=r"mib-bench/ioi can't be read. Is the Hugging Face hub within reach\?"):
        dfa.tasks.load("ioi", llama, collection="mib", n=2)


@pytest.mark.network
@pytest.mark.parametrize(("name", "sizes"), [("ioi", 10000), ("mcqa", 110), ("addition", 34440), ("arc-easy", 2251)])
def test_the_data_sets_on_the_hub(name, sizes):
    """``HF_HUB_OFFLINE=0 pytest -m network tests/test_mib.py``, with access to the hub."""
    tokenizer = byte_level_tokenizer("llama")
    table = dfa.tasks.coverage({"llama": tokenizer}, tasks=[name])
    assert int(table["kept"][0] + table["dropped"][0]) == sizes
