"""The two logs of the engine: `session` (changes before a commit) and `repository` (what happened to a repository)."""
