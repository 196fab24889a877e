# SPDX-License-Identifier: Apache-2.0
"""The fast suite runs one or two cases of a property, the slow one the others."""

import pytest


def representatives(cases, *quick):
    """`cases` as parameters of a test; all but those of `quick` are marked slow.

    A tuple is a case of several arguments.
    """
    cases = list(cases)
    assert all(case in cases for case in quick), "a case that there is not would run in neither"
    values = [case if isinstance(case, tuple) else (case,) for case in cases]
    marks = [() if case in quick else pytest.mark.slow for case in cases]
    return [pytest.param(*v, marks=mark) for v, mark in zip(values, marks, strict=True)]
