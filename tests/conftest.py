"""Shared by all tests."""

import contextlib
import os
import signal

# A shell lets what it starts in the background ignore Ctrl-C, and so would the processes that tests
# interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Before torch is imported: its threads spin while they wait for each other, which makes the
# tests many times slower wherever something else wants a core.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

with contextlib.suppress(ModuleNotFoundError):  # on a machine that only runs tests/gpu
    from hypothesis import settings

    # How long an example takes says more about the machine than about the code.
    settings.register_profile("deltaserve", deadline=None)
    settings.load_profile("deltaserve")

# Before Triton is imported, which some libraries do: without a GPU its kernels are interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
