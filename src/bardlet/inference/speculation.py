"""Speculative decoding: drafts of the next tokens from the text so far, so that one step of the model reads several.

A text repeats itself: names, phrases, code. The tokens that followed the last ones earlier are a draft (prompt lookup,
Saxena 2023); the model reads the draft at once, and draws each token as if it had read them one by one. A draft
therefore changes the time, and no token: `readers.PagedReader` gives a row the same bits in any batch.
"""

from __future__ import annotations

from collections.abc import Sequence

LENGTHS = (12, 6, 3)
"""Tokens that must have occurred before, in the order in which they are tried."""
LONGEST = 12
"""Tokens of the longest draft."""
MEMORY = 0.985
"""Weight of an experience after one more step."""


class Drafts:
    """Drafts of the continuation of one text, as long as they are expected to save time."""

    def __init__(self, ids: Sequence[int]) -> None:
        """ids: the text so far."""
        self.ids: list[int] = []
        self._after: list[dict[tuple[int, ...], int]] = [{} for _ in LENGTHS]
        # tokens of drafts that were right and wrong, by length of the match; one of each to begin with
        self._right, self._wrong = [1.0] * len(LENGTHS), [1.0] * len(LENGTHS)
        self._step, self._row = 0.0, 0.15  # seconds of a step without a draft; time of a further row, in steps
        self._level = 0
        for token in ids:
            self.append(token)

    def append(self, token: int) -> None:
        """Add a token to the text."""
        for length, after in zip(LENGTHS, self._after, strict=True):
            if len(self.ids) >= length:
                after[tuple(self.ids[-length:])] = len(self.ids)
        self.ids.append(token)

    def next(self, room: int) -> list[int]:
        """Return a draft of at most `room` tokens; empty if none is worth the time."""
        for level, (length, after) in enumerate(zip(LENGTHS, self._after, strict=True)):
            start = after.get(tuple(self.ids[-length:])) if len(self.ids) >= length else None
            if start is not None:
                self._level = level
                period = len(self.ids) - start  # what followed may reach the end, and goes on as it began
                return [self.ids[start + i % period] for i in range(self._worthwhile(level, min(room, LONGEST)))]
        return []

    def _worthwhile(self, level: int, room: int) -> int:
        """Return the length of draft with most tokens per second, by what is known of such drafts and of the time."""
        self._right[level] = 1 + (self._right[level] - 1) * MEMORY
        self._wrong[level] = 1 + (self._wrong[level] - 1) * MEMORY
        chance = self._right[level] / (self._right[level] + self._wrong[level])
        best, best_speed, expected = 0, 1.0, 1.0
        for number in range(1, room + 1):
            expected += chance**number  # the tokens of the step: its own, and those of the draft that are right
            speed = expected / (1 + number * self._row)
            if speed > best_speed:
                best, best_speed = number, speed
        return best

    def learn(self, drafted: int, right: int, seconds: float) -> None:
        """Learn from a step: the length of its draft, the tokens of it that were right, and the time it took."""
        if not drafted:
            self._step = seconds if not self._step else 0.9 * self._step + 0.1 * seconds
            return
        self._right[self._level] += right
        self._wrong[self._level] += right < drafted
        if self._step:
            row = (seconds / self._step - 1) / drafted
            self._row += 0.1 * (min(max(row, 0.0), 1.0) - self._row)
