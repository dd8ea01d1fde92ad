"""Holds what all other packages use, and uses none of them: settings, compiled loops, text that is safe to show."""
