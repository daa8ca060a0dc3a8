"""Cursors and checkpoints: base64 of a decimal integer, as the service writes them."""

import base64
import binascii


def encode(position: int) -> str:
    """Return the cursor of a position."""
    return base64.b64encode(b"%d" % position).decode("ascii")


def decode(cursor: str) -> int:
    """Return the position a cursor stands for.

    White space around the cursor is allowed: the SDK's ``get_previous_cursor_time`` leaves a line feed there.

    Raises:
        ValueError: ``cursor`` is not the base64 of a decimal integer.
    """
    try:
        digits = base64.b64decode(cursor.strip().encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError):
        raise ValueError("not base64")
    if not digits.isdigit() or len(digits) > 20:
        raise ValueError("not the base64 of a decimal integer")
    return int(digits)
