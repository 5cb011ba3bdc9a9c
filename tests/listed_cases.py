"""A source of ids alone, for tests of splits, and a writer of list files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dataloaders.base import CaseSource, SourceOptions, Volume

IDS = [f"case{k:02d}" for k in range(10)]


class ListedCases(CaseSource):
    """Ids alone; the last two have no label. Reading a test list that is "closed" is an error."""

    num_classes, in_channels, class_names = 2, 1, ("background", "organ")

    def __init__(
        self,
        train: Sequence[str] | None = None,
        test: Sequence[str] | str | None = None,
        labeled: Sequence[str] = tuple(IDS[:8]),
    ) -> None:
        self._train, self._test, self._labeled = train, test, labeled

    @classmethod
    def from_options(cls, options: SourceOptions) -> ListedCases:
        return cls()

    def case_ids(self) -> list[str]:
        return list(IDS)

    def labeled_ids(self) -> list[str]:
        return list(self._labeled)

    def load(self, case_id: str, *, with_label: bool) -> Volume:
        raise AssertionError("a split opens no image")

    def official_train(self) -> tuple[str, ...] | None:
        return None if self._train is None else tuple(self._train)

    def official_test(self) -> tuple[str, ...] | None:
        assert self._test != "closed", "training opened the test list"
        return None if self._test is None else tuple(self._test)


def write_list(path: Path, *ids: str) -> Path:
    path.write_text("\n".join(ids) + "\n")
    return path
