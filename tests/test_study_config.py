"""Studies written down as TOML."""

import pytest
import torch

import dfa_lens as dfa
from dfa_lens.errors import DfaError, FileError
from dfa_lens.experiments.config import Config, Resources
from dfa_lens.experiments.experiment import FULL, QUICK, Attribution, Budget, ModelPair
from dfa_lens.experiments.settings import SETTINGS
from dfa_lens.tasks.own import FileTask
from dfa_lens.transfer.recipe import RELEASED

WHOLE = """
out = "results"
families = ["llama3"]
settings = ["zero-shot", "functional"]
seeds = [3, 4]
test_tasks = ["sums"]
dtype = "bfloat16"
protocol = "mib"

[budget]
quick = true
steps = 7

[attribution]
method = "nap"
mlp_gradient = "input"

[models.mine]
source = "llama3-tiny-source"
target = "somebody/large"

[tasks]
sums = "sums.csv"
ioi = "ioi"

[setting."near, released"]
like = "zero-shot, released"
regime = "near-distribution"

[executor]
kind = "slurm"
memory = 32
options = { slurm_partition = "gpu" }

[setting.short]
recipe = { steps = 5, temperature = [1.0, 0.5], form = "low-rank" }
"""


def read(folder, text):
    path = folder / "study.toml"
    path.write_text(text)
    return Config.read(path)


def test_a_backend_of_all_models(tmp_path):
    shipped = read(tmp_path, 'backend = "transformers"\n').run["families"]
    assert [each.name for each in shipped] == list(dfa.zoo.pairs())
    assert shipped[0].target.keywords["backend"] == "transformers"
    text = 'backend = "bridge"\nfamilies = ["llama3"]\n[models.a]\nsource = "b"\ntarget = "c"\n'
    llama, own = read(tmp_path, text).run["families"]
    assert llama.source.keywords["backend"] == own.source.keywords["backend"] == "bridge"
    own = read(tmp_path, f'{text}backend = "hooked"\n').run["families"][1]
    assert own.source.keywords["backend"] == "hooked"
    with pytest.raises(DfaError, match=r"Unknown backend in .*study.toml 'hoked'"):
        read(tmp_path, 'backend = "hoked"\n')


def test_what_a_file_says_is_what_a_study_is_told(tmp_path):
    (tmp_path / "sums.csv").write_text("clean,corrupt,answer,wrong,split\n1+1=,1+2=,2,3,train\n")
    config = read(tmp_path, WHOLE)
    run = config.run
    assert config.resources == Resources("slurm", memory=32, options={"slurm_partition": "gpu"})
    assert run["out"] == tmp_path / "results" and run["seeds"] == [3, 4] and run["test_tasks"] == ["sums"]
    assert run["budget"] == Budget(QUICK.train, QUICK.test, 7, QUICK.curve_points, QUICK.batch_size)
    assert run["attribution"] == Attribution("nap", mlp_gradient="input") and run["protocol"] == "mib"
    shipped, mine = run["families"]
    assert shipped == ModelPair.of("llama3") and mine.name == "mine" and mine.source == "llama3-tiny-source"
    assert mine.target.args == ("somebody/large",) and mine.target.keywords["dtype"] == torch.bfloat16
    assert run["tasks"] == {"sums": FileTask.read(tmp_path / "sums.csv"), "ioi": "ioi"}
    settings = run["settings"]
    assert list(settings) == ["zero-shot", "functional", "near, released", "short"]
    assert settings["zero-shot"] is SETTINGS["zero-shot"]
    assert settings["near, released"].recipe == RELEASED and settings["near, released"].regime == "near-distribution"
    assert settings["short"].recipe == dfa.Recipe(steps=5, temperature=(1.0, 0.5), form="low-rank")
    assert settings["short"].method == "short" and settings["short"].regime == "zero-shot"


def test_an_empty_file_is_the_study_by_default(tmp_path):
    run = read(tmp_path, "").run
    assert run["budget"] == FULL and run["settings"] is run["families"] is run["tasks"] is None
    assert run["out"] == tmp_path / "study" and run["attribution"] == Attribution()


