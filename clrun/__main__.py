"""`python -m clrun`; processes started by spawn import this file again, hence the guard."""

from clrun.cli import main

if __name__ == "__main__":
    main()
