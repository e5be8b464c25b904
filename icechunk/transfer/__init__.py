"""Transfer of bytes between sessions and storage: pools of concurrent requests, and the caches in front of them.

Not here: tries, timeouts and the requests of a kind of storage (`storage`), and which bytes belong together
(`log.session`, `session`).
"""
