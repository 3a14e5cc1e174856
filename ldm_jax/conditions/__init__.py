"""Conditions of a model: see `base`, `kinds`, `requests` and `tokenizer`."""
