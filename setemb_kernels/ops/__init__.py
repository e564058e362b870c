"""The ops, one folder each: `op` (public function, schema, fake, autograd, autocast), `reference`, `triton`."""
