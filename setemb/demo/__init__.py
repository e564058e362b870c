"""`setemb demo`: the whole path on real input, from packages to a page."""
