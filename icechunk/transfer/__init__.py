"""What moves bytes: pools that keep the wire busy, and the caches in front of them."""
