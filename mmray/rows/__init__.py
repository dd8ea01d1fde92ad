"""Rows: from the files that a user wrote to samples with exact token ids."""
