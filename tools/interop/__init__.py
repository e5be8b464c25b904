"""Scripts that run against our library and against the official one: same names, same results."""
