"""A stand-in for colpali-engine 0.3.18: names, signatures and results of what the integration replaces."""
