"""How things are shown, whatever they are: pages without scripts, cards of a notebook, progress.

What is shown of a run or of a prepared dataset is in `mmray.report`, of samples in `mmray.inspect`.
"""
