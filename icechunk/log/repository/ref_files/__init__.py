"""The ref-files layout, format 1: one small object for each branch and tag, and the upgrade to format 2."""
