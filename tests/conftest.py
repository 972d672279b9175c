"""Shared by all tests."""

import os

# Before torch is imported: its threads spin while they wait for each other, which makes the
# tests many times slower wherever something else wants a core.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
