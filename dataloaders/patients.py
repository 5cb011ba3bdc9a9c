"""Patients by the names of their cases, where the data do not say whom a case shows."""

from __future__ import annotations

import re

from dataloaders.base import CaseSource
from dataloaders.case_lists import some


class PatientsByName:
    """The patient of a case id by a regular expression: its first group, or without groups all that it matches.

    An id without a match is a patient of its own.
    """

    def __init__(self, pattern: str) -> None:
        self._pattern = re.compile(pattern)

    def found_in(self, case_id: str) -> str | None:
        """The patient's name in an id; None without a match."""
        found = self._pattern.search(case_id)
        return (found[1] if self._pattern.groups else found[0]) if found else None

    def __call__(self, case_id: str) -> str:
        return self.found_in(case_id) or case_id


def name_patients(source: CaseSource, pattern: str) -> None:
    """Make ``source.patient`` follow the pattern instead of what the data say.

    Raises:
        ValueError: If some ids have no match: their patients would be parted in silence.
    """
    patients = PatientsByName(pattern)
    nameless = [case_id for case_id in source.case_ids() if not patients.found_in(case_id)]
    if nameless:
        raise ValueError(
            f"--patient_pattern {pattern!r}: finds no patient in {some(nameless)}; pass one that matches every case "
            "id, or '' to go by what the data say"
        )
    source.patient = patients  # type: ignore[method-assign]
