"""Other tools' doors: by these, xarray, zarr and fsspec open a repository by its URL. Each is an entry point."""
