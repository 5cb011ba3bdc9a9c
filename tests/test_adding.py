"""The examples of docs/adding.md keep the contracts as they stand."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_the_examples_of_the_guide_keep_the_contracts(tmp_path: Path) -> None:
    for name in ("dataloaders", "myutils", "networks", "benchmarks", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "setup.cfg", tmp_path)
    guide = (ROOT / "docs" / "adding.md").read_text(encoding="utf-8")
    blocks = re.findall(r"`([\w/]+\.py)`:\n\n```python\n(.*?)```", guide, re.DOTALL)
    assert len(blocks) == 4
    for name, code in blocks:
        with (tmp_path / name).open("a", encoding="utf-8") as file:
            file.write(code)
    command = [sys.executable, "-m", "pytest", "-rp", "-m", "slow or not slow"]
    command += ["-k", "npy or maker or dilated or entropy"]
    command += ["tests/contract", "tests/networks/test_compiling.py", "tests/networks/test_layers.py"]
    command += ["tests/methods/test_method_parts.py"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8")
    assert result.returncode == 0, result.stdout[-3000:]
    for name in ("npy", "has_a_maker", "dilated", "entropy"):
        assert re.search(rf"PASSED .*{name}", result.stdout), name
