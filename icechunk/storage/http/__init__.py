"""HTTP/1.1 exchanges, and repositories on web servers."""
