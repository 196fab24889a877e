# SPDX-License-Identifier: Apache-2.0
"""What a run will need on chips that are not here, asked of those chips' own compilers."""
