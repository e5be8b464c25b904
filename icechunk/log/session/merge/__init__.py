"""Changes of several sessions side by side: conflicts, merging of forks, differences between snapshots."""
