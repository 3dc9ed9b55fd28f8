"""The command `fastvit`, and `python -m fastvit_cli`."""

import sys


def main() -> None:
    """Run the command; ctrl-c ends it in one line also while it is being loaded."""
    try:
        from fastvit_cli.main import main as command
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        sys.exit(130)
    command()


if __name__ == "__main__":
    main()
