"""Entry point of `pmc-fast` and `python -m pmc_fast`. Ctrl-C prints one line, also during imports."""

import sys


def main() -> None:
    """Import the command line and run it."""
    try:
        from .cli.main import main as run
    except KeyboardInterrupt:
        print("pmc-fast: interrupted: nothing was written", file=sys.stderr)
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
