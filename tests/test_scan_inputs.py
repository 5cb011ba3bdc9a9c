"""What a prediction may write: no output is an input, however many of both there are."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from myutils.scan_inputs import Scan, require_free_outputs


def test_outputs_of_before_are_looked_at_once_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scans, outputs = [], []
    for folder in ("in", "out"):
        (tmp_path / folder).mkdir()
    for name in map(str, range(50)):
        for folder in ("in", "out"):
            (tmp_path / folder / f"{name}.nii.gz").touch()
        scans.append(Scan(name, tmp_path / "in" / f"{name}.nii.gz"))
        outputs.append(tmp_path / "out" / f"{name}.nii.gz")
    looked, stat = [], Path.stat

    def counted(path: Path, **options: Any) -> os.stat_result:
        looked.append(path)
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", counted)
    require_free_outputs(scans, outputs)
    assert 0 < len(looked) <= 10 * 50  # not the 50 * 50 of each with each
    outputs[7].unlink()
    outputs[7].hardlink_to(scans[8].path)
    with pytest.raises(ValueError, match=r"out/7\.nii\.gz is an input and would be overwritten"):
        require_free_outputs(scans, outputs)
