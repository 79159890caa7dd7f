"""Numbers as a person reads them; `-` for what is not known."""


def milliseconds(seconds: float | None) -> str:
    """Seconds as milliseconds or, from one second on, as seconds."""
    if seconds is None:
        return "-"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def percent(share: float | None) -> str:
    """A share of one."""
    return "-" if share is None else f"{share:.1%}"


def count(number: float | None) -> str:
    """A whole number."""
    return "-" if number is None else f"{number:.0f}"
