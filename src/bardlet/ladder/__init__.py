"""The ladder: every rung of the lecture trained on the same text, measured, and shown beside the one before.

`rungs.py` says what the rungs are, `run.py` trains them, `report.py` makes the page, `pictures.py` its pictures,
`sources.py` finds their code, and `experiments.py` holds the maths as experiments.
"""
