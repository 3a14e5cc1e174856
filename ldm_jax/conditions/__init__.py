"""What a model is told: see `base`, `kinds`, `requests` and `tokenizer`."""
