"""Where a run lives: devices, checkpoints, logs, the compilation cache."""
