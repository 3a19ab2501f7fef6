"""What is drawn lies where the object is, and no object hides another."""

import torch

from mvit.detection.draw import draw_objects

GREY = torch.full((3, 80, 120), 100, dtype=torch.uint8)


def test_a_box_is_drawn_on_the_pixels_it_covers() -> None:
    drawn = draw_objects(GREY, torch.tensor([[30.0, 40.0, 60.0, 70.0]]), torch.tensor([0]), names=["cat"])
    changed = (drawn != GREY).any(dim=0)
    assert changed[40, 30:60].all()
    assert changed[69, 30:60].all()
    assert changed[40:70, 30].all()
    assert changed[40:70, 59].all()
    assert not changed[41:69, 31:59].any()
    assert not changed[70:].any()
    assert changed[20:40].any()  # the name, above it


def test_masks_that_overlap_show_both_colours_and_smaller_masks_begin_in_the_corner() -> None:
    masks = torch.zeros(2, 64, 64, dtype=torch.bool)
    masks[0, 10:30, 10:30] = True
    masks[1, 20:40, 20:40] = True
    boxes = torch.tensor([[10.0, 10.0, 30.0, 30.0], [20.0, 20.0, 40.0, 40.0]])
    drawn = draw_objects(GREY, boxes, torch.tensor([0, 1]), masks)
    first, both, second = (tuple(drawn[:, y, y].tolist()) for y in (15, 25, 35))
    assert len({first, both, second, (100, 100, 100)}) == 4
    assert max(both) > 60  # not black
    assert tuple(GREY.unique().tolist()) == (100,)  # the picture itself is left as it was


def test_of_many_small_objects_the_names_do_not_hide_the_objects() -> None:
    x, y = torch.meshgrid(torch.arange(5, 115, 10.0), torch.arange(5, 75, 10.0), indexing="ij")
    boxes = torch.stack((x, y, x + 6, y + 6), dim=-1).flatten(0, 1)
    drawn = draw_objects(GREY, boxes, torch.zeros(len(boxes), dtype=torch.int64), names=["a long name"])
    for left, top, _, _ in boxes.long().tolist():
        assert (drawn[:, top + 3, left + 3] == 100).all()


def test_a_picture_without_objects_is_only_copied() -> None:
    none = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 80, 120, dtype=torch.bool)
    assert torch.equal(draw_objects(GREY, *none), GREY)
