"""Importing the package is light and has no side effects; every public name exists and says what it is."""

import inspect
import subprocess
import sys

import pytest

import expunge

HEAVY = ("torch", "numpy", "torchvision", "timm", "sklearn", "scipy", "matplotlib", "accelerate", "datasets", "pyarrow")


def loaded_after(code: str) -> list[str]:
    """The heavy packages that a fresh interpreter holds after running ``code``."""
    tell = f"import sys; print(' '.join(m for m in {HEAVY!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{tell}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_import_loads_nothing_heavy():
    assert loaded_after("import expunge") == []


def test_the_probe_sees_what_is_loaded():
    assert "numpy" in loaded_after("import expunge, numpy")


def test_public_names_start_no_accelerator_and_load_no_extra():
    code = "import expunge\nfor n in expunge.__all__: getattr(expunge, n)\n"
    check = "import torch\nassert not torch.cuda.is_initialized()"
    found = loaded_after(code + check)
    assert "torch" in found
    assert not {"torchvision", "timm", "datasets", "pyarrow", "matplotlib", "sklearn"} & set(found)


@pytest.mark.parametrize("name", sorted(set(expunge.__all__) - {"__version__"}))
def test_public_name_is_documented(name):
    value = getattr(expunge, name)
    text = inspect.getdoc(value if inspect.isclass(value) or inspect.isroutine(value) else type(value))
    assert text
    assert text.strip().splitlines()[0].rstrip().endswith((".", ":", "?"))


def test_type_checkers_see_the_same_names(root):
    from ast import If, ImportFrom, parse

    tree = parse((root / "src/expunge/__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, If))
    typed = {alias.name for node in block.body if isinstance(node, ImportFrom) for alias in node.names}
    assert typed == set(expunge.__all__) - {"__version__"}


def test_unknown_name_suggests():
    with pytest.raises(AttributeError, match="did you mean 'unlearn'"):
        expunge.unlern  # noqa: B018


def test_dir_lists_public_names():
    assert dir(expunge) == sorted(expunge.__all__)


def test_no_submodule_hides_a_public_name():
    """Importing ``expunge.x`` binds the module to ``expunge.x``; a public name of that spelling must survive it."""
    code = """
import importlib, types, expunge
for home in expunge._PUBLIC.values():
    importlib.import_module(home)
hidden = [n for n in expunge._PUBLIC if isinstance(getattr(expunge, n), types.ModuleType)]
assert not hidden, hidden
"""
    loaded_after(code)
