"""The repository log: what happens to a repository is an event, its state is their fold, and a layout persists them."""
