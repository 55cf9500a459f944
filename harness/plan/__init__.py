"""The plan of a study: clusters, memory, speed, resources, and what is left to train."""
