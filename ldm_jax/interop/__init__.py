"""Other people's weights, in and out: each file here reads or writes one layout."""
