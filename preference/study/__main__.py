"""`python -m preference.study`: the command of preference/study/study.py."""

from common.errors import run_command
from preference.study.study import main

if __name__ == "__main__":
    run_command(main)
