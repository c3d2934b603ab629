# SPDX-License-Identifier: MIT
"""What the tests share."""
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
    """The root of three small domains from toy.py: shapes, the source, strokes and textures."""
    from tests import toy  # the module object that train.py imports
    root = tmp_path_factory.mktemp("decathlon") / "data"
    sizes = {  # classes, and images per class in train, val and test
        "shapes": (5, (13, 2, 1)),
        "strokes": (3, (3, 2, 1)),
        "textures": (3, (3, 2, 1))}
    small = {}
    for domain, (number, counts) in sizes.items():
        draw, grain, classes, _ = toy.TOY[domain]
        small[domain] = (draw, grain, classes[:number], counts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "TOY", small)
        toy.draw_toy(root)
    return root


@pytest.fixture(scope="session")
def script():
    """A function that runs a script in this process: its exit code, output and errors."""
    def run(name, *words):
        code = 0
        out = io.StringIO()
        err = io.StringIO()
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
    """A function: a script ends with exit code 2 and one line of errors that holds `named`."""
    def check(name, *words, named):
        code, _, err = script(name, *words)
        assert code == 2, err
        assert err.startswith(f"{name}: "), err
        assert str(named) in err, err
        assert err.endswith("\n"), err
        assert err[:-1].isprintable(), err
    return check
