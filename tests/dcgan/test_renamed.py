"""Old module names: importable, with a warning that says the new name."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from dcgan import _renamed


@pytest.mark.parametrize(("old", "new"), _renamed.RENAMED.items())
def test_an_old_name_is_the_new_module(old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, old, raising=False)
    with pytest.warns(DeprecationWarning, match=f"^{old} has been renamed; import {new} instead$"):
        module = importlib.import_module(old)
    assert module is importlib.import_module(new)
    assert module.__name__ == new
    assert module.__spec__ is not None
    assert module.__spec__.name == new


def test_old_names_in_import_statements() -> None:
    code = (
        "from dcgan.training.fused import TrainStep; from dcgan import graphs; import dcgan.training as t; "
    )
    code += "assert TrainStep is t.TrainStep and graphs.__name__ == 'dcgan.graphed'"
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "import dcgan.training.fast_step instead" in done.stderr
