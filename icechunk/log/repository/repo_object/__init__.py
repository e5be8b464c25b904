"""The repo-object layout, format 2.1 as published: every change replaces ``repo``."""
