"""Transfer of bytes: pools of concurrent requests, and the caches in front of them."""
