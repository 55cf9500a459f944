"""One way from a planned study to tasks in a backend's hands."""
