"""Conclusions from fits: comparisons at equal loss, optima, predictions, and the notes that qualify them."""
