"""The Points table: read, checked, and split into what is fitted."""
