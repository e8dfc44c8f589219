"""Run the command ``fourm`` as ``python -m fourm COMMAND``."""

from fourm.cli import main

if __name__ == "__main__":
    main()
