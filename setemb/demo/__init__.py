"""`setemb demo`: the whole path on real input, from packages to a page: data, features, training, evaluation, index, report."""
