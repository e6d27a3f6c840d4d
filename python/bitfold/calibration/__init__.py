"""The calibrated way of `bitfold.quantize`: data in, block by block through the model, packed matrices out.

`driver.py` is the walk; `survey.py`, `blocks.py` and `sets.py` find what is walked through, `replay.py` and
`streams.py` feed it, `gathering.py`, `statistics.py` and `solving.py` do the work, `checkpoint.py` and
`distributed.py` let it survive and spread. `memory.py` says beforehand what it takes.
"""

from bitfold.calibration.checkpoint import CheckpointError
from bitfold.calibration.memory import MemoryLimitError
from bitfold.calibration.report import CalibrationWarning, Report, report
from bitfold.calibration.settings import Settings

__all__ = ["CalibrationWarning", "CheckpointError", "MemoryLimitError", "Report", "Settings", "report"]
