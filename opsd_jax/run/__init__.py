# SPDX-License-Identifier: Apache-2.0
"""Runs: what a gin file says, the training loop, and the commands.

In reading order: experiment.py (a run as numbers, one dataclass per area), registry.py (the names
of a gin file, as text), config.py with gin_files.py and gin_errors.py (from gin files to an
Experiment) and gin_text.py (back), base_model.py and testbed_base.py (where the weights come from),
assembly.py (from an Experiment to model, method and shardings), stepping.py and loop.py (one step;
all of them), train.py (`opsd train`), finished_run.py (a workdir restored), then a file for each
other command: eval.py, generate.py, export.py, tokens.py. flags.py has the types of the command
line's values; notebook.py and by_hand.py are what `import opsd_jax` offers.
"""