def test_a_checkpoint_folder_beside_the_file_is_found(tmp_path):
    (tmp_path / "mine").mkdir()
    run = read(tmp_path, '[models.a]\nsource = "mine"\ntarget = "theirs"\nbackend = "hooked"').run
    (pair,) = run["families"]
    assert pair.source.args == (str(tmp_path / "mine"),) and pair.target.args == ("theirs",)
    assert pair.source.keywords["backend"] == "hooked"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('setings = ["zero-shot"]', "Unknown key in .*study.toml 'setings'.*Did you mean 'settings'"),
        ("[budget]\ntrian = 4", r"Unknown key in .*study.toml, \[budget\] 'trian'.*Did you mean 'train'"),
        ("[setting.a]\nregimes = 'zero-shot'", r"\[setting.a\] 'regimes'.*Did you mean 'regime'"),
        ("[setting.a.recipe]\nstepz = 3", r"\[setting.a.recipe\] 'stepz'.*Did you mean 'steps'"),
        ("[setting.a]\nlike = 'zero'", r"Unknown setting in .*\[setting.a\] 'zero'"),
        ("[setting.a]\nregime = 'zero'", r"Unknown regime in .*study.toml, \[setting.a\] 'zero'"),
        ("[setting.a.recipe]\nsteps = 0", r"study.toml, \[setting.a.recipe\]: steps must be an integer of at least 1"),
        ("[setting.a]\nlike = 'functional'\nrecipe = { steps = 3 }", "has no plain recipe to change"),
        ("settings = ['zero']", "Unknown setting in .*study.toml 'zero'"),
        ("settings = 'zero-shot'", "settings must be a list, each a text, not 'zero-shot'"),
        ("seeds = [0, 'a']", "seeds must be a list, each a whole number"),
        ("seeds = [true]", "seeds must be a list, each a whole number"),
        ("budget = 3", "budget must be a table, not 3"),
        ("[budget]\ntrain = 0", "budget.train must be at least 1, not 0"),
        ("[executor]\nkind = 'slrum'", r"Unknown kind in .*\[executor\] 'slrum'.*Did you mean 'slurm'"),
        ("[executor]\npartition = 'gpu'", r"Unknown key in .*\[executor\] 'partition'"),
        ("retries = -1", "retries must be 0 or more, not -1"),
        ("workers = 0", "workers must be at least 1, not 0"),
        ("[attribution]\nmethod = 'nop'", r"\[attribution\]: .*'nop'"),
        ("[attribution]\naccumulate = 'some'", r"Unknown accumulate in .*\[attribution\] 'some'"),
        ("[models.a]\nsource = 'x'", r"\[models.a\] lacks 'target'"),
        ("[models]\na = 'x'", "models.a must be a table"),
        ("[models.'=a']\nsource = 'x'\ntarget = 'y'", "The name of a pair of models must begin with"),
        ("families = ['lama3']", r"\[families\]: Unknown family 'lama3'"),
        ("dtype = 'float'", "Unknown dtype in .* 'float'"),
        ("[tasks]\na = 3", "tasks.a must be the name of a task or of a file"),
        ("[tasks]\na = 'none.csv'", "There is no file .*none.csv"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path, text, message):
    with pytest.raises(DfaError, match=message) as caught:
        read(tmp_path, text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1500


def test_what_is_no_toml(tmp_path):
    with pytest.raises(FileError, match="is not TOML: .*line 2"):
        read(tmp_path, "a = 1\nb = \n")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(FileError, match="is not TOML"):
        Config.read(tmp_path / "bytes.toml")
    with pytest.raises(FileError, match="There is no file"):
        Config.read(tmp_path / "none.toml")


def test_workers_ask_for_a_gpu_where_the_study_runs_on_one(tmp_path, monkeypatch):
    import submitit

    from dfa_lens.experiments.executors import jobs

    asked = []
    monkeypatch.setattr(submitit.AutoExecutor, "update_parameters", lambda self, **given: asked.append(given))
    for device, gpus in (("cuda", None), ("cpu", None), ("cuda:1", 2)):
        jobs(Resources("local", gpus=gpus), tmp_path, 7.5, 30.2, device)
    assert [each["gpus_per_node"] for each in asked] == [1, 0, 2]
    assert (asked[0]["mem_gb"], asked[0]["timeout_min"], asked[0]["cpus_per_task"]) == (8, 31, 1)
