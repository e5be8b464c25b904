"""Icechunk for asyncio: a transactional storage engine for Zarr."""
