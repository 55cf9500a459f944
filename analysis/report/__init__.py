"""The report: figures, the page, and the tables of the terminal."""
