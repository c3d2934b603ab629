# SPDX-License-Identifier: MIT
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts and ba2ps.py lie at the top


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
