"""The catalogue: which bases, deltas and versions of deltas there are, and where they come from."""
