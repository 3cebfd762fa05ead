"""Writes what is anybody's for a message."""

SHOWN = 100  # characters of a value that are shown
LONGEST_PATH = 4096  # and of a path, which systems have no longer
SAID = 1000  # and of what another error says


def plain(text: str, *, most: int = 2 * SHOWN) -> str:
    """Write a text that is anybody's for a message: in one line, without what a terminal obeys, and not for ever."""
    said = text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[: most + 1])
    return said if len(said) <= most else f"{said[:most]}…"


def said(error: BaseException) -> str:
    """Write what an error says, which may be anybody's words, for the message of another."""
    return plain(" ".join(str(error).split()), most=SAID)


def path_text(path: object) -> str:
    """Write a path that is anybody's for a message."""
    return plain(str(path), most=LONGEST_PATH)


def short(value: object) -> str:
    """Write a value for an error message."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
