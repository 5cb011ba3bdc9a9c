"""Two processes that were started with different flags refuse to train together."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_processes_with_different_flags_refuse_to_start(tmp_path: Path, demo_cache: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        str(ROOT / "train_cov_dfp_3d.py"),
        "--output_dir",
        str(tmp_path / "runs"),
        "--exp",
        "two",
    ]
    command += ["--cache_dir", str(demo_cache), "--seed"]
    ranks = [
        subprocess.Popen(
            [*command, str(rank)],
            cwd=tmp_path,
            env=os.environ | meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )
        for rank in range(2)
    ]
    try:
        for rank in ranks:
            _, errors = rank.communicate(timeout=170)
            assert rank.returncode == 2 and "process 1 has --seed 1, process 0 0; start all with" in errors
    finally:
        for rank in ranks:
            rank.kill()
    assert not (tmp_path / "runs").exists()
