"""The log layout: one new object for each entry. Creating the next slot is the commit."""
