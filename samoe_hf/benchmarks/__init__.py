"""How fast the package is, beside what others do with the same work: layers, tracking, training."""
