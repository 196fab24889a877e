# SPDX-License-Identifier: Apache-2.0
"""The command line: `opsd data | probe | plan | train | eval | generate | export | tokens | …`.

Exit status: 0 done; 2 a usage or input error, told in one sentence; 1 a bug, with a traceback; 75
start it again, it goes on (`host/watchdog.py`); 130 interrupted before there was anything to save.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

from opsd_jax.errors import UserError, as_named
from opsd_jax.fields import check, hints_of
from opsd_jax.run import flags

MOST_ROLLOUTS_SHOWN = 1024  # of opsd tokens and opsd probe, in one batch


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command and runs it; returns the exit status."""
    try:
        arguments = parser().parse_args(argv)
    except UserError as error:
        return ended(str(error), 2)
    command = f"opsd {arguments.command}"
    try:
        status = arguments.run(arguments)
    except UserError as error:
        return ended(f"{command}: {error}", 2)
    except BrokenPipeError:
        return 0
    except KeyboardInterrupt:
        return ended(f"{command}: interrupted", 130)
    except OSError as error:
        # A full disk or a forbidden folder is the user's to mend; anything else is a bug.
        if error.filename is None and error.errno is None:
            raise
        return ended(f"{command}: {error}", 2)
    except RuntimeError as error:  # XLA's errors are of that kind
        if arguments.command in ("train", "eval"):
            from opsd_jax.host.watchdog import leave, other_process_lost

            if why := other_process_lost(error):
                leave(why)
        raise
    return status or 0


def ended(why: str, status: int) -> int:
    """Says why, on one line, escaping what a terminal could not show; returns the status."""
    print(as_named(why).encode(errors="backslashreplace").decode(), file=sys.stderr)
    return status


