"""An explicit-state model of the log layout, and a checker of traces against it. See ``README.md`` beside this file."""
