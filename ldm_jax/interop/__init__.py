"""Reading and writing of weights: each module reads or writes one layout."""
