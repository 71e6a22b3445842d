"""What people see: metrics sinks, progress lines, tables, plots, the report page and the video.

Light to import (numpy and the standard library); `report.page` and `report.plots` load matplotlib, `report.video` loads MuJoCo's renderer when used.
"""

from modip_ray.report.metrics import MetricsLog, live_rows, read_metrics
from modip_ray.report.progress import Progress
from modip_ray.report.scores import final_table
from modip_ray.timing import Timer, format_tree, merge_snapshots

__all__ = ["MetricsLog", "Progress", "Timer", "final_table", "format_tree", "live_rows", "merge_snapshots", "read_metrics"]
