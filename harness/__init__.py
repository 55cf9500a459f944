"""The study engine: one YAML file becomes planned, dispatched, journalled and tracked training runs."""
