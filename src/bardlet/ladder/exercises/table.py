"""The exercises in their order: one a rung, and the four that the lecture leaves at its end."""

from __future__ import annotations

from dataclasses import dataclass

from bardlet.ladder.exercises.hints import HINTS
from bardlet.ladder.rungs import LADDER


@dataclass(frozen=True)
class Exercise:
    """An exercise.

    name: as in the line `# exercise: one-head` of its file; task: the sentence after its title; parts: the functions to
    write; minute: of the lecture, h:mm:ss, empty for what follows the lecture; page: of the course, below docs/.
    """

    name: str
    file: str
    rung: int
    title: str
    task: str
    parts: tuple[str, ...]
    minute: str
    page: str

    @property
    def hints(self) -> tuple[str, str, str]:
        """A question, the idea, and the line."""
        return HINTS[self.name]

    @property
    def where(self) -> str:
        """The source of the idea: a minute of the lecture, its exercises, or papers."""
        if self.minute:
            return f"the lecture at {self.minute}"
        return "the papers that the page names" if self.file[0].isdigit() else "the lecture's exercises"


def _rung(number: int, title: str, task: str, parts: str, minute: str = "") -> Exercise:
    """Return the exercise of a rung."""
    name = LADDER[number - 1].name
    file = f"{number:02}-{name}"
    return Exercise(name, f"{file.replace('-', '_')}.py", number, title, task, tuple(parts.split()), minute,
                    f"rungs/{file}.md")


EXERCISES = (
    _rung(1, "The bigram", "A table whose row of a token holds the logits of the next one.",
          "BigramLanguageModel.forward BigramLanguageModel.generate", "0:22:11"),
    _rung(2, "An average of the past", "The mean over each position and all before it, in three ways.",
          "average_by_loop average_by_matrix average_by_softmax", "0:42:13"),
    _rung(3, "One head of self-attention", "The equal weights of the average become weights computed from the text.",
          "Head.forward", "1:02:00"),
    _rung(4, "Several heads", "Small heads in parallel, their outputs side by side.",
          "MultiHeadAttention.__init__ MultiHeadAttention.forward", "1:21:59"),
    _rung(5, "Feed-forward", "A layer that computes on each position alone.", "FeedForward.__init__ "
          "FeedForward.forward", "1:24:25"),
    _rung(6, "Residual connections", "A block adds to x; its feed-forward layer is four times as wide inside.",
          "FeedForward.__init__ Block.forward", "1:26:48"),
    _rung(7, "LayerNorm", "The norm itself, and a block that has one before each part.",
          "LayerNorm.forward Block.forward", "1:32:51"),
    _rung(8, "Dropout", "Training sets random values to 0; evaluation does not.", "Dropout.forward", "1:37:49"),
    _rung(9, "RMSNorm and rotary positions", "A norm without a mean, and positions as rotations.",
          "RMSNorm.forward rotate"),
    _rung(10, "SwiGLU", "A feed-forward layer with a gate.", "SwiGLU.forward"),
    _rung(11, "QK-norm", "Queries and keys are normalized, then rotated, then multiplied.", "Attention.forward"),
    _rung(12, "Muon", "The five steps that give every direction of a gradient the same length.", "orthogonalize"),
    _rung(13, "An average of weights", "The mean of the weights over the last steps, in one copy.", "add_to_average"),
    Exercise("heads", "a_heads.py", 8, "Many heads at once", "All heads in one tensor, as another dimension of the "
             "batch.", ("MultiHeadAttention.forward",), "", "exercises/heads.md"),
    Exercise("addition", "b_addition.py", 8, "A GPT that adds", "Sums as text, and a loss on the answer alone.",
             ("write_sum", "make_batch"), "", "exercises/addition.md"),
    Exercise("finetune", "c_finetune.py", 8, "Pretrain, then fine-tune", "A model that starts from the weights of "
             "another.", ("start_from",), "", "exercises/finetune.md"),
    Exercise("paper", "d_paper.py", 9, "A feature from a paper", "The squared ReLU.", ("FeedForward.forward",), "",
             "exercises/paper.md"),
)

BY_NAME = {exercise.name: exercise for exercise in EXERCISES}
