"""Names under which the official library keeps what it took over from other projects; nothing is copied here."""
