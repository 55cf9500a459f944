"""Files, processes, the console and validation: nothing here knows a study."""
