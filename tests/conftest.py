"""Shared by all tests."""

import os

# The tests compare numbers: more threads than cores only make them slower.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
