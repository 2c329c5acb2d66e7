"""`nlu init`, from a table to a recipe: `columns` reads it, `words` writes prompts, `settings` chooses numbers."""
