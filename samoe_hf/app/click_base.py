"""The small model that the page tracks with where none is given."""

from pathlib import Path


def click_base() -> str:
    """The folder of a small model that has learned clicks and boxes, for `from_pretrained`.

    It goes on from [`~samoe_hf.small_base`], which has learned masks. It knows what a click means in synthetic "shapes"
    and drawings ("paper"), and hardly elsewhere; its card is in the folder.
    """
    return str(Path(__file__).parent / "base")
