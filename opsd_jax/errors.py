# SPDX-License-Identifier: Apache-2.0
"""The one exception that means "your input is wrong", as opposed to a bug."""

# Folders that no user has named -> what is named in their place: of a workdir in a bucket its URL.
STAND_INS: dict[str, str] = {}


def as_named(text: str) -> str:
    """A text for the user, who knows no folder of `STAND_INS`."""
    for folder, name in STAND_INS.items():
        text = text.replace(folder, name)
    return text


class UserError(ValueError):
    """Bad input, told in one sentence that names the file, key, row or flag and what to do.

    The command line prints the sentence without a traceback and exits with status 2.
    """

    def __init__(self, sentence: str = ""):
        super().__init__(as_named(sentence))
