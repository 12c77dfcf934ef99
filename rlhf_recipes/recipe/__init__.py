"""recipe.yaml -> `Recipe`, and what is said of a mistake in it. Nothing heavy is imported here."""

from rlhf_recipes.recipe.errors import RecipeError
from rlhf_recipes.recipe.loading import DEFAULT_RECIPE, load_recipe
from rlhf_recipes.recipe.sections import Recipe

__all__ = ["DEFAULT_RECIPE", "Recipe", "RecipeError", "load_recipe"]
