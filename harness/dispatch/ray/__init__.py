"""The Ray backends: a Ray inside an allocation, and a Ray cluster that is there already."""
