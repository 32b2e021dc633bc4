"""``visionattn recipes``: the shipped configurations, found by their names wherever the package is installed."""
import argparse
import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

__all__ = ["RECIPES", "find_recipe", "main", "with_recipes"]

_FOLDER = Path(__file__).parent / "configs"
RECIPES = {path.stem: path for path in sorted(_FOLDER.glob("*/*.yaml"))}  # by name, a task after the other


def main(argv: list[str]) -> None:
    """Runs ``visionattn recipes``: lists them, or prints the one that ``argv`` names."""
    parser = argparse.ArgumentParser(
        prog="visionattn recipes", description="Lists the recipes that fit takes by name (visionattn fit --config "
        "NAME), or prints one, to be saved and changed: visionattn recipes NAME > mine.yaml")
    parser.add_argument("name", nargs="?", metavar="NAME", help="the recipe to print")
    args = parser.parse_args(argv)
    if args.name:
        print(find_recipe(args.name).read_text(), end="")
        return
    width = max(map(len, RECIPES))
    for task in dict.fromkeys(path.parent.name for path in RECIPES.values()):
        print(f"{task}:")
        for name, path in RECIPES.items():
            if path.parent.name == task:
                print(f"  {name:<{width}}  {_about(path)}")


def find_recipe(name: str) -> Path:
    """The file of a shipped recipe.

    Args:
        name: Such as ``imagefolder_finetune``, with or without ``.yaml`` and folders before it.

    Raises:
        ValueError: There is none; the message lists those with similar names.
    """
    known = RECIPES.get(Path(name).name.removesuffix(".yaml"))
    if known:
        return known
    close = get_close_matches(Path(name).name.removesuffix(".yaml"), RECIPES, n=5, cutoff=0.4)
    near = f"; similar names: {', '.join(close)}" if close else ""
    raise ValueError(f"there is neither a file nor a recipe {name!r}{near} (visionattn recipes lists them)")


def with_recipes(argv: Sequence[str]) -> list[str]:
    """The command line ``argv`` with the files of recipes in place of the names that ``--config`` gives.

    A file that exists goes before a recipe of its name; a value of several lines or keys is a configuration itself.

    Raises:
        argparse.ArgumentError: There is neither.
    """
    found = list[str]()
    for argument in argv:
        option, equals, value = argument.partition("=")
        if found and found[-1] in ("--config", "-c"):
            argument = _file(argument)
        elif option == "--config" and equals:
            argument = f"--config={_file(value)}"
        found.append(argument)
    return found


def _file(value: str) -> str:
    file = Path(value)
    if re.search(r"[:{\n]\s", value) or value.lstrip().startswith("{") or (file.exists() and not file.is_dir()):
        return value
    try:
        return str(find_recipe(value))
    except ValueError as error:
        raise argparse.ArgumentError(None, str(error)) from None


def _about(path: Path) -> str:
    """The first sentence of the comment that a recipe begins with."""
    comment = re.match(r"(# .*\n)+", path.read_text())
    text = " ".join(comment[0].replace("\n# ", " ").removeprefix("# ").split()) if comment else ""
    return re.split(r"[:.](?: |$)", text)[0]
