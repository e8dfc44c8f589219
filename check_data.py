"""Read every sample of a data config once and name what is wrong: python check_data.py --data_config cfgs/….yaml"""

from fourm.utils.errors import run_cli
from fourm.utils.interrupts import end_at_once

if __name__ == "__main__":
    end_at_once()  # what follows takes seconds
    from fourm.tools.check import main

    run_cli(main)
