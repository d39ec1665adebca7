"""Rows, phases and settings of small trainings."""

from jz3.training import Phase, TrainSettings

SETTINGS = TrainSettings(learning_rate=3e-3, max_length=128, batch_packs=2, save_every=0)


def rows(count, offset=1):
    return [
        (f"## Question\nWhat is {i} + {offset}?\n\n## Solution\n", f"The sum is \\boxed{{{i + offset}}}.")
        for i in range(count)
    ]


PHASES = (Phase(name="first", rows=rows(60)), Phase(name="second", rows=rows(30, 4)))
