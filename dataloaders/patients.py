"""Patients by the names of their cases, where the data do not say whom a case shows."""

from __future__ import annotations

import re

from dataloaders.base import CaseSource


class PatientsByName:
    """The patient of a case id by a regular expression: the first group that it finds, or without groups all it finds.

    An id in which it finds nothing is a patient of its own.
    """

    def __init__(self, pattern: str) -> None:
        self._pattern = re.compile(pattern)

    def found_in(self, case_id: str) -> str | None:
        """The patient's name in an id; None where there is none."""
        found = self._pattern.search(case_id)
        if found is None:
            return None
        return next(filter(None, found.groups()), None) if self._pattern.groups else found[0]

    def __call__(self, case_id: str) -> str:
        return self.found_in(case_id) or case_id


def name_patients(source: CaseSource, pattern: str) -> None:
    """Make ``source.patient`` follow the pattern instead of what the data say."""
    source.patient = PatientsByName(pattern)  # type: ignore[method-assign]


def nameless_cases(source: CaseSource) -> list[str]:
    """Case ids in which the pattern of ``name_patients`` finds no patient; none where there is no pattern."""
    patients = source.patient
    if not isinstance(patients, PatientsByName):
        return []
    return [case_id for case_id in source.case_ids() if not patients.found_in(case_id)]
