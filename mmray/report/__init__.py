"""Reports prepared datasets and runs: tables in a terminal, pages with charts, objects in a notebook.

`prepared.py` and `run.py` read, `charts.py` turns numbers into shapes, `prepared_page.py` and `run_page.py` compose
pages, `tables.py` prints.
"""

from mmray.report.prepared_page import prepared_page
from mmray.report.run import Run, live_run
from mmray.report.run_page import run_page
from mmray.report.tables import prepared_table, run_table

__all__ = ["Run", "live_run", "prepared_page", "prepared_table", "run_page", "run_table"]
