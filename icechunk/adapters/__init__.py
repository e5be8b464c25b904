"""Entry points by which xarray, zarr and fsspec open a repository from its URL; one module for each of them.

Not here: the grammar of URLs (`storage.url`), and the session that a URL means (`repository.by_url`).
"""
