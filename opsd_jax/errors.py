# SPDX-License-Identifier: Apache-2.0
"""The one exception that means "your input is wrong", as opposed to a bug."""


class UserError(ValueError):
    """Bad input, told in one sentence that names the file, key, row or flag and what to do.

    The command line prints the sentence without a traceback and exits with status 2.
    """
