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
    "esd": "One step has come from 4.9 to 2.7 and the others were given up, with a diversity of 0.70 at one step: its"
    " loss differentiates the student by both times, and 173 updates have not settled it.",
    "ladd": "Its discriminator knows nothing at first; one step has come from 4.9 to 2.8, and two and four were given"
    " up for it, with grain and saturation above the teacher's.",
    "f_distill": "Alignment is 0.99 and diversity 0.73: as `diff_instruct`, whose gradient it weighs.",
    "lightning": f"At four steps alone: {_AT_FOUR}.",
    "phased_dmd": "At four steps alone, with a diversity of 0.86: `dmd` comes to the same distance there, and two"
    " networks with two critics are more to train.",
    "progressive": f"At four steps alone: {_AT_FOUR}, and it has halved its steps twice in so few updates.",
    "sfd": f"At four steps alone: {_AT_FOUR}.",
    "sgmd": "Alignment is 0.99 to 1.00 and diversity 0.72, 0.63 and 0.59: it narrows to fewer pictures of a caption,"
    " and does not so on the digits.",
    "sid": "One step has come from 4.9 to 1.9, but two and four are worse than untrained: diversity falls to 0.8 and"
    " saturation rises. After a stage of `kd` it left that one's figures too.",
    "twin_flow": "One step has come from 4.9 to 3.1, with a diversity of 0.73: an update asks for two and a half times"
    " as many rows as one of `psd`, and 75 have not taught it its own samples.",
    "uni_instruct": "As `sid`, whose gradient it weighs by a density ratio: diversity 0.8 at all counts.",
}

_DIGITS: Mapping[str, str] = {
    "ladd": "As on the shapes, its discriminator knows nothing at first: one step has come from 7.1 to 4.5, and two and"
    " four were given up for it.",
    "nft": "It follows a reward between its own samples and not the teacher's distance: one and two steps stay nearly"
    " where they were, and four are at 0.99. It is meant to come after another method.",
    "phased_dmd": "At four steps alone, where the teacher itself is at 1.02: 92 updates of two networks with two"
    " critics came to 1.11 (`dmd`: 1.67).",
    "pso": "As `nft`: a reward between its own samples, and no word of the teacher; it too comes after another method.",
    "scott": "Four steps are better than the teacher's, one and two are not yet: two steps of the teacher a target"
    " leave it three quarters of the updates that `lcm` gets, and the noise in them is not averaged out so soon.",
    "slam": "`lcm` with a share of each of its steps, and behind it (6.5 / 1.5 / 0.7) in as many updates: where that"
    " share is small, both sides are nearly one point and teach little.",
    "twin_flow": "Diversity is 0.64 at one step and 0.83 at two: as on the shapes, 77 updates have not taught it its"
    " own samples.",
}

WHY: Mapping[str, Mapping[str, str]] = {"shapes": _SHAPES, "digits": _DIGITS}
"""By task."""
