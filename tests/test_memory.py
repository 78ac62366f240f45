"""What batch_size="auto" takes for available, on systems that are made up, and what it makes of it."""

from types import SimpleNamespace

import psutil
import pytest
import torch
from helpers import random_model, random_pairs

import dfa_lens as dfa
from dfa_lens.evaluation.node_circuits import need_of_curve
from dfa_lens.models import memory
from dfa_lens.models.runner import Runner

GIB = 2**30
CPU = torch.device("cpu")


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A system with 8 GiB available, 1 GiB of it free; its control groups are those that a test writes."""
    virtual = SimpleNamespace(total=16 * GIB, available=8 * GIB, free=1 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: virtual)
    monkeypatch.setattr(memory, "CGROUPS_OF_PROCESS", tmp_path / "self")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "cgroup")

    def write(member, groups):
        """What /proc/self/cgroup says, and the files of every group's folder."""
        (tmp_path / "self").write_text(member + "\n")
        for folder, files in groups.items():
            path = tmp_path / "cgroup" / folder
            path.mkdir(parents=True, exist_ok=True)
            for name, text in files.items():
                (path / name).write_text(f"{text}\n")

    return write


def v2(limit, used, cache=0):
    stat = f"anon {used - cache}\nfile {cache}\ninactive_file {cache}"
    return {"memory.max": limit, "memory.current": used, "memory.stat": stat}


def v1(limit, used, cache=0):
    stat = f"cache 7\ninactive_file 7\ntotal_cache {cache}\ntotal_inactive_file {cache}"
    return {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": used, "memory.stat": stat}


def test_what_is_available_counts_not_what_is_free(system):
    """And where there are no control groups (macOS, Windows), nothing else."""
    assert memory.free_bytes(CPU) == 8 * GIB


def test_a_container_of_version_2(system):
    system("0::/", {".": v2(limit=3 * GIB, used=2 * GIB)})
    assert memory.free_bytes(CPU) == 1 * GIB


def test_file_cache_is_no_use(system):
    system("0::/", {".": v2(limit=3 * GIB, used=2 * GIB, cache=GIB)})
    assert memory.free_bytes(CPU) == 2 * GIB


def test_no_limit(system):
    system("0::/", {".": v2(limit="max", used=20 * GIB)})
    assert memory.free_bytes(CPU) == 8 * GIB


def test_a_group_above_allows_less(system):
    """A step of a cluster's job: without a limit of its own, the job has one; the strictest counts."""
    system(
        "0::/jobs/job_1/step_0",
        {
            "jobs/job_1/step_0": v2(limit="max", used=GIB),
            "jobs/job_1": v2(limit=4 * GIB, used=2 * GIB),
            "jobs": v2(limit=64 * GIB, used=3 * GIB),
        },
    )
    assert memory.free_bytes(CPU) == 2 * GIB


def test_version_1(system):
    """Other controllers' lines say nothing of memory; an unlimited group has the largest number of pages."""
    member = "9:name=systemd:/\n8:cpu,cpuacct:/job\n4:memory:/job\n0::/"
    system(member, {"memory": v1(2**63 - 4096, 9 * GIB), "memory/job": v1(5 * GIB, 3 * GIB, cache=2 * GIB)})
    assert memory.free_bytes(CPU) == 4 * GIB


def test_the_name_of_a_group_outside(system):
    """Within a container the process may be listed under the host's name, which is not to be found here."""
    system("4:memory:/docker/0123abc", {"memory": v1(5 * GIB, 3 * GIB)})
    assert memory.free_bytes(CPU) == 2 * GIB


def test_more_in_use_than_allowed(system):
    """A limit that was lowered: nothing is left, and one example a pass is tried all the same."""
    system("0::/", {".": v2(limit=GIB, used=2 * GIB)})
    assert memory.free_bytes(CPU) == 0


@pytest.fixture(scope="module")
def small():
    model = random_model("auto", num_hidden_layers=3)
    return model, random_pairs(64, 8), dfa.NodeSet.heads_and_mlps(model)


@pytest.mark.parametrize("together", [1, 4])
def test_a_curve_of_the_size_that_fits(small, monkeypatch, together):
    """By the definition: the largest power of two that fits, so that twice as many examples would not."""
    model, pairs, nodes = small

    def peak(n):
        need = dfa.estimate(model, pairs, nodes, batch_size=n, sizes=8, sizes_per_pass=together)["faithfulness_curve"]
        return need.peak_bytes / memory.USABLE

    monkeypatch.setattr(memory, "free_bytes", lambda device: int(1.5 * peak(8)))
    assert memory.fitting(Runner(model), pairs, nodes, lambda f, n: need_of_curve(f, len(pairs), n, 8, together)) == 8


def test_sizes_that_share_a_pass_take_fewer_examples(small, monkeypatch):
    """What the curve itself asks for: the memory that suffices for 16 examples does not with 6 sizes a pass."""
    model, pairs, nodes = small
    need = dfa.estimate(model, pairs, nodes, batch_size=16, sizes=8)["faithfulness_curve"]
    monkeypatch.setattr(memory, "free_bytes", lambda device: int(1.1 * need.peak_bytes / memory.USABLE))
    batches = []
    whole = dfa.PromptPairs.batches
    monkeypatch.setattr(dfa.PromptPairs, "batches", lambda pairs, size: batches.append(size) or whole(pairs, size))
    flat, sizes = dfa.controls.uniform(nodes), list(range(8))
    for together in (1, 6):
        dfa.faithfulness_curve(model, pairs, flat, sizes=sizes, batch_size="auto", sizes_per_pass=together)
    assert batches[0] == 16
    assert batches[1] <= 4
