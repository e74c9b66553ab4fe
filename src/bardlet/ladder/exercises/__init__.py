"""The course's exercises: what each asks, its starter file and its hints, and a reader's progress.

`table.py` lists the exercises and `hints.py` their hints; `starters.py` finds the exercise of a file and copies the
starter files, which are in exercises/ of the repository; `progress.py` keeps what is done. The judge is
`ladder/check/judge.py`.
"""
