#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Plain hosts over ssh: no scheduler, GPUs or TPUs of your own.
#
#   HOSTS="gpu1 gpu2" GIN=experiments/paper/qwen3_1p7b.gin WORKDIR=/shared/runs/a experiments/launch/hosts.sh
#
# Needs on every host: ssh without a password, this checkout at the same path with a .venv
# (pip install '.[cuda]'), and WORKDIR on a file system that all see (NFS, Lustre, Filestore). Process
# 0 is on the first host; the others must reach its PORT. Or WORKDIR=s3://BUCKET/RUN or
# gs://BUCKET/RUN, for which each host needs the vendor's credentials, with LOGS=FOLDER of each host.
#
# Started again until the run is done: 75 = go on from the last checkpoint (preempted, or another
# process was lost), 134 = JAX itself ended a process because another one was lost; 2 is an error in
# the input and 1 a bug, and end it. Ctrl-C here asks the run to save and stop.
# Logs: WORKDIR/logs/START.PROCESS.log (LOGS/… of this machine); numbers: WORKDIR/metrics.jsonl.
#
# Environment, with a reason each:
#   XLA_PYTHON_CLIENT_MEM_FRACTION=.92  JAX takes 75 % of a GPU by default; nothing else runs here
#   NCCL_DEBUG=WARN                     says which link broke when a collective fails
#   XLA_FLAGS                           the latency-hiding scheduler lets FSDP's gathers of weights run
#                                       while the layer before computes; not measured by us. Add
#                                       --xla_gpu_deterministic_ops=true where a resumed run is to be
#                                       the undisturbed one bit for bit: it is slower
# On TPU hosts set ENVIRONMENT= (empty); on CPUs JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo.
set -uo pipefail

read -ra hosts <<<"${HOSTS:?the hosts, separated by blanks}"
gin=${GIN:?the gin file} workdir=${WORKDIR:?a folder that all hosts see}
port=${PORT:-8476} starts=${MAX_STARTS:-100} ssh=${SSH:-ssh -o ServerAliveInterval=30}
environment=${ENVIRONMENT-XLA_PYTHON_CLIENT_MEM_FRACTION=.92 NCCL_DEBUG=WARN XLA_FLAGS=--xla_gpu_enable_latency_hiding_scheduler=true}
here=$(pwd) logs=${LOGS:-$workdir/logs}
mkdir -p "$logs"

stopping=
# shellcheck disable=SC2317,SC2329 # the trap calls it
ask_to_stop() { # SIGTERM to one process is enough: all agree on a step
  stopping=1
  # shellcheck disable=SC2086 # words of a command
  $ssh "${hosts[0]}" "kill -TERM \$(cat '$logs/pid.0')"
}
trap ask_to_stop INT TERM

for ((start = 1; start <= starts; start++)); do
  pids=() status=0
  for process in "${!hosts[@]}"; do
    # exec: the pid that is written is that of the run itself.
    command="cd '$here' && . .venv/bin/activate && mkdir -p '$logs' && echo \$\$ >'$logs/pid.$process' && \
      exec env $environment opsd train --gin_file='$gin' --workdir='$workdir' ${FLAGS:-} \
      --coordinator='${hosts[0]##*@}:$port' --num_processes=${#hosts[@]} --process_id=$process --stopped_status=75"
    # shellcheck disable=SC2086
    $ssh "${hosts[process]}" "$command" >"$logs/$start.$process.log" 2>&1 &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do
    while :; do
      wait "$pid"
      code=$?
      kill -0 "$pid" 2>/dev/null || break # a signal ends wait, not the process
    done
    # Input errors and bugs count more than what they did to the others.
    ((code == 0 || status == 1 || status == 2)) || status=$code
  done
  echo "start $start ended with status $status; logs: $logs/$start.*.log"
  [ -z "$stopping" ] || exit "$status"
  case $status in
    0 | 1 | 2) exit "$status" ;;
  esac
  sleep "${PAUSE:-10}"
done
exit "$status"
