# SPDX-License-Identifier: MIT
import contextlib
import io
import runpy
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the scripts and ba2ps.py lie at the top


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def decathlon(tmp_path_factory):
    """The root of three small domains that toy.py draws: shapes, the source, strokes and textures."""
    import toy
    root = tmp_path_factory.mktemp("decathlon") / "data"
    sizes = {"shapes": (5, (13, 2, 1)), "strokes": (3, (3, 2, 1)), "textures": (3, (3, 2, 1))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "TOY", {domain: (*toy.TOY[domain][:2], toy.TOY[domain][2][:classes], images)
                                   for domain, (classes, images) in sizes.items()})
        toy.draw_toy(root)
    return root


@pytest.fixture(scope="session")
def script():
    """A function that runs a script in this process: its exit code, standard output and standard error."""
    def run(name, *words):
        code, out, err = 0, io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [name, *map(str, words)])
            try:
                with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                    runpy.run_path(str(ROOT / name), run_name="__main__")
            except SystemExit as stopped:
                code = stopped.code or 0
        return code, out.getvalue(), err.getvalue()
    return run


@pytest.fixture(scope="session")
def refused(script):
    """A function: a script ends with exit code 2 and one line on standard error that holds `named`."""
    def check(name, *words, named):
        code, _, err = script(name, *words)
        assert code == 2 and err.startswith(f"{name}: ") and str(named) in err, err
        assert err.endswith("\n") and err[:-1].isprintable(), err
    return check
