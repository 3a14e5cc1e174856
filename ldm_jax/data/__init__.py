"""Pictures and captions in, numpy batches out; see `sources`, `transforms` and `loader`."""
