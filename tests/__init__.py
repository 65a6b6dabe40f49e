"""A package, since torch-fidelity installs one of this name, which would come before a mere folder."""
