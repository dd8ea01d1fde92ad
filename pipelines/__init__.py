"""The Ray Data graphs: rows to a prepared dataset (`prepare`), a prepared dataset to batches (`ingest`)."""
