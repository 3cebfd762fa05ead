"""Samples digits with networks that were trained: every schedule, prediction, scheduler, guidance and clipping."""

import itertools

import pytest

from tests.pipelines.digits import SHAPE, OnSchedule, assert_digits, digits_network
from tests.pipelines.test_sampling_by_distribution import CASES, in_turn, objective
from unetgn.pipelines.sampling import sample
from unetgn.pipelines.schedulers import make_sampling_scheduler
from unetgn.training.objective import make_scheduler

CLASSES = [seed % 10 for seed in range(20)]
WAYS = list(itertools.product([1, 3, 6], [True, False]))  # guidance, clipping
# With strong guidance and without clipping these are not stable with fewer.
STEPS = dict.fromkeys(("pndm", "heun", "kdpm2", "kdpm2_ancestral"), 20)
# Every other one of the chosen cases in one of the ways in turn, the whole product with `-m slow`.
SHARE = [(*case, *WAYS[index % len(WAYS)]) for index, case in enumerate(in_turn(CASES)[::2])]
REST = [(*case, *way) for case in CASES for way in WAYS if (*case, *way) not in SHARE]


@pytest.mark.parametrize(
    ("schedule", "prediction_type", "name", "guidance_scale", "clip"),
    SHARE + [pytest.param(*case, marks=pytest.mark.slow) for case in REST],
)
def test_the_digits_are_those_that_were_asked_for(
    schedule: str, prediction_type: str, name: str, guidance_scale: float, clip: bool
) -> None:
    training_scheduler = make_scheduler(objective(schedule, prediction_type, clip))
    images = sample(
        OnSchedule(digits_network(prediction_type), training_scheduler),
        make_sampling_scheduler(name, training_scheduler, STEPS.get(name, 10)),
        range(len(CLASSES)),
        SHAPE,
        class_labels=CLASSES,
        guidance_scale=guidance_scale,
        clip=clip,
    )
    assert_digits(images, CLASSES)
