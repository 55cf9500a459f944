"""Tables of finished runs in, fitted scaling laws, comparisons and a report out; knows nothing of how runs are made."""
