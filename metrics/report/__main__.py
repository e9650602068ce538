"""`python -m metrics.report`: the command of metrics/report/page.py."""

from common.errors import run_command
from metrics.report.page import main

if __name__ == "__main__":
    run_command(main)
