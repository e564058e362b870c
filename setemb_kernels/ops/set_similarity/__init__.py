"""Similarities of sets of any sizes: Chamfer, MaxSim, soft forms and others. `op` is the place to start reading."""
