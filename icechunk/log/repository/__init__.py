"""The repository log: what happens to a repository is an event, its state is their fold, and a layout persists them.

`entries`, `repo_object` and `ref_files` are the three layouts. Sessions, chunks and Zarr are not known here.
"""
