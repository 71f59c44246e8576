"""`distillation/cards.py`: times on cards that are not here, by their data sheets."""

import pytest

from hsivi_diffusers.distillation.cards import CARDS, COMPUTE, LAUNCH, TRAFFIC, Work, find_card


@pytest.mark.parametrize(
    ("given", "name"), [("rtx4090", "RTX 4090"), ("RTX 4090", "RTX 4090"), ("a100 40gb", "A100 40GB")]
)
def test_a_card_is_found_by_its_name_however_it_is_written(given, name):
    assert find_card(given) == (name, CARDS[name])


@pytest.mark.parametrize(
    ("given", "message"),
    [("RTX 4900", "'RTX 4900' is not known; did you mean RTX 4090.: give one of T4, "), ("", "is not known")],
)
def test_another_is_refused_with_the_table(given, message):
    with pytest.raises(ValueError, match=message):
        find_card(given)


def test_operations_and_traffic_add_up_and_a_small_network_waits_for_its_launches():
    card = CARDS["H100"]
    flops, traffic = 989e12 * COMPUTE, 3350e9 * TRAFFIC  # of a second each
    assert card.seconds(Work(flops, 0, 0), half=True) == pytest.approx(1)
    assert card.seconds(Work(flops, 2 * traffic, 0), half=True) == pytest.approx(3)
    assert card.seconds(Work(flops, 0, 0), half=False) == pytest.approx(989 / 67)
    assert card.seconds(Work(flops, 0, 2 / LAUNCH), half=True) == pytest.approx(2)


def test_every_card_is_faster_in_half_precision():
    assert all(card.half > card.single for card in CARDS.values())
