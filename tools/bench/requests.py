"""CPU time of requests for 16 KiB objects, ours beside plain aiobotocore's: ``python -m tools.bench.requests``.

Both run in one process against one MinIO, in turns; the figures are this process's CPU time alone.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from aiobotocore.config import AioConfig
from aiobotocore.session import get_session

from icechunk.config import S3Options
from icechunk.credentials import S3Credentials, S3StaticCredentials
from icechunk.storage.s3.storage import S3Storage
from tools import services

BUCKET = "bench"
SIZE = 16 * 1024
TASKS = 16


async def cpu_ms(operation: Callable[[str], Awaitable[Any]], keys: list[str]) -> float:
    """CPU time of one operation, ms, over all keys with `TASKS` at a time."""
    waiting = iter(keys)

    async def work(waiting: Iterable[str]) -> None:
        for key in waiting:
            await operation(key)

    began = time.process_time()
    async with asyncio.TaskGroup() as group:
        for _ in range(TASKS):
            group.create_task(work(waiting))
    return (time.process_time() - began) / len(keys) * 1e3


async def measure(service: services.S3Service, count: int, repeat: int) -> None:
    """Print the best of `repeat` rounds, and their ratio."""
    data = os.urandom(SIZE)
    keys = [f"{n:06d}" for n in range(count)]
    ours = S3Storage(
        BUCKET,
        options=S3Options(region=service.region, endpoint_url=service.endpoint, allow_http=True, force_path_style=True),
        credentials=S3Credentials.Static(S3StaticCredentials(service.access_key, service.secret_key)),
    )
    async with get_session().create_client(
        "s3",
        region_name=service.region,
        endpoint_url=service.endpoint,
        aws_access_key_id=service.access_key,
        aws_secret_access_key=service.secret_key,
        config=AioConfig(s3={"addressing_style": "path"}, max_pool_connections=TASKS),
    ) as client:

        async def plain_get(key: str) -> None:
            answer = await client.get_object(Bucket=BUCKET, Key=key)
            async with answer["Body"] as body:
                assert await body.read() == data

        async def our_get(key: str) -> None:
            assert (await ours.get(key)).data == data

        operations: dict[str, dict[str, Callable[[str], Awaitable[Any]]]] = {
            "PUT": {
                "ours": lambda key: ours.put(key, data),
                "aiobotocore": lambda key: client.put_object(Bucket=BUCKET, Key=key, Body=data),
            },
            "GET": {"ours": our_get, "aiobotocore": plain_get},
        }
        for verb, systems in operations.items():
            best = {name: float("inf") for name in systems}
            for _ in range(repeat):
                for name, operation in systems.items():
                    best[name] = min(best[name], await cpu_ms(operation, keys))
            ratio = best["ours"] / best["aiobotocore"]
            print(f"{verb} {SIZE} B: ours {best['ours']:.3f} ms, aiobotocore {best['aiobotocore']:.3f} ms: {ratio:.3f}")
    await ours.aclose()


def main() -> None:
    """Start MinIO and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    with services.minio(buckets=[BUCKET]) as service:
        asyncio.run(measure(service, options.count, options.repeat))


if __name__ == "__main__":
    main()
