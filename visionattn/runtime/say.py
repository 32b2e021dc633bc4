"""What a user should know, said once."""
import sys

__all__ = ["say"]


def say(text: str) -> None:
    """Says a line on stderr; of names that are no text the bytes.

    Where Lightning runs it goes through Lightning's log, so that one of several processes speaks.
    """
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    lightning = sys.modules.get("lightning.pytorch.utilities.rank_zero")
    if lightning is None:
        print(text, file=sys.stderr, flush=True)
    else:
        lightning.rank_zero_info(text)
