"""Files, processes, the console and validation: nothing here depends on a study."""
