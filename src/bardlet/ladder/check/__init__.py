"""`bardlet check`: test a learner's own code of the lecture by its behavior.

`run.py` starts `worker.py` in a process of its own, with limits. There, `source.py` takes the classes from the file,
`sizes.py` knows the usual names of sizes, `uses.py` guesses the unusual ones, and `build.py` builds and calls the
classes. `trace.py` records the tensor operations of a forward pass; `softmax.py` finds the softmaxes in it, and
`attention.py` the attention. `modules.py`, `model.py`, `translation.py`, `generation.py`, `weights.py` and
`learning.py` test one part each. `script.py` reads the training loop from the syntax tree. `examine.py` runs all tests,
class by class, and `mistakes.py` says each mistake in a sentence. A file with an exercise of the course goes to
`judge.py`, which compares its functions with the results of `known.py`, and with those of wrong answers in
`misses.py`.
"""
