"""Read every sample of a data config once and name what is wrong: python check_data.py --data_config cfgs/….yaml"""

from fourm.data.check import main
from fourm.utils.errors import run_cli

if __name__ == "__main__":
    run_cli(main)
