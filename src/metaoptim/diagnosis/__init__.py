"""Looks into a run: does it adapt, what does it reuse, where are its steps too long?"""

from metaoptim.diagnosis.diagnose import diagnose
from metaoptim.diagnosis.result import Diagnosis, Reading

__all__ = ["Diagnosis", "Reading", "diagnose"]
