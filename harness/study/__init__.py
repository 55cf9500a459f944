"""The study: its YAML schema, its grid, its Runs and their schedules."""
