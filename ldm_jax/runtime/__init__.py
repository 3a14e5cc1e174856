"""The environment of a run: devices, checkpoints, logs, the compilation cache."""
