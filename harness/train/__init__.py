"""Training a Series: the worker, its loop, its engine, its checkpoint files, and how it stops."""
