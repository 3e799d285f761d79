"""The programs: run from a checkout, not part of the wheel."""

import os

from train.heap import keep_memory

# LAPACK's own threads (QR on CPU) spin beside XLA's: where other work shares the cores, a step of a
# router with a basis was measured to take up to ten times as long. It is read when scipy is loaded.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Threads choose their arena when they first ask for memory, so this comes before XLA's threads.
keep_memory()
