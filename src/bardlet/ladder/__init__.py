"""The ladder: train every rung of the lecture on the same text, measure it, and compare it with the rung before.

`rungs.py` defines the rungs, `run.py` trains them, `report.py` writes the page, `pictures.py` draws its pictures,
`sources.py` extracts the rungs' code, and `experiments.py` runs the math as experiments.
"""
