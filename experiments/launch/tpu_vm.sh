#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Cloud TPU: a slice by a queued resource, spot or not, asked for again whenever it is taken away.
# Not run by us: there was no Cloud project to run it in.
#
#   PROJECT=p ZONE=us-west4-a TYPE=v5litepod-16 RUNTIME=v2-alpha-tpuv5-lite SHARE=10.0.0.2:/runs \
#     REPOSITORY=https://… GIN=experiments/paper/qwen3_1p7b.gin RUN=a experiments/launch/tpu_vm.sh
#
#   chip  TYPE           RUNTIME                  hosts x chips
#   v5e   v5litepod-16   v2-alpha-tpuv5-lite      4 x 4
#   v5p   v5p-16         v2-alpha-tpuv5           2 x 4 (the number counts cores)
#   v6e   v6e-16         v2-alpha-tpuv6e          4 x 4
#
# SHARE is a Filestore export (NFS): the workdir lies there, so that all hosts and the next slice see
# it. Or WORKDIR=gs://BUCKET/RUN instead of SHARE: the slice's service account needs
# roles/storage.objectUser on it, and nothing is mounted or installed; after a slice that was killed
# the next start waits a minute for its lock. JAX finds the hosts of a slice by itself (--distributed).
#
# Preemption: a spot slice gets SIGTERM and 30 seconds; the run saves and ends with 75. Whatever the
# slice died of, it is deleted, asked for again, and the same command goes on from the last
# checkpoint; so set train.checkpoint_every_minutes, 30 seconds may be too short to save a large model.
# Statuses 2 (input) and 1 (bug) of every host end it; nothing is deleted then.
# Logs: /share/RUN/logs/HOST.log, appended (with WORKDIR in ~/logs of each host, which goes with it);
# numbers: metrics.jsonl of the workdir.
#
# Flags of libtpu (LIBTPU_INIT_ARGS), with a reason each; from its public tuning guides, not measured:
#   async_collective_fusion…            FSDP's all-gathers run beside the layer that does not need them
#   overlap_compute_collective_tc       v5p, v6e: the same for reductions of gradients
set -euo pipefail

name=${NAME:-opsd-$RUN}
place=(--project="${PROJECT:?}" --zone="${ZONE:?}")
args="--xla_tpu_enable_async_collective_fusion=true --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true --xla_tpu_overlap_compute_collective_tc=true"

state() { gcloud compute tpus queued-resources describe "$name" "${place[@]}" --format='value(state.state)' 2>/dev/null || echo NONE; }
on_all() { gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker=all --command="$1"; }

if [ -n "${WORKDIR:-}" ]; then
  mount=true logs="\$HOME/logs"
else
  WORKDIR=/share/$RUN logs=/share/$RUN/logs
  mount="sudo apt-get install -y -qq nfs-common && sudo mkdir -p /share && (mountpoint -q /share || sudo mount ${SHARE:?} /share)"
fi
setup="$mount &&
  (test -d opsd || git clone -q '${REPOSITORY:?}' opsd) && cd opsd &&
  (test -d .venv || python3 -m venv .venv) && . .venv/bin/activate && pip install -q '.[tpu]'"
# PIPESTATUS: the status of the run, not of tee.
train="cd opsd && . .venv/bin/activate && mkdir -p $logs && export LIBTPU_INIT_ARGS='$args' &&
  opsd train --gin_file='${GIN:?}' --workdir='$WORKDIR' ${FLAGS:-} --distributed --stopped_status=75 2>&1 |
  tee -a $logs/\$(hostname).log; exit \${PIPESTATUS[0]}"

while :; do
  case $(state) in
    NONE)
      gcloud compute tpus queued-resources create "$name" --node-id="$name" "${place[@]}" \
        --accelerator-type="${TYPE:?}" --runtime-version="${RUNTIME:?}" "${KIND:---spot}"
      ;;
    ACTIVE)
      status=0
      { on_all "$setup" && on_all "$train"; } || status=$?
      echo "the run ended with status $status"
      case $status in
        0 | 1 | 2) break ;;
      esac
      [ "$(state)" != ACTIVE ] || sleep 20 # a process was lost, the slice was not
      ;;
    SUSPENDED | SUSPENDING | FAILED)
      gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet
      ;;
    *) sleep 30 ;; # ACCEPTED, PROVISIONING, WAITING_FOR_RESOURCES, CREATING, DELETING
  esac
done
[ "$status" != 0 ] || gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet
exit "$status"
