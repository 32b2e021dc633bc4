"""What a user should know, said once."""
import sys

__all__ = ["one_line", "say"]


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


def one_line(error: Exception, limit: int = 800) -> str:
    """The error's message, of one that a loader process raised the message there; ``limit`` characters at most."""
    text = str(error).strip()
    if isinstance(error, ModuleNotFoundError) and error.name and text == f"No module named {error.name!r}":
        package = error.name.partition(".")[0]  # as where exported files alone were to run
        text = f"this needs the package {package}: pip install visionattn"
    if "Original Traceback" in text:
        text = text.splitlines()[-1].partition(": ")[2]
    text = " ".join(text.split()) or type(error).__name__
    return text if len(text) <= limit else f"{text[:limit]} ..."
