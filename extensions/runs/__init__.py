"""A run: built from a recipe, started or resumed, evaluated, trained, recorded in its folder."""
