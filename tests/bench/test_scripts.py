"""The timing scripts run and print their figures; the figures themselves are never a test."""

from __future__ import annotations

import sys

import pytest

from benchmarks import metrics_speed, prototype_share


def test_prototype_share_prints_both_sides_and_the_share(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "--patch_size", "16", "16", "16", "--classes", "3", "--rounds", "1"])
    prototype_share.main()
    printed = capsys.readouterr().out
    assert "without  prototypes" in printed and "share of the step" in printed


@pytest.mark.slow
def test_metrics_speed_prints_all_libraries_and_equal_figures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "--rounds", "1"])
    metrics_speed.main()
    lines = capsys.readouterr().out.splitlines()
    gaps = {line.split()[0]: float(line.split()[-1]) for line in lines[1:]}
    assert set(gaps) == {"ours", "medpy", "monai"}
    assert max(gaps.values()) < 1e-4
