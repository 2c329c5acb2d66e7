"""`nlu init`: from a table to a recipe."""
