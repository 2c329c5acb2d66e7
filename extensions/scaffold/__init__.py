"""`nlu init`, from a table to a recipe.

`source` reads the files, `columns` says what they hold, `words` writes the prompt, `entry` decides on the task;
`settings` chooses the numbers, `recipe_text` writes, `draft` tries, `summary` says it all.
"""
