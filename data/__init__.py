"""A package, so that another module named data elsewhere on the path cannot take its place."""
