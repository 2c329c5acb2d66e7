"""Tasks that the project makes itself: minimal pairs from templates, nothing to download.

A new one is a module with `generate(split, seed)` and an entry here, in `Source.generator` and in the task table.
"""

from extensions.data.generated import acceptability, reviews

GENERATORS = {"acceptability": acceptability.generate, "reviews": reviews.generate}
