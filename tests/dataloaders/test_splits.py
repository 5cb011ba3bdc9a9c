"""List files and splits: disjoint roles, the field's protocol, and a test list that training does not open."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from listed_cases import IDS, ListedCases, write_list

from dataloaders.case_lists import read_case_list, some, strip_nifti_suffix
from dataloaders.splits import SplitRequest, TrainingSplit, make_test_ids, make_training_split


def test_an_id_may_hold_a_number_sign(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("case#1\ncase#2 # the second\n#none\n")
    assert read_case_list(tmp_path / "list.txt") == ("case#1", "case#2")


def test_list_file_tolerates_crlf_comments_suffixes_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "train.list"
    path.write_bytes(b"\xef\xbb\xbfb.nii.gz\r\n\r\n# old cases\r\n a.nii # first\r\nc.d\r\n")
    assert read_case_list(path) == ("b", "a", "c.d")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no case id"),
        (b"\n# nothing\n", "holds no case id"),
        (b"a\nb\na.nii.gz\n", "holds 'a' more than once"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
    ],
)
def test_bad_list_file_is_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.list").write_bytes(content)
    with pytest.raises(ValueError, match=f"x.list.*{message}"):
        read_case_list(tmp_path / "x.list")


def test_missing_list_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"x.list does not exist"):
        make_training_split(ListedCases(), SplitRequest(labelnum=2, train_list=tmp_path / "x.list"))


def test_names_for_messages() -> None:
    assert strip_nifti_suffix("a.nii.gz") == "a" == strip_nifti_suffix("a.nii") and strip_nifti_suffix("a.gz") == "a.gz"
    assert some(["a", "b", "c"], limit=2) == "'a', 'b' and 1 more"


def test_first_labelnum_ids_of_the_train_list_are_labeled_and_the_last_of_them_validate() -> None:
    source = ListedCases(train=["case05", "case09", "case01", "case03", "case00", "case07"])
    split = make_training_split(source, SplitRequest(labelnum=3, val_num=1))
    assert split.labeled == ("case05", "case01")  # case09 has no label
    assert split.val == ("case03",) and split.unlabeled == ("case09", "case00", "case07")


def test_train_list_file_goes_before_the_data_s_own(tmp_path: Path) -> None:
    source = ListedCases(train=IDS)
    listed = write_list(tmp_path / "t.list", "case04.nii.gz", "case02", "case08")
    split = make_training_split(source, SplitRequest(labelnum=1, train_list=listed))
    assert split == TrainingSplit(("case04",), ("case02", "case08"), ())


def test_training_never_opens_the_test_list_beside_a_train_list(tmp_path: Path) -> None:
    request = SplitRequest(labelnum=2, test_list=tmp_path / "does_not_exist.list")
    split = make_training_split(ListedCases(train=IDS[:6], test="closed"), request)
    assert split.labeled == ("case00", "case01") and len(split.unlabeled) == 4
    own = write_list(tmp_path / "train.list", *IDS[:6])
    assert make_training_split(ListedCases(test="closed"), SplitRequest(labelnum=2, train_list=own)) == split


def test_only_a_train_list_tests_on_the_labeled_cases_outside_it() -> None:
    source, request = ListedCases(train=IDS[:6]), SplitRequest(labelnum=2)
    assert make_test_ids(source, request, make_training_split(source, request)) == ("case06", "case07")


def test_only_a_test_list_leaves_its_cases_out_of_training(tmp_path: Path) -> None:
    for source, listed in (
        (ListedCases(test=["case01", "case02"]), None),
        (ListedCases(), write_list(tmp_path / "test.list", "case01", "case02")),
    ):
        request = SplitRequest(labelnum=3, test_list=listed)
        split = make_training_split(source, request)
        assert {*split.labeled, *split.unlabeled} == set(IDS) - {"case01", "case02"}
        assert make_test_ids(source, request, split) == ("case01", "case02")


def test_without_lists_the_seed_decides_and_nothing_overlaps() -> None:
    source = ListedCases()
    splits = []
    for seed in range(4):
        request = SplitRequest(labelnum=4, val_num=1, seed=seed)
        split = make_training_split(source, request)
        test = make_test_ids(source, request, split)
        roles = [*split.labeled, *split.unlabeled, *split.val, *test]
        assert sorted(roles) == IDS  # each case has one role
        assert len(test) == 1 and (len(split.labeled), len(split.val)) == (3, 1)  # 8 labelled // 5
        assert split == make_training_split(source, request)
        splits.append(split)
    assert len({split.digest for split in splits}) > 1


def test_test_list_is_asked_for_labels_before_the_training_where_it_is_read_then(tmp_path: Path) -> None:
    (tmp_path / "test.txt").write_text("case00\ncase09\n")
    with pytest.raises(ValueError, match=r"test.txt names 'case09', which have no label file"):
        make_training_split(ListedCases(), SplitRequest(labelnum=2, test_list=tmp_path / "test.txt"))


def test_order_of_the_seed_does_not_depend_on_the_other_cases() -> None:
    whole = make_training_split(ListedCases(test=["case00"]), SplitRequest(labelnum=2))
    fewer = make_training_split(ListedCases(test=["case00", whole.unlabeled[0]]), SplitRequest(labelnum=2))
    assert fewer.labeled == whole.labeled and fewer.unlabeled == whole.unlabeled[1:]


@pytest.mark.parametrize("labelnum", [0, -1, 7])
def test_labelnum_outside_the_labeled_training_cases_is_refused(labelnum: int) -> None:
    with pytest.raises(ValueError, match=f"--labelnum {labelnum}: .* has 6 labelled .* in 1..6"):
        make_training_split(ListedCases(train=IDS[:6]), SplitRequest(labelnum=labelnum))


@pytest.mark.parametrize("val_num", [-1, 3, 4])
def test_val_num_leaves_at_least_one_labeled_case(val_num: int) -> None:
    with pytest.raises(ValueError, match=f"--val_num {val_num}: .* in 0..2"):
        make_training_split(ListedCases(train=IDS[:6]), SplitRequest(labelnum=3, val_num=val_num))


def test_labeled_and_validation_lists_replace_the_numbers(tmp_path: Path) -> None:
    request = SplitRequest(
        labelnum=1,
        labeled_list=write_list(tmp_path / "l.list", "case06", "case02"),
        val_list=write_list(tmp_path / "v.list", "case03"),
    )
    expected = TrainingSplit(("case06", "case02"), ("case00", "case01", "case04"), ("case03",))
    source = ListedCases(train=["case00", "case01", "case02", "case03", "case04", "case06"])
    split = make_training_split(source, request)
    assert split == expected
    assert make_test_ids(source, request, split) == ("case05", "case07")
    free = make_training_split(ListedCases(), request)  # the held-out case is none that a list claims
    assert free.labeled == ("case06", "case02") and free.val == ("case03",)
    with pytest.raises(ValueError, match="list names 'case06', which the data's own train list does not; take"):
        make_training_split(ListedCases(train=IDS[:5], test="closed"), request)
    listed = replace(request, train_list=write_list(tmp_path / "t.list", *IDS[:5]))  # a user's own need not hold them
    assert make_training_split(source, listed) == expected


def test_lists_that_overlap_are_refused(tmp_path: Path) -> None:
    first, second = write_list(tmp_path / "l.list", "case01", "case02"), write_list(tmp_path / "v.list", "case02")
    with pytest.raises(ValueError, match=r"l.list and .*v.list both name 'case02'"):
        make_training_split(ListedCases(), SplitRequest(labelnum=1, labeled_list=first, val_list=second))
    with pytest.raises(ValueError, match="the test list and another list both name 'case02'"):
        make_training_split(ListedCases(), SplitRequest(labelnum=1, labeled_list=first, test_list=second))


def test_test_cases_that_were_trained_on_are_refused(tmp_path: Path) -> None:
    source = ListedCases(train=IDS[:6])
    split = make_training_split(source, SplitRequest(labelnum=2))
    request = SplitRequest(labelnum=2, test_list=write_list(tmp_path / "test.list", "case07", "case05"))
    with pytest.raises(ValueError, match="test cases 'case05' are training cases"):
        make_test_ids(source, request, split)


def test_unknown_ids_get_a_hint(tmp_path: Path) -> None:
    listed = write_list(tmp_path / "t.list", "case00", "csae01")
    with pytest.raises(ValueError, match=r"t.list names 'csae01', not in ListedCases; did you mean 'case01'\?"):
        make_training_split(ListedCases(), SplitRequest(labelnum=1, train_list=listed))


def test_hint_for_a_large_data_set_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = [f"case{k:03d}" for k in range(100)]
    monkeypatch.setattr(ListedCases, "case_ids", lambda self: known)
    listed = write_list(tmp_path / "t.list", "xyz")
    with pytest.raises(ValueError, match=r"the data have 100 cases, the first is 'case000'$"):
        make_training_split(ListedCases(), SplitRequest(labelnum=1, train_list=listed))


def test_own_list_with_an_unknown_or_repeated_id_is_refused() -> None:
    with pytest.raises(ValueError, match="the data's own train list names 'zz'"):
        make_training_split(ListedCases(train=["case00", "zz"]), SplitRequest(labelnum=1))
    with pytest.raises(ValueError, match="own train list holds 'case00' more than once"):
        make_training_split(ListedCases(train=["case00", "case00"]), SplitRequest(labelnum=1))


def test_lists_that_need_labels_say_which_are_missing(tmp_path: Path) -> None:
    listed = write_list(tmp_path / "x.list", "case00", "case08", "case09")
    for request in (SplitRequest(labelnum=1, labeled_list=listed), SplitRequest(labelnum=1, val_list=listed)):
        with pytest.raises(ValueError, match=r"x.list names 'case08', 'case09', which have no label file"):
            make_training_split(ListedCases(), request)
    source = ListedCases(train=IDS[:2], test=["case09"])
    request = SplitRequest(labelnum=1)
    with pytest.raises(ValueError, match="the test list names 'case09', which have no label"):
        make_test_ids(source, request, make_training_split(source, request))


def test_labelled_cases_that_are_held_out_are_counted_in_messages(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has 7 labelled training cases, besides 1 for the test .*; pass .* 1\.\.7"):
        make_training_split(ListedCases(), SplitRequest(labelnum=8))
    single, request = ListedCases(labeled=["case03"]), SplitRequest(labelnum=1)
    with pytest.raises(ValueError, match=r"no labelled training case, besides 1 for the test .* in --labeled_list"):
        make_training_split(single, request)
    alone = replace(request, labeled_list=write_list(tmp_path / "l.list", "case03"))
    assert make_training_split(single, alone).labeled == ("case03",)
    with pytest.raises(ValueError, match="no test cases: no case has a label; pass --test_list"):
        make_test_ids(ListedCases(labeled=[]), request, make_training_split(single, alone))


def test_no_labeled_or_no_test_case_is_an_error() -> None:
    with pytest.raises(ValueError, match="has no labelled training case"):
        make_training_split(ListedCases(train=IDS, labeled=()), SplitRequest(labelnum=1))
    source, request = ListedCases(train=IDS), SplitRequest(labelnum=1)
    with pytest.raises(ValueError, match="there are no test cases"):
        make_test_ids(source, request, make_training_split(source, request))


def test_stored_split_comes_back_or_is_refused() -> None:
    split = TrainingSplit(("a", "b"), ("c",), ())
    stored = split.to_dict()
    assert TrainingSplit.from_dict(stored) == split and stored["digest"] == split.digest and len(split.digest) == 64
    assert TrainingSplit(("a",), ("b", "c"), ()).digest != split.digest
    with pytest.raises(ValueError, match="stored split has digest"):
        TrainingSplit.from_dict(stored | {"labeled": ["a"]})
    with pytest.raises(ValueError, match="stored split has no 'val'"):
        TrainingSplit.from_dict({"labeled": [], "unlabeled": []})


def test_one_labelled_case_in_five_is_held_out_whatever_lists_claim(tmp_path: Path) -> None:
    source = ListedCases(labeled=IDS)
    listed = SplitRequest(labelnum=1, labeled_list=write_list(tmp_path / "l.list", "case00", "case01", "case02"))
    for request in (SplitRequest(labelnum=1), listed):
        assert len(make_test_ids(source, request, make_training_split(source, request))) == 2  # 10 labelled // 5
    few, request = ListedCases(labeled=IDS[:4]), SplitRequest(labelnum=3)
    assert len(make_test_ids(few, request, make_training_split(few, request))) == 1  # at least one


def test_training_cases_that_a_run_left_out_are_no_test_cases() -> None:
    source, used = ListedCases(train=IDS[:6]), TrainingSplit(("case00",), ("case01",), ())
    assert make_test_ids(source, SplitRequest(labelnum=1), used) == ("case06", "case07")


def test_validation_list_is_asked_for_labels_beside_a_train_list(tmp_path: Path) -> None:
    request = SplitRequest(labelnum=1, val_list=write_list(tmp_path / "v.list", "case01", "case09"))
    with pytest.raises(ValueError, match=r"v.list names 'case09', which have no label file"):
        make_training_split(ListedCases(train=IDS), request)
