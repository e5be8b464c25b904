"""Files virtualised with VirtualiZarr into this package, and read back: the references are those of the files.

``python -m tools.interop.virtualizarr_trip FOLDER`` in an environment with VirtualiZarr (and without the official
library): every NetCDF file of iris-sample-data, and HDF5 files made here, are virtualised, written, committed, read
through xarray and through VirtualiZarr's own reader, and compared. Prints what became of each file, as JSON.
"""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

import icechunk

__all__ = ["trip"]


def make_files(folder: Path) -> None:
    """HDF5 files with what they can hold: chunked, contiguous, compressed, shuffled, partial and missing chunks."""
    import h5py

    random = np.random.default_rng(7)
    made: dict[str, tuple[Any, dict[str, Any]]] = {
        "contiguous": (random.integers(0, 9, (5, 7)), {}),
        "chunked": (random.random((10, 9)), {"chunks": (4, 5)}),
        "zipped": (random.integers(0, 99, (30, 20), "i4"), {"chunks": (8, 8), "compression": "gzip"}),
        "shuffled": (random.random((50,)), {"chunks": (16,), "compression": "gzip", "shuffle": True}),
        "big": (random.integers(0, 9, (6, 6), "i2").astype(">i2"), {"chunks": (3, 3)}),
        "scalar": (np.float64(4.5), {}),
    }
    for name, (values, how) in made.items():
        with h5py.File(folder / f"made_{name}.h5", "w") as file:
            file.create_dataset(name, data=values, **how)
    with h5py.File(folder / "made_sparse.h5", "w") as file:
        sparse = file.create_dataset("sparse", (40,), "f4", chunks=(10,), fillvalue=-1.0)
        sparse[10:20] = 3.0
    times = xr.Dataset(
        {"t": (("time", "y", "x"), random.random((12, 8, 6)).astype("f4"))},
        {"time": np.arange(12), "y": np.arange(8) * 0.5},
    )
    times.to_netcdf(
        folder / "made_times.nc", engine="h5netcdf", encoding={"t": {"chunksizes": (3, 4, 6), "zlib": True}}
    )


def trip(path: Path, repo: Any, prefix: str) -> str:
    """Virtualise one file into a group of its own, and compare what comes back."""
    from obspec_utils.registry import ObjectStoreRegistry
    from obstore.store import LocalStore
    from virtualizarr import open_virtual_dataset
    from virtualizarr.parsers import HDFParser, IcechunkParser, NetCDF3Parser

    registry = ObjectStoreRegistry({"file://": LocalStore()})
    is_hdf = path.read_bytes()[:4] == b"\x89HDF"
    parser = HDFParser() if is_hdf else NetCDF3Parser()
    try:
        virtual = open_virtual_dataset(f"{prefix}{path.name}", registry=registry, parser=parser, loadable_variables=[])
    except Exception as error:
        return f"not virtualised by VirtualiZarr: {type(error).__name__}"
    group = path.stem
    session = repo.writable_session("main")
    virtual.vz.to_icechunk(session.store, group=group, last_updated_at=datetime.now(UTC) + timedelta(seconds=2))
    session.commit(path.name)
    session = repo.readonly_session("main")
    ours = xr.open_zarr(session.store, group=group, consolidated=False, decode_cf=False).load()
    how: dict[str, Any] = {"engine": "h5netcdf", "phony_dims": "sort"} if is_hdf else {"engine": "scipy"}
    expected = xr.open_dataset(path, decode_cf=False, **how)
    compared = 0
    for name, variable in expected.variables.items():
        if name in ours.variables and variable.dtype.kind in "iuf":
            np.testing.assert_array_equal(ours[name].values, variable.values, err_msg=str(name))
            compared += 1
    expected.close()
    store = IcechunkParser(group=group).parse_session(session, registry, native_chunks_prefix=f"{prefix}none")
    for name in virtual.variables:
        data = virtual[name].variable.data
        if hasattr(data, "manifest"):
            again = store._group.arrays[name].manifest
            # Chunks that VirtualiZarr inlines become chunks of ours, which may be objects.
            before = {key: ref for key, ref in data.manifest.dict().items() if ref["path"].startswith("file:")}
            after = {key: ref for key, ref in again.dict().items() if key in before}
            if before != after or len(again.dict()) != len(data.manifest.dict()):
                raise AssertionError(f"{path.name}: the references of {name} changed: {before} is now {after}")
    return f"equal: {compared} variables"


def main(arguments: list[str]) -> None:
    """See the module."""
    import iris_sample_data

    warnings.simplefilter("ignore")
    folder = Path(arguments[0]).resolve()
    for path in sorted(Path(iris_sample_data.path).glob("*.nc")):
        shutil.copy(path, folder)
    make_files(folder)
    prefix = f"file://{folder}/"
    config = icechunk.RepositoryConfig.default()
    config.set_virtual_chunk_container(
        icechunk.VirtualChunkContainer(prefix, icechunk.local_filesystem_store(str(folder)))
    )
    access: Any = {prefix: icechunk.credentials.LocalFileSystemAccess}
    repo = icechunk.Repository.create(icechunk.in_memory_storage(), config, access)
    print(json.dumps({path.name: trip(path, repo, prefix) for path in _files(folder)}))


def _files(folder: Path) -> Iterator[Path]:
    yield from (path for path in sorted(folder.iterdir()) if path.suffix in (".nc", ".h5"))


if __name__ == "__main__":
    main(sys.argv[1:])
