import subprocess
import sys

import pytest

from expunge import _compat

FAKE = """
import torch
if not {healthy}:
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            raise RuntimeError(f"operator torchvision::{{name}} does not exist")
__version__ = "0"
"""


def run(tmp_path, healthy, body):
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(FAKE.format(healthy=healthy))
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import expunge; from expunge import _compat; {body}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_a_healthy_torchvision_is_left_alone(tmp_path):
    done = run(
        tmp_path, True, "import torchvision; assert torchvision.__version__ == '0'; assert _compat.declared == []"
    )
    assert done.returncode == 0, done.stderr


def test_missing_operators_are_declared(tmp_path):
    done = run(tmp_path, False, "import torchvision; assert len(_compat.declared) == 2")
    assert done.returncode == 0, done.stderr


def test_without_the_hook_the_same_import_fails(tmp_path):
    done = run(tmp_path, False, "sys.meta_path.pop(0); import torchvision")
    assert "operator torchvision::nms does not exist" in done.stderr


def test_other_failures_pass_through(tmp_path):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise RuntimeError('something else')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import expunge, torchvision"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "something else" in done.stderr


def test_the_hook_is_installed_once():
    before = list(sys.meta_path)
    _compat.install()
    assert sys.meta_path == before


def test_the_real_torchvision_imports():
    pytest.importorskip("torchvision")
    from torchvision import transforms

    assert transforms.CenterCrop(2).size == (2, 2)
