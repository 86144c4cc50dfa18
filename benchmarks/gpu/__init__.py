"""Checks and figures that need a GPU, each part a process: `bash benchmarks/gpu/check.sh SECONDS PART...`."""
