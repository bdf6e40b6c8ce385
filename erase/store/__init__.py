"""Everything on disk: files, weights, deltas, model cards, labelled images."""
