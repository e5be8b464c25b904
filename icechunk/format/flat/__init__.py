"""FlatBuffers and FlexBuffers: single tables, and whole vectors of tables as numpy columns."""
