"""Looking after a repository: expiration, collection of garbage, pruning of the log, storage statistics."""
