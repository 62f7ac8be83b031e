"""Case 15: two processes draw disjoint samples and agree with one process; a crash in one does not hang the other."""

import json
import socket

import inject
import pytest

from expunge.patch import Patch
from expunge.run import unlearn

RUN = """
import json, warnings
folder, out, fault = sys.argv[1:4]
rank = int(os.environ["RANK"])
task = faulty()
def crash(number, model, optimizer):
    if fault == "crash" and rank == 1 and number == 3:
        os._exit(9)
settings = {"protections": [{"kind": "l1", "weight": 0.001}], "optim": {"lr": 0.01, "epochs": 2}}
from expunge.run import unlearn
patch = unlearn(task, REQUEST, recipe(**settings), run_dir=folder, checkpoint_every=3, on_step=crash)
again = unlearn(task, REQUEST, recipe(**settings), run_dir=folder)
assert again.digest == patch.digest
with open(f"{out}/{rank}.json", "w") as f:
    json.dump({"seen": task.seen, "digest": patch.digest}, f)
import torch.distributed
torch.distributed.destroy_process_group()
"""


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def start_pair(folder, out, fault="none"):
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "EXPUNGE_TIMEOUT": "30"}
    return [inject.start(RUN, str(folder), str(out), fault, RANK=str(r), LOCAL_RANK=str(r), **shared) for r in range(2)]


def settings():
    return {"protections": [{"kind": "l1", "weight": 0.001}], "optim": {"lr": 0.01, "epochs": 2}}


def largest_difference(a, b):
    return max(float((a[n].dense() - b[n].dense()).abs().max()) for n in a)


@pytest.fixture(scope="module")
def crash(tmp_path_factory):
    """Process 1 dies after step 3; what both said, and the folder as they left it."""
    out = tmp_path_factory.mktemp("pair")
    processes = start_pair(out / "run", out, "crash")
    texts = [p.communicate(timeout=120)[0] for p in processes]
    files = sorted(p.name for p in (out / "run").iterdir())
    return out, [p.returncode for p in processes], texts, files


@pytest.fixture(scope="module")
def pair(crash):
    """The same run, resumed by two processes."""
    out = crash[0]
    for process in start_pair(out / "run", out):
        text, _ = process.communicate(timeout=120)
        assert process.returncode == 0, text
    return out


def test_a_crash_in_one_process_ends_the_other(crash):
    _, codes, texts, files = crash
    assert codes[1] == 9
    assert codes[0] not in (0, None), texts[0]
    assert "patch.safetensors" not in files
    assert "checkpoint.safetensors" in files


def test_the_processes_see_disjoint_samples_that_make_up_the_whole(pair):
    seen = [json.loads((pair / f"{r}.json").read_text())["seen"] for r in range(2)]
    single = inject.faulty()
    unlearn(single, inject.REQUEST, inject.recipe(**settings()))
    assert len(seen[0]) == len(seen[1]) == 13  # resumed from the checkpoint after step 3
    for (role, ids), (role_0, ids_0), (role_1, ids_1) in zip(single.seen[3:], *seen, strict=True):
        assert role == role_0 == role_1
        assert not set(ids_0) & set(ids_1)
        assert sorted(ids_0 + ids_1) == sorted(ids)


def test_two_processes_give_the_patch_of_one_within_tolerance(pair):
    both = Patch.load(pair / "run" / "patch.safetensors")
    one = unlearn(inject.faulty(), inject.REQUEST, inject.recipe(**settings()))
    assert set(both) == set(one)
    assert largest_difference(both, one) < 1e-4
    other = unlearn(inject.faulty(), inject.REQUEST, inject.recipe(**settings()), seed=1)
    assert largest_difference(other, one) > 1e-3


def test_both_processes_return_the_same_patch_and_one_writes(pair):
    digests = {json.loads((pair / f"{r}.json").read_text())["digest"] for r in range(2)}
    assert digests == {Patch.load(pair / "run" / "patch.safetensors").digest}
    rows = [json.loads(line) for line in (pair / "run" / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == list(range(16))
    assert sorted(p.name for p in (pair / "run").iterdir()) == [".lock", "log.jsonl", "patch.safetensors", "run.json"]


def test_logged_losses_are_those_of_one_process(pair, tmp_path):
    unlearn(inject.faulty(), inject.REQUEST, inject.recipe(**settings()), run_dir=tmp_path)
    for ours, theirs in zip(*(
        [json.loads(line) for line in (d / "log.jsonl").read_text().splitlines()] for d in (tmp_path, pair / "run")
    ), strict=True):  # fmt: skip
        for key in ("loss", "l1", "grad_norm"):
            assert theirs[key] == pytest.approx(ours[key], rel=1e-2, abs=1e-4)
