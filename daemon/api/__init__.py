"""HTTP dialects: request structs in, events out."""
