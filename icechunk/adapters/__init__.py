"""Entry points by which xarray, zarr and fsspec open a repository from its URL. Each is an entry point."""
