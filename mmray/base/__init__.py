"""What every room stands on and which needs none of them: settings, compiled loops, texts that are safe to show."""
