"""The report in the browser that `install.sh` brings; `make test` skips it where there is none."""

from test_report_page import page, test_report_in_a_browser

__all__ = ["page", "test_report_in_a_browser"]
