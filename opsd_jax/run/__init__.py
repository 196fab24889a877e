# SPDX-License-Identifier: Apache-2.0
"""Runs: what a gin file says, the training loop, and the commands.

In reading order: experiment.py (a run as numbers, one dataclass per area), registry.py (the names
of a gin file, as text), config.py with gin_files.py, gin_errors.py, unused_bindings.py and
unread_settings.py (from gin files to an Experiment), gin_text.py (back) and pins.py (names on the
Hub as commits), base_model.py and testbed_base.py (where the weights come from), assembly.py (from
an Experiment to model, method and shardings), inputs.py (what is read before the first step),
graded_rows.py and after_rollout.py (between the halves of a step), stepping.py and loop.py (one
step; all of them), flops.py and meter.py (how busy the chips are), train.py (`opsd train`),
finished_run.py (a workdir restored), then a file for each other command: data.py, eval.py,
generate.py, export.py, and with shown_rows.py tokens.py and probe.py. flags.py has the types of the
command line's values; notebook.py, with live.py, and by_hand.py are what `import opsd_jax` offers.
"""
