"""From the fold of a session to the files of a commit: which manifests are written anew, and what is in them."""
