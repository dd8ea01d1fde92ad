"""Rows: what a user wrote, from files to samples with exact token ids."""
