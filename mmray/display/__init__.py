"""Displays things, whatever they are: pages without scripts, cards in a notebook, progress.

`mmray.report` decides what to show of runs and prepared datasets, `mmray.inspect` what to show of samples.
"""
