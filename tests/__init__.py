"""A package, since torch-fidelity installs one of this name, which would come before a mere folder."""

import os

# before anything imports NumPy: its BLAS starts a thread a core in every worker of xdist, and they wait for each other
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
