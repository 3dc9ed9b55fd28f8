"""`python -m fastvit_cli` is `fastvit`."""

from fastvit_cli.main import main

if __name__ == "__main__":
    main()
