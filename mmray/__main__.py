"""`python -m mmray`: the same as the command `mmray`."""

from mmray.cli import main

if __name__ == "__main__":
    main()
