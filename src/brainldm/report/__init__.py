"""Pages to look at, made from result files alone: no images are judged here and no network is needed."""

from brainldm.report.page import write_report

__all__ = ["write_report"]
