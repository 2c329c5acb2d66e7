"""`nlu sweep`: tasks x a grid over recipe keys, one run per cell, and the best cell of each task."""
