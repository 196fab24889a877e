# SPDX-License-Identifier: Apache-2.0
"""What keeps a run alive, written down and the same; knows nothing of the method.

In reading order:
  files               text files of a run: whole or not at all, every value read checked
  foreign_values      values of a file that somebody else wrote, each of its type or told
  hub                 files of the Hugging Face Hub by name
  config_text         which bindings of two operative configs differ
  identity            digests of a run's inputs, by which a resumed run is refused others
  checkpoint_record   what a checkpoint says of itself, and the checksum of every array
  checkpoint          saving and restoring, falling back to the last whole step
  bucket, stage       paths in gs:// and s3://; a workdir there, and the folder that mirrors it
  array_objects       sharded arrays as objects in a bucket
  bucket_checkpoint   checkpoints in a bucket
  metrics             metrics.jsonl, samples, TensorBoard, W&B
  progress            the line that a user watches
  chips               peaks of chips, their memory, the time spent compiling
  goodput             the share of the time since the first start that was kept
  heap                memory that compilers have freed, given back
  profile_window      a profiler trace of some steps
  compilation_cache   compiled programs kept for the next start
  guard               alarms for collapse and leakage, and what ends a run
  pod                 how the processes of a pod wait for each other
  watchdog            how a process ends when another one dies or hangs
  lock, lease         one writer per workdir, on disk and in a bucket
  preemption          SIGTERM and Ctrl-C
"""
