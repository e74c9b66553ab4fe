"""The judge of an exercise, in the process of `worker.py`: the learner's functions against known results.

`known.py` has the tests; `examine.py` adds the mistakes that it knows by name.
"""

from __future__ import annotations

import re

import torch

from bardlet.errors import BardletError, is_out_of_memory, one_line
from bardlet.ladder.check import examine
from bardlet.ladder.check.attempt import Attempt
from bardlet.ladder.check.known import TESTS
from bardlet.ladder.check.load import Loaded, raised
from bardlet.ladder.check.mistakes import Finding

FORBIDDEN = re.compile(r"[^\w .,:;()\[\]'=<>+*@/-]")
"""Characters that no finding may have, see `mistakes.DETAIL`."""


def judge(loaded: Loaded, exercise: str, rung: int, note: examine.Note = lambda report: None) -> examine.Report:
    """Return the report on an exercise: a finding for each part whose result differs from the known one.

    A part that is not written yet, or needs one that is not, is untested.
    """
    report, attempt = examine.Report(rung), Attempt(loaded)
    for test in TESTS[exercise]:
        report.doing = f"testing {test.where}"
        note(report)
        torch.manual_seed(1337)
        try:
            test.run(attempt)
            report.holds(test.where, test.holds)
        except NotImplementedError:
            report.untested[test.where] = "a part of it is not written yet"
        except Exception as error:
            if is_out_of_memory(error):
                raise
            said = str(error) if isinstance(error, BardletError) else f"it raises {raised(error)}"
            detail = FORBIDDEN.sub(" ", one_line(ValueError(said)))[:160].rstrip(" .")
            report.add([Finding("exercise", test.where, detail)])
    if report.findings and loaded.modules:
        report.doing = "looking for a known mistake"
        note(report)
        report.findings[:0] = examine.examine(loaded, rung, until=0.0).findings
    report.done, report.doing = True, "done"
    return report
