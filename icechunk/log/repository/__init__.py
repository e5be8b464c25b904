"""The repository log: each change of a repository is an event, the state is their fold, a layout persists them.

`events` and `state` are pure; `settle` is the engine of conditional writes. The three layouts, `entries`, `repo_object`
and `ref_files`, do not import one another; `open`, `create` and `convert` choose among them. Not here: sessions, chunks
and Zarr (`session`, `transfer`, `store`), and the way in which a store keeps its bytes (`storage`).
"""
