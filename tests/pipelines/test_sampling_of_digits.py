"""Samples digits with networks that were trained: every schedule, prediction, scheduler, guidance and clipping."""

import itertools

import pytest

from tests.pipelines.digits import SHAPE, OnSchedule, assert_digits, digits_network
from tests.pipelines.test_sampling_by_distribution import CASES, objective
from training.objective import make_scheduler
from unetgn.pipelines.sampling import make_sampling_scheduler, sample

CLASSES = [seed % 10 for seed in range(20)]
WAYS = list(itertools.product([1, 3, 6], [True, False]))  # guidance, clipping
STEPS = {"pndm": 20}  # with strong guidance and without clipping it is not stable with fewer
# Each case in one of the ways in turn, the whole product with `-m slow`.
SHARE = [(*case, *WAYS[index % len(WAYS)]) for index, case in enumerate(CASES)]
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
