"""`python -m vmrun` is the `vmrun` command."""

from vmrun.cli import main

if __name__ == "__main__":
    main()
