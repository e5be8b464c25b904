"""Manifests: chunk references of one or several arrays, as a file and as columns.

Not here: which references share a manifest (`log.session.plan`), and changes to references (`log.session.columns`).
"""

from __future__ import annotations

from icechunk.format.manifest.decoding import decode_manifest
from icechunk.format.manifest.encoding import encode_manifest, max_refs

__all__ = ["decode_manifest", "encode_manifest", "max_refs"]
