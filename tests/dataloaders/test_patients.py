"""Splits where patients have several cases: each patient is on one side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from listed_cases import IDS, ListedCases, write_list

from dataloaders.case_lists import order_key
from dataloaders.patients import PatientsByName, name_patients, nameless_cases
from dataloaders.splits import SplitRequest, make_test_ids, make_training_split
from myutils.config import RunConfig
from myutils.resolving import resolve_config


class PairsOfCases(ListedCases):
    """Two cases of each patient: case00 and case01 are of patient 0, and so on; the last one's have no label."""

    def patient(self, case_id: str) -> str:
        return f"patient{int(case_id[-2:]) // 2}"


IDS_OF_OTHERS = ("case04", "case05", "case06", "case07")  # labelled, and of no patient that case00 or case02 is of


def patients(ids: Sequence[str]) -> set[str]:
    return {PairsOfCases().patient(case_id) for case_id in ids}


@pytest.mark.parametrize("seed", range(4))
def test_cases_of_a_patient_who_is_tested_are_not_trained_on(seed: int, tmp_path: Path) -> None:
    source = PairsOfCases()
    for listed in (None, write_list(tmp_path / "test.list", "case05")):
        request = SplitRequest(labelnum=2, seed=seed, test_list=listed)
        split = make_training_split(source, request)
        test = make_test_ids(source, request, split)
        assert not patients(test) & patients([*split.labeled, *split.unlabeled]) and len(patients(test)) == 1
        assert len(split.labeled + split.unlabeled) == 8  # the tested patient's other case is in no role
    whole = make_test_ids(source, SplitRequest(labelnum=2), make_training_split(source, SplitRequest(labelnum=2)))
    assert len(whole) == 2  # 8 labelled // 5 is one case, and its patient has two


def test_patients_that_a_list_claims_are_not_held_out(tmp_path: Path) -> None:
    listed = write_list(tmp_path / "l.list", "case00", "case02", "case04")
    request = SplitRequest(labelnum=1, labeled_list=listed)
    split = make_training_split(PairsOfCases(), request)
    assert make_test_ids(PairsOfCases(), request, split) == ("case06", "case07")


def test_other_cases_of_validation_patients_are_not_trained_on(tmp_path: Path) -> None:
    source = PairsOfCases(train=IDS)
    split = make_training_split(source, SplitRequest(labelnum=3, val_num=1))
    assert split.val == ("case02",) and "case03" not in split.labeled + split.unlabeled and len(split.unlabeled) == 6
    listed = write_list(tmp_path / "v.list", "case00")
    split = make_training_split(source, SplitRequest(labelnum=2, val_list=listed))
    assert split.labeled == ("case02", "case03") and "case01" not in split.unlabeled


def test_a_train_list_tests_on_patients_that_it_does_not_show() -> None:
    source, request = PairsOfCases(train=["case00", "case02"]), SplitRequest(labelnum=1)
    assert make_test_ids(source, request, make_training_split(source, request)) == IDS_OF_OTHERS


def test_a_single_patient_cannot_be_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PairsOfCases, "patient", lambda self, case_id: "one")
    with pytest.raises(ValueError, match=r"no labelled training case, besides 8 for the test.*of one patient"):
        make_training_split(PairsOfCases(), SplitRequest(labelnum=1))


def test_two_roles_that_share_a_patient_are_refused(tmp_path: Path) -> None:
    source = PairsOfCases(train=IDS[:6])
    with pytest.raises(ValueError, match=r"'case01' show patients that labelled cases show.*--val_num"):
        make_training_split(source, SplitRequest(labelnum=3, val_num=2))
    assert make_training_split(source, SplitRequest(labelnum=4, val_num=2)).val == ("case02", "case03")
    first, second = write_list(tmp_path / "l.list", "case00"), write_list(tmp_path / "s.list", "case01")
    with pytest.raises(ValueError, match="'case01' show patients that labelled cases show"):
        make_training_split(source, SplitRequest(labelnum=1, labeled_list=first, val_list=second))
    with pytest.raises(ValueError, match="the test list and another list name cases of one patient: 'case00'"):
        make_training_split(PairsOfCases(), SplitRequest(labelnum=1, labeled_list=first, test_list=second))
    source = PairsOfCases(train=IDS[:5], test=["case05"])
    request = SplitRequest(labelnum=2)
    with pytest.raises(ValueError, match="test cases 'case05' show patients that training cases of this run show"):
        make_test_ids(source, request, make_training_split(source, request))


@pytest.mark.parametrize("seed", range(3))
def test_the_seed_orders_patients_by_their_first_case(seed: int) -> None:
    """A later scan of a patient moves nobody."""
    source = PairsOfCases(test=["case00"])
    split = make_training_split(source, SplitRequest(labelnum=2, seed=seed))
    firsts = sorted(("case02", "case04", "case06", "case08"), key=lambda case_id: order_key(case_id, seed))
    labeled = next(case_id for case_id in firsts if case_id != "case08")  # case08 has no label
    assert split.labeled == (labeled, f"case{int(labeled[-2:]) + 1:02d}")
    assert list(split.unlabeled[::2]) == [case_id for case_id in firsts if case_id != labeled]


@pytest.mark.parametrize(
    ("pattern", "patient"),
    [("^[^_]+", "P012"), (r"P(\d+)_", "012"), (r"^(?:P\d+)", "P012"), ("_20..$", "_2019"), (r"A(\d+)|P(\d+)", "012")],
)
def test_a_pattern_finds_the_patient_in_a_name(pattern: str, patient: str) -> None:
    assert PatientsByName(pattern)("P012_2019") == patient


def test_a_pattern_keeps_scans_of_a_patient_together() -> None:
    source, together = ListedCases(), set(IDS[:5])
    name_patients(source, "case0(?=[0-4])|case0[5-9]")  # the first five are of one patient
    tested = set()
    for seed in range(8):
        request = SplitRequest(labelnum=1, seed=seed)
        split = make_training_split(source, request)
        trained, test = {*split.labeled, *split.unlabeled}, make_test_ids(source, request, split)
        assert together <= trained or (together.isdisjoint(trained) and together == set(test))
        tested.add(together == set(test))
    assert tested == {True, False}


def test_a_pattern_that_leaves_a_case_without_a_patient_is_refused() -> None:
    source = ListedCases()
    assert nameless_cases(source) == []
    name_patients(source, "case0[0-8]")
    assert nameless_cases(source) == ["case09"] and source.patient("case09") == "case09"
    config = RunConfig(patient_pattern="case0[0-8]")
    with pytest.raises(ValueError, match=r"--patient_pattern 'case0\[0-8\]': finds no patient in 'case09'; pass one"):
        resolve_config(config, source)
    with pytest.raises(ValueError, match=r"--patient_pattern '\(case': no regular expression: missing \)"):
        RunConfig(patient_pattern="(case")
