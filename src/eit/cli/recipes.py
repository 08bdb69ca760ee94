"""`eit recipes`, `eit recipes show RECIPE`."""

import json

import typer

from eit.cli.help import Program
from eit.cli.options import Json, Overrides, RecipeName, RedirectingGroup, refuse_before_command


class RecipesGroup(RedirectingGroup):
    def redirect(self, words: list[str]) -> list[str] | None:
        return None if words[0].startswith("-") else ["recipes", "show", *words]


recipes = Program(cls=RecipesGroup, invoke_without_command=True)


@recipes.callback()
def list_all(context: typer.Context, as_json: Json = False) -> None:
    """List the included recipes: cost and expected accuracy.

    \b
    eit recipes
    eit recipes show cifar10
    """
    refuse_before_command(context, json=as_json)
    if context.invoked_subcommand is None:
        list_recipes(as_json)


@recipes.command()
def show(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Print a recipe with every key, its value and its meaning. The output is a recipe too.

    \b
    eit recipes show cifar10
    eit recipes show cifar10 train.epochs=100 > mine.yaml
    """
    from eit.config import load_recipe

    print(load_recipe(recipe, overrides or ()).explained())


def list_recipes(as_json: bool) -> None:
    from eit.config import recipe_header, recipe_names

    if as_json:
        print(json.dumps([dict(name=name, header=recipe_header(name)) for name in recipe_names()], indent=2))
        return
    for name in recipe_names():
        print(name)
        for line in recipe_header(name).splitlines():
            print(f"    {line}")
    print("train one with: eit train NAME [key=value ...]")
