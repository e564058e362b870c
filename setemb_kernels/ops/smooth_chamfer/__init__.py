"""All-pairs smooth-Chamfer similarity. `op` is the place to start reading."""
