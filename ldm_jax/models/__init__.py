"""Flax Linen modules: networks only. No input/output, no noise schedule, no configuration."""
