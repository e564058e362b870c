"""A stand-in for PyLate 1.6: names, signatures and results of what `setemb_kernels.integrations.pylate` replaces."""
