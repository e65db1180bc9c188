"""Planning in finite decision processes whose model is known, or known to lie in a set."""
