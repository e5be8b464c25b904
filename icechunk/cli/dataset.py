"""The real data that the demo ingests: files of the PyPI package ``iris-sample-data``, read as xarray datasets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from icechunk.cli.terminal import CommandError

__all__ = ["MONTHS", "SCENARIOS", "SEA_SURFACE", "compare", "corrected", "joined", "load"]

MONTHS = (
    "NEMO/nemo_1m_20150101-20150201_grid-T.nc",
    "NEMO/nemo_1m_20150201-20150301_grid-T.nc",
    "NEMO/nemo_1m_20150301-20150401_grid-T.nc",
)
"""Monthly means of the NEMO ocean model: January, February and March 2015, one time step each."""

SCENARIOS = {"a1b": "A1B_north_america.nc", "e1": "E1_north_america.nc"}
"""240 years of air temperature over North America under two emission scenarios (Met Office)."""

SEA_SURFACE = "ostia_monthly.nc"
"""54 months of sea surface temperature of the equatorial belt (Met Office OSTIA)."""

TIME = "time_counter"
BIAS_CELSIUS = 0.05


def load(name: str) -> Any:
    """The dataset of one file, decoded as xarray decodes it by default, in memory.

    Raises
    ------
    CommandError
        A package of the ``demo`` extra is missing, or the file is.
    """
    try:
        import iris_sample_data
        import netCDF4  # noqa: F401
        import xarray
    except ImportError as error:
        raise CommandError(f"the demo needs {error.name}: pip install 'aioicechunk[demo]'") from error
    path = Path(iris_sample_data.path) / name
    if not path.is_file():
        raise CommandError(f"iris-sample-data has no {name} here ({path}): pip install -U iris-sample-data")
    with xarray.open_dataset(path, engine="netcdf4", decode_timedelta=False) as source:
        return source.load()


def joined(first: Any, *others: Any) -> Any:
    """The expected result of appending `others` to `first` along the months' time dimension."""
    import xarray

    return xarray.concat(
        [first, *others],
        dim=TIME,
        data_vars="minimal",
        coords="minimal",
        compat="override",
        join="override",
        combine_attrs="override",
    )


def corrected(months: Any) -> tuple[Any, Any, dict[str, slice]]:
    """February's sea surface temperature without a bias: (patch to write, all months after it, region of the patch)."""
    import xarray

    region = {TIME: slice(1, 2)}
    february = months["tos"].isel(region)
    values = february.values - february.dtype.type(BIAS_CELSIUS)
    after = months.copy(deep=True)
    after["tos"][region] = values
    return xarray.Dataset({"tos": (february.dims, values)}), after, region


def compare(expected: Any, found: Any) -> list[str]:
    """Every difference in names, types, shapes, attributes of variables and bits of values; none when equal."""
    import numpy as np

    differences = []
    missing = set(expected.variables) ^ set(found.variables)
    if missing:
        differences.append(f"variables differ: {', '.join(sorted(map(str, missing)))}")
    for name in sorted(set(expected.variables) & set(found.variables), key=str):
        want, got = expected.variables[name], found.variables[name]
        if (want.dims, want.shape, want.dtype) != (got.dims, got.shape, got.dtype):
            differences.append(
                f"{name}: {got.dtype}{got.dims}{got.shape} instead of {want.dtype}{want.dims}{want.shape}"
            )
        elif want.attrs != got.attrs:
            differences.append(f"{name}: attributes differ")
        elif want.dtype == object:
            # dates of calendars that numpy has no type for
            if not np.array_equal(want.values, got.values):
                differences.append(f"{name}: values differ")
        elif want.values.tobytes() != got.values.tobytes():
            differences.append(f"{name}: values differ")
    return differences
