"""``python -m fourm COMMAND``: the console script ``fourm``."""

from fourm.cli import main

if __name__ == "__main__":
    main()
