"""Why a method is no better than its teacher at the same steps here: one sentence each, read off its figures.

Kept by hand beside the leaderboard, because figures say that a method fell behind and not what it fell behind in.
"""

from collections.abc import Mapping

_AT_FOUR = (
    "the teacher's own four steps are as good as all its 32, within ± 0.06, which leaves little to win at this count"
)

_SHAPES: Mapping[str, str] = {
    "agd": "It learns guidance along the teacher's own path and nothing of longer steps: it is the guided teacher at"
    " half the evaluations a step.",
    "diff_instruct": "Alignment is 1.00 and diversity 0.65: it narrows to fewer pictures of a caption, fastest of its"
    " family.",
    "ect": "The only one that asks the teacher nothing but its weights to begin with; it is still far from done, with a"
    " diversity of 0.62 at one step.",
    "esd": "One step has come from 4.9 to 3.1 and the others were given up: its loss differentiates the student by"
    " both times, and 173 updates have not settled it.",
    "ladd": "Its discriminator knows nothing at first; one step has come from 4.9 to 2.8, and two and four were given"
    " up for it, with grain and saturation above the teacher's.",
    "f_distill": "Alignment is 0.99 and diversity 0.73: as `diff_instruct`, whose gradient it weighs.",
    "lightning": f"At four steps alone: {_AT_FOUR}.",
    "progressive": f"At four steps alone: {_AT_FOUR}, and it has halved its steps twice in so few updates.",
    "sfd": f"At four steps alone: {_AT_FOUR}.",
    "sid": "One step has come from 4.9 to 1.9, but two and four are worse than untrained: diversity falls to 0.8 and"
    " saturation rises. After a stage of `kd` it left that one's figures too.",
    "tbcm": "Four steps are nearly the teacher's while one is worse than untrained: it learns along its own paths from"
    " noise, and the longest jumps come last.",
    "uni_instruct": "As `sid`, whose gradient it weighs by a density ratio: diversity 0.8 at all counts.",
}

_UNSETTLED = (
    "One step is worse than untrained and shows {} of what is asked; at the same settings it came to {} on the shapes."
    " Its target is a derivative along the teacher's path in the student itself, and what differs here is not known yet"
)

_DIGITS: Mapping[str, str] = {
    "ayf": _UNSETTLED.format("0.64", "2.6 / 0.98 / 0.98") + ".",
    "esd": "Diversity is 0.61 at one step and 0.82 at two: as on the shapes, 173 updates have not settled it.",
    "imean_flow": _UNSETTLED.format("0.41", "2.7 / 0.95 / 0.95") + ".",
    "mean_flow": _UNSETTLED.format("0.35", "2.4 / 0.98 / 0.98") + ".",
    "scott": "Four steps are better than the teacher's, one and two are not yet: two steps of the teacher a target"
    " leave it three quarters of the updates that `lcm` gets, and the noise in them is not averaged out so soon.",
}

WHY: Mapping[str, Mapping[str, str]] = {"shapes": _SHAPES, "digits": _DIGITS}
"""By task."""
