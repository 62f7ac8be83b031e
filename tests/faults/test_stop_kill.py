"""Case 17 for a measured stop rule: a run that is killed and resumed stops at the same step."""

import json
import signal

import inject

from expunge.objectives.stopping import ACCURACY
from expunge.run import unlearn

UNTIL = {"below_test": 0.3, "every": 2}

KILL = """
import test_stop_kill as t
from expunge.run import unlearn
unlearn(tiny_classifier(), REQUEST, t.stopping(), run_dir=sys.argv[1], checkpoint_every=2, on_step=kill_at(5))
"""


def stopping():
    schedule = {"kind": "single", "batch_size": 8}
    objective = {"kind": "gradient_ascent", "schedule": schedule, "until": UNTIL}
    return inject.recipe(objective=objective, optim={"lr": 0.01, "epochs": 8})


def measured(folder):
    found = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(r["step"], r.get(ACCURACY)) for r in found]


def test_kill_9_and_resume_stops_at_the_same_step(tmp_path):
    process = inject.start(KILL, str(tmp_path / "run"))
    text, _ = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, text
    task = inject.tiny_classifier()
    whole = unlearn(task, inject.REQUEST, stopping(), run_dir=tmp_path / "whole")
    assert 5 < len(measured(tmp_path / "whole")) < 40
    taken: list[int] = []
    resumed = unlearn(
        task, inject.REQUEST, stopping(), run_dir=tmp_path / "run", checkpoint_every=2,
        on_step=lambda n, *_: taken.append(n),
    )  # fmt: skip
    assert taken[0] == 5
    assert measured(tmp_path / "run") == measured(tmp_path / "whole")
    assert resumed.digest == whole.digest
    assert resumed.manifest.notes == whole.manifest.notes
