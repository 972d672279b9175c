"""The operators of the engine: each has a ``reference.py`` in plain torch beside its kernels."""
