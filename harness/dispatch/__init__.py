"""Dispatchers: they start workers somewhere and tell whether they still run; results never travel through them."""
