"""xarray and time travel, cell by cell, without an ``await``.

python examples/notebook.py
"""

# %% A data set, and a repository in memory
import numpy as np
import pandas as pd
import xarray as xr

import icechunk
from icechunk.xarray import to_icechunk

days = pd.date_range("2026-01-01", periods=30)
weather = xr.Dataset(
    {"temperature": (("time", "station"), np.random.default_rng(0).normal(5, 3, (30, 3)).round(1))},
    coords={"time": days, "station": [1317, 1492, 1026]},
)
repo = icechunk.Repository.create(icechunk.in_memory_storage())

# %% The first three weeks
session = repo.writable_session("main")
to_icechunk(weather.isel(time=slice(0, 21)), session)
first = session.commit("January, three weeks")
repo.create_tag("preliminary", first)

# %% Append the rest
with repo.transaction("main", message="January, the last days") as store:
    to_icechunk(weather.isel(time=slice(21, None)), store.session, append_dim="time")

# %% A correction, on a branch of its own until it has been reviewed
repo.create_branch("correction", repo.lookup_branch("main"))
session = repo.writable_session("correction")
corrected = weather.isel(time=slice(0, 7)) - 0.5
to_icechunk(corrected.drop_vars(["time", "station"]), session, region={"time": slice(0, 7), "station": slice(None)})
session.commit("The first week was half a degree too warm")
print(repo.diff(from_branch="main", to_branch="correction"))


# %% Three versions, side by side
def read(session: icechunk.Session) -> xr.Dataset:
    dataset: xr.Dataset = xr.open_zarr(session.store, consolidated=False).load()
    return dataset


for name, version in {
    "preliminary": read(repo.readonly_session(tag="preliminary")),
    "main": read(repo.readonly_session("main")),
    "correction": read(repo.readonly_session("correction")),
}.items():
    print(f"{name:12} {version.sizes['time']} days, mean {float(version.temperature.mean()):.2f} °C")

# %% How it came to be
for snapshot in repo.ancestry(branch="correction"):
    print(snapshot.written_at.strftime("%H:%M:%S"), snapshot.id, snapshot.message)
