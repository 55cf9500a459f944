"""MLflow: the mirror of the journals and the server that shows it."""