def parser() -> argparse.ArgumentParser:
    """All commands and flags."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that there is no PyTorch
    root = flags.Parser(
        prog="opsd", description="On-policy self-distillation of language models, in JAX."
    )
    commands = root.add_subparsers(dest="command", required=True)

    train = commands.add_parser("train", help="run an experiment; resumes a workdir")
    add_gin(train, required=True)
    train.add_argument(
        "--workdir",
        type=flags.workdir,
        required=True,
        help="made if missing; resumed if it has a run; gs://BUCKET/RUN and s3://BUCKET/RUN, too",
    )
    train.add_argument(
        "--stopped_status",
        type=flags.bounded(Annotated[int, ">= 0", "<= 125"]),
        default=0,
        help="exit status after SIGTERM or Ctrl-C saved a run that is not finished (default 0); "
        "75 tells a scheduler to start it again",
    )
    add_distributed(train)
    train.set_defaults(run=run_train)

    export = commands.add_parser("export", help="write a model for transformers, vLLM or PEFT")
    export.add_argument("--workdir", type=flags.workdir, required=True)
    add_step(export)
    export.add_argument("--out", type=flags.folder, required=True, help="folder to write")
    export.add_argument("--format", choices=("hf", "peft"), default="hf")
    export.set_defaults(run=run_export)

    add_asking(commands)
    add_looking(commands)
    add_planning(commands)
    return root


def add_asking(commands: Any) -> None:
    """`eval` and `generate`: a run or a model from files is asked something."""
    evaluate = commands.add_parser("eval", help="accuracy of a run or a model on held-out problems")
    add_gin(evaluate, required=False)
    add_model(evaluate).add_argument(
        "--compare",
        nargs=2,
        type=flags.folder,
        metavar=("A", "B"),
        help="two workdirs, or their folders, in which opsd eval has run: B minus A with an "
        "interval over problems",
    )
    evaluate.add_argument(
        "--out", type=flags.folder, help="folder of the generations (default: WORKDIR/eval/NAME)"
    )
    add_distributed(evaluate)
    evaluate.set_defaults(run=run_eval)

    generate = commands.add_parser("generate", help="stream an answer to the terminal")
    add_model(generate)
    generate.add_argument(
        "--prompt",
        type=flags.text,
        required=True,
        help="the question; a run shows it as contexts.evaluation does",
    )
    for name, kind, default, words in (
        ("temperature", flags.number, 0.0, "0 = greedy"),
        ("top_k", flags.integer, 0, "entries kept; 0 = all"),
        ("top_p", flags.number, 1.0, "probability kept; 1 = all"),
        ("min_p", flags.number, 0.0, "least share of the largest probability"),
        ("repetition_penalty", flags.number, 1.0, "1 = off"),
        ("presence_penalty", flags.number, 0.0, "0 = off"),
        ("max_tokens", flags.count, 256, "of the answer, at most"),
        ("seed", flags.seed, 0, "of the sampling"),
    ):
        generate.add_argument(
            f"--{name}", type=kind, default=default, help=f"{words} (default {default})"
        )
    generate.add_argument(
        "--stop", type=flags.some_text, action="append", default=[], help="end before this text"
    )
    generate.set_defaults(run=run_generate)


def add_looking(commands: Any) -> None:
    """`data`, `probe`, `tokens` and `report`: what a run will see, and what runs did."""
    num_rows = flags.bounded(Annotated[int, ">= 1", f"<= {MOST_ROLLOUTS_SHOWN}"])
    data = commands.add_parser("data", help="the first rows as each role will see them")
    add_gin(data, required=True)
    data.add_argument("--num", type=num_rows, default=3, help="rows to show (default 3)")
    data.set_defaults(run=run_data)

    probe = commands.add_parser("probe", help="before training: what can this teacher teach?")
    add_gin(probe, required=True)
    probe.add_argument("--num", type=num_rows, default=64, help="problems (default 64)")
    probe.add_argument("--seed", type=flags.seed, default=0)
    probe.add_argument("--out", type=flags.file, help="a json file for the numbers")
    probe.set_defaults(run=run_probe)

    tokens = commands.add_parser("tokens", help="where the teacher disagrees, token by token")
    tokens.add_argument(
        "--workdir",
        type=flags.workdir,
        required=True,
        help="a training run; `report` shows the file",
    )
    add_step(tokens)
    tokens.add_argument("--num", type=num_rows, default=8, help="rollouts")
    tokens.add_argument("--seed", type=flags.seed, default=0)
    tokens.set_defaults(run=run_tokens)

    report = commands.add_parser("report", help="many runs on one html page")
    report.add_argument(
        "--workdir",
        type=flags.labelled_folder,
        action="append",
        required=True,
        help="DIR, or LABEL=DIR to group by label; repeatable, the first method is the reference",
    )
    report.add_argument("--out", type=flags.file, required=True, help="the html file to write")
    report.add_argument("--name", type=flags.text, default="", help="title of the page")
    report.add_argument(
        "--levels", type=flags.level, nargs="+", default=[0.7, 0.8, 0.9], help="accuracies to reach"
    )
    report.set_defaults(run=run_report)


def add_planning(commands: Any) -> None:
    """`plan`: what a run will need on chips that are not here."""
    plan = commands.add_parser("plan", help="does an experiment fit chips that are not here?")
    add_gin(plan, required=True)
    plan.add_argument(
        "--target",
        type=flags.text,
        required=True,
        help="a chip and a shape: v5e:4x4, v5p:2x2x2, h100:8, h100:2x8 (hosts x cards)",
    )
    plan.add_argument(
        "--model_config",
        type=flags.text,
        help="a Hugging Face config.json, its folder or Hub name (default: that of train.model)",
    )
    for role, most in (("student", 512), ("teacher", 2048)):
        plan.add_argument(
            f"--{role}_tokens",
            type=flags.count,
            help=f"width of its prompts (default: contexts.{role}_max_tokens, at most {most})",
        )
    plan.add_argument(
        "--search",
        action="store_true",
        help="a table over mesh.replica, mesh.model, train.num_micro_batches and train.remat",
    )
    plan.set_defaults(run=run_plan)


def add_gin(command: argparse.ArgumentParser, required: bool) -> None:
    """--gin_file and --gin_bindings, both repeatable."""
    command.add_argument(
        "--gin_file", type=flags.file, action="append", default=[], required=required
    )
    command.add_argument(
        "--gin_bindings",
        type=flags.text,
        action="append",
        default=[],
        help="e.g. 'train.num_steps = 3'",
    )


def add_model(command: argparse.ArgumentParser) -> argparse._MutuallyExclusiveGroup:
    """Exactly one of --workdir [--step] and --model."""
    which = command.add_mutually_exclusive_group(required=True)
    which.add_argument("--workdir", type=flags.workdir, help="a training run")
    which.add_argument(
        "--model",
        type=flags.file_or_folder,
        help="a Hugging Face directory, a .gguf file, owner/name on the Hub, or 'smollm2'",
    )
    add_step(command)
    return which


def add_step(command: argparse.ArgumentParser) -> None:
    """--step of a --workdir."""
    command.add_argument(
        "--step",
        type=flags.step,
        metavar="N|best",
        help="a checkpoint; 0 is the base (default: the guard's choice, else the latest)",
    )


def add_distributed(command: argparse.ArgumentParser) -> None:
    """How a command that every host of a pod starts alike finds the other processes."""
    command.add_argument(
        "--distributed",
        action="store_true",
        help="one of several processes, which JAX finds: Cloud TPU, GKE, SLURM, Open MPI",
    )
    for name, kind, words in (
        ("coordinator", flags.address, "HOST:PORT of process 0, where JAX finds nothing by itself"),
        ("num_processes", flags.count, "how many there are, with --coordinator"),
        ("process_id", flags.integer, "which of them this is, from 0, with --coordinator"),
    ):
        command.add_argument(f"--{name}", type=kind, metavar=name.upper(), help=words)


# The commands import late: `opsd --help` must not wait for jax.


def join_pod(arguments: argparse.Namespace) -> None:
    """Connects to the other processes, if there are to be any.

    Raises:
      UserError: flags that do not fit together, or the others are not found.
    """
    names = ("coordinator", "num_processes", "process_id")
    told = {name: getattr(arguments, name) for name in names}
    if missing := [name for name in names if told[name] is None]:
        if len(missing) < len(names):
            raise UserError(
                "--coordinator, --num_processes and --process_id go together; "
                f"--{missing[0]} is missing"
            )
        told = {}
    else:
        last = told["num_processes"] - 1
        check("--process_id", told["process_id"], Annotated[int, ">= 0", f"<= {last}"])
    if told or arguments.distributed:
        from opsd_jax.host.pod import join

        join(told.get("coordinator"), told.get("num_processes"), told.get("process_id"))


def refuse(arguments: argparse.Namespace, chosen: str, *flags: str) -> None:
    """Raises a UserError for the first flag that is given but means nothing beside `chosen`."""
    for flag in flags:
        if (value := getattr(arguments, flag)) is not None and value is not False and value != []:
            raise UserError(f"--{flag} does not apply to --{chosen}; leave it out")


def run_train(arguments: argparse.Namespace) -> int:
    import jax

    from opsd_jax.evaluation.summary import summary
    from opsd_jax.run.config import load_experiment
    from opsd_jax.run.train import train

    join_pod(arguments)
    experiment, text = load_experiment(arguments.gin_file, arguments.gin_bindings)
    stopped: list[bool] = []
    train(experiment, text, arguments.workdir, on_stop=lambda: stopped.append(True))
    if jax.process_index() == 0:
        print(summary(arguments.workdir))
    return arguments.stopped_status if stopped else 0


def run_eval(arguments: argparse.Namespace) -> None:
    if arguments.compare:
        refuse(arguments, "compare", "step", "out", "gin_file", "gin_bindings", "distributed")
        refuse(arguments, "compare", "coordinator", "num_processes", "process_id")
        from opsd_jax.evaluation import compare

        found = compare.compare(*arguments.compare)
        print(compare.table(found), file=sys.stderr)
        print(compare.summary(found))
        return
    if arguments.model:
        refuse(arguments, "model", "step")
    from opsd_jax.run.eval import evaluate_command

    join_pod(arguments)
    evaluate_command(
        arguments.gin_file,
        arguments.gin_bindings,
        arguments.workdir,
        arguments.model,
        arguments.step,
        arguments.out,
    )


def run_generate(arguments: argparse.Namespace) -> None:
    if arguments.model:
        refuse(arguments, "model", "step")
    from opsd_jax.sampling.config import RolloutConfig

    shared = "temperature top_k top_p min_p repetition_penalty presence_penalty".split()
    chosen = {name: getattr(arguments, name) for name in shared}
    for name, value in chosen.items():
        check(f"--{name}", value, hints_of(RolloutConfig)[name])
    settings = RolloutConfig(arguments.max_tokens, **chosen)
    from opsd_jax.run.generate import generate_command  # late: a refusal does not wait for jax

    generate_command(
        arguments.workdir,
        arguments.model,
        arguments.step,
        arguments.prompt,
        settings,
        arguments.seed,
        arguments.stop,
    )


def run_export(arguments: argparse.Namespace) -> None:
    from opsd_jax.run.export import export_command

    export_command(arguments.workdir, arguments.step, arguments.out, arguments.format)


def run_tokens(arguments: argparse.Namespace) -> None:
    from opsd_jax.run.tokens import tokens_command

    tokens_command(arguments.workdir, arguments.step, arguments.num, arguments.seed)


def run_data(arguments: argparse.Namespace) -> None:
    from opsd_jax.run.data import data_command

    data_command(arguments.gin_file, arguments.gin_bindings, arguments.num)


def run_probe(arguments: argparse.Namespace) -> None:
    from opsd_jax.run.probe import probe_command

    probe_command(
        arguments.gin_file, arguments.gin_bindings, arguments.num, arguments.seed, arguments.out
    )


def run_plan(arguments: argparse.Namespace) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"  # Nothing runs; a chip that is here is not taken.
    from opsd_jax.plan.command import plan_command

    plan_command(
        arguments.gin_file,
        arguments.gin_bindings,
        arguments.target,
        arguments.model_config,
        arguments.student_tokens,
        arguments.teacher_tokens,
        arguments.search,
    )


def run_report(arguments: argparse.Namespace) -> None:
    from opsd_jax.evaluation.report import report_command

    report_command(arguments.workdir, arguments.out, arguments.name, arguments.levels)


if __name__ == "__main__":
    sys.exit(main())
