"""Does dtrain compute what the papers say? Each method against an independent rendering of its mathematics."""
