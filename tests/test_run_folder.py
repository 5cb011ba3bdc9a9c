"""One run gets a folder, and what a killed one left behind goes."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from myutils.run_folder import claim_folder, fcntl, hold, refuse_used_name


def test_of_two_runs_with_one_name_the_first_gets_the_folder(tmp_path: Path) -> None:
    assert claim_folder(tmp_path / "a", chosen=True) == tmp_path / "a"
    with pytest.raises(ValueError, match=r"--exp a: .* has not reached its first checkpoint"):
        claim_folder(tmp_path / "a", chosen=True)
    assert claim_folder(tmp_path / "a", chosen=False) == tmp_path / "a_2"
    assert claim_folder(tmp_path / "a", chosen=False) == tmp_path / "a_3"


def test_an_empty_folder_of_the_users_may_be_chosen(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    assert claim_folder(tmp_path / "a", chosen=True) == tmp_path / "a"


@pytest.mark.parametrize("left", ["baseline", "test", "metrics.jsonl", "best.pt"])
def test_what_is_left_of_a_run_is_not_taken_for_the_new_one(tmp_path: Path, left: str) -> None:
    (tmp_path / "a" / left).mkdir(parents=True)
    with pytest.raises(ValueError, match=rf"--exp a: .* holds {left} of .*choose another name"):
        refuse_used_name(tmp_path / "a")


def test_checkpoints_that_a_killed_process_did_not_finish_go_with_the_next_training(tmp_path: Path) -> None:
    for name in (".partial_123_last.pt", ".partial_9_best.pt", "last.pt", "mine.tmp"):
        (tmp_path / name).touch()
    with hold(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "last.pt", "mine.tmp"]
        (tmp_path / ".partial_7_last.pt").touch()
        with pytest.raises(ValueError, match="another process trains in"):
            hold(tmp_path)
        assert (tmp_path / ".partial_7_last.pt").exists()


@pytest.mark.skipif(fcntl is None, reason="nothing is locked without fcntl")
def test_a_worker_that_outlives_its_trainer_does_not_hold_the_folder(tmp_path: Path) -> None:
    lock = hold(tmp_path)
    ours, theirs = socket.socketpair()
    worker = os.fork()
    if worker == 0:  # it waits for the end of the test, as one that is reading a case
        try:
            ours.close()
            theirs.send(b"x")
            theirs.recv(1)
        finally:
            os._exit(0)
    theirs.close()
    ours.recv(1)
    lock.close()  # the trainer's death
    try:
        hold(tmp_path).close()
    finally:
        ours.close()
        os.waitpid(worker, 0)
