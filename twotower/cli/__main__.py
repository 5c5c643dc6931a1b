"""Run the command line: python -m twotower.cli."""

from .commands import main

if __name__ == "__main__":
    main()
