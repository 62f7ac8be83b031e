"""Case 17 at the command line: `expunge run`, killed with SIGKILL, continues and ends with the very same patch."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from expunge.files import sha256_file
from expunge.patch import Patch

TEXT = """
name: killed
task:
  model: {name: mlp, input_shape: [1, 8, 8]}
  data: {name: digits, limit: 100}
request: {class: 3}
recipe: {method: fine_tune, batch_size: 16, optim: {lr: 0.01, epochs: 300}}
controls: false
attacks: [mia]
"""


def command(*words: object) -> list[str]:
    return [sys.executable, "-c", "from expunge.cli import main; main()", *map(str, words)]


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_a_killed_run_resumes_to_the_same_patch(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(TEXT)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    words = command("run", tmp_path / "c.yaml", "--output", killed)
    with subprocess.Popen(words, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not (killed / "checkpoint.safetensors").exists() and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (killed / "patch.safetensors").exists()
    assert not (killed / "report.json").exists()
    for folder in (killed, whole):
        done = subprocess.run(command("run", tmp_path / "c.yaml", "--output", folder), env=env, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
    assert Patch.load(killed / "patch.safetensors").digest == Patch.load(whole / "patch.safetensors").digest
    assert sha256_file(killed / "log.jsonl") == sha256_file(whole / "log.jsonl")
    # the comparison can fail: another seed gives another patch
    other = command("run", tmp_path / "c.yaml", "--output", tmp_path / "other", "--seed", 1, "--recipe.optim.epochs", 2)
    assert subprocess.run(other, env=env, capture_output=True).returncode == 0
    digest = Patch.load(tmp_path / "other/patch.safetensors").digest
    assert digest != Patch.load(whole / "patch.safetensors").digest
    # time spent before the kill is unknown, so no run time is claimed
    assert not (killed / "timing.json").exists()
    assert (whole / "timing.json").exists()
